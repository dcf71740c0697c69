"""The C library's memory, kept between steps."""

import os
import sys

_KEEP = {
    "MALLOC_TRIM_THRESHOLD_": "16000000000",
    "MALLOC_MMAP_THRESHOLD_": "8000000000",
    "MALLOC_ARENA_MAX": "1",  # Arenas of other threads have no room for large arrays, and get new memory for each.
}


def keep_freed_memory() -> None:
    """Starts the program anew, in place, with settings that the C library reads only when a process starts.

    On a CPU a third of a step would go into giving its memory back to Linux and getting it again. Call this before
    anything takes time; where the settings are there already, and on other systems, it does nothing.
    """
    if sys.platform == "linux" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | _KEEP)
