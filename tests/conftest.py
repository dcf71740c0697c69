import os

# Set before the first import of JAX: eight CPU devices, for tests of sharding; and programs that are compiled to run
# once, for milliseconds, are not worth LLVM's time.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")

import gc
import pathlib

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(autouse=True)
def few_programs():
    """Drops compiled programs before there are too many: each is memory that is mapped, of which Linux gives a process
    65,530 pieces, and without more of them XLA crashes."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()
