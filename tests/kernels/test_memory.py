"""The XLA form of each recurrence, with gradients, has no array with a state per token, or a number per pair of tokens.

This reads the program that XLA is given; `python -m tests.aot.memory 8192 65536` compiles it and asks for the bytes.
"""

import math
import re

import jax
import pytest

from benchmarks.ops import Case, backward
from tests.aot.memory import ONE_HEAD, RECURRENCES, most_elements

NUM_TOKENS = 8192


def largest_array(case: Case, impl: str) -> int:
    """Returns the most elements of an array in the lowered program, forward and backward."""
    args, cotangents = (tuple(case.structs(arrays, {**ONE_HEAD, "T": NUM_TOKENS})) for arrays in (case.ins, case.outs))
    text = jax.jit(backward(case.forward(impl=impl))).lower(args, cotangents).as_text()
    return max(math.prod(map(int, shape.split("x"))) for shape in set(re.findall(r"tensor<([\dx]+)x[a-z]", text)))


@pytest.mark.parametrize("name", RECURRENCES)
def test_chunks_keep_few_states(name):
    assert largest_array(RECURRENCES[name], "xla") <= most_elements(RECURRENCES[name], NUM_TOKENS)


def test_a_loop_over_tokens_is_noticed():
    case = RECURRENCES["linear_attention"]
    assert largest_array(case, "ref") > most_elements(case, NUM_TOKENS)
