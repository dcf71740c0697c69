"""Compiles every op, forward and backward, for chips that are not here: `python -m tests.aot.gate v5e`.

libtpu compiles for TPUs; XLA and ptxas for H100. The functions are the public ones with `impl=None`: on TPUs the
program has to hold the kernels that benchmarks/ops.py promises, in both directions. Each op is compiled for one device
without a mesh, with float32 operands and heads of 64; and in `per_shard` for a mesh of four, with bfloat16 and 128.
"""

import contextlib
import sys
import time
import traceback
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding

from benchmarks.ops import CASES, Case, backward, letters
from efficient_lm.sharding import make_mesh, per_shard, spec
from efficient_lm.topologies import parse_target, prepare_compilers

TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

# A length that is no multiple of anything; two value heads read one key head.
SMALL = {"B": 1, "T": 300, "S": 300, "N": 2, "K": 1, "H": 64, "P": 64, "F": 192, "W": 4, "U": 3, "D": 128, "V": 1024}
LARGE = SMALL | {"B": 2, "N": 4, "K": 2, "H": 128, "P": 128, "F": 512}


def get_mesh(chip: str) -> Mesh:
    """Returns a mesh of four devices that need not be here."""
    if chip not in TPUS and chip != "h100":
        sys.exit(f"{chip} is not one of {', '.join(TPUS)}, h100")
    return make_mesh({"data": 2, "model": 2}, parse_target(TPUS.get(chip, "h100:4")).devices()[:4])


def compile_case(case: Case, sizes: Mapping[str, int], device: Any, mesh: Mesh | None, expect_kernels: bool) -> None:
    """Compiles forward and backward, for the mesh if there is one.

    Raises:
      AssertionError: a kernel is missing, or one is there that the table does not know of.
    """

    def place(arrays: str) -> list[jax.ShapeDtypeStruct]:
        layout = lambda dims: NamedSharding(mesh, spec(dims)) if mesh else SingleDeviceSharding(device)
        structs = zip(case.structs(arrays, sizes), letters(arrays).split(","), strict=True)
        return [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout(dims)) for x, dims in structs]

    def lower(function, *args):
        platform = "cuda" if device.platform == "gpu" else "tpu"
        return jax.jit(function).trace(*args).lower(lowering_platforms=(platform,))

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if mesh else contextlib.nullcontext():
        forward = per_shard(case.forward(), letters(case.ins), letters(case.outs))
        args, cotangents = place(case.ins), tuple(place(case.outs))
        num_forward = lower(forward, *args).as_text().count("@tpu_custom_call")
        both = lower(backward(forward), args, cotangents)
        num_backward = both.as_text().count("@tpu_custom_call") - num_forward
        compiled = both.compile().as_text() or ""
    assert (num_forward > 0) == expect_kernels, f"{num_forward} kernels in the forward program"
    assert (num_backward > 0) == expect_kernels, f"{num_backward} more kernels in the backward program"
    assert ("tpu_custom_call" in compiled) == expect_kernels, "the kernels were lost in compilation"


def main(chip: str, *forms: str) -> int:
    """Returns how many cases failed, of the forms "device" and "mesh", or of both if none is named."""
    prepare_compilers()
    num_failed, whole_mesh = 0, get_mesh(chip)
    for name, case in CASES.items():
        expect_kernels = case.tpu_kernel and chip in TPUS
        for title, typed, sizes, mesh in (
            ("device", case.in_float32(), SMALL, None),
            ("mesh", case, LARGE, whole_mesh),
        ):
            if forms and title not in forms:
                continue
            start, result = time.perf_counter(), "ok"
            try:
                compile_case(typed, sizes, whole_mesh.devices.flat[0], mesh, expect_kernels)
            except Exception:
                num_failed, result = num_failed + 1, "FAILED\n" + traceback.format_exc()
            print(f"{chip} {name}, {title}: {time.perf_counter() - start:.1f} s, {result}", flush=True)
    return num_failed


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) > 0)
