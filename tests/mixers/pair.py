"""Two layers as one mixer, for mixers that see what an earlier layer left."""

import dataclasses

from efficient_lm.mixers.base import Mixer, MixerConfig, SharingMixer


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairConfig(MixerConfig):
    first: MixerConfig
    second: MixerConfig

    def build(self, d_model, *, rngs):
        return Pair(self, d_model, rngs=rngs)


class Pair(Mixer):
    """`second(x + first(x))`."""

    def __init__(self, cfg, d_model, *, rngs):
        self.first, self.second = cfg.first.build(d_model, rngs=rngs), cfg.second.build(d_model, rngs=rngs)
        assert isinstance(self.first, SharingMixer)
        assert isinstance(self.second, SharingMixer)

    def init_state(self, batch_size, max_len, *dtype):
        return tuple(layer.init_state(batch_size, max_len, *dtype) for layer in (self.first, self.second))

    def __call__(self, x, state=None, *, segment_ids=None):
        first, second = state or (None, None)
        y_BTD, first, shared = self.first.share(x, first, {}, segment_ids=segment_ids)
        y_BTD, second, _ = self.second.share(x + y_BTD, second, shared, segment_ids=segment_ids)
        return y_BTD, state and (first, second)
