"""Sequence mixers, each beside its configuration."""

from efficient_lm.mixers.attention import Attention as Attention
from efficient_lm.mixers.attention import AttentionConfig as AttentionConfig
from efficient_lm.mixers.base import Mixer as Mixer
from efficient_lm.mixers.base import MixerConfig as MixerConfig
from efficient_lm.mixers.gated_deltanet import GatedDeltaNet as GatedDeltaNet
from efficient_lm.mixers.gated_deltanet import GatedDeltaNetConfig as GatedDeltaNetConfig
from efficient_lm.mixers.gla import GLA as GLA
from efficient_lm.mixers.gla import GLAConfig as GLAConfig
from efficient_lm.mixers.mamba import Mamba as Mamba
from efficient_lm.mixers.mamba import MambaConfig as MambaConfig
from efficient_lm.mixers.mamba2 import Mamba2 as Mamba2
from efficient_lm.mixers.mamba2 import Mamba2Config as Mamba2Config
