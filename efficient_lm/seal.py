"""Files that a checkpoint holds beside arrays, with digests that tell whether they are still what was written.

`Text` and `Sealed` are checkpointables in the sense of orbax (`StatefulCheckpointable`).
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import jax
from etils import epath


class DamagedCheckpoint(RuntimeError):
    """What was written cannot be read back as it was."""


class Text:
    """A file, written by the first process; `text` is called in the background."""

    def __init__(self, name: str, text: Callable[[], str]):
        self.name, self.text = name, text

    async def save(self, directory: Any) -> Awaitable[None]:
        async def write():
            if jax.process_index() == 0:
                (await directory.await_creation() / self.name).write_text(self.text())

        return write()

    async def load(self, directory: epath.Path) -> Awaitable[None]:
        raise NotImplementedError("it is read as a file")


class _Ready:
    """A folder that is there already, in the form in which orbax hands out folders."""

    def __init__(self, path: epath.Path):
        self.path = path

    def __truediv__(self, other: str) -> "_Ready":
        return _Ready(self.path / other)

    async def await_creation(self) -> epath.Path:
        self.path.mkdir(parents=True, exist_ok=True)
        return self.path


class Sealed:
    """Saves what `inner` saves, with the digests of its files beside them."""

    def __init__(self, inner: Any):
        self.inner = inner

    async def save(self, directory: Any) -> Awaitable[None]:
        # Processes share the folder; in one of its own each knows which files it wrote.
        scratch = Path(tempfile.mkdtemp())
        writing = await self.inner.save(_Ready(epath.Path(scratch)))

        async def write():
            await writing
            folder, digests = await directory.await_creation(), {}
            for path in sorted(path for path in scratch.rglob("*") if path.is_file()):
                name, content = path.relative_to(scratch).as_posix(), path.read_bytes()
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
                digests[name] = hashlib.sha256(content).hexdigest()
            seal = {"processes": jax.process_count(), "sha256": digests}
            (folder / f"seal_{jax.process_index()}.json").write_text(json.dumps(seal))
            shutil.rmtree(scratch)

        return write()

    async def load(self, directory: epath.Path) -> Awaitable[None]:
        return await self.inner.load(directory)


def check_seals(folder: epath.Path) -> None:
    """Raises DamagedCheckpoint unless the files in `folder` are as they were when `Sealed` wrote them."""
    try:
        seals = [json.loads(path.read_bytes()) for path in folder.glob("seal_*.json")]
        if not seals or len(seals) != seals[0]["processes"]:
            raise DamagedCheckpoint(f"{folder.name} is incomplete")
        for name, digest in [pair for seal in seals for pair in seal["sha256"].items()]:
            if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
                raise DamagedCheckpoint(f"{folder.name}/{name} is not what was written")
    except PermissionError:
        raise  # The checkpoint may be sound.
    except (OSError, ValueError, KeyError) as error:
        raise DamagedCheckpoint(f"{folder.name} cannot be read: {error}") from error
