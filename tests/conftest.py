import os

# Set before the first import of JAX: eight CPU devices, for tests of sharding; and programs that are compiled to run
# once, for milliseconds, are not worth LLVM's time.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_default_matmul_precision", "highest")
