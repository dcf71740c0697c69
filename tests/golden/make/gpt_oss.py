"""Golden layer: the attention of transformers' gpt-oss, with sink logits, a window, and YaRN that rounds nothing."""

import torch
from common import draw, generator, module_case
from parameters import parameters
from transformers import GptOssConfig
from transformers import masking_utils as masks
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

B, T, D = 2, 67, 12

SETTINGS = {
    "hidden_size": D,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "attention_bias": False,
    "sliding_window": 9,
    "num_hidden_layers": 1,
    "layer_types": ["sliding_attention"],
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 337.0,
        "factor": 8.0,
        "beta_fast": 8.0,
        "beta_slow": 0.5,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
    "max_position_embeddings": 512,
}


def config() -> GptOssConfig:
    return GptOssConfig(**SETTINGS, attn_implementation="eager")


def attend(apply, x):
    rotary = GptOssRotaryEmbedding(config=config())
    window = masks.sliding_window_causal_mask_function(SETTINGS["sliding_window"])
    mask = masks.eager_mask(B, T, T, mask_function=window, dtype=x.dtype)
    return apply(x, position_embeddings=rotary(x, torch.arange(T)[None]), attention_mask=mask)[0]


def main() -> None:
    module_case(
        "layer_gpt_oss_attention",
        lambda: GptOssAttention(config(), layer_idx=0),
        attend,
        draw(generator("layer_gpt_oss_attention"), B, T, D),
        parameters,
        settings=SETTINGS,
        source="transformers 5.23.0 GptOssAttention",
    )


if __name__ == "__main__":
    main()
