"""Golden layers: flash-linear-attention's HGRN2, its Triton kernels run by Triton's interpreter, in float32."""

import interpreter  # noqa: F401, before the kernels
import torch
from common import draw, generator, module_case
from fla.layers.hgrn2 import HGRN2Attention
from parameters import parameters

# Up to 64 tokens the layer runs its recurrent kernel; the chunked one does not run in the interpreter.
B, T, D = 2, 37, 16

SETTINGS = {"hidden_size": D, "num_heads": 2, "expand_ratio": None}


def main() -> None:
    # The first layer of a stack has no bound. A later one has one per channel, here the same for all.
    for name, layer_idx, lower_bound in (("layer_hgrn2", 0, 0.0), ("layer_hgrn2_bound", 1, 0.375)):
        settings = SETTINGS | {"layer_idx": layer_idx}
        module_case(
            name,
            lambda settings=settings: HGRN2Attention(**settings),
            lambda apply, x, bound=lower_bound: apply(x, lower_bound=torch.full((D,), bound, dtype=x.dtype))[0],
            draw(generator(name), B, T, D),
            parameters,
            settings=settings | {"lower_bound": lower_bound},
            source="flash-linear-attention 0.6.0 HGRN2Attention",
            precision="float32",
        )


if __name__ == "__main__":
    main()
