"""How good a model is."""

from efficient_lm.evaluation.held_out import HeldOut as HeldOut
from efficient_lm.evaluation.held_out import compressed_bits_per_byte as compressed_bits_per_byte
from efficient_lm.evaluation.held_out import evaluate as evaluate
