"""Batches made ahead in a thread."""

import queue
import threading
from typing import Any

from efficient_lm.data.batch import Batch
from efficient_lm.data.packing import PackedRows


class Prefetch:
    """Takes up to `size` batches ahead; its state is the one after the last batch that was taken from it."""

    def __init__(self, rows: PackedRows, size: int):
        self._rows = rows
        self._size = size
        self._state = rows.get_state()
        self._queue: queue.Queue[Any] = queue.Queue(size)
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def __next__(self) -> Batch:
        if self._size == 0:
            batch, self._state = next(self._rows), self._rows.get_state()
            return batch
        if self._thread is None:
            self._queue, self._stop = queue.Queue(self._size), threading.Event()
            self._thread = threading.Thread(target=self._run, args=(self._queue, self._stop), daemon=True)
            self._thread.start()
        item = self._queue.get()
        if isinstance(item, Exception):
            self._thread = None
            raise item
        batch, self._state = item
        return batch

    def get_state(self) -> dict[int, list[int]]:
        return self._state

    def set_state(self, state: dict[int, list[int]]) -> None:
        self.close()
        self._rows.set_state(state)
        self._state = self._rows.get_state()

    def close(self) -> None:
        """Ends the thread and forgets what was made ahead."""
        if self._thread is not None:
            self._stop.set()
            while self._thread.is_alive():
                while not self._queue.empty():
                    self._queue.get()  # The thread may wait for room.
                self._thread.join(0.01)
            self._thread = None
            self._rows.set_state(self._state)

    def _run(self, out: queue.Queue[Any], stop: threading.Event) -> None:
        try:
            while not stop.is_set():
                out.put((next(self._rows), self._rows.get_state()))
        except Exception as error:  # Raised where the batch is taken.
            out.put(error)
