"""Trains a configuration: python train.py configs/quickstart.py --num-steps 200

Without a configuration, lists those there are. With one, --help shows everything that can be set.
"""

import os
import sys
from pathlib import Path

# On a CPU a third of the time goes into giving memory back to Linux after each step and getting it again. The C library
# reads its settings when a process starts: start anew, in place, with ones that keep it.
if __name__ == "__main__" and sys.platform == "linux" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
    keep = {"MALLOC_TRIM_THRESHOLD_": "16000000000", "MALLOC_MMAP_THRESHOLD_": "8000000000"}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | keep)

import jax

from efficient_lm.checkpoint import DamagedCheckpoint, SaveFailed
from efficient_lm.cli import list_configs, load_config, one_line_errors
from efficient_lm.trainer import Diverged, fit


def main() -> None:
    if len(sys.argv) < 2:
        list_configs(Path(__file__).parent / "configs")
        return
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(Path("~/.cache/efficient_lm/xla").expanduser()))
    with one_line_errors(ValueError, OSError, DamagedCheckpoint, SaveFailed, Diverged):
        fit(load_config(sys.argv[1], sys.argv[2:]))


if __name__ == "__main__":
    main()
