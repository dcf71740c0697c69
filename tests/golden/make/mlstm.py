"""Golden layers: the mLSTM of transformers' xLSTM, in chunks and then token by token, with mild and extreme gates."""

from common import draw, generator, module_case
from parameters import parameters
from transformers import xLSTMConfig
from transformers.models.xlstm.modeling_xlstm import xLSTMLayer

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


if __name__ == "__main__":
    main()
