"""Golden layers: the latent attentions of transformers' DeepSeek-V2 and DeepSeek-V3, with YaRN."""

import torch
from common import draw, generator, module_case
from parameters import parameters
from transformers import DeepseekV2Config, DeepseekV3Config
from transformers import masking_utils as masks
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

B, T, D = 2, 67, 12

SETTINGS = {
    "hidden_size": D,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 5,
    # Of the four frequencies YaRN keeps the first, blends the second and third, and divides the last.
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 337.0,
        "factor": 8.0,
        "beta_fast": 8.0,
        "beta_slow": 0.5,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "original_max_position_embeddings": 64,
    },
    "max_position_embeddings": 512,
}


def case(name: str, config_type, attention_type, rotary_type, query_rank: int | None) -> None:
    settings = SETTINGS | {"q_lora_rank": query_rank}
    config = lambda: config_type(**settings, attn_implementation="eager")

    def attend(apply, x):
        rotary = rotary_type(config=config())
        mask = masks.eager_mask(B, T, T, dtype=x.dtype)
        return apply(x, position_embeddings=rotary(x, torch.arange(T)[None]), attention_mask=mask)[0]

    module_case(
        name,
        lambda: attention_type(config(), layer_idx=0),
        attend,
        draw(generator(name), B, T, D),
        parameters,
        settings=settings,
        source=f"transformers 5.23.0 {attention_type.__name__}",
    )


def main() -> None:
    case("layer_deepseek_v2", DeepseekV2Config, v2.DeepseekV2Attention, v2.DeepseekV2RotaryEmbedding, None)
    case("layer_deepseek_v3", DeepseekV3Config, v3.DeepseekV3Attention, v3.DeepseekV3RotaryEmbedding, 9)


if __name__ == "__main__":
    main()
