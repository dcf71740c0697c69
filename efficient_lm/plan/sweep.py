"""Which mesh, and what remat: compiles the training step for each that may fit, and ranks them.

Each is compiled once, in a process of its own, by the command that plans one; what came out is kept in a folder.
"""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import math
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

import efficient_lm
import pallas_kernels
from efficient_lm.config import TrainConfig
from efficient_lm.config_data import config_to_dict
from efficient_lm.console import console
from efficient_lm.plan.report import SweepProgress, print_sweep
from efficient_lm.plan.step import Plan, device_bytes
from efficient_lm.sharding import make_mesh
from efficient_lm.topologies import GIB, Target
from efficient_lm.training import abstract_state

# From what keeps least to what keeps most: what does not fit with one does not with those after it.
REMATS = ("everything", "dots", "nothing")
# Those that talk most stand last: their devices are neighbours.
AXES = ("data", "context", "expert", "model")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    mesh: dict[str, int]
    remat: str
    plan: Plan | None = None
    rejected: str = ""
    """Why there is no plan."""

    @property
    def rank(self) -> tuple[float, ...]:
        """Sorts the fastest to the front; where the same bounds two, the next slowest part decides."""
        assert self.plan is not None
        return (float(not self.plan.fits), *sorted(self.plan.seconds.values(), reverse=True))

    @property
    def name(self) -> str:
        return f"{mesh_name(self.mesh)}, remat={self.remat}"


def mesh_name(mesh: Mapping[str, int]) -> str:
    """Returns a mesh as --mesh takes it."""
    return ",".join(f"{axis}={size}" for axis, size in mesh.items())


def meshes(cfg: TrainConfig, num_devices: int, asked: Mapping[str, int]) -> list[dict[str, int]]:
    """Returns the meshes to try, those first that split least beside rows.

    `data` and `model` are tried, `expert` if there are experts, `context` if there are fewer rows than devices; and
    what `asked` gives -1. Axes to which it gives a size keep that.

    Raises:
      ValueError: an axis that is unknown, or sizes that no mesh of these devices has.
    """
    for axis, size in asked.items():
        if axis not in AXES:
            raise ValueError(f"mesh axis {axis!r} is unknown; the axes are {', '.join(sorted(AXES))}")
        if size == 0 or size < -1 or num_devices % size:
            raise ValueError(f"mesh axis {axis}={size} does not divide {num_devices} devices")
    variables: Any = jax.tree.leaves(
        jax.eval_shape(lambda: cfg.model.build(rngs=nnx.Rngs(0))), is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    free = {"data", "model", *(axis for axis, size in asked.items() if size == -1)}
    if any("E" in variable.get_metadata().get("dims", "") for variable in variables):
        free.add("expert")
    if cfg.batch_size // cfg.grad_accumulation < num_devices:
        free.add("context")
    divisors = [size for size in range(1, num_devices + 1) if num_devices % size == 0]
    sizes = lambda axis: [asked[axis]] if asked.get(axis, -1) > 0 else divisors if axis in free else [1]
    found = [
        dict(zip(AXES, mesh, strict=True))
        for mesh in itertools.product(*map(sizes, AXES))
        if math.prod(mesh) == num_devices
    ]
    if not found:
        raise ValueError(f"no mesh of {num_devices} devices has {mesh_name(asked)}")
    found.sort(key=lambda mesh: (-mesh["data"], *(mesh[axis] for axis in reversed(AXES))))
    return [{axis: size for axis, size in mesh.items() if size > 1} or {"data": 1} for mesh in found]


def reason_against(cfg: TrainConfig, target: Target, mesh: Mapping[str, int], devices: Sequence[Any]) -> str:
    """Returns why this mesh cannot work, as far as that is known without compiling; empty if it may."""
    optimizer, _ = cfg.optimizer.build(cfg.num_steps)
    try:
        state, batch = abstract_state(cfg, optimizer, make_mesh(mesh, devices))
    except ValueError as error:
        return str(error).partition(";")[0]
    needed, there = device_bytes((state, batch)), target.chip.memory_bytes
    if needed <= there:
        return ""
    return f"parameters and optimizer take {needed / GIB:.2f} GiB of {there / GIB:.2f}"


@dataclasses.dataclass(frozen=True)
class Sweep:
    config: str
    """Its file, and what overrides it, for the processes that compile."""
    overrides: list[str]
    cfg: TrainConfig
    target: Target
    _: dataclasses.KW_ONLY
    results: Path
    """Folder of what was compiled, by all that it follows from."""
    json: Path | None = None

    def run(self, asked: Mapping[str, int], remats: Sequence[str] = REMATS) -> Plan:
        """Compiles, prints and writes; returns the best plan.

        Raises:
          ValueError: nothing fits, or there is nothing to try.
        """
        devices, tried = self.target.devices(), meshes(self.cfg, self.target.num_devices, asked)
        against = {mesh_name(mesh): reason_against(self.cfg, self.target, mesh, devices) for mesh in tried}
        remats = [remat for remat in REMATS if remat in remats]
        done = [
            Candidate(mesh=mesh, remat=remat, rejected=reason)
            for mesh in tried
            if (reason := against[mesh_name(mesh)])
            for remat in remats
        ]
        left = [mesh for mesh in tried if not against[mesh_name(mesh)]]
        self.results.mkdir(parents=True, exist_ok=True)
        console.print(
            f"{self.config} on {self.target.name}: {len(tried)} meshes, {len(left)} to compile with "
            f"{len(remats)} remats each; results are kept in {self.results}"
        )
        stopped = False
        try:
            with SweepProgress(len(left) * len(remats)) as progress:
                for mesh in left:
                    for candidate in self._mesh(mesh, remats, progress):
                        done.append(candidate)
                        self._write(done)
        except KeyboardInterrupt:
            stopped = True
            console.print("stopped; the same command goes on from there", style="bold")
        ranked = self._write(done)
        print_sweep(ranked, self.target)
        best = ranked[0]
        if best.plan is None or not best.plan.fits:
            raise ValueError(f"nothing fits on {self.target.name}: {self._closest(ranked)}")
        console.print(f"best{' so far' if stopped else ''}, to train and to plan:", style="bold green")
        print(f"  {shlex.join(self.train_command(best))}\n  {shlex.join(self.plan_command(best))}")
        return best.plan

    def plan_command(self, candidate: Candidate) -> list[str]:
        options = ["--on", self.target.name, "--mesh", mesh_name(candidate.mesh), *self._overrides(candidate)]
        return ["python", "-m", "efficient_lm.plan", self.config, *options]

    def train_command(self, candidate: Candidate) -> list[str]:
        mesh = [word for axis, size in candidate.mesh.items() for word in (axis, str(size))]
        return ["python", "train.py", self.config, "--mesh", *mesh, *self._overrides(candidate)]

    def _overrides(self, candidate: Candidate) -> list[str]:
        same = candidate.remat == self.cfg.model.remat
        return self.overrides if same else [*self.overrides, "--model.remat", candidate.remat]

    def _mesh(self, mesh: dict[str, int], remats: Sequence[str], progress: SweepProgress) -> Iterator[Candidate]:
        """Yields the plans of one mesh; when one lacks memory, those that keep more are not compiled."""
        lacking = ""
        for remat in remats:
            candidate = Candidate(mesh=mesh, remat=remat, rejected=lacking)
            if not lacking:
                start = time.perf_counter()
                progress.compiling(candidate.name)
                candidate, was_kept = self._compile(candidate)
                progress.compiled(None if was_kept else time.perf_counter() - start)
                if (plan := candidate.plan) is not None and not plan.fits:
                    missing = (plan.peak_bytes - plan.chip_bytes) / GIB
                    lacking = f"not compiled: {remat} keeps less and lacks {missing:.2f} GiB already"
            else:
                progress.compiled(None)
            progress.report(candidate)
            yield candidate

    def _compile(self, candidate: Candidate) -> tuple[Candidate, bool]:
        """Returns the candidate with its plan or the reason against it, and whether it was there already."""
        kept = self.results / f"{self._key(candidate)}.json"
        if kept.exists():
            return _read(candidate, json.loads(kept.read_text())), True
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "plan.json"
            command = [sys.executable, *self.plan_command(candidate)[1:], "--json", str(output)]
            process = subprocess.run(command, capture_output=True, text=True)
            if process.returncode == 0:
                found = {"plan": json.loads(output.read_text())}
            else:
                said = process.stderr.strip().splitlines()
                error = next((line for line in reversed(said) if line.startswith("error: ")), "")
                found = {"rejected": error.removeprefix("error: ")}
                if not error:
                    # Not for want of anything in the configuration: another time it may end well.
                    why = f"signal {-process.returncode}" if process.returncode < 0 else "".join(said[-1:])
                    return dataclasses.replace(candidate, rejected=f"the compiler's process failed: {why}"), False
        new = kept.with_suffix(".new")
        new.write_text(json.dumps(found) + "\n")
        new.replace(kept)
        return _read(candidate, found), False

    def _key(self, candidate: Candidate) -> str:
        cfg = dataclasses.replace(self.cfg, model=dataclasses.replace(self.cfg.model, remat=candidate.remat))
        follows_from = config_to_dict(cfg), self.target.name, mesh_name(candidate.mesh), _versions()
        return hashlib.sha256(json.dumps(follows_from).encode()).hexdigest()[:24]

    def _write(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Returns the candidates, the best first and those without a plan last; writes them if asked to."""
        planned = sorted((c for c in candidates if c.plan is not None), key=lambda candidate: candidate.rank)
        ranked = [*planned, *(candidate for candidate in candidates if candidate.plan is None)]
        if self.json is not None:
            plain = [
                {"mesh": c.mesh, "remat": c.remat, "rejected": c.rejected, "command": shlex.join(self.train_command(c))}
                | {"plan": c.plan and c.plan.to_json()}
                for c in ranked
            ]
            content = {"config": self.config, "on": self.target.name, "candidates": plain}
            self.json.write_text(json.dumps(content, indent=1) + "\n")
        return ranked

    def _closest(self, ranked: Sequence[Candidate]) -> str:
        plans = {c.name: c.plan.peak_bytes - c.plan.chip_bytes for c in ranked if c.plan is not None}
        if not plans:
            return next((c.rejected for c in ranked), "nothing was compiled")
        name = min(plans, key=lambda name: plans[name])
        return f"{name} comes closest and lacks {plans[name] / GIB:.2f} GiB"


def _read(candidate: Candidate, found: dict[str, Any]) -> Candidate:
    plan = found.get("plan")
    return dataclasses.replace(
        candidate, plan=plan and Plan.from_json(plan), rejected=found.get("rejected", "").partition(";")[0]
    )


def _versions() -> dict[str, str]:
    """Returns what a plan follows from beside the configuration: compilers, and the source of the library."""
    installed = {d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    names = ("jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc")
    source = hashlib.sha256()
    for package in (efficient_lm, pallas_kernels):
        for path in sorted(Path(str(package.__file__)).parent.rglob("*.py")):
            source.update(path.read_bytes())
    return {name: installed.get(name, "") for name in names} | {"source": source.hexdigest()}
