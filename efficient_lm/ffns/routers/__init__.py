"""How tokens and experts come together, each way beside its configuration."""

from efficient_lm.ffns.routers.base import Router as Router
from efficient_lm.ffns.routers.base import RouterConfig as RouterConfig
from efficient_lm.ffns.routers.top_k import GroupLimitConfig as GroupLimitConfig
from efficient_lm.ffns.routers.top_k import TopK as TopK
from efficient_lm.ffns.routers.top_k import TopKConfig as TopKConfig
