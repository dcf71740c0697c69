"""How tokens and experts come together, each way beside its configuration."""

from efficient_lm.ffns.routers.base import Router as Router
from efficient_lm.ffns.routers.base import RouterConfig as RouterConfig
from efficient_lm.ffns.routers.expert_choice import ExpertChoice as ExpertChoice
from efficient_lm.ffns.routers.expert_choice import ExpertChoiceConfig as ExpertChoiceConfig
from efficient_lm.ffns.routers.hash import Hash as Hash
from efficient_lm.ffns.routers.hash import HashConfig as HashConfig
from efficient_lm.ffns.routers.relu import ReLU as ReLU
from efficient_lm.ffns.routers.relu import ReLUConfig as ReLUConfig
from efficient_lm.ffns.routers.soft import Soft as Soft
from efficient_lm.ffns.routers.soft import SoftConfig as SoftConfig
from efficient_lm.ffns.routers.top_k import GroupLimitConfig as GroupLimitConfig
from efficient_lm.ffns.routers.top_k import TopK as TopK
from efficient_lm.ffns.routers.top_k import TopKConfig as TopKConfig
from efficient_lm.ffns.routers.top_p import TopP as TopP
from efficient_lm.ffns.routers.top_p import TopPConfig as TopPConfig
from efficient_lm.ffns.routers.zero_computation import ZeroComputation as ZeroComputation
from efficient_lm.ffns.routers.zero_computation import ZeroComputationConfig as ZeroComputationConfig
