"""Golden layers: flash-linear-attention's RWKV-7 around its naive recurrence, the rest by Triton's interpreter.

Two layers, so that the second mixes in the first one's values, read their input in two pieces, with a cache.
"""

import interpreter  # noqa: F401, before the kernels
import torch
from common import draw, fla_naive, generator, module_case
from fla.layers import rwkv7
from fla.models.utils import Cache
from parameters import parameters

B, T, D = 2, 37, 16

SETTINGS = {
    "hidden_size": D,
    "head_dim": 8,
    "decay_low_rank_dim": 4,
    "a_low_rank_dim": 3,
    "v_low_rank_dim": 2,
    "gate_low_rank_dim": 6,
    "norm_eps": 64e-5 / 8,  # which the layer multiplies by head_dim
    "num_hidden_layers": 2,
}


class Pair(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (rwkv7.RWKV7Attention(**SETTINGS, layer_idx=i) for i in range(2))

    def forward(self, x):
        cache, pieces = Cache(), []
        for piece in (x[:, :20], x[:, 20:]):
            y, _, cache, v_first = self.first(piece, past_key_values=cache, use_cache=True)
            y, _, cache, _ = self.second(piece + y, past_key_values=cache, use_cache=True, v_first=v_first)
            pieces.append(y)
        return torch.cat(pieces, dim=1)


def main() -> None:
    dplr = fla_naive("ops/generalized_delta_rule/dplr/naive.py").dplr_recurrence

    def chunk_rwkv7(r, w, k, v, a, b, scale, initial_state, output_final_state, **_):
        r = r * (scale * r.shape[-1] ** 0.5)  # The recurrence scales what it reads.
        args = (x.transpose(1, 2) for x in (r, k, v, a, b, w))
        o, state = dplr(*args, initial_state=initial_state, output_final_state=output_final_state)
        return o.transpose(1, 2), state

    rwkv7.chunk_rwkv7 = chunk_rwkv7
    module_case(
        "layer_rwkv7_pair",
        Pair,
        lambda apply, x: apply(x),
        draw(generator("layer_rwkv7_pair"), B, T, D),
        parameters,
        settings=SETTINGS,
        source="flash-linear-attention 0.6.0, two RWKV7Attention with dplr_recurrence",
        precision="float32",
    )


if __name__ == "__main__":
    main()
