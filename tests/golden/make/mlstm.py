"""Golden layers: the mLSTM of transformers' xLSTM, in chunks and then token by token, with mild and extreme gates.

And its cell alone, from a state: the norm behind it hides the denominator.
"""

import torch
from common import draw, generator, module_case, record
from parameters import parameters
from transformers import xLSTMConfig
from transformers.models.xlstm.modeling_xlstm import xLSTMBackend, xLSTMLayer

B, T, D = 2, 67, 12

SETTINGS = {
    "hidden_size": D,
    "num_heads": 2,
    "qk_dim_factor": 0.5,
    "v_dim_factor": 1.0,
    "use_bias": False,
    "norm_eps": 1e-6,
    "mode": "inference",
    "chunk_size": 16,
    "autocast_kernel_dtype": "float32",
    "return_last_states": True,
}


def main() -> None:
    # The stabilizer matters where input gates are far above zero, forget gates where they are shut.
    for name, cap, scale in (("layer_mlstm", 15.0, 1.0), ("layer_mlstm_wide", 40.0, 12.0)):
        config = xLSTMConfig(**SETTINGS, gate_soft_cap=cap)

        def draw_parameters(name, rng, shape, scale=scale):
            return parameters(name, rng, shape) * (scale if name.startswith(("igate", "fgate")) else 1.0)

        module_case(
            name,
            lambda config=config: xLSTMLayer(config),
            lambda apply, x: apply(x)[0],
            draw(generator(name), B, T, D),
            draw_parameters,
            settings=SETTINGS | {"gate_soft_cap": cap},
            source="transformers 5.23.0 xLSTMLayer",
        )
    cell()


def cell() -> None:
    rng, N, H, P = generator("mlstm_cell"), 2, 4, 3
    # Keys that agree with queries: else the denominator vanishes here and there, and float32 tells nothing.
    inputs = {key: abs(draw(rng, B, T, N, H)) for key in "qk"} | {"v": draw(rng, B, T, N, P)}
    inputs |= {"i": draw(rng, B, T, N, scale=4), "f": 2 + draw(rng, B, T, N, scale=2)}
    inputs |= {"S": draw(rng, B, N, H, P), "n": abs(draw(rng, B, N, H))}
    m = draw(rng, B, N, scale=2)

    def run(q, k, v, i, f, S, n):
        heads_first = [x.transpose(1, 2) for x in (q, k, v, i, f)]
        backend = xLSTMBackend(xLSTMConfig(**SETTINGS))
        h, (S, n, last) = backend(*heads_first, S, n, torch.tensor(m, dtype=q.dtype)[..., None])
        # What the state stands for, whatever it is divided by.
        return {"o": h.transpose(1, 2), "S": S * last[..., None].exp(), "n": n * last.exp()}

    source = "transformers 5.23.0 xLSTMBackend"
    record("mlstm_cell", run, inputs, settings={"chunk_size": 16}, source=source, constants={"m": m})


if __name__ == "__main__":
    main()
