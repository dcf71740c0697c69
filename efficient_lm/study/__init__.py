"""Experiments that compare architectures on the machine at hand: `python -m efficient_lm.study hybrid`."""
