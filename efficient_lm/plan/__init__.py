"""What a run needs on accelerators that are not here: `python -m efficient_lm.plan CONFIG --on v5e:16x16`."""

from efficient_lm.plan.step import Plan as Plan
from efficient_lm.plan.step import make_plan as make_plan
