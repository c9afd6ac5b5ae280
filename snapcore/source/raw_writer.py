"""Writing raw images: the disk as it is."""

from __future__ import annotations

from snapcore.source.sink import Sink
from snapcore.source.writer import Piece


class RawWriter:
    """See `snapcore.source.writer.Writer`."""

    unit_bytes = 4096
    pack = None

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes

    def begin(self, sink: Sink) -> None:
        """See `Writer.begin`."""

    def put(self, sink: Sink, piece: Piece) -> None:
        """See `Writer.put`."""
        sink.append_zeros(piece.offset_bytes - sink.position)
        sink.append(piece.data)

    def end(self, sink: Sink) -> None:
        """See `Writer.end`."""
        sink.append_zeros(self.size_bytes - sink.position)
