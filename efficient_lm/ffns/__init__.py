"""Feed-forward networks, each beside its configuration."""

from efficient_lm.ffns.base import FFN as FFN
from efficient_lm.ffns.base import FFNConfig as FFNConfig
from efficient_lm.ffns.mlp import MLP as MLP
from efficient_lm.ffns.mlp import MLPConfig as MLPConfig
from efficient_lm.ffns.moe import MoE as MoE
from efficient_lm.ffns.moe import MoEConfig as MoEConfig
