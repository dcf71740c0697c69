"""What a plan reads from compiled programs, and what it refuses before it compiles; tests/aot/plan.py compiles."""

import dataclasses
import json
import math
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from efficient_lm.config import TrainConfig
from efficient_lm.ffns import MLPConfig, MoEConfig
from efficient_lm.ffns.routers import TopKConfig
from efficient_lm.hlo import SLICES, Collective, Program, collectives, crossed_axes, memory_traffic, replica_groups
from efficient_lm.mixers import AttentionConfig, Mamba2Config
from efficient_lm.model import BlockConfig, ModelConfig
from efficient_lm.optimizer import AdamWConfig
from efficient_lm.plan.report import plot_memory, print_plan, print_sweep
from efficient_lm.plan.step import Plan, device_bytes, memory_of_failure
from efficient_lm.plan.sweep import Candidate, meshes, reason_against
from efficient_lm.sharding import make_mesh, mesh_sizes
from efficient_lm.topologies import CHIPS, parse_mesh, parse_target
from efficient_lm.training import abstract_state, make_train_step

TINY = TrainConfig(
    model=ModelConfig(
        vocab_size=64,
        d_model=16,
        blocks={"A": BlockConfig(mixer=AttentionConfig(num_heads=2, head_dim=8), ffn=MLPConfig(d_ff=32))},
        pattern="A",
        num_periods=3,
    ),
    optimizer=AdamWConfig(learning_rate=1e-3),
    batch_size=8,
    seq_len=4,
    num_steps=1000,
)

FFN = MLPConfig(d_ff=32)
MAMBA2 = BlockConfig(mixer=Mamba2Config(num_heads=4, num_groups=2, key_dim=8, value_dim=4), ffn=FFN)
HYBRID = dataclasses.replace(TINY.model, blocks={"M": MAMBA2, **TINY.model.blocks}, pattern="M A")
RECURRENT = dataclasses.replace(TINY.model, blocks={"M": MAMBA2}, pattern="M")
# What a training step may send: how often, of what kind, along which axes.
PINNED = {
    "transformer": (
        TINY,
        {"data": 4, "model": 2},
        {
            ("all-gather", "data"): 50,
            ("all-gather", "model"): 1,
            ("all-reduce", "data"): 7,
            ("all-reduce", "model"): 19,
            ("all-reduce", "data", "model"): 1,
        },
    ),
    "hybrid": (
        dataclasses.replace(TINY, model=HYBRID),
        {"data": 2, "model": 2, "context": 2},
        {
            ("all-gather", "data"): 140,
            ("all-gather", "model"): 1,
            ("all-gather", "context"): 62,
            ("all-reduce", "data"): 7,
            ("all-reduce", "model"): 37,
            ("all-reduce", "context"): 9,
            ("all-reduce", "data", "context"): 3,
            ("all-reduce", "data", "model", "context"): 1,
            ("reduce-scatter", "context"): 21,
        },
    ),
    "recurrent": (
        dataclasses.replace(TINY, model=RECURRENT),
        {"data": 8},
        {("all-gather", "data"): 56, ("all-reduce", "data"): 6},
    ),
}


@pytest.mark.parametrize("name", PINNED)
def test_sends_what_it_did(name, capfd, monkeypatch):
    """A collective that nobody meant to add shows here; and the compiler never gives up on a layout."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # States of shapes are not what annotations say.
    cfg, axes, pinned = PINNED[name]
    mesh, (optimizer, _) = make_mesh(axes), cfg.optimizer.build(cfg.num_steps)
    with jax.set_mesh(mesh):
        step = make_train_step(cfg, cfg.objective.build(), optimizer).lower(*abstract_state(cfg, optimizer, mesh))
        program = Program(step.compile().as_text() or "")
    assert {(c.kind, *c.axes): c.count for c in collectives(program, mesh.shape)} == pinned
    assert "rematerialization" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "groups", "axes"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", [[0, 1, 2, 3], [4, 5, 6, 7]], ("model",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]], ("data",)),
        ("replica_groups=[1,8]<=[8]", [list(range(8))], ("data", "model")),
        ("replica_groups={}", [list(range(8))], ("data", "model")),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]], ("model",)),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]], ("model",)),
        ("source_target_pairs={{0,4},{4,0}}", [[0, 4], [4, 0]], ("data",)),
        ("source_target_pairs={{0,0},{1,1}}", [[0, 0], [1, 1]], ()),
    ],
)
def test_groups_of_devices(text, groups, axes):
    assert replica_groups(text + ", use_global_device_ids=true", 8) == groups
    assert crossed_axes(groups, {"data": 2, "model": 4}) == axes


def test_what_a_program_sends():
    """Collectives in a loop count as often as it runs, and say which axis they cross."""
    mesh = make_mesh({"data": 2, "model": 4})

    def body(x):
        def step(x, _):
            return jnp.tanh(jax.lax.psum(x, "model")), None

        x, _ = jax.lax.scan(step, x, length=5)
        return jax.lax.all_gather(x, "data"), jax.lax.ppermute(x, "model", [(i, (i + 1) % 4) for i in range(4)])

    with jax.set_mesh(mesh):
        spec = PartitionSpec("data", "model")
        run = jax.shard_map(body, in_specs=spec, out_specs=(PartitionSpec(None, None, "model"), spec), check_vma=False)
        x = jax.ShapeDtypeStruct((64, 512), jnp.float32, sharding=NamedSharding(mesh, spec))
        program = Program(jax.jit(run).lower(x).compile().as_text() or "")
    part = 32.0 * 128 * 4  # Bytes of x on one device.
    assert collectives(program, mesh.shape) == [
        Collective("all-reduce", ("model",), 5, 5 * 2 * 3 / 4 * part),
        Collective("collective-permute", ("model",), 1, part),
        Collective("all-gather", ("data",), 1, part),
    ]
    assert not program.unknown_loops
    # At least what the five sums and the results take, written and read.
    assert 2 * (5 + 1 + 2) * part <= memory_traffic(program) <= 4 * (5 + 1 + 2) * part


def test_what_goes_from_slice_to_slice():
    """As libtpu 0.0.52 writes a gather and a sum over two slices, here in a loop of three; a slice has half of data."""
    handler = 'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",'
    recv = "(f32[%s]{1,0:T(8,128)}, u32[]{:S(2)}, token[]) recv(%%token.0), channel_id=3, " + handler
    program = Program(f"""HloModule train, is_scheduled=true

%body (parts: f32[4,8]) -> f32[4,8] {{
  %recv.1 = {recv % "64,8"}_xla_megascale_target="{{1,2}}x{{0:3}}",_xla_megascale_transfer_type="ALL_GATHER"}}
  %recv.2 = {recv % "16,8"}_xla_megascale_transfer_type="ALL_REDUCE",_xla_megascale_reduce_operation="SUM"}}
  ROOT %all-gather.1 = f32[4,8]{{1,0}} all-gather(%parts), replica_groups={{{{0,2}},{{1,3}}}}, dimensions={{0}}
}}

ENTRY %main (parts: f32[4,8]) -> f32[4,8] {{
  ROOT %while.1 = f32[4,8]{{1,0}} while(%parts), body=%body, backend_config={{"known_trip_count":{{"n":"3"}}}}
}}
""")
    assert collectives(program, {"data": 4, "model": 2}, 2) == [
        Collective("all-gather", SLICES, 3, 3 * 64 * 8 * 4 / 2),
        Collective("all-reduce", SLICES, 3, 3 * 16 * 8 * 4.0),
        Collective("all-gather", ("data",), 3, 3 * 4 * 8 * 4 / 2),
    ]


def test_parameters_and_optimizer_by_arithmetic(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # States of shapes are not what annotations say.
    mesh = make_mesh({"data": 4, "model": 2})
    state, batch = abstract_state(TINY, TINY.optimizer.build(1000)[0], mesh)
    D, F, V, NH, layers = 16, 32, 64, 16, 3
    matrices = V * D + layers * (4 * D * NH + 3 * D * F)
    vectors = D + layers * 2 * D  # Norms lie whole on every device.
    assert device_bytes(state.model) == 4 * (matrices // 8 + vectors)
    # Two moments of AdamW, its counter and the schedule's.
    assert device_bytes(state.opt_state) == 2 * device_bytes(state.model) + 2 * 4
    assert device_bytes(batch) == 3 * 8 * 4 * 4 // 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: parse_target("v4:2x2x1"), "no chip 'v4'; those known are v5e, v5p, v6e, tpu7x, h100"),
        (lambda: parse_target("v5e:16"), "say how many chips there are as --on v5e:4x4"),
        (lambda: parse_target("h100:12"), "take a multiple"),
        (lambda: parse_target("2xh100:8"), "slices are of TPUs; GPUs are one number, as in h100:16"),
        (lambda: parse_target("0xv5e:2x2"), "no chip '0xv5e'"),
        (lambda: parse_target("twoxv5e:2x2"), "no chip 'twoxv5e'"),
        (lambda: parse_mesh("data:8"), "write AXIS=SIZE"),
        (lambda: mesh_sizes({"date": 8}, 8), "mesh axis 'date' is unknown; the axes are"),
        (lambda: mesh_sizes({"data": 4}, parse_target("v5e:4x4").num_devices), "does not use 16 devices"),
        (lambda: _state(model=4), r"2 heads \(N of DNH\) cannot be divided among model=4 devices"),
        (lambda: _state(batch_size=6, data=4, model=2), r"batch_size=6 / grad_accumulation=1: 6 rows .* data=4"),
    ],
)
def test_refuses_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def _state(*, batch_size=8, data=2, model=4):
    cfg = dataclasses.replace(TINY, batch_size=batch_size)
    return abstract_state(cfg, cfg.optimizer.build(1000)[0], make_mesh({"data": data, "model": model}))


def test_devices_of_targets():
    assert parse_target("v5e:16x16").num_devices == 256
    assert parse_target("tpu7x:2x2x1").num_devices == 8  # Two devices to a chip.
    assert parse_target("h100:8").num_devices == 8
    assert parse_target("4xtpu7x:2x2x1").num_devices == 32
    assert parse_target("1xv5e:2x2") == parse_target("v5e:2x2")
    assert parse_mesh("data=64,model=-1") == {"data": 64, "model": -1}


def test_reads_how_much_is_missing():
    said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm capacity"
    assert memory_of_failure(said, 2**30) == (int(19.5 * 2**30), int(15.75 * 2**30))
    said = "the total memory required for HLO temporaries (420.5G) exceeds available HBM (15.75G)."
    assert memory_of_failure(said, 2**30) == (int(420.5 * 2**30), int(15.75 * 2**30))
    with pytest.raises(ValueError, match="does not compile: UNIMPLEMENTED"):
        memory_of_failure("UNIMPLEMENTED: this", 0)


def _plan(**changes):
    plan = Plan(
        on="v5e:2x2",
        mesh={"data": 4},
        batch_size=8,
        seq_len=1000,
        num_parameters=10,
        memory={"parameters": 2**30, "activations, gradients": 2**31},
        peak_bytes=3 * 2**30,
        chip_bytes=CHIPS["v5e"].memory_bytes,
        collectives=[Collective("all-gather", ("data",), 3, 2e9)],
        useful_flops=3e14,
        executed_flops=4e14,
        traffic_bytes=1e9,
        seconds={"computing": 0.5, "memory": 0.1, "network, data": 2.0},
        peak_flops=8e14,
        seconds_to_trace=1.0,
        seconds_to_compile=2.0,
        remarks=["something"],
    )
    return dataclasses.replace(plan, **changes)


def test_floors(tmp_path):
    """The slowest part bounds the speed; what is reported is consistent, and can be drawn, saved and read back."""
    plan = _plan()
    assert (plan.fits, plan.bound, plan.tokens_per_second) == (True, "network, data", 4000.0)
    assert math.isclose(plan.mfu, 3e14 / 2.0 / 8e14)
    assert not dataclasses.replace(plan, peak_bytes=17 * 2**30).fits
    print_plan(plan)
    plot_memory(plan, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").stat().st_size > 1000
    saved = json.loads(json.dumps(plan.to_json()))
    assert saved["bound"] == "network, data"
    assert Plan.from_json(saved) == plan


MOE = BlockConfig(mixer=TINY.model.blocks["A"].mixer, ffn=MoEConfig(router=TopKConfig(top_k=2), num_experts=4, d_ff=8))
EXPERTS = dataclasses.replace(TINY, model=dataclasses.replace(TINY.model, blocks={"A": MOE}))


@pytest.mark.parametrize(
    ("cfg", "asked", "found"),
    [
        (TINY, {}, [{"data": 4}, {"data": 2, "model": 2}, {"model": 4}]),
        (TINY, {"model": 1}, [{"data": 4}]),
        (TINY, {"model": 1, "context": -1}, [{"data": 4}, {"data": 2, "context": 2}, {"context": 4}]),
        # Two rows for four devices.
        (
            dataclasses.replace(TINY, grad_accumulation=4),
            {"model": 1},
            [{"data": 4}, {"data": 2, "context": 2}, {"context": 4}],
        ),
        (EXPERTS, {"data": 2}, [{"data": 2, "expert": 2}, {"data": 2, "model": 2}]),
    ],
)
def test_meshes_that_a_sweep_tries(cfg, asked, found):
    assert meshes(cfg, 4, asked) == found


@pytest.mark.parametrize(
    ("changes", "axes", "reason"),
    [
        ({}, {"data": 4, "model": 2}, ""),
        ({}, {"data": 2, "model": 4}, "2 heads (N of DNH) cannot be divided among model=4 devices"),
        ({"batch_size": 4}, {"data": 8}, "batch_size=4 / grad_accumulation=1: 4 rows (B of BT) cannot be divided"),
        ({"seq_len": 3}, {"data": 4, "context": 2}, "3 tokens (T of BT) cannot be divided among context=2 devices"),
        # Weights and two moments of 2**30 x 16 float32: 192 GiB on 8 devices.
        (
            {"model": dataclasses.replace(TINY.model, vocab_size=2**30)},
            {"data": 8},
            "parameters and optimizer take 24.00 GiB of 16.00",
        ),
    ],
)
def test_rejects_before_compiling(changes, axes, reason, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # States of shapes are not what annotations say.
    said = reason_against(dataclasses.replace(TINY, **changes), parse_target("v5e:4x2"), axes, jax.devices())
    assert said == reason or (reason and reason in said)


def test_ranks_by_what_is_slowest_then_by_what_is_next():
    of = lambda name, **changes: Candidate(mesh={"data": 4}, remat=name, plan=_plan(**changes))
    lacks = of("lacks", peak_bytes=2**40, seconds={"computing": 0.1})
    slow, fast = of("slow"), of("fast", seconds={"computing": 0.5, "memory": 0.4})
    faster = of("faster", seconds={"computing": 0.5, "memory": 0.3})
    ranked = sorted([lacks, slow, fast, faster], key=lambda candidate: candidate.rank)
    assert [candidate.remat for candidate in ranked] == ["faster", "fast", "slow", "lacks"]
    print_sweep([*ranked, Candidate(mesh={"model": 4}, remat="dots", rejected="why " * 30)], parse_target("v5e:2x2"))


@pytest.mark.slow
def test_a_killed_sweep_goes_on(tmp_path):
    """Compiles a tiny model for four chips in two ways, is killed after the first, and keeps what that gave."""
    (tmp_path / "tiny.py").write_text("from tests.test_plan import TINY\n\n\ndef config():\n    return TINY\n")
    results, file = tmp_path / "results", tmp_path / "sweep.json"
    options = ["--on", "v5e:2x2", "--sweep", "--mesh", "model=1", "--remats", "everything", "nothing"]
    command = [sys.executable, "-m", "efficient_lm.plan", str(tmp_path / "tiny.py"), *options]
    command += ["--results", str(results), "--json", str(file), "--seq-len", "8"]
    root = pathlib.Path(__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    start = {"cwd": root, "env": environment, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **start) as process:
        assert process.stdout is not None
        assert any(line.startswith("1/2 ") for line in process.stdout)
        process.send_signal(signal.SIGKILL)
    (first,) = results.glob("*.json")
    written = first.stat().st_mtime_ns
    done = subprocess.run(command, **start)
    assert done.returncode == 0
    assert first.stat().st_mtime_ns == written
    assert len(list(results.glob("*.json"))) == 2
    found = json.loads(file.read_text())["candidates"]
    assert {candidate["remat"] for candidate in found} == {"everything", "nothing"}
    assert all(candidate["plan"]["fits"] and candidate["plan"]["mesh"] == {"data": 4} for candidate in found)
    assert found[0]["plan"]["tokens_per_second"] >= found[1]["plan"]["tokens_per_second"]
    # What is printed can be pasted.
    assert found[0]["command"] in done.stdout
    assert " --seq-len 8" in found[0]["command"]
