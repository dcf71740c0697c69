"""What a run needs on accelerators that are not here: python -m efficient_lm.plan CONFIG --on v5e:16x16 --mesh data=256

The training step itself is compiled for them, ahead of time. What the compiler says is reported: memory, and what is
sent from device to device. Times are floors, so that speeds are upper bounds: every unit works at its peak, all of them
at once.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import tyro

from efficient_lm.cli import load_config, one_line_errors
from efficient_lm.plan.report import plot_memory, print_plan
from efficient_lm.plan.step import make_plan
from efficient_lm.plan.sweep import REMATS, Sweep
from efficient_lm.sharding import mesh_sizes
from efficient_lm.topologies import parse_mesh, parse_target, prepare_compilers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    config: Annotated[str, tyro.conf.Positional]
    """File of the configuration; what follows beside these options overrides it, as in train.py."""
    on: str
    """Chips and how they are wired: v5e:16x16, v5p:4x4x4, v6e:8x8, tpu7x:2x2x1, h100:8."""
    mesh: str = "data=-1"
    """Devices along each axis: data=64,model=4; -1 takes those that are left."""
    json: Path | None = None
    """File to write everything to, for programs."""
    png: Path | None = None
    """File for a picture of memory; of a sweep, that of the best."""
    sweep: bool = False
    """Tries meshes and remats, and ranks those that fit. An axis that --mesh gives a size keeps it; -1 tries all."""
    remats: tuple[Literal["everything", "dots", "nothing"], ...] = REMATS
    """What a sweep tries for model.remat."""
    results: Path = Path("~/.cache/efficient_lm/plans")
    """Folder where a sweep keeps what it has compiled: killed, the same command goes on."""


def main(args: Arguments, overrides: list[str]) -> None:
    target, axes = parse_target(args.on), parse_mesh(args.mesh)
    if not args.sweep:
        axes = mesh_sizes(axes, target.num_devices)
    cfg = load_config(args.config, overrides)
    if args.sweep:
        sweep = Sweep(args.config, overrides, cfg, target, results=args.results.expanduser(), json=args.json)
        plan = sweep.run(axes, args.remats)
    else:
        plan = make_plan(cfg, target, axes)
        print_plan(plan)
        if args.json is not None:
            args.json.write_text(json.dumps(plan.to_json(), indent=1) + "\n")
    if args.png is not None:
        plot_memory(plan, args.png)


if __name__ == "__main__":
    prepare_compilers()
    with one_line_errors(ValueError, OSError):
        known, rest = tyro.cli(
            Arguments, prog="python -m efficient_lm.plan", description=__doc__, return_unknown_args=True
        )
        main(known, rest)
