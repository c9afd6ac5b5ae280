"""The transmission phase of the NBD protocol (NetworkBlockDevice/nbd, doc/proto.md), without the interpreter."""

from collections.abc import Callable, Sequence

from snapcore.volume import Volume

class Export:
    """What a connection reads and writes: a volume of a pool, or a raw file or device.

    Parameters
    ----------
    volume : Volume or None
        None: `descriptor` is a raw file of `size_bytes`.
    make_room : callable or None
        Called when a write found the log or the pool full: (result, errno) -> whether to try again.
    writable : bool
    """

    volume: Volume | None

    def __init__(
        self,
        volume: Volume | None,
        descriptor: int,
        size_bytes: int,
        *,
        writable: bool,
        make_room: Callable[[int, int], bool] | None = None,
    ) -> None: ...

class Connection:
    """One client in the transmission phase.

    Parameters
    ----------
    descriptor : int
        A connected stream socket, blocking. It is not closed here.
    export : Export
    structured, extended : bool
        What was negotiated.
    contexts : sequence of (id, Volume or None)
        Meta contexts that were negotiated: None is base:allocation, a volume is what changed since that snapshot.
    idle_s : float
        After so long without a request, or in the middle of one, the client is cut off; 0 is never.
    """

    def __init__(
        self,
        descriptor: int,
        export: Export,
        *,
        structured: bool,
        extended: bool,
        contexts: Sequence[tuple[int, Volume | None]] = (),
        idle_s: float = 0,
    ) -> None: ...
    def serve(self) -> str:
        """Answer until the client disconnects or breaks the protocol, or `stop` is called.

        Returns
        -------
        str
            "disconnected", "vanished", "stopped", "idle", or what rule the client broke.
        """
    def expire(self, limit_s: float) -> int:
        """Answer EIO to what is under way for longer than this without getting on. From any thread; does not wait.

        What a write that was given up may still change is refused (EIO) to all connections of this process until the
        write has ended, so that nobody's later write is overwritten by it.

        Returns
        -------
        int
            How many requests were given up.
        """
    def stop(self) -> None:
        """Take no more requests, answer those that are under way, and let `serve` return. From any thread."""
    @property
    def requests(self) -> int:
        """How many were answered."""
