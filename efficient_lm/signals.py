"""Being told to stop, at the end of a step."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[int], bool]]:
    """Yields `should_stop(step)`, to be asked at every step: whether to save and leave now.

    SIGTERM and SIGINT (Ctrl-C, a notebook's stop button) set it, and no longer end the program; a second SIGINT
    raises KeyboardInterrupt at once. The handlers from before come back at the end.

    With several processes the answer comes from JAX, which watches for SIGTERM by itself and has all processes stop
    after the same step; a handler of ours would take that signal away from it. SIGINT is then left alone.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return

    received: list[int] = []

    def handle(number, _):
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)
        # Not print: a handler may interrupt another print.
        os.write(2, b"stopping after this step; Ctrl-C again stops at once\n")

    # Only the main thread may set handlers. None is a handler that Python did not set and could not set again.
    in_main_thread = threading.current_thread() is threading.main_thread()
    numbers = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) is not None]
    before = {number: signal.signal(number, handle) for number in numbers} if in_main_thread else {}
    try:
        yield lambda step: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
