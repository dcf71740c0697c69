"""What models are trained for."""

from efficient_lm.objectives.base import Objective as Objective
from efficient_lm.objectives.base import ObjectiveConfig as ObjectiveConfig
from efficient_lm.objectives.next_token import NextToken as NextToken
from efficient_lm.objectives.next_token import NextTokenConfig as NextTokenConfig
