"""Golden models: tiny hybrids of transformers, whole, from tokens to logits."""

import json
import sys
from typing import Any

import numpy as np
import torch
import transformers
from common import FOLDER, double_precision, draw, generator
from parameters import parameters

B, T, V, D = 2, 19, 29, 12

ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2}
# Bamba, Granite and Falcon-H1 call the sizes of Mamba-2 alike.
MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 6,
    "mamba_n_groups": 2,
    "mamba_d_state": 5,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 8,
}
ROPE = {"rope_type": "default", "rope_theta": 1000.0}
HALF_ROPE = {**ROPE, "partial_rotary_factor": 0.5}
MIXED = ["linear_attention", "full_attention", "linear_attention"]

CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "jamba": (
        transformers.JambaConfig,
        transformers.JambaForCausalLM,
        {
            **ATTENTION,
            "intermediate_size": 20,
            "num_hidden_layers": 4,
            "attn_layer_period": 4,
            "attn_layer_offset": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 5,
            "mamba_dt_rank": 3,
            "rms_norm_eps": 1e-6,
        },
    ),
    "bamba": (
        transformers.BambaConfig,
        transformers.BambaForCausalLM,
        {
            **ATTENTION,
            **MAMBA2,
            "head_dim": 4,
            "hidden_size": 16,
            "mamba_d_head": 8,
            "intermediate_size": 20,
            "num_hidden_layers": 3,
            "attn_layer_indices": [1],
            "rope_parameters": HALF_ROPE,
            "rms_norm_eps": 1e-6,
        },
    ),
    "granite_moe_hybrid": (
        transformers.GraniteMoeHybridConfig,
        transformers.GraniteMoeHybridForCausalLM,
        {
            **ATTENTION,
            **MAMBA2,
            "intermediate_size": 7,
            "shared_intermediate_size": 10,
            "num_hidden_layers": 3,
            "layer_types": MIXED,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "embedding_multiplier": 12.0,
            "logits_scaling": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.3,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-6,
        },
    ),
    "nemotron_h": (
        transformers.NemotronHConfig,
        transformers.NemotronHForCausalLM,
        {
            **ATTENTION,
            "head_dim": 5,
            "layers_block_type": ["linear_attention", "mlp", "linear_attention", "full_attention", "mlp"],
            "intermediate_size": 20,
            "ssm_state_size": 5,
            "mamba_num_heads": 4,
            "mamba_head_dim": 6,
            "n_groups": 2,
            "chunk_size": 8,
            "time_step_min": 1e-30,  # Steps are cut below it only when a whole prompt is read; here, never.
            "layer_norm_epsilon": 1e-6,
        },
    ),
    "falcon_h1": (
        transformers.FalconH1Config,
        transformers.FalconH1ForCausalLM,
        {
            **ATTENTION,
            **MAMBA2,
            "head_dim": 4,
            "mamba_d_ssm": 24,
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "rope_parameters": ROPE,
            "embedding_multiplier": 5.5,
            "lm_head_multiplier": 0.25,
            "mlp_multipliers": [0.75, 0.5],
            "key_multiplier": 0.4,
            "attention_in_multiplier": 0.9,
            "attention_out_multiplier": 0.6,
            "ssm_multipliers": [0.35, 0.25, 0.18, 0.5, 0.7],
            "ssm_in_multiplier": 1.25,
            "ssm_out_multiplier": 0.3,
            "mamba_rms_norm": False,
            "rms_norm_eps": 1e-6,
        },
    ),
    "minimax": (
        transformers.MiniMaxConfig,
        transformers.MiniMaxForCausalLM,
        {
            **ATTENTION,
            "head_dim": 8,
            "intermediate_size": 10,
            "num_hidden_layers": 3,
            "layer_types": MIXED,
            "block_size": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": ROPE,  # Published weights are for half of each head; this class turns all of it.
            "full_attn_alpha_factor": 3.5,
            "full_attn_beta_factor": 1.5,
            "linear_attn_alpha_factor": 2.5,
            "linear_attn_beta_factor": 0.75,
            "mlp_alpha_factor": 3.0,
            "mlp_beta_factor": 1.25,
            "rms_norm_eps": 1e-6,
        },
    ),
    "qwen3_next": (
        transformers.Qwen3NextConfig,
        transformers.Qwen3NextForCausalLM,
        {
            **ATTENTION,
            "head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 5,
            "linear_value_head_dim": 3,
            "linear_conv_kernel_dim": 4,
            "num_hidden_layers": 3,
            "layer_types": MIXED,
            "moe_intermediate_size": 7,
            "shared_expert_intermediate_size": 10,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "rope_parameters": HALF_ROPE,
            "rms_norm_eps": 1e-6,
        },
    ),
    "recurrent_gemma": (
        transformers.RecurrentGemmaConfig,
        transformers.RecurrentGemmaForCausalLM,
        {
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "lru_width": 21,
            "intermediate_size": 40,
            "num_hidden_layers": 4,
            "attention_window_size": 7,
            "rope_parameters": HALF_ROPE,
            "logits_soft_cap": 3.0,
            "rms_norm_eps": 1e-6,
        },
    ),
    "zamba2": (
        transformers.Zamba2Config,
        transformers.Zamba2ForCausalLM,
        {
            "num_attention_heads": 4,
            "num_hidden_layers": 7,
            "layers_block_type": [
                "linear_attention",
                *["hybrid", "linear_attention", "hybrid", "hybrid", "hybrid", "linear_attention"],
            ],
            "hidden_act": "gelu_pytorch_tanh",  # The published models have the exact function.
            "num_mem_blocks": 2,
            "adapter_rank": 3,
            "use_shared_attention_adapter": True,
            "use_mem_rope": True,
            "rope_parameters": ROPE,
            "intermediate_size": 20,
            "mamba_d_state": 5,
            "mamba_ngroups": 2,
            "n_mamba_heads": 4,
            "chunk_size": 8,
            "time_step_min": 1e-30,  # Steps are cut below it only when a whole prompt is read; here, never.
            "rms_norm_eps": 1e-6,
        },
    ),
}


def draw_parameter(case: str, name: str, shape: torch.Size) -> np.ndarray:
    rng = generator(f"model_{case} {name}")
    if "embed_tokens" in name:
        return draw(rng, *shape)
    if len(shape) == 3 and "conv" not in name:  # Matrices of experts, of heads.
        return draw(rng, *shape, scale=shape[-1] ** -0.5)
    x = parameters(name, rng, shape)
    # These norms multiply by 1 + weight.
    is_offset = case == "recurrent_gemma" or (case == "qwen3_next" and "linear_attn" not in name)
    return x - 1 if is_offset and "norm" in name else x


def main() -> None:
    for case in sys.argv[1:] or CASES:
        config_class, model_class, settings = CASES[case]
        settings = {"hidden_size": D, "vocab_size": V, **settings}

        def run(dtype, config_class=config_class, model_class=model_class, settings=settings, case=case):
            config = config_class(**settings, attn_implementation="eager", pad_token_id=None)
            config._experts_implementation = "eager"
            model = model_class(config).to(dtype).eval()
            weights = {name: draw_parameter(case, name, p.shape) for name, p in model.named_parameters()}
            for name, p in model.named_parameters():
                p.data = torch.tensor(weights[name], dtype=dtype)
            tokens = torch.tensor(generator(f"model_{case} tokens").integers(1, V, size=(B, T)))
            with torch.no_grad():
                logits = model(tokens, use_cache=False).logits
            return weights, tokens, logits

        with double_precision():
            weights, tokens, logits = run(torch.float64)
        plain = run(torch.float32)[2]
        error = (plain.double() - logits).norm() / logits.norm()
        assert error < 1e-5, f"{case}: off by {error:.1e} from the unmodified reference"
        source = f"transformers {transformers.__version__} {model_class.__name__}"
        meta = {"source": source, "torch": torch.__version__, "precision": "float64", "settings": settings}
        arrays = {f"in.{name}": x.astype(np.float32) for name, x in weights.items()}
        path = FOLDER / f"model_{case}.npz"
        np.savez_compressed(
            path, meta=np.array(json.dumps(meta)), tokens=tokens.numpy(), logits=logits.double().numpy(), **arrays
        )
        print(f"{path.name:40} {path.stat().st_size / 1024:6.1f} KiB, {len(arrays)} arrays, error {error:.1e}")


if __name__ == "__main__":
    main()
