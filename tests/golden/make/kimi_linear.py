"""Golden layer: the Kimi Delta Attention of transformers' Kimi Linear."""

from common import check_cache, draw, generator, module_case
from parameters import parameters
from transformers import DynamicCache, KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

B, T, D = 2, 67, 12

SETTINGS = {
    "hidden_size": D,
    "linear_num_heads": 2,
    "linear_head_dim": 5,
    "linear_conv_kernel_dim": 4,
    "rms_norm_eps": 1e-5,
}


def config() -> KimiLinearConfig:
    return KimiLinearConfig(**SETTINGS, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])


def call(apply, x):
    y, cache = apply(x), DynamicCache(config=config())
    check_cache(y, lambda part: apply(part, cache_params=cache), x)
    return y


def main() -> None:
    module_case(
        "layer_kimi_linear",
        lambda: KimiLinearDeltaAttention(config(), layer_idx=0),
        call,
        draw(generator("layer_kimi_linear"), B, T, D),
        parameters,
        settings=SETTINGS,
        source="transformers 5.23.0 KimiLinearDeltaAttention",
    )


if __name__ == "__main__":
    main()
