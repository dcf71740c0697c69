"""What devices can do at most."""

import jax

from efficient_lm.topologies import CHIPS

# Dense bfloat16 operations per second of one device, by the kind that JAX reports, from the makers' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU7x": CHIPS["tpu7x"].flops,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": CHIPS["h100"].flops,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops() -> float | None:
    """Returns what all devices together can do per second; None where it is not known, as on a CPU."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return None if peak is None else peak * jax.device_count()
