"""Golden layers of Qwen3-Next in transformers: its Gated DeltaNet and its attention."""

import torch
from common import check_cache, draw, generator, module_case
from parameters import parameters
from transformers import DynamicCache, Qwen3NextConfig
from transformers import masking_utils as masks
from transformers.models.qwen3_next import modeling_qwen3_next as qwen3_next

B, T, D = 2, 67, 12

SETTINGS = {
    "hidden_size": D,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 3,
    "linear_conv_kernel_dim": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5},
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
}


def config() -> Qwen3NextConfig:
    return Qwen3NextConfig(**SETTINGS, attn_implementation="eager")


def attend(apply, x):
    position_ids = torch.arange(T)[None]
    rotary = qwen3_next.Qwen3NextRotaryEmbedding(config=config())
    mask = masks.eager_mask(B, T, T, dtype=x.dtype)
    return apply(x, position_embeddings=rotary(x, position_ids), attention_mask=mask)[0]


def gated_deltanet(apply, x):
    y, cache = apply(x), DynamicCache(config=config())
    check_cache(y, lambda part: apply(part, cache_params=cache), x)
    return y


def main() -> None:
    used = lambda *words: {key: value for key, value in SETTINGS.items() if key.startswith(words)}
    module_case(
        "layer_qwen3_next_gated_deltanet",
        lambda: qwen3_next.Qwen3NextGatedDeltaNet(config(), layer_idx=0),
        gated_deltanet,
        draw(generator("layer_qwen3_next_gated_deltanet"), B, T, D),
        parameters,
        settings=used("hidden", "linear", "rms"),
        source="transformers 5.23.0 Qwen3NextGatedDeltaNet",
    )
    module_case(
        "layer_qwen3_next_attention",
        lambda: qwen3_next.Qwen3NextAttention(config(), layer_idx=1),
        attend,
        draw(generator("layer_qwen3_next_attention"), B, T, D),
        # These norms multiply by 1 + weight.
        lambda name, rng, shape: parameters(name, rng, shape) - ("norm" in name),
        settings=used("hidden", "num_attention", "num_key", "head_dim", "rms", "rope"),
        source="transformers 5.23.0 Qwen3NextAttention",
    )


if __name__ == "__main__":
    main()
