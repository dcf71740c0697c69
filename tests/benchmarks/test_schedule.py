"""Reads what libtpu 0.0.52 left of `nest`, compiled for v5e on a grid of 4 x 4 (nest-final_*.txt)."""

import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from benchmarks.schedule.bundles import find_branches, find_loops, read_bundles, read_slots
from benchmarks.schedule.chips import CHIPS
from benchmarks.schedule.cost import cost
from benchmarks.schedule.hlo import glue_cycles, kernel_calls, sorts
from benchmarks.schedule.measure import match
from benchmarks.schedule.pallas import Kernel, find_kernels

FOLDER = pathlib.Path(__file__).parent
BUNDLES = read_bundles((FOLDER / "nest-final_bundles.txt").read_text())
CAPACITY, SLOTS = read_slots((FOLDER / "nest-final_utilization.txt").read_text())


def nest(x_ref, w_ref, o_ref, sum_ref):
    """Seven products of 128 x 128 x 128 in a loop, and a branch at each end of the inner axis of the grid."""

    @pl.when(pl.program_id(1) == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def add(i, carry):
        sum_ref[...] += jnp.dot(x_ref[pl.ds(i * 128, 128)], w_ref[...], preferred_element_type=jnp.float32)
        return carry

    jax.lax.fori_loop(0, 7, add, 0)

    @pl.when(pl.program_id(1) == 3)
    def _():
        o_ref[...] = jnp.tanh(sum_ref[...]).astype(o_ref.dtype)


def call(x, w):
    return pl.pallas_call(
        nest,
        out_shape=jax.ShapeDtypeStruct((512, 128), jnp.bfloat16),
        grid=(4, 4),
        in_specs=[pl.BlockSpec((1024, 128), lambda i, j: (i, j)), pl.BlockSpec((128, 128), lambda i, j: (0, j))],
        out_specs=pl.BlockSpec((128, 128), lambda i, j: (i, 0)),
        scratch_shapes=[pltpu.VMEM((128, 128), jnp.float32)],
        name="nest",
    )(x, w)


def test_bundles():
    assert len(BUNDLES) == len(SLOTS)
    assert CAPACITY["MATMUL"] == 4
    outer, inner = find_loops(BUNDLES)
    # The pipeline walks two trips more than the grid has steps.
    assert (outer.depth, outer.trips, inner.depth, inner.trips) == (1, 18, 2, 7)
    branches = find_branches(BUNDLES, outer, (4, 4))
    assert [branch.chance for branch in branches] == [1 / 4, 1 / 4]


def test_cost():
    """A product of 128 x 128 x 128 is 8 vector matmuls of 16 rows, which 4 matrix units share."""
    chip = CHIPS["v5e"]
    found = cost(BUNDLES, SLOTS, (4, 4), 1e6, chip)
    assert found.mxu_step == 7 * 8 * chip.vmatmul_cycles / 4
    assert found.mxu_step < found.bundles_step < found.schedule / 16
    assert found.cycles == found.schedule
    assert found.remarks == ()
    # One more trip of the inner loop is what its bundles are.
    _, inner = find_loops(BUNDLES)
    assert 7 * (inner.last - inner.first + 1) < found.bundles_step < len(BUNDLES) * 7
    assert found.mxu_occupancy == pytest.approx(found.mxu_step / (found.schedule / 16), rel=0.01)
    slow = cost(BUNDLES, SLOTS, (4, 4), 1e9, chip)
    assert slow.cycles == slow.hbm_floor == 1e9 / 546


def test_wrong_grid_is_told():
    assert cost(BUNDLES, SLOTS, (5, 4), 0, CHIPS["v5e"]).remarks == ("the grid's loop is a guess",)


def loop_of(*bundles):
    """A loop of 16 steps, and the two trips more of the pipeline."""
    lines = ["   0   :  { %s1 = smov.u32 0 }", "   0x1 LB: > { %s9 = sadd.s32 1, %s8 }"]
    lines += [f"   {i + 2:#x}   : > {{ {bundle} }}" for i, bundle in enumerate(bundles)]
    lines += ["   0x99   : > { %p6 = scmp.ge.s32.totalorder %s9, 18 /* loop exit test */ }", "   0x9a   :  {}"]
    found = read_bundles("\n".join(lines))
    (loop,) = find_loops(found)
    assert loop.trips == 18
    return found, loop


@pytest.mark.parametrize(("bound", "is_branch"), [(17, False), (12, True)])
def test_the_branch_around_a_step_is_none(bound, is_branch):
    bundles, loop = loop_of(
        f"%p3 = scmp.ge.s32.totalorder %s9, 1  ;;  %p4 = scmp.lt.s32.totalorder %s9, {bound}",
        "%p5 = pnand %p3, %p4",
        "%9 = sbr.rel (%p5) target = $region7",
        *["%1 = vnop"] * 5,
        "%2 = vnop } /* Start region 7 */ {",
    )
    branches = find_branches(bundles, loop, (16,))
    assert [(branch.first, branch.last, branch.chance) for branch in branches] == [(9, 9, None)] * is_branch


def test_the_cheaper_side_of_a_test_is_taken():
    def side(predicate, region, num_bundles):
        bundles = [f"%9 = sbr.rel ({predicate}) target = $region{region}", *["%1 = vnop"] * (4 + num_bundles)]
        return [*bundles, f"%2 = vnop }} /* Start region {region} */ {{"]

    bundles, _ = loop_of(*side("!%p5", 7, 3), *side("%p5", 8, 11))
    slots = [dict.fromkeys(CAPACITY, 0)] * len(bundles)
    found = cost(bundles, slots, (16,), 0, CHIPS["v5e"])
    assert found.bundles_step == len(bundles) - 2 - 11
    one, _ = loop_of(*side("!%p5", 7, 3), *side("%p6", 8, 11))
    assert cost(one, slots, (16,), 0, CHIPS["v5e"]).bundles_step == len(bundles) - 2


def test_waits_for_results():
    """Two matrix units, one after the other: each result is fetched at once, so neither hides the other."""
    products = [f"%v{unit} = vmatmul.bf16.gmra.mxu{unit} %v8" for unit in range(2)]
    fetches = [["%v1 = vpop.f32.mrf.mxu0"] * 2, ["%v2 = vpop.f32.mrf.mxu1"] * 2]
    bundles, _ = loop_of(products[0], *fetches[0], products[1], *fetches[1])
    slots = [dict.fromkeys(CAPACITY, 0)] * len(bundles)
    chip = CHIPS["v5e"]
    found = cost(bundles, slots, (16,), 0, chip)
    assert (found.bundles_step, found.mxu_step) == (8, chip.vmatmul_cycles)
    assert found.schedule / 16 > 2 * chip.vmatmul_cycles


def test_kernels():
    x, w = jax.ShapeDtypeStruct((4096, 512), jnp.bfloat16), jax.ShapeDtypeStruct((128, 512), jnp.bfloat16)
    both = lambda x, w: jax.lax.scan(lambda total, _: (total + call(x, w), None), call(x, w), length=3)
    once, scanned = find_kernels(jax.jit(both).trace(x, w).jaxpr)
    # The first operand changes at each of the 16 steps, as does the second; the output at each fourth.
    expected = 16 * 1024 * 128 * 2 + 16 * 128 * 128 * 2 + 4 * 128 * 128 * 2
    assert once == Kernel("nest", (4, 4), 1, expected, 0, False)
    assert scanned.calls == 3


HLO = """\
HloModule jit_run, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%cheap (a: f32[8]) -> f32[8] {
  ROOT %copy.1 = f32[8]{0} copy(%a), backend_config={"estimated_cycles":"5"}
}

%dear (a: f32[8]) -> f32[8] {
  ROOT %copy.2 = f32[8]{0} copy(%a), backend_config={"estimated_cycles":"500"}
}

%body (a: (s32[], f32[8])) -> (s32[], f32[8]) {
  %nest.2 = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(run)/nest/pallas_call"}
  %add.1 = f32[8]{0} add(%a, %nest.2), backend_config={"estimated_cycles":"10"}
}

%condition (a: (s32[], f32[8])) -> pred[] {
  %constant.1 = s32[] constant(6)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %multiply.1 = f32[8]{0} multiply(%a, %a), metadata={op_name="x"
}, backend_config={"estimated_cycles":"1"}
  %while.1 = (s32[], f32[8]) while(%t), condition=%condition, body=%body
  %conditional.1 = f32[8]{0} conditional(%p, %a, %a), branch_computations={%cheap, %dear}
}
"""


def test_glue():
    assert glue_cycles(HLO) == (1 + 6 * 10 + 5, 0)
    unknown = HLO.replace("constant(6)", "parameter(0)")
    assert glue_cycles(unknown) == (1 + 10 + 5, 1)
    assert glue_cycles(unknown, trips_by_data=20) == (1 + 20 * 10 + 5, 0)


def test_sorts():
    sort = "  %sort.3 = (s32[4,8]{1,0:T(4,128)}, s32[4,8]{1,0}) sort(%a, %i), dimensions={1}\n"
    hlo = HLO.replace("  %while.1", sort + "  ROOT %sort.4 = s32[8]{0} sort(%a), dimensions={0}\n  %while.1")
    assert sorts(hlo) == {"sort.3": "(s32[4,8], s32[4,8]) along 1", "sort.4": "s32[8] along 0"}
    assert glue_cycles(hlo, None, {"sort.3": 100, "sort.4": 1000}) == (1100 + 1 + 6 * 10 + 5, 0)


def test_match():
    nest = Kernel("nest", (4, 4), 1, 0, 0, False)
    assert kernel_calls(HLO) == [("nest.2", "nest")]
    assert match(kernel_calls(HLO), [nest]) == [("nest.2", nest)]
    assert match([("jvp_nest_.2", "transpose(jvp(nest))")], [nest]) == [("jvp_nest_.2", nest)]
    with pytest.raises(ValueError, match=r"nest\.2"):
        match(kernel_calls(HLO), [Kernel("other", (4,), 1, 0, 0, False)])
