"""Every feed-forward network keeps its promises."""

import promises
import pytest

from efficient_lm import ffns
from efficient_lm.ffns import FFNConfig, MLPConfig, MoEConfig, routers
from efficient_lm.ffns.routers import (
    ExpertChoiceConfig,
    GroupLimitConfig,
    HashConfig,
    ReLUConfig,
    RouterConfig,
    SoftConfig,
    TopKConfig,
    TopPConfig,
    ZeroComputationConfig,
)


def moe(router: RouterConfig, **fields) -> MoEConfig:
    return MoEConfig(router=router, num_experts=8, d_ff=12, **fields)


# One line adds a network. Sizes differ from one another, so that no two can be mixed up, and divide by the shards.
TINY = {
    "MLP": MLPConfig(d_ff=24),
    "plain MLP": MLPConfig(d_ff=24, activation="gelu"),
    "top-k": moe(TopKConfig(top_k=2, balance_loss=0.1, z_loss=0.01), shared=MLPConfig(d_ff=20), shared_gate=True),
    "DeepSeek-V3": moe(
        TopKConfig(
            top_k=3,
            scores="sigmoid",
            scale=2.5,
            groups=GroupLimitConfig(num_groups=4, top_k=2, num_best=2),
            bias_rate=0.1,
            balance_loss=0.1,
        ),
        activation="squared_relu",
    ),
    "top-p": moe(TopPConfig(top_p=0.6, max_experts=5, expected_experts=3.0, entropy_loss=0.1, balance_loss=0.1)),
    "ReLU": moe(ReLUConfig(expected_experts=2.0, max_experts=6, loss=0.1)),
    "hash": moe(HashConfig(num_hashes=2, seed=3)),
    "expert choice": moe(ExpertChoiceConfig(experts_per_token_on_average=2.0)),
    "soft": moe(SoftConfig(num_slots=2, seq_len=promises.T)),
    "MoE++": moe(
        ZeroComputationConfig(
            top_k=3, num_null=1, num_copy=2, num_constant=3, expected_experts=1.5, balance_loss=0.1, price=0.5
        )
    ),
    "capacity": moe(TopKConfig(top_k=2, capacity_factor=0.75, balance_loss=0.1)),
}

# Those that look at other tokens by definition.
NOT_BY_ITSELF = {"capacity", "expert choice", "soft"}
# A capacity is a share of the row, padding included: beside padding fewer tokens are dropped.
COUNTS_PADDING = {"capacity"}


def test_every_network_is_covered():
    exported = {c for c in vars(ffns).values() if isinstance(c, type) and issubclass(c, FFNConfig)}
    assert exported - {FFNConfig} == {type(cfg) for cfg in TINY.values()}
    exported = {c for c in vars(routers).values() if isinstance(c, type) and issubclass(c, RouterConfig)}
    assert exported - {RouterConfig} == {type(cfg.router) for cfg in TINY.values() if isinstance(cfg, MoEConfig)}


@pytest.mark.parametrize("promise", promises.PROMISES, ids=lambda promise: promise.__name__)
@pytest.mark.parametrize("name", TINY)
def test_promise(name, promise):
    broken = {promises.each_token_by_itself: NOT_BY_ITSELF, promises.counts_every_token_once: COUNTS_PADDING}
    if name in broken.get(promise, ()):
        with pytest.raises(AssertionError):
            promise(TINY[name])
    else:
        promise(TINY[name])
