"""Golden layer: flash-linear-attention's HGRN, its Triton kernels run by Triton's interpreter, in float32."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from common import draw, generator, module_case
from fla.layers import hgrn
from parameters import parameters
from triton.runtime.autotuner import Autotuner

B, T, D = 2, 37, 16

SETTINGS = {"hidden_size": D, "expand_ratio": 1, "norm_eps": 1e-6, "layer_idx": 1}
# Not a parameter of the layer: the model learns one for each.
LOWER_BOUND = 0.25


def main() -> None:
    # The autotuner wants to time a GPU: any configuration will do.
    Autotuner._bench = lambda self, *args, **kwargs: [0.0, 0.0, 0.0]
    # Layers that are trained take the chunked kernel, which does not run in the interpreter.
    hgrn.chunk_hgrn = hgrn.fused_recurrent_hgrn
    module_case(
        "layer_hgrn",
        lambda: hgrn.HGRNAttention(**SETTINGS),
        lambda apply, x: apply(x, lower_bound=torch.full((D,), LOWER_BOUND))[0],
        draw(generator("layer_hgrn"), B, T, D),
        parameters,
        settings=SETTINGS | {"lower_bound": LOWER_BOUND},
        source="flash-linear-attention 0.6.0 HGRNAttention, with fused_recurrent_hgrn",
        precision="float32",
    )


if __name__ == "__main__":
    main()
