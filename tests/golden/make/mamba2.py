"""Golden layer: the Mamba-2 mixer of transformers."""

from common import draw, generator, module_case
from parameters import parameters
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

B, T, D = 2, 67, 10

SETTINGS = {
    "hidden_size": D,
    "expand": 2,
    "num_heads": 4,
    "head_dim": 5,
    "state_size": 6,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "use_bias": False,
    "layer_norm_epsilon": 1e-6,
    "chunk_size": 16,
}


def main() -> None:
    # With two groups, the norm before the output runs over each group by itself.
    for name, num_groups in (("layer_mamba2", 1), ("layer_mamba2_groups", 2)):
        settings = SETTINGS | {"n_groups": num_groups}
        config = Mamba2Config(**settings, num_hidden_layers=1)
        module_case(
            name,
            lambda config=config: Mamba2Mixer(config, layer_idx=0),
            lambda apply, x: apply(x),
            draw(generator(name), B, T, D),
            parameters,
            settings=settings,
            source="transformers 5.23.0 Mamba2Mixer",
        )


if __name__ == "__main__":
    main()
