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
from efficient_lm.plan.decoding import Decoding, make_decoding
from efficient_lm.plan.report import plot_decoding, plot_memory, print_decoding, print_plan
from efficient_lm.plan.step import make_plan
from efficient_lm.plan.sweep import REMATS, Sweep
from efficient_lm.sharding import mesh_sizes
from efficient_lm.topologies import parse_mesh, parse_target, prepare_compilers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    config: Annotated[str, tyro.conf.Positional]
    """File of the configuration; what follows beside these options overrides it, as in train.py."""
    on: str
    """Chips and how they are wired: v5e:16x16, v5p:4x4x4, v6e:8x8, tpu7x:2x2x1, h100:8; 2xv5e:16x16 are two slices."""
    mesh: str | None = None
    """Devices along each axis: data=64,model=4; -1 takes those that are left. If not given, all are along data; of
    --decoding, along model."""
    json: Path | None = None
    """File to write everything to, for programs."""
    png: Path | None = None
    """File for a picture of memory; of a sweep, that of the best."""
    decoding: bool = False
    """Says what the next token takes instead of a training step: states, floors of its time, batches that fit."""
    contexts: tuple[int, ...] = (4096, 32768, 131072, 1048576)
    """Lengths of the sequences that are decoded."""
    batches: tuple[int, ...] = (1, 8, 64)
    """Sequences that are decoded together; the most that fit are always tried."""
    sweep: bool = False
    """Tries meshes and remats, and ranks those that fit. An axis that --mesh gives a size keeps it; -1 tries all."""
    remats: tuple[Literal["everything", "dots", "nothing"], ...] = REMATS
    """What a sweep tries for model.remat."""
    results: Path = Path("~/.cache/efficient_lm/plans")
    """Folder where a sweep keeps what it has compiled: killed, the same command goes on."""


def main(args: Arguments, overrides: list[str]) -> None:
    target = parse_target(args.on)
    asked = parse_mesh(args.mesh or ("model=-1" if args.decoding else "data=-1"))
    axes = asked if args.sweep else mesh_sizes(asked, target.num_devices)
    cfg = load_config(args.config, overrides)
    if args.decoding:
        made = make_decoding(cfg.model, target, axes, contexts=args.contexts, batches=args.batches)
        print_decoding(made)
    elif args.sweep:
        sweep = Sweep(args.config, overrides, cfg, target, results=args.results.expanduser(), json=args.json)
        made = sweep.run(axes, args.remats)
    else:
        made = make_plan(cfg, target, axes)
        print_plan(made)
    if args.json is not None and not args.sweep:
        args.json.write_text(json.dumps(made.to_json(), indent=1) + "\n")
    if args.png is not None:
        plot_decoding(made, args.png) if isinstance(made, Decoding) else plot_memory(made, args.png)


if __name__ == "__main__":
    prepare_compilers()
    with one_line_errors(ValueError, OSError):
        known, rest = tyro.cli(
            Arguments, prog="python -m efficient_lm.plan", description=__doc__, return_unknown_args=True
        )
        main(known, rest)
