import os
import signal
import threading

import pytest

from efficient_lm.signals import stop_signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop(number, capfd):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop_signals() as should_stop:
        assert not should_stop(1)
        os.kill(os.getpid(), number)
        assert should_stop(2)
        assert should_stop(3)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert capfd.readouterr().err == "stopping after this step; Ctrl-C again stops at once\n"
    with stop_signals() as should_stop:
        assert not should_stop(4)


def test_a_second_interrupt_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stop_signals() as should_stop:  # noqa: PT012
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert should_stop(1)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_has_no_signals():
    answers = []

    def run():
        with stop_signals() as should_stop:
            answers.append(should_stop(1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert answers == [False]
