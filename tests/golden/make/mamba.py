"""Golden layers: the Mamba mixers of transformers, the plain one and Jamba's with norms of dt, B and C."""

from common import draw, generator, module_case
from parameters import parameters
from transformers import JambaConfig, MambaConfig
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.mamba.modeling_mamba import MambaMixer

B, T, D = 2, 67, 10

MAMBA = {
    "hidden_size": D,
    "expand": 2,
    "state_size": 6,
    "time_step_rank": 3,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "use_bias": False,
}
JAMBA = {
    "hidden_size": D,
    "mamba_expand": 2,
    "mamba_d_state": 6,
    "mamba_dt_rank": 3,
    "mamba_d_conv": 4,
    "mamba_conv_bias": True,
    "mamba_proj_bias": False,
    "rms_norm_eps": 1e-6,
}


def main() -> None:
    for name, settings, build in (
        ("layer_mamba", MAMBA, lambda: MambaMixer(MambaConfig(**MAMBA, num_hidden_layers=1), layer_idx=0)),
        ("layer_jamba", JAMBA, lambda: JambaMambaMixer(JambaConfig(**JAMBA), layer_idx=0)),
    ):
        x = draw(generator(name), B, T, D)
        source = f"transformers 5.23.0 {type(build()).__name__}"
        module_case(name, build, lambda apply, x: apply(x), x, parameters, settings=settings, source=source)


if __name__ == "__main__":
    main()
