"""What the commands that serve share: waiting until they are told to end."""

from __future__ import annotations

import contextlib
import select
import signal
import socket
from collections.abc import Iterator


class Told:
    """Whether SIGTERM or SIGINT came."""

    def __init__(self, bell: socket.socket) -> None:
        self._bell = bell

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until one comes, so long at most; whether one came."""
        ready, _, _ = select.select([self._bell], [], [], timeout_s)
        return bool(ready)


@contextlib.contextmanager
def until_told() -> Iterator[Told]:
    """SIGTERM and SIGINT tell, instead of ending the process.

    The system may give a signal to any thread, and Python acts on it when its main thread goes on: which one that waits
    for a lock does not. So the main thread waits for a byte that comes with every signal.
    """
    bell, ringer = socket.socketpair()
    with bell, ringer:
        ringer.setblocking(False)
        ringing = signal.set_wakeup_fd(ringer.fileno(), warn_on_full_buffer=False)
        before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield Told(bell)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(ringing)
