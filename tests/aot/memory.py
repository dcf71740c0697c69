"""Compiles the XLA form of each recurrence, forward and backward, for 8k and 64k tokens: `python -m tests.aot.memory`.

Memory has to grow no faster than the tokens do, and no array may hold a state per token, or a number per pair of tokens.
"""

import math
import os
import re
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks.ops import CASES, SIZES, Case, backward

SHORT, LONG = 8 * 1024, 64 * 1024
ONE_HEAD = {**SIZES, "N": 1, "K": 1, "F": 128}


def compile_case(case: Case, num_tokens: int, device: jax.Device) -> tuple[int, int]:
    """Returns the bytes of temporary memory, and the number of elements of the largest array in the program."""
    sizes = {**ONE_HEAD, "T": num_tokens}
    place = lambda arrays: tuple(
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(device))
        for x in case.structs(arrays, sizes)
    )
    # All of it in HBM: otherwise what fits into VMEM is missing from the sum.
    both = jax.jit(backward(case.forward(impl="xla")), compiler_options={"xla_msa_enable": False})
    compiled = both.lower(place(case.ins), place(case.outs)).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    shapes = re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", compiled.as_text() or "")
    return memory.temp_size_in_bytes, max(math.prod(map(int, shape.split(","))) for shape in set(shapes))


def main() -> int:
    """Returns how many cases failed."""
    device, num_failed = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0], 0
    for name, case in CASES.items():
        if "state" not in case.args:
            continue
        (short, _), (long, largest) = (compile_case(case, num_tokens, device) for num_tokens in (SHORT, LONG))
        sizes = {**ONE_HEAD, "T": LONG}
        (state,) = case.structs(case.args["state"], sizes)
        arguments = max(x.size for x in case.structs(case.ins, sizes))
        # Less than a state for every fourth token; but outputs may be states, and are as long as arguments.
        limit = max(LONG * state.size // 4, 2 * arguments)
        failed = long > 1.1 * LONG / SHORT * short or largest > limit
        num_failed += failed
        print(
            f"{name}: {short / 1e6:.1f} MB for 8k tokens, {long / 1e6:.1f} MB for 64k; the largest array has "
            f"{largest / LONG:.0f} elements a token, of at most {limit / LONG:.0f}{', FAILED' * failed}",
            flush=True,
        )
    return num_failed


if __name__ == "__main__":
    sys.exit(main() > 0)
