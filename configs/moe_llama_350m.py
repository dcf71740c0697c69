"""Llama at 350 M with experts in place of each feed-forward network (arXiv 2510.04800, section on mixtures of experts).

1.47 B parameters, of which a token uses 0.55 B: as many as in llama_350m, 0.20 B of them the tied embedding. A shared
expert and one of eight, each half as wide as the network that they replace; sigmoid scores, and a bias that balances
the load by 0.001 a step.
"""

import dataclasses

import llama_350m

from efficient_lm.config import TrainConfig
from efficient_lm.ffns import MLPConfig, MoEConfig
from efficient_lm.ffns.routers import TopKConfig


def config(bias_rate: float | None = 1e-3) -> TrainConfig:
    base = llama_350m.config()
    router = TopKConfig(top_k=1, scores="sigmoid", renormalize=False, bias_rate=bias_rate)
    ffn = MoEConfig(router=router, num_experts=8, d_ff=2048, shared=MLPConfig(d_ff=2048))
    blocks = {"A": dataclasses.replace(base.model.blocks["A"], ffn=ffn)}
    return dataclasses.replace(
        base, model=dataclasses.replace(base.model, blocks=blocks), mesh={"data": -1, "expert": 8}
    )
