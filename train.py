"""Trains a configuration: python train.py configs/quickstart.py --num-steps 200

Without a configuration, lists those there are. With one, --help shows everything that can be set.
"""

import os
import sys
from pathlib import Path

from efficient_lm.allocator import keep_freed_memory

if __name__ == "__main__":
    keep_freed_memory()

import jax

from efficient_lm.checkpoint import DamagedCheckpoint, SaveFailed
from efficient_lm.cli import list_configs, load_config, one_line_errors
from efficient_lm.processes import PeerFailed, joined
from efficient_lm.trainer import Diverged, fit


def main() -> None:
    if len(sys.argv) < 2:
        list_configs(Path(__file__).parent / "configs")
        return
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path("~/.cache/efficient_lm/xla").expanduser()))
    with one_line_errors(ValueError, OSError, DamagedCheckpoint, SaveFailed, Diverged, PeerFailed):
        cfg = load_config(sys.argv[1], sys.argv[2:])
        with joined(cfg.processes):
            fit(cfg)


if __name__ == "__main__":
    main()
