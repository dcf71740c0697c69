"""Errors of float32, values and gradients, are at most three times those of one token after another."""

import pytest

from tests.kernels import exactness


@pytest.mark.parametrize(
    ("op", "decay", "gate", "width", "impls"),
    [
        ("delta_rule", "token", "closed", 64, ("xla", "tpu")),
        ("delta_rule", "token", "open", 16, ("xla",)),
        ("delta_rule", "channel", "mixed", 64, ("xla", "tpu")),
        ("generalized_delta_rule", "token", "closed", 64, ("xla",)),
        ("generalized_delta_rule", "channel", "open", 64, ("xla", "tpu")),
    ],
)
def test_as_exact_as_the_definition(op, decay, gate, width, impls):
    """Rows of 512 tokens: what cancels does so within a chunk, and after four of them the states no longer grow.

    The program has longer rows and all cases, and finds the same ratios there.
    """
    for impl, found in exactness.ratios(op, decay, gate, 512, width, width, impls).items():
        assert {name: ratio for name, ratio in found.items() if not ratio <= 3} == {}, impl
