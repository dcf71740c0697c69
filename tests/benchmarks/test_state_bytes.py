"""The bytes of every mixer's state, against formulas for some."""

from benchmarks.state_bytes import CONTEXTS, MIXERS, StateBytes, main
from efficient_lm import mixers
from efficient_lm.mixers import CrossAttentionConfig, KeyValuesConfig, MixerConfig


def test_every_mixer_is_drawn(tmp_path):
    exported = {c for c in vars(mixers).values() if isinstance(c, type) and issubclass(c, MixerConfig)}
    shared = {KeyValuesConfig, CrossAttentionConfig}  # GQA's cache, but once for many layers.
    assert exported - {MixerConfig} - shared == {type(cfg) for cfg in MIXERS.values()}
    sizes = main(StateBytes(output=tmp_path))
    assert (tmp_path / "state_bytes.png").stat().st_size > 0
    # Bytes per token, and 4 for the length.
    assert sizes["GQA"] == [2 * 2 * 4 * 128 * n + 4 for n in CONTEXTS]
    assert sizes["MLA"] == [2 * (512 + 64) * n + 4 for n in CONTEXTS]
    assert sizes["grouped tied"] == [2 * (4 * 128 + 64) * n + 4 for n in CONTEXTS]
    assert sizes["window of 4096"] == [2 * 2 * 4 * 128 * min(n, 4096) + 4 for n in CONTEXTS]
    assert sizes["NSA"] == [2 * 2 * 4 * 128 * (n + n // 64) + 4 for n in CONTEXTS]
    assert sizes["Lightning"] == [4 * 16 * 128 * 128] * len(CONTEXTS)
