"""Every op with the arguments to compile it with: what tests/aot proves, benchmarks/tpu_schedule.py measures.

An argument is written `"bf16[BTKH]"`: the letters (efficient_lm/sharding.py) say its shape, given their sizes, and how
it is laid out on a mesh. Lower-case letters have the sizes of the upper-case ones and are whole on every device.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels as kernels

DTYPES = {"bf16": jnp.bfloat16, "f32": jnp.float32, "s32": jnp.int32}

# What tables of speed use: one row of 4096 tokens, 8 heads of 128 x 128, 1024 channels. U = W - 1 inputs are the state
# of a convolution.
SIZES = types.MappingProxyType(
    {"B": 1, "T": 4096, "S": 4096, "N": 8, "K": 8, "H": 128, "P": 128, "F": 1024, "W": 4, "U": 3, "D": 1024, "V": 32768}
)


@dataclasses.dataclass(frozen=True)
class Case:
    op: Callable[..., Any]
    args: Mapping[str, str]
    outs: str
    tpu_kernel: bool
    """Whether a program lowered for a TPU holds a Pallas kernel, in each direction."""
    sizes: Mapping[str, int] = types.MappingProxyType({})
    """Where they differ from those of the table."""
    branches_taken: float = 1.0
    """How often a kernel takes a branch that depends on data, at the sizes of the table."""
    trips: int | None = None
    """Of XLA's loops whose length depends on data, at the sizes of the table."""
    kernel_trips: Mapping[str, float] = types.MappingProxyType({})
    """The same of loops in kernels, on average, by what is in the names of the kernels."""

    def structs(self, arrays: str, sizes: Mapping[str, int]) -> list[jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of `"bf16[BTKH],f32[BTN]"`."""
        sizes = {**sizes, **self.sizes}
        pairs = [array.removesuffix("]").split("[") for array in arrays.split(",")]
        shapes = [tuple(sizes[letter.upper()] for letter in dims) for _, dims in pairs]
        return [jax.ShapeDtypeStruct(shape, DTYPES[dtype]) for shape, (dtype, _) in zip(shapes, pairs, strict=True)]

    @property
    def ins(self) -> str:
        """The arguments in the form of `outs`."""
        return ",".join(self.args.values())

    def unit(self, sizes: Mapping[str, int]) -> tuple[str, float]:
        """Returns what a cost is counted per, and how many of them there are."""
        sizes = {**sizes, **self.sizes}
        tokens, letters = sizes["B"] * sizes["T"], set(self.ins)
        if "N" in letters:
            return "token and head", tokens * sizes["N"]
        return ("token and 128 channels", tokens * sizes["F"] / 128) if "F" in letters else ("token", tokens)

    def in_float32(self) -> "Case":
        wide = {name: array.replace("bf16", "f32") for name, array in self.args.items()}
        return dataclasses.replace(self, args=wide, outs=self.outs.replace("bf16", "f32"))

    def forward(self, impl: str | None = None) -> Callable[..., Any]:
        """Returns the op as a function of its arguments in order."""
        return lambda *args: self.op(**dict(zip(self.args, args, strict=True)), impl=impl)


def letters(arrays: str) -> str:
    """Returns `"BTKH,BTN"` for `"bf16[BTKH],f32[BTN]"`."""
    return ",".join(array.removesuffix("]").split("[")[1] for array in arrays.split(","))


def backward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function of (arguments, cotangents): the outputs, and the gradients of all arguments but integers."""

    def run(args, cotangents):
        outs, pull = jax.vjp(forward, *args)
        return outs, [grad for grad in pull(cotangents) if grad.dtype != jax.dtypes.float0]

    return run


_HEADS = {"q": "bf16[BTKH]", "k": "bf16[BTKH]", "v": "bf16[BTNP]"}
_STATE = {"state": "f32[BNHP]", "segment_ids": "s32[BT]"}
_HEADS_OUT = "bf16[BTNP],f32[BNHP]"

_SPARSE = {"q": "bf16[BTNH]", "k": "bf16[BSKH]", "v": "bf16[BSKP]", "segment_ids": "s32[BS]"}
# 16 of 512 blocks are chosen; 16 query heads to a key/value head.
_LONG = {"T": 2**15, "S": 2**15, "N": 32, "K": 2, "J": 16}


def _grouped_matmul(**args: Any) -> tuple[jax.Array]:
    return (kernels.grouped_matmul(**args),)


CASES = {
    "linear_attention": Case(
        kernels.linear_attention, {**_HEADS, "g": "f32[BTN]", **_STATE}, _HEADS_OUT, tpu_kernel=True
    ),
    "linear_attention_channel": Case(
        kernels.linear_attention, {**_HEADS, "g": "f32[BTNH]", **_STATE}, _HEADS_OUT, tpu_kernel=True
    ),
    "delta_rule": Case(
        kernels.delta_rule, {**_HEADS, "beta": "f32[BTN]", "g": "f32[BTN]", **_STATE}, _HEADS_OUT, tpu_kernel=True
    ),
    "delta_rule_channel": Case(
        kernels.delta_rule, {**_HEADS, "beta": "f32[BTN]", "g": "f32[BTNH]", **_STATE}, _HEADS_OUT, tpu_kernel=True
    ),
    "generalized_delta_rule": Case(
        kernels.generalized_delta_rule,
        {**_HEADS, "a": "bf16[BTKH]", "b": "bf16[BTKH]", "g": "f32[BTNH]", **_STATE},
        _HEADS_OUT,
        tpu_kernel=True,
    ),
    "diagonal_scan": Case(
        kernels.diagonal_scan,
        {"a": "f32[BTF]", "x": "f32[BTF]", "state": "f32[BF]", "segment_ids": "s32[BT]"},
        "f32[BTF],f32[BF]",
        tpu_kernel=True,
    ),
    "selective_scan": Case(
        kernels.selective_scan,
        {
            "x": "bf16[BTF]",
            "dt": "f32[BTF]",
            "A": "f32[FH]",
            "B": "bf16[BTH]",
            "C": "bf16[BTH]",
            "D": "f32[F]",
            "state": "f32[BFH]",
            "segment_ids": "s32[BT]",
        },
        "bf16[BTF],f32[BFH]",
        tpu_kernel=True,
        sizes={"H": 16},
    ),
    "short_conv": Case(
        functools.partial(kernels.short_conv, activation="silu"),
        {"x": "bf16[BTF]", "w": "bf16[FW]", "bias": "bf16[F]", "state": "bf16[BUF]", "segment_ids": "s32[BT]"},
        "bf16[BTF],bf16[BUF]",
        tpu_kernel=True,
    ),
    "attention": Case(
        kernels.attention,
        {"q": "bf16[BTNH]", "k": "bf16[BSKH]", "v": "bf16[BSKP]", "segment_ids": "s32[BT]"},
        "bf16[BTNP],f32[BNT]",
        tpu_kernel=True,
        branches_taken=10 / 16,  # Of 4 x 4 blocks of 1024, those not above the diagonal.
        trips=32 * 33,  # Of 32 x 64 blocks of 128 x 64, the same.
    ),
    "attention_forget": Case(
        kernels.attention,
        {"q": "bf16[BTNH]", "k": "bf16[BSKH]", "v": "bf16[BSKP]", "g": "f32[BSN]", "segment_ids": "s32[BT]"},
        "bf16[BTNP],f32[BNT]",
        tpu_kernel=False,
        trips=32 * 33,
    ),
    "block_sparse_attention": Case(
        functools.partial(kernels.block_sparse_attention, block_size=64, query_block=64),
        {**_SPARSE, "block_ids": "s32[BUKJ]"},
        "bf16[BTNP],f32[BNT]",
        tpu_kernel=True,
        sizes={**_LONG, "U": 2**9},
    ),
    "block_sparse_attention_tokens": Case(
        functools.partial(kernels.block_sparse_attention, block_size=64),
        {**_SPARSE, "block_ids": "s32[BTKJ]"},
        "bf16[BTNP],f32[BNT]",
        tpu_kernel=True,
        sizes=_LONG,
        # 1024 queries forward, 512 backward, each with 16 blocks drawn from those before it: 8 queries of a block are a
        # part, 32 parts a trip, 4096 keys a step. The average of drawing and counting.
        kernel_trips={"forward": 8.6, "backward": 4.66},
    ),
    "grouped_matmul": Case(
        _grouped_matmul,
        {"x": "bf16[Td]", "w": "bf16[edF]", "group_sizes": "s32[e]"},
        "bf16[TF]",
        tpu_kernel=True,
        sizes={"E": 8},
        trips=36,  # Of tiles of 128 rows, half of one for each group beside those that are full.
    ),
    "linear_cross_entropy": Case(
        kernels.linear_cross_entropy,
        {"x": "bf16[BTD]", "w": "bf16[dv]", "labels": "s32[BT]", "weights": "f32[BT]"},
        "f32[BT],f32[BT]",
        tpu_kernel=False,
    ),
}

# One token for each of eight sequences: a path of its own in every recurrent op, without kernels.
DECODING = {
    f"{name}_decode": dataclasses.replace(case, tpu_kernel=False, sizes={**case.sizes, "B": 8, "T": 1})
    for name, case in CASES.items()
    if "state" in case.args
}
CASES |= DECODING
