"""Batches made ahead in a thread."""

import queue
import threading
import weakref
from typing import Any

from efficient_lm.data.batch import Batch
from efficient_lm.data.packing import PackedRows


class Prefetch:
    """Takes up to `size` batches ahead; its state is the one after the last batch that was taken from it."""

    def __init__(self, rows: PackedRows, size: int):
        self._rows = rows
        self._size = size
        self._state = rows.get_state()
        self._ahead: queue.Queue[Any] | None = None
        self._end = lambda: None

    def __next__(self) -> Batch:
        if self._size == 0:
            batch, self._state = next(self._rows), self._rows.get_state()
            return batch
        if self._ahead is None:
            self._ahead = self._start()
        item = self._ahead.get()
        if isinstance(item, Exception):
            self._ahead = None
            raise item
        batch, self._state = item
        return batch

    def get_state(self) -> dict[int, list[int]]:
        return self._state

    def set_state(self, state: dict[int, list[int]]) -> None:
        """Goes to where `state` was taken and forgets what was made ahead."""
        self._end()
        self._ahead = None
        self._rows.set_state(state)
        self._state = self._rows.get_state()

    def close(self) -> None:
        """Ends the thread."""
        self.set_state(self._state)

    def _start(self) -> queue.Queue[Any]:
        ahead, stop = queue.Queue(self._size), threading.Event()
        thread = threading.Thread(target=_run, args=(self._rows, ahead, stop), name="prefetch", daemon=True)
        thread.start()
        # Also when this object is forgotten, and before the interpreter ends: it cannot take a thread in C++ with it.
        self._end = weakref.finalize(self, _end, thread, ahead, stop)
        return ahead


def _run(rows: PackedRows, ahead: queue.Queue[Any], stop: threading.Event) -> None:
    try:
        while not stop.is_set():
            ahead.put((next(rows), rows.get_state()))
    except Exception as error:  # Raised where the batch is taken.
        ahead.put(error)


def _end(thread: threading.Thread, ahead: queue.Queue[Any], stop: threading.Event) -> None:
    stop.set()
    while thread.is_alive():
        while not ahead.empty():
            ahead.get()  # The thread may wait for room.
        thread.join(0.01)
