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
    "n_groups": 2,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "use_bias": False,
    "layer_norm_epsilon": 1e-5,
    "chunk_size": 16,
}


def main() -> None:
    module_case(
        "layer_mamba2",
        lambda: Mamba2Mixer(Mamba2Config(**SETTINGS, num_hidden_layers=1), layer_idx=0),
        lambda apply, x: apply(x),
        draw(generator("layer_mamba2"), B, T, D),
        parameters,
        settings=SETTINGS,
        source="transformers 5.23.0 Mamba2Mixer",
    )


if __name__ == "__main__":
    main()
