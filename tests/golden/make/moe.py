"""Golden layers: the mixtures of experts of transformers' Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2 and V3."""

from typing import Any

import numpy as np
import torch
import transformers
from common import draw, generator, module_case
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

B, T, D, F, E = 2, 19, 12, 10, 8

DEEPSEEK = {
    "hidden_size": D,
    "moe_intermediate_size": F,
    "n_routed_experts": E,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "routed_scaling_factor": 2.5,
    "n_group": 4,
    "topk_group": 2,
}
CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "mixtral": (
        transformers.MixtralConfig,
        MixtralSparseMoeBlock,
        {"hidden_size": D, "intermediate_size": F, "num_local_experts": E, "num_experts_per_tok": 2},
    ),
    "olmoe": (
        transformers.OlmoeConfig,
        OlmoeSparseMoeBlock,
        {
            "hidden_size": D,
            "intermediate_size": F,
            "num_experts": E,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
        },
    ),
    "qwen2": (
        transformers.Qwen2MoeConfig,
        Qwen2MoeSparseMoeBlock,
        {
            "hidden_size": D,
            "moe_intermediate_size": F,
            "shared_expert_intermediate_size": 14,
            "num_experts": E,
            "num_experts_per_tok": 2,
            "norm_topk_prob": False,
        },
    ),
    "qwen3": (
        transformers.Qwen3MoeConfig,
        Qwen3MoeSparseMoeBlock,
        {
            "hidden_size": D,
            "moe_intermediate_size": F,
            "num_experts": E,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
        },
    ),
    "deepseek_v2": (
        transformers.DeepseekV2Config,
        DeepseekV2Moe,
        {**DEEPSEEK, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": (
        transformers.DeepseekV3Config,
        DeepseekV3MoE,
        # Large enough to change the choice of most tokens.
        {**DEEPSEEK, "norm_topk_prob": True, "bias": [0.25, -0.125, 0.0, 0.1875, -0.25, 0.0625, 0.0, -0.0625]},
    ),
}


def parameters(name: str, rng: np.random.Generator, shape: torch.Size) -> np.ndarray:
    """Returns matrices, one or several, that keep the size of what they multiply."""
    return draw(rng, *shape, scale=shape[-1] ** -0.5)


def main() -> None:
    for name, (config_class, module_class, settings) in CASES.items():

        def build(config_class=config_class, module_class=module_class, settings=settings) -> torch.nn.Module:
            settings = dict(settings)
            bias = settings.pop("bias", None)
            config = config_class(num_attention_heads=1, num_key_value_heads=1, **settings)
            config._experts_implementation = "eager"
            module = module_class(config)
            if bias is not None:
                module.gate.e_score_correction_bias = torch.tensor(bias)
            return module

        module_case(
            f"ffn_{name}",
            build,
            lambda apply, x: apply(x),
            draw(generator(f"ffn_{name}"), B, T, D),
            parameters,
            settings=settings,
            source=f"transformers {transformers.__version__} {module_class.__name__}",
        )


if __name__ == "__main__":
    main()
