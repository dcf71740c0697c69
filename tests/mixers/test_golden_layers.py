"""The mixers against layers of transformers and flash-linear-attention (tests/golden/make says which).

Each case rearranges the other library's parameters into ours, differentiably: gradients are compared under the other
library's names.
"""

import dataclasses
import json
import operator
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from from_torch import (
    Arrays,
    Settings,
    gated_deltanet,
    heads_in,
    heads_out,
    lightning,
    mamba,
    mamba2,
    qwen3_next_attention,
    rglru,
    split,
)
from pair import PairConfig

from efficient_lm.mixers import (
    AttentionConfig,
    CombaConfig,
    CompressionConfig,
    DeltaNetConfig,
    DifferentialAttentionConfig,
    ForgettingAttentionConfig,
    GatedDeltaNetConfig,
    GatedDeltaProductConfig,
    GLAConfig,
    GroupedTiedAttentionConfig,
    HGRN2Config,
    HGRNConfig,
    KimiDeltaAttentionConfig,
    LigerConfig,
    LinearTransformerConfig,
    LoLCATsConfig,
    MesaNetConfig,
    Mixer,
    MixerConfig,
    MLAConfig,
    MLSTMConfig,
    MoBAConfig,
    NativeSparseAttentionConfig,
    RetNetConfig,
    RWKV6Config,
    RWKV7Config,
    S4DConfig,
)
from efficient_lm.rotary import Llama3Scaling, RotaryConfig, YarnScaling

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"

type Convert = Callable[[Settings, Arrays], tuple[MixerConfig, Arrays]]


def olmo_hybrid(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    K, N = settings["linear_num_key_heads"], settings["linear_num_value_heads"]
    H, P, W = (settings[f"linear_{name}_dim"] for name in ("key_head", "value_head", "conv_kernel"))
    q_conv, k_conv, v_conv = split(p["conv1d.weight"], K * H, K * H, N * P, axis=0)
    config = GatedDeltaNetConfig(
        num_heads=N,
        num_key_heads=K,
        key_dim=H,
        value_dim=P,
        conv_size=W,
        beta_max=1.0 + settings["linear_allow_neg_eigval"],
        norm_eps=settings["norm_eps"],
    )
    return config, {
        "q_proj.kernel": heads_in(p["q_proj.weight"], K),
        "k_proj.kernel": heads_in(p["k_proj.weight"], K),
        "v_proj.kernel": heads_in(p["v_proj.weight"], N),
        "gate_proj.kernel": heads_in(p["g_proj.weight"], N),
        "beta_proj.kernel": p["b_proj.weight"].T,
        "dt_proj.kernel": p["a_proj.weight"].T,
        "q_conv.kernel": q_conv.reshape(K, H, W),
        "k_conv.kernel": k_conv.reshape(K, H, W),
        "v_conv.kernel": v_conv.reshape(N, P, W),
        "A_log": p["A_log"],
        "dt_bias": p["dt_bias"],
        "norm.norm.scale": p["o_norm.weight"],
        "o_proj.kernel": heads_out(p["o_proj.weight"], N),
    }


def kimi_delta_attention(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    N, H, W = (settings[f"linear_{name}"] for name in ("num_heads", "head_dim", "conv_kernel_dim"))
    q_conv, k_conv, v_conv = (x.reshape(N, H, W) for x in split(p["conv1d.weight"], *[N * H] * 3, axis=0))
    config = KimiDeltaAttentionConfig(
        num_heads=N,
        key_dim=H,
        value_dim=H,
        decay_rank=H,
        gate_rank=H,
        conv_size=W,
        norm_eps=settings["rms_norm_eps"],
    )
    return config, {
        "q_proj.kernel": heads_in(p["q_proj.weight"], N),
        "k_proj.kernel": heads_in(p["k_proj.weight"], N),
        "v_proj.kernel": heads_in(p["v_proj.weight"], N),
        "beta_proj.kernel": p["b_proj.weight"].T,
        "decay_down_proj.kernel": p["forget_gate.f_a_proj.weight"].T,
        "decay_up_proj.kernel": heads_in(p["forget_gate.f_b_proj.weight"], N),
        "gate_down_proj.kernel": p["g_a_proj.weight"].T,
        "gate_up_proj.kernel": heads_in(p["g_b_proj.weight"], N),
        "q_conv.kernel": q_conv,
        "k_conv.kernel": k_conv,
        "v_conv.kernel": v_conv,
        "A_log": p["forget_gate.A_log"].reshape(N),
        "dt_bias": p["forget_gate.dt_bias"].reshape(N, H),
        "norm.norm.scale": p["o_norm.weight"],
        "o_proj.kernel": heads_out(p["o_proj.weight"], N),
    }


def deltanet(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    D, N, W = settings["hidden_size"], settings["num_heads"], settings["conv_size"]
    H, P = int(D * settings["expand_k"]) // N, int(D * settings["expand_v"]) // N
    convs = {f"{x}_conv.kernel": p[f"{x}_conv1d.weight"].reshape(N, -1, W) for x in "qkv" if f"{x}_conv1d.weight" in p}
    config = DeltaNetConfig(
        num_heads=N,
        key_dim=H,
        value_dim=P,
        conv_size=W if settings["use_short_conv"] else None,
        beta_max=1.0 + settings["allow_neg_eigval"],
    )
    return config, convs | {
        "q_proj.kernel": heads_in(p["q_proj.weight"], N),
        "k_proj.kernel": heads_in(p["k_proj.weight"], N),
        "v_proj.kernel": heads_in(p["v_proj.weight"], N),
        "beta_proj.kernel": p["b_proj.weight"].T,
        "norm.scale": p["o_norm.weight"],
        "o_proj.kernel": heads_out(p["o_proj.weight"], N),
    }


def gated_deltaproduct(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    D, J, K, N = (settings[name] for name in ("hidden_size", "num_householder", "num_heads", "num_v_heads"))
    H, P, W = settings["head_dim"], int(settings["head_dim"] * settings["expand_v"]), settings["conv_size"]
    config = GatedDeltaProductConfig(
        num_steps=J,
        num_heads=N,
        num_key_heads=K,
        key_dim=H,
        value_dim=P,
        conv_size=W,
        beta_max=1.0 + settings["allow_neg_eigval"],
    )
    return config, {
        "q_proj.kernel": heads_in(p["q_proj.weight"], K),
        "k_proj.kernel": p["k_proj.weight"].T.reshape(D, J, K, H),
        "v_proj.kernel": p["v_proj.weight"].T.reshape(D, J, N, P),
        "gate_proj.kernel": heads_in(p["g_proj.weight"], N),
        "beta_proj.kernel": p["b_proj.weight"].T.reshape(D, J, N),
        "dt_proj.kernel": p["a_proj.weight"].T,
        "q_conv.kernel": p["q_conv1d.weight"].reshape(K, H, W),
        "k_conv.kernel": p["k_conv1d.weight"].reshape(J, K, H, W),
        "v_conv.kernel": p["v_conv1d.weight"].reshape(J, N, P, W),
        "A_log": p["A_log"],
        "dt_bias": p["dt_bias"],
        "norm.norm.scale": p["o_norm.weight"],
        "o_proj.kernel": heads_out(p["o_proj.weight"], N),
    }


def comba(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    N, H, W = settings["num_heads"], settings["head_dim"], settings["conv_size"]
    P = int(H * settings["expand_v"])
    return CombaConfig(num_heads=N, key_dim=H, value_dim=P, conv_size=W), {
        "q_proj.kernel": heads_in(p["q_proj.weight"], N),
        "k_proj.kernel": heads_in(p["k_proj.weight"], N),
        "v_proj.kernel": heads_in(p["v_proj.weight"], N),
        "gate_proj.kernel": heads_in(p["g_proj.weight"], N),
        "beta_proj.kernel": p["b_proj.weight"].T,
        "dt_proj.kernel": p["a_proj.weight"].T,
        "q_conv.kernel": p["q_conv1d.weight"].reshape(N, H, W),
        "k_conv.kernel": p["k_conv1d.weight"].reshape(N, H, W),
        "v_conv.kernel": p["v_conv1d.weight"].reshape(N, P, W),
        "feedback_logit": p["decay"],
        "correction": p["D"],
        "A_log": p["A_log"],
        "dt_bias": p["dt_bias"],
        "norm.norm.scale": p["o_norm.weight"],
        "o_proj.kernel": heads_out(p["o_proj.weight"], N),
    }


def mesanet(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    N, H, W = settings["num_heads"], settings["head_dim"], settings["conv_size"]
    return MesaNetConfig(num_heads=N, key_dim=H, value_dim=H, conv_size=W), {
        "q_proj.kernel": heads_in(p["q_proj.weight"], N),
        "k_proj.kernel": heads_in(p["k_proj.weight"], N),
        "v_proj.kernel": heads_in(p["v_proj.weight"], N),
        "beta_proj.kernel": p["b_proj.weight"].T,
        "beta_bias": p["b_proj.bias"],
        "decay_proj.kernel": p["a_proj.weight"].T,
        "decay_bias": p["a_proj.bias"],
        "q_conv.kernel": p["q_conv1d.weight"].reshape(N, H, W),
        "k_conv.kernel": p["k_conv1d.weight"].reshape(N, H, W),
        "ridge": p["lambda_params"].reshape(N, H),
        "norm.scale": p["o_norm.weight"],
        "o_proj.kernel": heads_out(p["o_proj.weight"], N),
    }


def llama_attention(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    N, K, H = settings["num_attention_heads"], settings["num_key_value_heads"], settings["head_dim"]
    rope = settings["rope_parameters"]
    scaling = Llama3Scaling(
        factor=rope["factor"],
        low_frequency_factor=rope["low_freq_factor"],
        high_frequency_factor=rope["high_freq_factor"],
        original_max_len=rope["original_max_position_embeddings"],
    )
    rotary = RotaryConfig(theta=rope["rope_theta"], scaling=scaling)
    return AttentionConfig(num_heads=N, num_kv_heads=K, head_dim=H, rotary=rotary), {
        "q_proj.kernel": heads_in(p["q_proj.weight"], N),
        "k_proj.kernel": heads_in(p["k_proj.weight"], K),
        "v_proj.kernel": heads_in(p["v_proj.weight"], K),
        "o_proj.kernel": heads_out(p["o_proj.weight"], N),
    }


def mistral_attention(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    N, K, H = settings["num_attention_heads"], settings["num_key_value_heads"], settings["head_dim"]
    rotary = RotaryConfig(theta=settings["rope_parameters"]["rope_theta"])
    window = settings["sliding_window"]
    return AttentionConfig(num_heads=N, num_kv_heads=K, head_dim=H, rotary=rotary, window_size=window), {
        "q_proj.kernel": heads_in(p["q_proj.weight"], N),
        "k_proj.kernel": heads_in(p["k_proj.weight"], K),
        "v_proj.kernel": heads_in(p["v_proj.weight"], K),
        "o_proj.kernel": heads_out(p["o_proj.weight"], N),
    }


def gpt_oss_attention(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    config, parameters = mistral_attention(settings, p)
    assert isinstance(config, AttentionConfig)
    rope = settings["rope_parameters"]
    scaling = YarnScaling(
        factor=rope["factor"],
        original_max_len=rope["original_max_position_embeddings"],
        fast_turns=rope["beta_fast"],
        slow_turns=rope["beta_slow"],
        round_borders=rope["truncate"],
    )
    rotary = RotaryConfig(theta=rope["rope_theta"], scaling=scaling)
    return dataclasses.replace(config, rotary=rotary, sink_logits=True), parameters | {"sinks": p["sinks"]}


def diffllama_attention(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    # Its first half of the heads has the first maps, the second half the second; values are split in the same way.
    N, K, H = settings["num_attention_heads"] // 2, settings["num_key_value_heads"] // 2, settings["head_dim"]
    (q, q2), (k, k2), (v, v2) = (
        split(heads_in(p[f"{name}_proj.weight"], 2 * size), size, size, axis=1)
        for name, size in (("q", N), ("k", K), ("v", K))
    )
    rotary = RotaryConfig(theta=settings["rope_parameters"]["rope_theta"])
    lambda_init = 0.8 - 0.6 * float(np.exp(-0.3 * settings["layer"]))
    config = DifferentialAttentionConfig(
        num_heads=N, num_kv_heads=K, head_dim=H, rotary=rotary, lambda_init=lambda_init
    )
    names = {"lambda_q": "lambda_q1", "lambda_k": "lambda_k1", "lambda_q2": "lambda_q2", "lambda_k2": "lambda_k2"}
    lambdas = {ours: p[theirs] for ours, theirs in names.items()}
    return config, lambdas | {
        "q_proj.kernel": q,
        "q2_proj.kernel": q2,
        "k_proj.kernel": k,
        "k2_proj.kernel": k2,
        "v_proj.kernel": jnp.concatenate([v, v2], axis=2),
        "norm.scale": jnp.ones(2 * H),  # It has none.
        "o_proj.kernel": heads_out(p["o_proj.weight"], N),
    }


def forgetting_attention(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    D, N, K = settings["hidden_size"], settings["num_heads"], settings["num_kv_heads"]
    return ForgettingAttentionConfig(num_heads=N, num_kv_heads=K, head_dim=D // N, output_gate=True), {
        "q_proj.kernel": heads_in(p["q_proj.weight"], N),
        "k_proj.kernel": heads_in(p["k_proj.weight"], K),
        "v_proj.kernel": heads_in(p["v_proj.weight"], K),
        "forget_proj.kernel": p["f_proj.weight"].T,
        "forget_bias": p["f_proj.bias"],
        "gate_proj.kernel": heads_in(p["g_proj.weight"], N),
        "o_proj.kernel": heads_out(p["o_proj.weight"], N),
    }


def moba(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    names = {"block_size": "block_size", "num_blocks": "top_k"}
    return MoBAConfig(**_in_blocks(settings, names)), _grouped_projections(settings, p)


def lolcats(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    names = {"feature_dim": "feature_dim", "window_size": "window_size"}
    parameters = {"q_features.kernel": "q_map", "k_features.kernel": "k_map", "window_logit": "window_factors"}
    parameters = {ours: p[theirs] for ours, theirs in parameters.items()}
    return LoLCATsConfig(**_in_blocks(settings, names)), parameters | _grouped_projections(settings, p)


def liger(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    return LigerConfig(**_in_blocks(settings, {"window_size": "window_size"})), _grouped_projections(settings, p)


def native_sparse_attention(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    names = {"block_size": "block_size", "num_blocks": "block_counts", "window_size": "window_size"}
    gate_DNR = p["g_proj.weight"].T.reshape(-1, settings["num_heads"], 3)
    parameters = _grouped_projections(settings, p) | {"gate_proj.kernel": gate_DNR}
    return NativeSparseAttentionConfig(**_in_blocks(settings, names)), parameters


def native_sparse_compression(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    config, parameters = native_sparse_attention(settings, p)
    K, L, F = (settings[name] for name in ("num_kv_heads", "compression_block_size", "compression_hidden"))
    for ours in ("k", "v"):
        of = lambda name, ours=ours: jnp.stack([p[f"{ours}_phi.{head}.{name}"] for head in range(K)])
        parameters |= {
            f"{ours}_compression.positions": of("positions"),
            f"{ours}_compression.in_kernel": jnp.moveaxis(of("up.weight").reshape(K, F, L, -1), 1, 3),
            f"{ours}_compression.out_kernel": jnp.moveaxis(of("down.weight"), 1, 2),
        }
    compression = CompressionConfig(block_size=L, stride=settings["compression_stride"], d_hidden=F)
    return dataclasses.replace(config, compression=compression), parameters


def _in_blocks(settings: Settings, names: dict[str, str]) -> dict[str, Any]:
    names = names | {name: name for name in ("num_heads", "num_kv_heads", "head_dim")}
    return {name: settings[theirs] for name, theirs in names.items()} | {
        "rotary": RotaryConfig(theta=settings["rope_theta"])
    }


def _grouped_projections(settings: Settings, p: Arrays) -> Arrays:
    N, K = settings["num_heads"], settings["num_kv_heads"]
    heads = {"q": N, "k": K, "v": K}
    return {f"{name}_proj.kernel": heads_in(p[f"{name}_proj.weight"], n) for name, n in heads.items()} | {
        "o_proj.kernel": heads_out(p["o_proj.weight"], N)
    }


def deepseek(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    N, H, P = settings["num_attention_heads"], settings["qk_nope_head_dim"], settings["v_head_dim"]
    R, shared = settings["kv_lora_rank"], settings["qk_rope_head_dim"]
    rope = settings["rope_parameters"]
    amplitude = lambda name: 0.1 * rope[name] * np.log(rope["factor"]) + 1
    scaling = YarnScaling(
        factor=rope["factor"],
        original_max_len=rope["original_max_position_embeddings"],
        fast_turns=rope["beta_fast"],
        slow_turns=rope["beta_slow"],
        amplitude=float(amplitude("mscale") / amplitude("mscale_all_dim")),
    )
    # Theirs turn pairs (2 i, 2 i + 1), ours (i, i + shared / 2).
    paired = lambda w: jnp.concatenate([w[..., 0::2], w[..., 1::2]], axis=-1)
    is_low_rank = settings["q_lora_rank"] is not None
    q, q_rotated = split(heads_in(p["q_b_proj.weight" if is_low_rank else "q_proj.weight"], N), H, shared)
    latent, rotated = split(p["kv_a_proj_with_mqa.weight"].T, R, shared)
    k, v = split(heads_in(p["kv_b_proj.weight"], N), H, P)
    low_rank = {"q_down_proj.kernel": "q_a_proj.weight", "q_norm.scale": "q_a_layernorm.weight"} if is_low_rank else {}
    config = MLAConfig(
        num_heads=N,
        latent_dim=R,
        query_rank=settings["q_lora_rank"],
        key_dim=H,
        rotary_dim=shared,
        value_dim=P,
        rotary=RotaryConfig(theta=rope["rope_theta"], scaling=scaling),
        scale=float((H + shared) ** -0.5 * amplitude("mscale_all_dim") ** 2),
    )
    return config, {ours: p[theirs].T for ours, theirs in low_rank.items()} | {
        "q_proj.kernel": jnp.concatenate([q, paired(q_rotated)], axis=-1),
        "latent_proj.kernel": latent[:, None],
        "latent_scale": p["kv_a_layernorm.weight"][None],
        "shared_proj.kernel": paired(rotated),
        "k_proj.kernel": k,
        "v_proj.kernel": v,
        "o_proj.kernel": heads_out(p["o_proj.weight"], N),
    }


def grouped_tied_attention(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    N, K, H, R = (settings[name] for name in ("num_heads", "num_kv_heads", "head_dim", "rope_dim"))
    rotary = RotaryConfig(theta=settings["rope_theta"])
    return GroupedTiedAttentionConfig(num_heads=N, num_kv_heads=K, head_dim=H, rotary_dim=R, rotary=rotary), {
        "q_proj.kernel": heads_in(p["q_proj.weight"], N),
        "kv_proj.kernel": heads_in(p["kv_proj.weight"], K),
        "shared_proj.kernel": p["W_rope_k.weight"].T,
        "o_proj.kernel": heads_out(p["o_proj.weight"], N),
    }


def grouped_latent_attention(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    N, R, H, shared = (settings[name] for name in ("num_heads", "latent_dim", "head_dim", "rope_dim"))
    *latents, rotated = split(p["W_dKV.weight"].T, R, R, shared)
    expand = jnp.concatenate([heads_in(p[f"W_ukv_{i}.weight"], N // 2) for i in (1, 2)], axis=1)
    k, v = split(expand, H, H)
    config = MLAConfig(
        num_heads=N,
        num_latent_heads=2,
        latent_dim=R,
        query_rank=settings["query_rank"],
        key_dim=H,
        rotary_dim=shared,
        value_dim=H,
        rotary=RotaryConfig(theta=settings["rope_theta"]),
    )
    return config, {
        "q_down_proj.kernel": p["W_dQ.weight"].T,
        "q_norm.scale": p["q_norm.weight"],
        "q_proj.kernel": heads_in(p["W_uQ_rope.weight"], N),
        "latent_proj.kernel": jnp.stack(latents, axis=1),
        "latent_scale": jnp.stack([p["kv_norm_1.weight"], p["kv_norm_2.weight"]]),
        "shared_proj.kernel": rotated,
        "k_proj.kernel": k,
        "v_proj.kernel": v,
        "o_proj.kernel": heads_out(p["o_proj.weight"], N),
    }


def gla(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    D, N, R = settings["hidden_size"], settings["num_heads"], settings["gate_low_rank_dim"]
    H, P = int(D * settings["expand_k"]) // N, int(D * settings["expand_v"]) // N
    temperature = float(settings["gate_logit_normalizer"])
    config = GLAConfig(num_heads=N, key_dim=H, value_dim=P, decay_rank=R, decay_temperature=temperature)
    return config, {
        "q_proj.kernel": heads_in(p["q_proj.weight"], N),
        "k_proj.kernel": heads_in(p["k_proj.weight"], N),
        "v_proj.kernel": heads_in(p["v_proj.weight"], N),
        "gate_proj.kernel": heads_in(p["g_proj.weight"], N),
        "decay_down_proj.kernel": p["gk_proj.0.weight"].T,
        "decay_up_proj.kernel": heads_in(p["gk_proj.1.weight"], N),
        "decay_bias": p["gk_proj.1.bias"].reshape(N, H),
        "norm.norm.scale": p["g_norm_swish_gate.weight"],
        "o_proj.kernel": heads_out(p["o_proj.weight"], N),
    }


def retnet(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    D, N = settings["hidden_size"], settings["num_heads"]
    H, P = int(D * settings["expand_k"]) // N, int(D * settings["expand_v"]) // N
    return RetNetConfig(num_heads=N, key_dim=H, value_dim=P), {
        "q_proj.kernel": heads_in(p["q_proj.weight"], N),
        "k_proj.kernel": heads_in(p["k_proj.weight"], N),
        "v_proj.kernel": heads_in(p["v_proj.weight"], N),
        "gate_proj.kernel": heads_in(p["g_proj.weight"], N),
        "norm.norm.scale": p["g_norm_swish_gate.weight"],
        "o_proj.kernel": heads_out(p["o_proj.weight"], N),
    }


def linear_transformer(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    D, N = settings["hidden_size"], settings["num_heads"]
    H, P = int(D * settings["expand_k"]) // N, int(D * settings["expand_v"]) // N
    return LinearTransformerConfig(num_heads=N, key_dim=H, value_dim=P), {
        "q_proj.kernel": heads_in(p["q_proj.weight"], N),
        "k_proj.kernel": heads_in(p["k_proj.weight"], N),
        "v_proj.kernel": heads_in(p["v_proj.weight"], N),
        "o_proj.kernel": heads_out(p["o_proj.weight"], N),
    }


def hgrn2(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    D, N = settings["hidden_size"], settings["num_heads"]
    H = D // N
    return HGRN2Config(num_heads=N, key_dim=H, value_dim=H, lower_bound=settings["lower_bound"]), {
        "q_proj.kernel": heads_in(p["q_proj.weight"], N),
        "forget_proj.kernel": heads_in(p["f_proj.weight"], N),
        "v_proj.kernel": heads_in(p["i_proj.weight"], N),
        "norm_scale": p["g_norm.weight"].reshape(N, H),
        "o_proj.kernel": heads_out(p["o_proj.weight"], N),
    }


def rwkv6(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    D, N, R = settings["hidden_size"], settings["num_heads"], settings["proj_low_rank_dim"]
    H, P, decay_rank = (
        int(D * settings["expand_k"]) // N,
        int(D * settings["expand_v"]) // N,
        settings["gate_low_rank_dim"],
    )
    return RWKV6Config(num_heads=N, key_dim=H, value_dim=P, mix_rank=R, decay_rank=decay_rank), {
        "mix": p["x_proj.0.mu"],
        "mix_down_proj.kernel": heads_in(p["x_proj.0.linear.weight"], 5),
        "mix_up_proj.kernel": jnp.moveaxis(p["x_proj.2.weight"].reshape(D, 5, R), 0, 2),
        "mix_bias": p["x_bias"],
        "q_proj.kernel": heads_in(p["r_proj.linear.weight"], N),
        "k_proj.kernel": heads_in(p["k_proj.linear.weight"], N),
        "v_proj.kernel": heads_in(p["v_proj.linear.weight"], N),
        "decay_down_proj.kernel": p["w_proj.linear.lora.0.weight"].T,
        "decay_up_proj.kernel": heads_in(p["w_proj.linear.lora.2.weight"], N),
        "decay_bias": p["w_proj.linear.lora.2.bias"].reshape(N, H),
        "bonus": p["bonus"],
        "gate_proj.kernel": heads_in(p["g_proj.linear.weight"], N),
        "norm_scale": p["g_norm.weight"].reshape(N, P),
        "norm_bias": p["g_norm.bias"].reshape(N, P),
        "o_proj.kernel": heads_out(p["o_proj.weight"], N),
    }


def rwkv7_pair(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    H = settings["head_dim"]
    N = settings["hidden_size"] // H
    first = RWKV7Config(
        num_heads=N,
        key_dim=H,
        value_dim=H,
        decay_rank=settings["decay_low_rank_dim"],
        rate_rank=settings["a_low_rank_dim"],
        gate_rank=settings["gate_low_rank_dim"],
    )
    second = dataclasses.replace(first, value_rank=settings["v_low_rank_dim"])
    ours = {}
    for layer in ("first", "second"):
        projections = {"decay": "w", "rate": "a", "gate": "g"} | ({"first_share": "v"} if layer == "second" else {})
        for name, letter in projections.items():
            lora = f"{layer}.{letter}_lora.lora"
            ours[f"{layer}.{name}.down_proj.kernel"] = p[f"{lora}.0.weight"].T
            ours[f"{layer}.{name}.up_proj.kernel"] = heads_in(p[f"{lora}.2.weight"], N)
            if f"{lora}.2.bias" in p:
                ours[f"{layer}.{name}.bias"] = p[f"{lora}.2.bias"].reshape(N, H)
        ours |= {
            f"{layer}.mix": jnp.concatenate([p[f"{layer}.x_{letter}"][0] for letter in "rwkvag"]),
            f"{layer}.q_proj.kernel": heads_in(p[f"{layer}.r_proj.weight"], N),
            f"{layer}.k_proj.kernel": heads_in(p[f"{layer}.k_proj.weight"], N),
            f"{layer}.v_proj.kernel": heads_in(p[f"{layer}.v_proj.weight"], N),
            f"{layer}.replaced_scale": p[f"{layer}.k_k"].reshape(N, H),
            f"{layer}.rate_scale": p[f"{layer}.k_a"].reshape(N, H),
            f"{layer}.bonus": p[f"{layer}.r_k"],
            f"{layer}.norm_scale": p[f"{layer}.g_norm.weight"].reshape(N, H),
            f"{layer}.norm_bias": p[f"{layer}.g_norm.bias"].reshape(N, H),
            f"{layer}.o_proj.kernel": heads_out(p[f"{layer}.o_proj.weight"], N),
        }
    return PairConfig(first=first, second=second), ours


def mlstm(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    D, N = settings["hidden_size"], settings["num_heads"]
    H, P = int(D * settings["qk_dim_factor"]) // N, int(D * settings["v_dim_factor"]) // N
    return MLSTMConfig(num_heads=N, key_dim=H, value_dim=P, gate_soft_cap=settings["gate_soft_cap"]), {
        "q_proj.kernel": heads_in(p["q.weight"], N),
        "k_proj.kernel": heads_in(p["k.weight"], N),
        "v_proj.kernel": heads_in(p["v.weight"], N),
        "gate_proj.kernel": heads_in(p["ogate_preact.weight"], N),
        "input_proj.kernel": p["igate_preact.weight"].T,
        "input_bias": p["igate_preact.bias"],
        "forget_proj.kernel": p["fgate_preact.weight"].T,
        "forget_bias": p["fgate_preact.bias"],
        "norm_scale": p["multihead_norm.weight"].reshape(N, P),
        "o_proj.kernel": heads_out(p["out_proj.weight"], N),
    }


def hgrn(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    width = settings["hidden_size"] * settings["expand_ratio"]
    return HGRNConfig(width=width, lower_bound=settings["lower_bound"]), {
        "x_proj.kernel": p["i_proj.weight"].T,
        "forget_proj.kernel": p["f_proj.weight"].T,
        "gate_proj.kernel": p["g_proj.weight"].T,
        "norm.norm.scale": p["g_norm.weight"],
        "o_proj.kernel": p["o_proj.weight"].T,
    }


def s4d(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    out, gate = split(p["output_linear.weight"], *[settings["hidden_size"]] * 2, axis=0)
    out_bias, gate_bias = split(p["output_linear.bias"], *[settings["hidden_size"]] * 2)
    return S4DConfig(state_size=settings["d_state"] // 2), {
        "log_dt": p["log_dt"],
        "log_decay": p["log_A_real"],
        "frequency": p["A_imag"],
        "C": p["C"],
        "skip": p["D"],
        "o_proj.kernel": out.T,
        "o_bias": out_bias,
        "gate_proj.kernel": gate.T,
        "gate_bias": gate_bias,
    }


CACHED = {
    "layer_qwen3_next_attention": qwen3_next_attention,
    "layer_llama_attention": llama_attention,
    "layer_mistral_attention": mistral_attention,
    "layer_gpt_oss_attention": gpt_oss_attention,
    "layer_diffllama_attention": diffllama_attention,
    "layer_forgetting_attention": forgetting_attention,
    "layer_moba": moba,
    "layer_lolcats": lolcats,
    "layer_liger": liger,
    "layer_native_sparse_attention": native_sparse_attention,
    "layer_native_sparse_compression": native_sparse_compression,
    "layer_deepseek_v2": deepseek,
    "layer_deepseek_v3": deepseek,
    "layer_grouped_tied_attention": grouped_tied_attention,
    "layer_grouped_latent_attention": grouped_latent_attention,
    "layer_qwen3_next_gated_deltanet": gated_deltanet,
    "layer_olmo_hybrid": olmo_hybrid,
    "layer_kimi_linear": kimi_delta_attention,
    "layer_deltanet": deltanet,
    "layer_deltanet_without_conv": deltanet,
    "layer_gated_deltaproduct": gated_deltaproduct,
    "layer_gated_deltaproduct_three": gated_deltaproduct,
    "layer_comba": comba,
    "layer_mesanet": mesanet,
}
CASES = CACHED | {
    "layer_mamba": mamba,
    "layer_jamba": mamba,
    "layer_mamba2": mamba2,
    "layer_mamba2_groups": mamba2,
    "layer_gla": gla,
    "layer_retnet": retnet,
    "layer_lightning": lightning,
    "layer_lightning_last": lightning,
    "layer_linear_transformer": linear_transformer,
    "layer_hgrn2": hgrn2,
    "layer_hgrn2_bound": hgrn2,
    "layer_rwkv6": rwkv6,
    "layer_rwkv7_pair": rwkv7_pair,
    "layer_mlstm": mlstm,
    "layer_mlstm_wide": mlstm,
    "layer_recurrent_gemma": rglru,
    "layer_hgrn": hgrn,
    "layer_s4d": s4d,
}


@pytest.mark.parametrize(("case", "convert"), CASES.items(), ids=list(CASES))
def test_layer(case: str, convert: Convert):
    settings, inputs, file = load(case)

    @jax.jit
    def run(inputs, dy):
        y, vjp = jax.vjp(lambda inputs: build(settings, inputs, convert)(inputs["x"])[0], inputs)
        return y, vjp(dy)[0]

    y, grads = run(inputs, jnp.asarray(file["cotangent.y"]))
    # Rounding in float32, of a whole layer.
    errors = {"y": relative_error(y, file["out.y"]) / 1e-5}
    errors |= {f"d{key}": relative_error(x, file[f"grad.{key}"]) / 1e-4 for key, x in grads.items()}
    assert all(error < 1 for error in errors.values()), f"errors as multiples of what is tolerated: {errors}"


@pytest.mark.parametrize(("case", "convert"), CACHED.items(), ids=list(CACHED))
def test_layer_with_state(case: str, convert: Convert):
    """A prompt, a piece of text, then token by token: what the other library computes at once."""
    settings, inputs, file = load(case)

    @jax.jit
    def run(inputs):
        mixer, x_BTD = build(settings, inputs, convert), inputs["x"]
        B, T, _ = x_BTD.shape
        prompt, piece = T // 2, 3 * T // 4
        prompt_BTD, state = mixer(x_BTD[:, :prompt], mixer.init_state(B, T))
        piece_BTD, state = mixer(x_BTD[:, prompt:piece], state)

        def step(state, x_BD):
            y_BTD, state = mixer(x_BD[:, None], state)
            return state, y_BTD[:, 0]

        _, rest_TBD = jax.lax.scan(step, state, jnp.moveaxis(x_BTD[:, piece:], 1, 0))
        return jnp.concatenate([prompt_BTD, piece_BTD, jnp.moveaxis(rest_TBD, 0, 1)], axis=1)

    error = relative_error(run(inputs), file["out.y"])
    assert error < 1e-5, f"relative error {error:.1e}"


def load(case: str) -> tuple[Settings, Arrays, dict[str, np.ndarray]]:
    file = dict(np.load(GOLDEN / f"{case}.npz"))
    inputs = {key.removeprefix("in."): jnp.asarray(x) for key, x in file.items() if key.startswith("in.")}
    return json.loads(str(file["meta"]))["settings"], inputs, file


def build(settings: Settings, inputs: Arrays, convert: Convert) -> Mixer:
    config, parameters = convert(settings, {key: x for key, x in inputs.items() if key != "x"})
    mixer = config.build(settings["hidden_size"], rngs=nnx.Rngs(0))
    assert len(parameters) == len(jax.tree.leaves(nnx.state(mixer, nnx.Param)))
    for path, value in parameters.items():
        variable = operator.attrgetter(path)(mixer)
        assert variable.shape == value.shape, path
        variable[...] = value
    return mixer


def relative_error(got: jax.Array, want: np.ndarray) -> float:
    assert got.shape == want.shape
    error = np.asarray(got, np.float64) - want
    return float(np.sqrt(np.mean(np.square(error)) / np.mean(np.square(want))))
