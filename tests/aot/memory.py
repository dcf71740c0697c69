"""Compiles the XLA form of each recurrence, with gradients, at two lengths: `python -m tests.aot.memory 8192 65536`.

Memory has to grow no faster than the tokens do, and no array may hold a state per token, or a number per pair of
tokens.
"""

import math
import re
import sys
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from benchmarks.ops import CASES, DECODING, SIZES, Case, backward
from efficient_lm.topologies import parse_target, prepare_compilers

ONE_HEAD = {**SIZES, "N": 1, "K": 1, "F": 128}
RECURRENCES = {name: case for name, case in CASES.items() if "state" in case.args and name not in DECODING}


def most_elements(case: Case, num_tokens: int) -> int:
    """Returns how large an array may be: less than a state for every fourth token.

    But outputs may be states, and are as long as arguments.
    """
    sizes = {**ONE_HEAD, "T": num_tokens}
    (state,) = case.structs(case.args["state"], sizes)
    return max(num_tokens * state.size // 4, 2 * max(x.size for x in case.structs(case.ins, sizes)))


def compile_case(case: Case, num_tokens: int, device: Any) -> tuple[int, int]:
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


def main(short: int, long: int) -> int:
    """Returns how many cases failed."""
    prepare_compilers()
    device, num_failed = parse_target("v5e:2x2").devices()[0], 0
    for name, case in RECURRENCES.items():
        (short_bytes, _), (long_bytes, largest) = (compile_case(case, tokens, device) for tokens in (short, long))
        limit = most_elements(case, long)
        failed = long_bytes > 1.1 * long / short * short_bytes or largest > limit
        num_failed += failed
        print(
            f"{name}: {short_bytes / 1e6:.1f} MB for {short} tokens, {long_bytes / 1e6:.1f} MB for {long}; the largest "
            f"array has {largest / long:.0f} elements a token, of at most {limit / long:.0f}{', FAILED' * failed}",
            flush=True,
        )
    return num_failed


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])) > 0)
