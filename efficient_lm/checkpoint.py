"""Checkpoints that survive a kill at any moment, fit any mesh, and are never loaded damaged.

The folder of a step holds three orbax items: `state`, the arrays by path; `leaves`, what each of them is and a
fingerprint of its bits (orbax loads a flipped bit without a word); `data`, the position in the data.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, NamedSharding, Sharding
from orbax.checkpoint import v1 as ocp

from efficient_lm.leaves import Tree, check_same, describe, fingerprints, flatten, is_key, to_hex, unflatten
from efficient_lm.seal import DamagedCheckpoint as DamagedCheckpoint
from efficient_lm.seal import Sealed, Text, check_seals

type Record = dict[str, dict[str, Any]]  # What is known of each leaf, by path.

_log = logging.getLogger(__name__)


class SaveFailed(RuntimeError):
    """A checkpoint could not be written; those before it are untouched."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and what to keep."""

    save_every: int = 1000
    keep_last: int = 3
    keep_every: int | None = None  # Steps that are multiples of this one are kept for good.

    def __post_init__(self):
        for name in ("save_every", "keep_last", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")


class Checkpoints:
    """The checkpoints of a run: `with Checkpoints(folder, cfg) as checkpoints: ...`.

    One program at a time may hold a folder.
    """

    def __init__(self, folder: epath.PathLike, cfg: CheckpointConfig):
        self.folder, self.cfg = epath.Path(folder).absolute(), cfg
        # orbax logs one failed save as a thousand lines from seven threads; our errors say it in one.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_is_no_traceback_of_orbax)
        policies = ocp.training.preservation_policies
        # Any: orbax's annotations of its own policies contradict one another.
        keep: Any = policies.LatestN(cfg.keep_last)
        if cfg.keep_every is not None:
            keep = policies.AnyPreservationPolicy([keep, policies.EveryNSteps(cfg.keep_every)])
        self._orbax = ocp.training.Checkpointer(
            self.folder,
            preservation_policy=keep,
            cleanup_tmp_directories=True,
        )
        self._current: int | None = None  # The step that was saved or restored last.

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_):
        self.close()

    @property
    def latest_step(self) -> int | None:
        """The newest step in the folder, sound or not; one that is still being written does not count."""
        return max(_steps(self.folder), default=None)

    def is_due(self, step: int) -> bool:
        return step % self.cfg.save_every == 0

    def save(self, step: int, state: Tree, data: ocp.StatefulCheckpointable | None = None) -> None:
        """Saves in the background; on return the arrays may be donated and the data may move on.

        Waits for the save before it. Saving again the step that was saved or restored last does nothing.

        Raises:
          SaveFailed: this save could not be started, or the one before it failed.
          ValueError: there is a newer checkpoint, or a leaf is no array of JAX.
        """
        self.wait()
        if step == self._current:
            return
        if self.latest_step is not None and step <= self.latest_step:
            raise ValueError(
                f"step {step} is not newer than checkpoint {self.latest_step} in {self.folder}; restore it"
            )
        leaves = flatten(state)
        arrays = {path: jax.random.key_data(x) if is_key(x) else x for path, x in leaves.items()}
        items: dict[str, Any] = {
            # orbax refuses arrays without elements; their record says it all.
            "state": {path: x for path, x in arrays.items() if x.size},
            "leaves": Sealed(Text("leaves.json", _record(leaves, arrays))),
        }
        if data is not None:
            items["data"] = Sealed(data)
        try:
            self._orbax.save_checkpointables_async(step, items, force=True)
        except (OSError, ValueError) as error:
            raise self._clear_failed_save(step, error) from error
        self._current = step

    def check(self) -> None:
        """Raises SaveFailed if the save in the background has failed; does not wait for it."""
        if not self._orbax.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is safe on disk.

        Raises:
          SaveFailed: it could not be written.
        """
        try:
            self._orbax.wait()
        except Exception as error:  # Whatever ended a thread of orbax.
            raise self._clear_failed_save(self._current, error) from error

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._orbax.close()

    def restore(self, abstract_state: Tree, data: ocp.StatefulCheckpointable | None = None) -> tuple[int, Tree] | None:
        """Returns step and state of the newest sound checkpoint, and puts `data` where it was; None if there is none.

        Arrays are laid out as `abstract_state` says; a leaf without a sharding goes where JAX puts new arrays.
        Damaged checkpoints that are newer than the sound one are renamed to `<step>.damaged`.

        Raises:
          DamagedCheckpoint: there are checkpoints, and all are damaged.
          ForeignLeaves: the newest sound checkpoint is one of another model. Nothing was changed.
        """
        self.wait()
        like, damaged = flatten(abstract_state), {}
        for step in reversed(_steps(self.folder)):
            folder, leaves, damage = self.folder / str(step), {}, None
            try:
                record = _read_record(folder)
                saved = {path: leaf["is"] for path, leaf in record.items()}
                check_same(saved, describe(like), what=f"the arrays in {folder}")
                if data is not None:
                    check_seals(folder / "data")
                leaves = _load(folder, record, {path: _placement(x) for path, x in like.items()})
            except DamagedCheckpoint as error:
                damage = str(error)
            damage = _agree(damage)
            if damage is not None:
                _log.warning("checkpoint %s is damaged, going back to an older one: %s", folder, damage)
                damaged[step] = damage
                continue
            for newer in damaged:
                self._set_aside(newer)
            if data is not None:
                ocp.load_checkpointables(folder, {"data": data})
            self._current = step
            return step, unflatten(abstract_state, leaves)
        if damaged:
            reasons = "; ".join(f"{step}: {damage}" for step, damage in damaged.items())
            raise DamagedCheckpoint(f"every checkpoint in {self.folder} is damaged: {reasons}")
        return None

    def _set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint, so that it neither blocks that step nor counts among those to keep."""
        if jax.process_index() == 0:
            target = self.folder / f"{step}.damaged"
            while target.exists():
                target = target.with_name(target.name + "+")
            (self.folder / str(step)).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"checkpoint {step} set aside")
        self._orbax.reload()

    def _clear_failed_save(self, step: int | None, error: Exception) -> SaveFailed:
        """Frees what a failed save left, and returns what to raise."""
        self._current = None
        if jax.process_index() == 0:
            for partial in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
                # A thread of orbax may still be writing there; the rest goes at the next start.
                with contextlib.suppress(OSError):
                    partial.rmtree()
        # orbax has struck off its list what it would have deleted after this save.
        self._orbax.reload()
        is_full = "No space left on device" in str(error)
        reason = "no space left on device" if is_full else f"{type(error).__name__}: {_first_line(error)}"
        return SaveFailed(
            f"checkpoint {step} could not be written to {self.folder}: {reason}; the newest there is {self.latest_step}"
        )


def load_weights(
    folder: epath.PathLike, step: int | None = None, prefix: str = "model"
) -> tuple[int, dict[str, jax.Array]]:
    """Returns a step and its arrays under `prefix`, by path below it, on any machine; changes nothing on disk.

    `step=None` takes the newest sound checkpoint. `leaves.unflatten` puts the arrays into a model.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      DamagedCheckpoint: it is damaged, or all are.
      ValueError: nothing has this prefix.
    """
    folder = epath.Path(folder).absolute()
    steps = _steps(folder)
    if not steps or (step is not None and step not in steps):
        wanted = "checkpoint" if step is None else f"checkpoint {step}"
        raise FileNotFoundError(f"no {wanted} in {folder}; there are {steps}")
    start = f"{prefix}/" if prefix else ""
    for candidate in [*reversed(steps)] if step is None else [step]:
        try:
            record = _read_record(folder / str(candidate))
            leaves = _load(folder / str(candidate), record, {path: None for path in record if path.startswith(start)})
        except DamagedCheckpoint as error:
            if step is not None or candidate == steps[0]:
                raise
            _log.warning("checkpoint %s is damaged, going back to an older one: %s", folder / str(candidate), error)
            continue
        if not leaves:
            tops = sorted({path.split("/")[0] for path in record})
            raise ValueError(f"nothing under {prefix!r} in {folder / str(candidate)}; there is {', '.join(tops)}")
        return candidate, {path.removeprefix(start): x for path, x in leaves.items()}
    raise AssertionError("the oldest checkpoint is returned or raises")


def _steps(folder: epath.Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.exists() else []


def _record(leaves: Mapping[str, jax.Array], arrays: Mapping[str, jax.Array]) -> Callable[[], str]:
    """Describes leaves and the plain arrays that stand for them on disk: those of a typed key are its data.

    The devices begin to read the arrays now, before anyone can donate them; the text is for when they are done.
    """
    descriptions, prints = describe(leaves), fingerprints(arrays)
    record = {
        path: {
            "is": descriptions[path],
            "shape": list(x.shape),
            "dtype": str(x.dtype),
            "key": str(jax.random.key_impl(leaves[path])) if is_key(leaves[path]) else None,
        }
        for path, x in arrays.items()
    }

    def text() -> str:
        return json.dumps(
            {path: record[path] | {"fingerprint": value} for path, value in to_hex(prints).items()}, indent=1
        )

    return text


def _read_record(folder: epath.Path) -> Record:
    check_seals(folder / "leaves")
    return json.loads((folder / "leaves" / "leaves.json").read_text())


def _load(folder: epath.Path, record: Record, placement: Mapping[str, Sharding | None]) -> dict[str, jax.Array]:
    """Returns the leaves named in `placement`, and checks that they are what was saved.

    Raises:
      DamagedCheckpoint: they are not, or cannot be read.
    """
    abstract, arrays = {}, {}
    for path, sharding in placement.items():
        shape, dtype = tuple(record[path]["shape"]), jnp.dtype(record[path]["dtype"])
        if 0 in shape:
            arrays[path] = jnp.zeros(shape, dtype, device=sharding)
        elif sharding is None:
            abstract[path] = np.empty(
                shape, dtype
            )  # orbax puts an array without a sharding back on the devices it had.
        else:
            abstract[path] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    context = ocp.Context()
    context.pytree_options.loading.partial_load = True
    try:
        with context:
            arrays |= ocp.load_checkpointables(folder, {"state": abstract})["state"] if abstract else {}
    except (jax.errors.JaxRuntimeError, MemoryError, PermissionError):
        raise  # The checkpoint may be sound.
    except Exception as error:  # orbax and tensorstore raise many types for a file that is not as it was.
        raise DamagedCheckpoint(f"state cannot be read: {_first_line(error)}") from error
    # Without this, JAX would cut 64 bits to 32.
    wide = any(x.dtype.itemsize == 8 for x in arrays.values())
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        arrays = {path: jnp.asarray(x) for path, x in arrays.items()}
        prints = to_hex(fingerprints(arrays))
    bad = [path for path in arrays if prints[path] != record[path]["fingerprint"]]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise DamagedCheckpoint(f"the bits of {', '.join(bad[:3])}{more} are not those that were saved")
    impls = {path: record[path]["key"] for path in placement}
    return {
        path: arrays[path] if impls[path] is None else jax.random.wrap_key_data(arrays[path], impl=impls[path])
        for path in placement
    }


def _placement(x: jax.Array | jax.ShapeDtypeStruct) -> Sharding | None:
    """Returns where to put a leaf that is to be like `x`."""
    if x.sharding is None or (isinstance(x, jax.Array) and not x.committed):
        return None
    # eval_shape under a mesh gives shardings without devices.
    if isinstance(x.sharding, NamedSharding) and isinstance(x.sharding.mesh, AbstractMesh):
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            raise ValueError(f"{x.sharding} has no devices; restore under jax.set_mesh(mesh)")
        return NamedSharding(mesh, x.sharding.spec, memory_kind=x.sharding.memory_kind)
    return x.sharding


def _agree(damage: str | None) -> str | None:
    """Lets all processes judge a checkpoint alike."""
    if jax.process_count() == 1:
        return damage
    anywhere = multihost_utils.process_allgather(np.asarray(damage is not None)).any()
    return damage or ("another process cannot read it" if anywhere else None)


def _first_line(error: BaseException) -> str:
    """Returns the start of what first went wrong; what orbax wraps it in says less, or something else."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _is_no_traceback_of_orbax(record: logging.LogRecord) -> bool:
    return not (record.exc_info and ("/orbax/" in record.pathname or "tensorstore" in record.getMessage()))
