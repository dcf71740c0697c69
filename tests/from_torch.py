"""Parameters of torch as ours: what the tests of layers and those of whole models share.

Each function of a layer takes the settings of the other library and its parameters, by its names, and returns our
configuration with our parameters, by our names.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from efficient_lm.mixers import (
    AttentionConfig,
    GatedDeltaNetConfig,
    LightningConfig,
    Mamba2Config,
    MambaConfig,
    MixerConfig,
    RGLRUConfig,
)
from efficient_lm.rotary import RotaryConfig

type Arrays = dict[str, jax.Array]
type Settings = dict[str, Any]


def heads_in(w: jax.Array, num_heads: int) -> jax.Array:
    """Returns a torch matrix [out, in] that projects into heads as [D N H]."""
    return w.T.reshape(w.shape[1], num_heads, -1)


def heads_out(w: jax.Array, num_heads: int) -> jax.Array:
    """Returns a torch matrix [out, in] that projects heads out as [N H D]."""
    return w.T.reshape(num_heads, -1, w.shape[0])


def split(w: jax.Array, *sizes: int, axis: int = -1) -> list[jax.Array]:
    assert sum(sizes) == w.shape[axis]
    return jnp.split(w, np.cumsum(sizes)[:-1], axis=axis)


def gated_deltanet(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    K, N = settings["linear_num_key_heads"], settings["linear_num_value_heads"]
    H, P, W = (settings[f"linear_{name}_dim"] for name in ("key_head", "value_head", "conv_kernel"))
    G = N // K
    # Packed by key head: its query, its key, then the values and the gates of the heads that it serves.
    q, k, v, z = split(heads_in(p["in_proj_qkvz.weight"], K), H, H, G * P, G * P)
    b, a = split(heads_in(p["in_proj_ba.weight"], K), G, G)
    q_conv, k_conv, v_conv = split(p["conv1d.weight"], K * H, K * H, N * P, axis=0)
    D = q.shape[0]
    return GatedDeltaNetConfig(num_heads=N, num_key_heads=K, key_dim=H, value_dim=P, conv_size=W), {
        "q_proj.kernel": q,
        "k_proj.kernel": k,
        "v_proj.kernel": v.reshape(D, N, P),
        "gate_proj.kernel": z.reshape(D, N, P),
        "beta_proj.kernel": b.reshape(D, N),
        "dt_proj.kernel": a.reshape(D, N),
        "q_conv.kernel": q_conv.reshape(K, H, W),
        "k_conv.kernel": k_conv.reshape(K, H, W),
        "v_conv.kernel": v_conv.reshape(N, P, W),
        "A_log": p["A_log"],
        "dt_bias": p["dt_bias"],
        "norm.norm.scale": p["norm.weight"],
        "o_proj.kernel": heads_out(p["out_proj.weight"], N),
    }


def qwen3_next_attention(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    N, K, H = settings["num_attention_heads"], settings["num_key_value_heads"], settings["head_dim"]
    rope = settings["rope_parameters"]
    q, gate = split(heads_in(p["q_proj.weight"], N), H, H)
    rotary = RotaryConfig(theta=rope["rope_theta"], fraction=rope["partial_rotary_factor"])
    config = AttentionConfig(num_heads=N, num_kv_heads=K, head_dim=H, rotary=rotary, qk_norm=True, output_gate=True)
    return config, {
        "q_proj.kernel": q,
        "gate_proj.kernel": gate,
        "k_proj.kernel": heads_in(p["k_proj.weight"], K),
        "v_proj.kernel": heads_in(p["v_proj.weight"], K),
        "q_norm.scale": 1 + p["q_norm.weight"],
        "k_norm.scale": 1 + p["k_norm.weight"],
        "o_proj.kernel": heads_out(p["o_proj.weight"], N),
    }


def mamba(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    F, H, R = p["D"].shape[0], p["A_log"].shape[1], p["dt_proj.weight"].shape[1]
    x, gate = split(p["in_proj.weight"], F, F, axis=0)
    norms = {
        f"{ours}_norm.scale": p[f"{theirs}_layernorm.weight"]
        for ours, theirs in (("dt", "dt"), ("B", "b"), ("C", "c"))
        if f"{theirs}_layernorm.weight" in p
    }
    config = MambaConfig(
        d_inner=F, dt_rank=R, state_size=H, conv_size=p["conv1d.weight"].shape[2], inner_norms=len(norms) > 0
    )
    return config, norms | {
        "in_proj.kernel": x.T,
        "gate_proj.kernel": gate.T,
        "conv.kernel": p["conv1d.weight"][:, 0],
        "conv.bias": p["conv1d.bias"],
        "x_proj.kernel": p["x_proj.weight"].T,
        "dt_proj.kernel": p["dt_proj.weight"].T,
        "dt_bias": p["dt_proj.bias"],
        "A_log": p["A_log"],
        "skip": p["D"],
        "o_proj.kernel": p["out_proj.weight"].T,
    }


def mamba2(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    N, K, H, P = (settings[name] for name in ("num_heads", "n_groups", "state_size", "head_dim"))
    W = settings["conv_kernel"]
    z, x, B, C, dt = split(p["in_proj.weight"], N * P, N * P, K * H, K * H, N, axis=0)
    v_conv, k_conv, q_conv = split(p["conv1d.weight"], N * P, K * H, K * H, axis=0)
    v_bias, k_bias, q_bias = split(p["conv1d.bias"], N * P, K * H, K * H)
    norm = {"norm_scale": p["norm.weight"].reshape(N, P)} if "norm.weight" in p else {}
    config = Mamba2Config(num_heads=N, num_groups=K, key_dim=H, value_dim=P, conv_size=W, norm=len(norm) > 0)
    return config, norm | {
        "q_proj.kernel": heads_in(C, K),
        "k_proj.kernel": heads_in(B, K),
        "v_proj.kernel": heads_in(x, N),
        "gate_proj.kernel": heads_in(z, N),
        "dt_proj.kernel": dt.T,
        "q_conv.kernel": q_conv.reshape(K, H, W),
        "k_conv.kernel": k_conv.reshape(K, H, W),
        "v_conv.kernel": v_conv.reshape(N, P, W),
        "q_conv.bias": q_bias.reshape(K, H),
        "k_conv.bias": k_bias.reshape(K, H),
        "v_conv.bias": v_bias.reshape(N, P),
        "A_log": p["A_log"],
        "dt_bias": p["dt_bias"],
        "skip": p["D"],
        "o_proj.kernel": heads_out(p["out_proj.weight"], N),
    }


def lightning(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    N, H = settings["num_attention_heads"], settings["head_dim"]
    q, k, v = split(heads_in(p["qkv_proj.weight"], N), H, H, H)
    # As transformers computes it: the last layer keeps a trace of a slope.
    scale = 1 - settings["layer"] / (settings["num_hidden_layers"] - 1 + 1e-5) + 1e-5
    return LightningConfig(num_heads=N, key_dim=H, value_dim=H, slope_scale=scale), {
        "q_proj.kernel": q,
        "k_proj.kernel": k,
        "v_proj.kernel": v,
        "gate_proj.kernel": heads_in(p["output_gate.weight"], N),
        "norm_scale": p["norm.weight"].reshape(N, H),
        "o_proj.kernel": heads_out(p["out_proj.weight"], N),
    }


def rglru(settings: Settings, p: Arrays) -> tuple[MixerConfig, Arrays]:
    config = RGLRUConfig(
        width=settings["lru_width"], num_heads=settings["num_attention_heads"], conv_size=settings["conv1d_width"]
    )
    return config, {
        "x_proj.kernel": p["linear_x.weight"].T,
        "x_bias": p["linear_x.bias"],
        "gate_proj.kernel": p["linear_y.weight"].T,
        "gate_bias": p["linear_y.bias"],
        "conv.kernel": p["conv_1d.weight"][:, 0],
        "conv.bias": p["conv_1d.bias"],
        "input_gate.kernel": p["rg_lru.input_gate_weight"],
        "input_gate_bias": p["rg_lru.input_gate_bias"],
        "decay_gate.kernel": p["rg_lru.recurrent_gate_weight"],
        "decay_gate_bias": p["rg_lru.recurrent_gate_bias"],
        "decay": p["rg_lru.recurrent_param"],
        "o_proj.kernel": p["linear_out.weight"].T,
        "o_bias": p["linear_out.bias"],
    }
