"""Compiles one program for a TPU with libtpu's dump on, in a process of its own: flags are read once in a process.

Run as a program it is that process. It needs JAX, libtpu and what the program imports: the environments of peers have
no more.
"""

import dataclasses
import importlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What `build` of a module of programs returns."""

    function: Callable[..., Any]
    args: Any
    """Shapes and dtypes."""
    packages: tuple[str, ...] = ()
    """Whose versions matter, beside those of JAX and libtpu."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    module: str
    """Its `build(name, backward, impl)` returns the Program."""
    name: str
    backward: bool
    impl: str | None = None
    python: str = sys.executable


def run(job: Job, topology: str, folder: pathlib.Path) -> dict[str, Any]:
    """Leaves the dump in `folder`; returns the kernels of the traced program, versions, and bytes of memory.

    Raises:
      RuntimeError: it does not compile; the message is the last of what the process said.
    """
    (folder / "llo").mkdir(parents=True)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_STDERR_LOG_LEVEL": "3",
        "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder / 'llo'} --xla_jf_dump_llo_text=true "
        # The other passes are a gigabyte.
        "--xla_jf_dump_llo_pass_label_regex=^final",
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    spec = {"job": dataclasses.asdict(job), "topology": topology, "folder": str(folder)}
    done = subprocess.run(
        [job.python, "-m", __name__, json.dumps(spec)], env=environment, capture_output=True, text=True, check=False
    )
    answer = folder / "answer.json"
    if done.returncode or not answer.exists():
        raise RuntimeError("\n".join(done.stderr.strip().splitlines()[-5:]))
    return json.loads(answer.read_text())


def main(spec: dict[str, Any]) -> None:
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from benchmarks.schedule.pallas import find_kernels

    job, folder = Job(**spec["job"]), pathlib.Path(spec["folder"])
    device = topologies.get_topology_desc(platform="tpu", topology_name=spec["topology"]).devices[0]
    # Kernels that ask which TPU they are for find it in the mesh.
    mesh = Mesh(np.array([device]), ("one",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = importlib.import_module(job.module).build(job.name, job.backward, job.impl)
        replicated = NamedSharding(mesh, PartitionSpec())
        args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), program.args)
        traced = jax.jit(program.function).trace(*args)
        kernels = list(find_kernels(traced.jaxpr))
        compiled = traced.lower().compile()
    (folder / "program.hlo").write_text(compiled.as_text() or "")
    memory = compiled.memory_analysis()
    assert memory is not None
    answer = {
        "kernels": [dataclasses.asdict(kernel) for kernel in kernels],
        "temporary_bytes": memory.temp_size_in_bytes,
        "argument_and_output_bytes": memory.argument_size_in_bytes + memory.output_size_in_bytes,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "libtpu", *program.packages)},
    }
    (folder / "answer.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
