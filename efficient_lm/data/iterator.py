"""The training batches, and where they stand in a checkpoint."""

import json
from collections.abc import Awaitable, Iterator
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from efficient_lm.data.batch import Batch
from efficient_lm.data.packing import PackedRows, see_each_other
from efficient_lm.data.prefetch import Prefetch


class TrainIterator:
    """Endless training batches; a `StatefulCheckpointable` of Orbax.

    `identity` says what the data are; a checkpoint of other data is refused.
    """

    def __init__(
        self, rows: PackedRows, *, batch_size: int, document_mask: bool, prefetch: int, identity: dict[str, str]
    ):
        self._batches = Prefetch(rows, prefetch)
        self._batch_size = batch_size
        self._document_mask = document_mask
        self._identity = identity

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        return batch if self._document_mask else see_each_other(batch)

    def get_state(self) -> dict[str, Any]:
        """Returns the state after the last batch that was taken, ready for JSON."""
        rows = {str(row): numbers for row, numbers in self._batches.get_state().items()}
        return {"batch_size": self._batch_size, "identity": self._identity, "rows": rows}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where `state` was taken, by the same rows or by others of the same global batch.

        Raises:
          ValueError: it is the state of other data or of another batch size.
        """
        if state["batch_size"] != self._batch_size:
            raise ValueError(
                f"the checkpoint was written with batch_size {state['batch_size']}, not {self._batch_size}; "
                "each row is a stream of its own: keep the batch size or start a new run folder"
            )
        then, now = state["identity"], self._identity
        changes = [f"{key}: then {then.get(key)}, now {now[key]}" for key in now if then.get(key) != now[key]]
        if changes:
            raise ValueError(
                f"the data are not those of the checkpoint ({'; '.join(changes)}); "
                "restore them or start a new run folder"
            )
        self._batches.set_state({int(row): numbers for row, numbers in state["rows"].items()})

    def close(self) -> None:
        """Ends the thread that makes batches ahead."""
        self._batches.close()

    async def save(self, directory: ocp.path.PathAwaitingCreation) -> Awaitable[None]:
        """Notes the state now; what this returns writes it. Each host writes a file for its rows."""
        state = self.get_state()
        rows = [int(row) for row in state["rows"]]
        # Hosts may share rows, where one model lies across them, or have rows between those of another.
        name = f"rows_{rows[0]:06d}_{rows[-1]:06d}_{jax.process_index()}.json"

        async def write() -> None:
            folder = await directory.await_creation()
            (folder / name).write_text(json.dumps(state))

        return write()

    async def load(self, directory: ocp.path.Path) -> Awaitable[None]:
        """Goes to the saved state, written by any number of hosts."""

        async def read() -> None:
            states = [json.loads(file.read_text()) for file in sorted(directory.glob("rows_*.json"))]
            if not states:
                raise ValueError(f"{directory} holds no data state (rows_*.json); take another checkpoint")
            self.set_state(states[0] | {"rows": {k: v for state in states for k, v in state["rows"].items()}})

        return read()
