"""Several processes that train together: how they find one another, and how they fail together."""

import contextlib
import dataclasses
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax._src.distributed import global_state  # What JAX found out; nothing public says it.
from jax.experimental import multihost_utils

from efficient_lm.console import console

_MAX_MESSAGE = 2000  # Bytes of an error that the other processes are told.


class PeerFailed(RuntimeError):
    """Another process of the job could not go on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessesConfig:
    """On TPU pods and with SLURM, Open MPI and Kubernetes JAX finds all of this out by itself."""

    coordinator: str = ""
    """HOST:PORT of process 0, any free port of it that the others reach."""
    count: int | None = None
    """Processes of the job; 1: this one works alone, whatever the cluster says."""
    index: int | None = None
    """Which of them this is, from 0."""
    timeout: int = 300
    """Seconds to wait for the others at the start."""

    def __post_init__(self) -> None:
        if self.count is None or self.count == 1:
            if self.coordinator or self.index:
                raise ValueError("processes.coordinator and processes.index are set; set processes.count, too")
            return
        if self.count < 1 or self.timeout < 1:
            raise ValueError(f"processes.count={self.count} and timeout={self.timeout} must be at least 1")
        if self.index is None or not 0 <= self.index < self.count:
            raise ValueError(
                f"processes.index={self.index} has to be one of 0 to {self.count - 1}, another one in each of the "
                f"{self.count} processes"
            )
        if not self.coordinator.rpartition(":")[2].isdigit() or not self.coordinator.rpartition(":")[0]:
            raise ValueError(
                f"processes.coordinator={self.coordinator!r} has to be HOST:PORT of process 0, the same in all of them"
            )


@contextlib.contextmanager
def joined(cfg: ProcessesConfig) -> Iterator[None]:
    """Makes this process one of a job while it lasts; comes before all that touches devices.

    Without a cluster that JAX knows, and without `cfg.count`, the process works alone. If the others do not come, the
    program ends with one line that says where it waited.

    Raises:
      OSError: process 0 cannot listen where `cfg.coordinator` says.
      ValueError: what the cluster says is wrong.
    """
    with _deadline(cfg.timeout):
        _initialize(cfg)
    console.quiet = global_state.process_id > 0
    try:
        yield
    except BaseException:
        if jax.distributed.is_initialized():
            # At its end JAX waits for the others, which may wait for this process.
            leave = threading.Timer(10, os._exit, [1])
            leave.daemon = True
            leave.start()
        raise


def _initialize(cfg: ProcessesConfig) -> None:
    # With a single task of SLURM, JAX would take one GPU only.
    if cfg.count == 1 or (cfg.count is None and os.environ.get("SLURM_NTASKS") == "1"):
        return
    timeout = cfg.timeout + 60  # Ours comes first: JAX ends the program with a stack trace of C++.
    try:
        if cfg.count is None:
            jax.distributed.initialize(initialization_timeout=timeout)
        else:
            jax.distributed.initialize(
                cfg.coordinator,
                cfg.count,
                cfg.index,
                initialization_timeout=timeout,
                cluster_detection_method="deactivate",
            )
    except jax.errors.JaxRuntimeError as error:
        raise OSError(
            f"process 0 cannot listen at {global_state.coordinator_address} ({str(error).splitlines()[0]}); is the "
            "port taken, perhaps by an earlier run? take another one"
        ) from error
    except ValueError as error:
        if cfg.count is not None or "coordinator_address" not in str(error):
            raise
        # JAX knows no cluster here.


@contextlib.contextmanager
def _deadline(timeout: float) -> Iterator[None]:
    """Ends the program with one line if the block takes longer; JAX waits in C++, where no exception can reach it."""
    done = threading.Event()

    def watch():
        first = min(10, timeout / 2)
        if done.wait(first):
            return
        if global_state.coordinator_address is not None:
            print(f"{_who()} waits for the others at {global_state.coordinator_address}", file=sys.stderr, flush=True)
        if not done.wait(timeout - first):
            print(f"error: {_who()} waited {timeout:.0f} seconds; {_what_is_missing()}", file=sys.stderr, flush=True)
            os._exit(1)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _who() -> str:
    return f"process {global_state.process_id} of {global_state.num_processes}"


def _what_is_missing() -> str:
    """Says what to check, when not all processes have come together."""
    address = global_state.coordinator_address
    if address is None:
        return "the cluster does not say where process 0 is; set --processes.coordinator, count and index"
    everyone = f"all {global_state.num_processes} processes"
    if global_state.process_id == 0:
        return (
            f"not {everyone} came to {address}, where this one listens; have the others been started, with this "
            "address, and does no firewall keep them from it?"
        )
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return f"process 0 does not answer at {address} ({error}); has it been started, and can this machine reach it?"
    return f"process 0 answers at {address}, but not {everyone} came; have they been started, each with its own index?"


@contextlib.contextmanager
def together() -> Iterator[None]:
    """What fails in one process fails in all, at the end of the block; else the others would wait for it forever.

    Raises:
      PeerFailed: the block failed elsewhere, and says with what error.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    if jax.process_count() > 1:
        said = f"{type(failure).__name__}: {failure}".encode()[:_MAX_MESSAGE] if failure is not None else b""
        told = multihost_utils.process_allgather(np.frombuffer(said.ljust(_MAX_MESSAGE, b"\0"), np.uint8))
        texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in np.asarray(told)]
        if failure is None and any(texts):
            index = next(i for i, text in enumerate(texts) if text)
            raise PeerFailed(f"process {index} could not go on: {texts[index]}")
    if failure is not None:
        raise failure


def first_alone[T](make: Callable[[], T]) -> T:
    """Returns what `make` returns; process 0 calls it before the others, which find on disk what it left there."""
    made = []
    for turn in (True, False):
        with together():
            if turn == (jax.process_index() == 0):
                made.append(make())
    return made[0]
