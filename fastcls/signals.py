"""What asks a run to stop: heeded by the training, left to it by the processes that help."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

# Ctrl-C, what schedulers of batch jobs send before they kill, and the end of a terminal.
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Within, :data:`STOPS` only make the yielded function return True; a second Ctrl-C interrupts.

    So the running step ends and what is saved belongs together.
    """
    came = []

    def note(signum, frame):
        # Of the others a second may come by itself: from the shell beside the terminal's own.
        if signum == signal.SIGINT and signum in came:
            raise KeyboardInterrupt
        came.append(signum)

    if threading.current_thread() is not threading.main_thread():  # signals go to the main one
        yield lambda: False
        return
    # After nohup the end of the terminal stays ignored; None is not Python's to put back.
    kept = [s for s in STOPS[1:] if signal.getsignal(s) in (signal.SIG_IGN, None)]
    previous = {s: signal.signal(s, note) for s in STOPS if s not in kept}
    try:
        yield lambda: bool(came)
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def leave_stops_to_the_training(worker: int) -> None:
    """For the processes of a ``DataLoader``: whoever sends :data:`STOPS` sends them to all, and a
    worker that ends by one takes the training along. They end with it.
    """
    for signum in STOPS:
        signal.signal(signum, signal.SIG_IGN)
