"""What the study compares, as plain data: stacks of 13 blocks, budgets, and what the paper says of them.

The paper is arXiv 2510.04800. Its figures here are nats per token on DCLM, of its models of 1 B and of 350 M.
"""

import dataclasses
from typing import Any

from efficient_lm.ffns import MLPConfig, MoEConfig
from efficient_lm.ffns.routers import TopKConfig
from efficient_lm.mixers import AttentionConfig, Mamba2Config, ParallelMixerConfig
from efficient_lm.model import BlockConfig, ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """How large, how long, how often."""

    d_model: int
    vocab_size: int
    """Tokens of text; those of the synthetic tasks come on top."""
    batch_size: int
    seq_len: int
    num_steps: int
    num_seeds: int
    extended: bool
    """Also what takes longer: more blocks with both, more experts, and the ratios at equal operations."""
    contexts: tuple[int, ...]
    """Tokens in the cache when decoding is timed."""
    learning_rate: float = 2e-2


# Two CPU cores for 20 minutes, the same for a day, an accelerator. Only the small one was ever run. Of its minutes,
# compiling takes six (8 to 35 s a cell, 4 s for each block outside a scan), and 48 trainings take eight, at 35 ms a
# step for attention and 60 ms for Mamba-2. Decoding takes one.
BUDGETS = {
    "small": Budget(
        d_model=32,
        vocab_size=512,
        batch_size=16,
        seq_len=64,
        num_steps=180,
        num_seeds=3,
        extended=False,
        contexts=(512, 4096, 32768),
    ),
    "medium": Budget(
        d_model=64,
        vocab_size=1024,
        batch_size=16,
        seq_len=256,
        num_steps=1500,
        num_seeds=5,
        extended=True,
        contexts=(512, 2048, 8192, 32768),
    ),
    "large": Budget(
        d_model=256,
        vocab_size=4096,
        batch_size=64,
        seq_len=1024,
        num_steps=5000,
        num_seeds=5,
        extended=True,
        contexts=(2048, 8192, 32768, 131072),
        learning_rate=5e-3,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One model of the study."""

    name: str
    stack: tuple[str, str, int, str]
    """Prefix, period, number of periods, tail: A is attention, M Mamba-2, H both side by side."""
    hybrid: dict[str, Any] = dataclasses.field(default_factory=dict)
    """How H differs from the block that the paper chose, as fields of ParallelMixerConfig."""
    heads: int = 2
    """Heads of attention in H, of four."""
    experts: bool = False
    equal_flops: bool = False
    """Trained on as many operations as attention alone, instead of on as many tokens."""
    paper: tuple[float, ...] = ()
    """Nats per token there, at 1 B and, where there is one, at 350 M."""


ATTENTION, MAMBA = ("", "A", 13, ""), ("", "M", 13, "")
ONE_TO_FIVE, SIDE_BY_SIDE = ("", "M M M A M M", 2, "M"), ("", "H", 13, "")

RATIOS = (
    Cell(name="1:0", stack=ATTENTION, paper=(2.750, 2.882)),
    Cell(name="1:1", stack=("", "M A", 6, "M"), paper=(2.725, 2.850)),
    Cell(name="1:3", stack=("", "M M A M", 3, "M"), paper=(2.733, 2.858)),
    Cell(name="1:5", stack=ONE_TO_FIVE, paper=(2.735, 2.860)),
    # In the ninth block; in the seventh, the middle, the paper has 2.741 and 2.861.
    Cell(name="1:12", stack=("", "M", 8, "A M M M M"), paper=(2.740, 2.862)),
    Cell(name="0:1", stack=MAMBA, paper=(2.758, 2.880)),
)
PLACES = (
    Cell(name="1:12, first", stack=("A", "M", 12, ""), paper=(2.771, 2.898)),
    Cell(name="1:12, last but one", stack=("", "M", 11, "A M"), paper=(2.746,)),
)
INTRA = (
    Cell(name="intra 1:0", stack=SIDE_BY_SIDE, paper=(2.712, 2.847)),
    Cell(
        name="intra, joint",
        stack=SIDE_BY_SIDE,
        hybrid={"fusion": "add", "joint_projection": True},
        paper=(2.721, 2.857),
    ),
    Cell(
        name="intra, joint, no norm",
        stack=SIDE_BY_SIDE,
        hybrid={"norm": None, "fusion": "add", "joint_projection": True},
        paper=(2.738, 2.870),
    ),
)
EXPERTS = (Cell(name="0:1, experts", stack=MAMBA, experts=True, paper=(2.673,)),)
# At 4.5e20 operations each; the paper's attention at equal operations is its attention at equal tokens.
EXTENDED = (
    Cell(name="intra 1:5", stack=("", "M M M H M M", 2, "M"), paper=(2.728, 2.858)),
    Cell(
        name="intra, joint, gate",
        stack=SIDE_BY_SIDE,
        hybrid={"fusion": "gate", "joint_projection": True},
        paper=(2.751,),
    ),
    # The paper's widths of queries and of Mamba-2 are 512 : 1280 here, concatenated; 1152 : 1152 has 2.715 and 2.846.
    Cell(name="intra, 1/4 attention", stack=SIDE_BY_SIDE, heads=1, paper=(2.724, 2.878)),
    Cell(name="1:0, experts", stack=ATTENTION, experts=True, paper=(2.656,)),
    Cell(name="1:5, experts", stack=ONE_TO_FIVE, experts=True, paper=(2.653,)),
    *(
        dataclasses.replace(cell, name=f"{cell.name}, equal FLOPs", equal_flops=True, paper=(paper,))
        for cell, paper in zip(RATIOS[1:], (2.710, 2.716, 2.716, 2.721, 2.736), strict=True)
    ),
)
RECALLED = ("1:0", "1:1", "1:12", "0:1")  # Trained once more, on recall and needles.
DECODED = ("1:0", "1:1", "1:5", "1:12", "0:1")

# What the paper finds: the first of two cells has the lower loss.
CLAIMS = (
    ("a hybrid beats attention alone", "1:1", "1:0"),
    ("a hybrid beats Mamba-2 alone", "1:1", "0:1"),
    ("so does one with little attention: attention alone", "1:5", "1:0"),
    ("so does one with little attention: Mamba-2 alone", "1:5", "0:1"),
    ("more attention is better", "1:1", "1:12"),
    ("attention must not come first", "1:12", "1:12, first"),
    ("rather in the middle than at the end", "1:12", "1:12, last but one"),
    ("side by side beats attention alone", "intra 1:0", "1:0"),
    ("side by side beats one after the other", "intra 1:5", "1:5"),
    ("branches need norms", "intra, joint", "intra, joint, no norm"),
    ("each branch wants a projection of its own", "intra 1:0", "intra, joint"),
    ("a gate between branches harms", "intra, joint", "intra, joint, gate"),
    ("half of the width for attention beats a quarter", "intra 1:0", "intra, 1/4 attention"),
    ("experts help attention", "1:0, experts", "1:0"),
    ("experts help the hybrid", "1:5, experts", "1:5"),
    ("experts help Mamba-2", "0:1, experts", "0:1"),
)


def cells(budget: Budget) -> tuple[Cell, ...]:
    return RATIOS + PLACES + INTRA + EXPERTS + (EXTENDED if budget.extended else ())


def model_config(cell: Cell, d_model: int, vocab_size: int) -> ModelConfig:
    """Returns a model in which blocks of all kinds have nearly as many parameters, and do nearly as much for a token.

    Mamba-2 is as wide as the model, with keys of 16; the paper's is twice as wide, and attention gets more blocks.
    """
    H = d_model // 4
    mamba = Mamba2Config(num_heads=4, key_dim=16, value_dim=H)
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=H)
    half = AttentionConfig(num_heads=cell.heads, num_kv_heads=1, head_dim=H)
    other_half = dataclasses.replace(mamba, num_heads=4 - cell.heads)
    both = ParallelMixerConfig(first=half, second=other_half, **cell.hybrid)
    ffn = MLPConfig(d_ff=2 * d_model)
    if cell.experts:
        # One for all tokens and one of eight, each half as wide.
        router = TopKConfig(top_k=1, scores="sigmoid", renormalize=False, bias_rate=1e-3)
        ffn = MoEConfig(router=router, num_experts=8, d_ff=d_model, shared=MLPConfig(d_ff=d_model))
    prefix, pattern, num_periods, tail = cell.stack
    return ModelConfig(
        vocab_size=vocab_size,
        d_model=d_model,
        blocks={
            letter: BlockConfig(mixer=mixer, ffn=ffn)
            for letter, mixer in {"A": attention, "M": mamba, "H": both}.items()
        },
        prefix=prefix,
        pattern=pattern,
        num_periods=num_periods,
        tail=tail,
        dtype="float32",
        remat="nothing",
    )
