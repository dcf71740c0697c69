"""What a run leaves on disk, and when it may go on.

config.json    the resolved configuration
command.txt    a line per start
versions.json  a record per distinct environment it ran in
lock           says which process is writing
checkpoints/  metrics.jsonl  plots/  samples/
"""

import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import jax

from efficient_lm.config_data import config_from_dict, config_to_dict, differences
from efficient_lm.processes import together

# What there may be of a run that was killed before it began.
_FIRST_FILES = {"lock", "command.txt", "versions.json", "versions.json.new", "config.json.new"}


class RunFolder:
    """The places of a run. It is locked until `close`, the end of a `with`, or the end of the process."""

    def __init__(self, path: Path, lock: IO[str] | None):
        self.path, self._lock = path, lock
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.plots = path / "plots"
        self.samples = path / "samples"

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_):
        self.close()

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()


def open_run(folder: str | os.PathLike[str], config: Any, *, fresh: bool = False) -> RunFolder:
    """Starts a run in a new folder, or goes on with the one that is there; all processes of a job call this.

    `fresh` moves a run that is there to `<folder>.1`, `<folder>.2`, ... Fields declared with
    `dataclasses.field(metadata={"resumable": True})` may differ from when the run began.

    Raises:
      ValueError: the run that is there has another configuration, or the folder holds something else.
      BlockingIOError: another process is writing this run.
      PeerFailed: one of these, in another process of the job.
    """
    path = Path(folder).absolute()
    with together():
        lock = _begin(path, config, fresh) if jax.process_index() == 0 else None
    with together():
        if not (path / "config.json").exists():
            raise ValueError(
                f"process {jax.process_index()} on {socket.gethostname()} does not see {path}, which process 0 made; "
                "pass a --run-dir on a file system that all share"
            )
    return RunFolder(path, lock)


def read_config(folder: str | os.PathLike[str], *, packages: Sequence[str] = ("efficient_lm",)) -> Any:
    """Returns the configuration of the run in `folder`.

    Raises:
      ValueError: there is no run, or it was written by a version that had other classes or fields.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} is not the folder of a run: it has no config.json")
    return config_from_dict(json.loads(path.read_text()), packages=packages)


def _begin(path: Path, config: Any, fresh: bool) -> IO[str]:
    """Makes or checks the folder, and returns its lock."""
    _check_is_run(path)
    lock = _lock(path)
    try:
        if fresh and (path / "config.json").exists():
            lock = _move_aside(path, lock)
        _check_config(path, config)
        _write_files(path, config)
    except BaseException:
        lock.close()
        raise
    return lock


def _lock(path: Path) -> IO[str]:
    """Locks a folder, making it if need be; the system lets go of the lock when the process ends, however it ends."""
    while True:
        path.mkdir(parents=True, exist_ok=True)
        lock = open(path / "lock", "a+")  # noqa: SIM115 (it stays open as long as the run)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read() or "another process"
            lock.close()
            hint = "close() the earlier one" if holder == _this_process() else "stop it, or pass another --run-dir"
            raise BlockingIOError(f"{path} is being written by {holder}; {hint}") from None
        # Meanwhile another process may have moved the folder aside.
        if (path / "lock").exists() and os.path.samestat(os.stat(path / "lock"), os.fstat(lock.fileno())):
            lock.truncate(0)
            lock.write(_this_process())
            lock.flush()
            return lock
        lock.close()


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _move_aside(path: Path, lock: IO[str]) -> IO[str]:
    """Renames the folder, and returns the lock of a new one in its place."""
    number = 1
    while (target := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(target)
    lock.close()
    return _lock(path)


def _check_is_run(path: Path) -> None:
    """Raises ValueError if there is a folder that is neither empty nor that of a run."""
    if path.exists() and not (path / "config.json").exists():
        strangers = sorted({entry.name for entry in path.iterdir()} - _FIRST_FILES)
        if strangers:
            held = ", ".join(strangers[:5])
            raise ValueError(f"{path} is not the folder of a run and holds {held}; pass another --run-dir")


def _check_config(path: Path, config: Any) -> None:
    """Raises ValueError if there is a run that `config` does not continue; one without a checkpoint may change."""
    if (path / "config.json").exists() and any((path / "checkpoints").glob("*")):
        faults = differences(json.loads((path / "config.json").read_text()), config)
        if faults:
            raise ValueError(
                f"{path} holds a run of another configuration:\n  "
                + "\n  ".join(faults)
                + "\nPass --fresh to start anew (the old run is moved aside), or another --run-dir."
            )


def _write_files(path: Path, config: Any) -> None:
    plain = config_to_dict(config)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with open(path / "command.txt", "a") as file:
        file.write(f"{now} {shlex.join(['python', *sys.argv])}\n")
    records = json.loads((path / "versions.json").read_text()) if (path / "versions.json").exists() else []
    if not records or records[-1] != _versions():
        _write_json(path / "versions.json", [*records, _versions()])
    # After those: this file is what makes the folder one of a run.
    _write_json(path / "config.json", plain)
    for name in ("plots", "samples"):
        (path / name).mkdir(exist_ok=True)


def _write_json(path: Path, content: Any) -> None:
    """Replaces a file as a whole."""
    new = path.with_name(path.name + ".new")
    new.write_text(json.dumps(content, indent=2) + "\n")
    new.replace(path)


def _versions() -> dict[str, Any]:
    distributions = {d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    packages = ("efficient-lm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
    source = Path(__file__).parents[1]
    commit = None
    if (source / ".git").exists() and shutil.which("git"):
        done = subprocess.run(["git", "-C", source, "describe", "--always", "--dirty"], capture_output=True, text=True)
        commit = done.stdout.strip() or None
    return {
        "python": platform.python_version(),
        **{name: distributions.get(name) for name in packages},
        "commit": commit,
        "platform": platform.platform(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS"),
    }
