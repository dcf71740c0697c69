"""The XLA form of each recurrence, with gradients, has no array with a state per token, or a number per pair of tokens.

This reads the program that XLA is given; `python -m tests.aot.memory 8192 65536` compiles it and asks for the bytes.
"""

import math
import re

import jax
import pytest

from benchmarks.ops import CASES, DECODING, SIZES, Case, backward

NUM_TOKENS = 8192
SIZES_OF_ONE_HEAD = {**SIZES, "T": NUM_TOKENS, "N": 1, "K": 1, "F": 128}
RECURRENCES = [name for name, case in CASES.items() if "state" in case.args and name not in DECODING]


def largest_array(case: Case, impl: str) -> int:
    """Returns the most elements of an array in the lowered program, forward and backward."""
    args, cotangents = (tuple(case.structs(arrays, SIZES_OF_ONE_HEAD)) for arrays in (case.ins, case.outs))
    text = jax.jit(backward(case.forward(impl=impl))).lower(args, cotangents).as_text()
    return max(math.prod(map(int, shape.split("x"))) for shape in set(re.findall(r"tensor<([\dx]+)x[a-z]", text)))


def limit(case: Case) -> int:
    """Less than a state for every fourth token; but outputs may be states, and are as long as arguments."""
    (state,) = case.structs(case.args["state"], SIZES_OF_ONE_HEAD)
    arguments = case.structs(case.ins, SIZES_OF_ONE_HEAD)
    return max(NUM_TOKENS * state.size // 4, 2 * max(x.size for x in arguments))


@pytest.mark.parametrize("name", RECURRENCES)
def test_chunks_keep_few_states(name):
    assert largest_array(CASES[name], "xla") <= limit(CASES[name])


def test_a_loop_over_tokens_is_noticed():
    assert largest_array(CASES["linear_attention"], "ref") > limit(CASES["linear_attention"])
