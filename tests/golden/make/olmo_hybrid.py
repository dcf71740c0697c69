"""Golden layer: the Gated DeltaNet of OLMo Hybrid in transformers, whose eigenvalues may be negative."""

from common import check_cache, draw, generator, module_case
from parameters import parameters
from transformers import DynamicCache, OlmoHybridConfig
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet

B, T, D = 2, 67, 12

SETTINGS = {
    "hidden_size": D,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 5,
    "linear_value_head_dim": 3,
    "linear_conv_kernel_dim": 4,
    "linear_allow_neg_eigval": True,
}


def config() -> OlmoHybridConfig:
    return OlmoHybridConfig(
        **SETTINGS, num_hidden_layers=2, num_attention_heads=4, layer_types=["linear_attention", "full_attention"]
    )


def call(apply, x):
    y, cache = apply(x), DynamicCache(config=config())
    check_cache(y, lambda part: apply(part, cache_params=cache), x)
    return y


def main() -> None:
    module_case(
        "layer_olmo_hybrid",
        lambda: OlmoHybridGatedDeltaNet(config(), layer_idx=0),
        call,
        draw(generator("layer_olmo_hybrid"), B, T, D),
        parameters,
        # The layer's own constant, whatever the configuration says.
        settings=SETTINGS | {"norm_eps": 1e-5},
        source="transformers 5.23.0 OlmoHybridGatedDeltaNet",
    )


if __name__ == "__main__":
    main()
