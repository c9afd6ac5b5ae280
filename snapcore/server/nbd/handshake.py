"""The handshake: fixed newstyle, from the first magic number to the transmission phase.

Every length is checked before anything is read for it. What a client asks wrongly gets an error and it may go on; a
client that breaks the rules in a way that leaves nothing to answer is cut off (`EndedError`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, NoReturn, Protocol, TypeVar

from snapcore.errors import Error, NotFoundError
from snapcore.server.nbd.protocol import (
    MAX_REQUEST_BYTES,
    MAX_STRING_BYTES,
    MIN_BLOCK_BYTES,
    NBD_MAGIC,
    OPTION_MAGIC,
    PREFERRED_BLOCK_BYTES,
    REPLY_MAGIC,
    HandshakeFlag,
    Info,
    Option,
    Reply,
    TransmissionFlag,
)
from snapcore.server.nbd.stream import EndedError, Stream

# An option that is longer gets an error while it is not absurd, and ends the session when it is.
MAX_OPTION_BYTES = 64 << 10
MAX_SKIPPED_BYTES = 1 << 20
MAX_OPTIONS = 1024
MAX_CONTEXTS = 16

# A plain number: the complement of an IntFlag has no bit that has no name.
_ALL_FLAGS = int(HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)
_NOT_IN_STRINGS = "\0"

Entered_co = TypeVar("Entered_co", covariant=True)
Entered = TypeVar("Entered")


@dataclass(frozen=True)
class Facts:
    """What a client is told about an export.

    Attributes
    ----------
    name : str
        What it is called in full; of the default export too.
    description : str
        For people.
    flags : TransmissionFlag
        As they are with structured replies.
    """

    name: str
    description: str
    size_bytes: int
    flags: TransmissionFlag


class Exports(Protocol[Entered_co]):
    """What a client may see and enter. Every method raises `NotFoundError` for names that mean nothing."""

    def names(self) -> Sequence[tuple[str, str]]:
        """(name, description) of what is shown in a list."""

    def facts(self, name: str) -> Facts:
        """What an export is."""

    def contexts(self, name: str, query: str | None) -> Sequence[str]:
        """Meta contexts of an export that a query means; those that a prefix which ends in ":" leads to. None: all."""

    def enter(self, name: str, contexts: Sequence[tuple[int, str]]) -> Entered_co:
        """Open an export for transmission."""

    def leave(self, entered: object) -> None:
        """Undo `enter`: the client went away before it was told."""


@dataclass(frozen=True)
class Negotiated(Generic[Entered]):
    """What client and server agreed on.

    Attributes
    ----------
    name : str
        Of the export, as the client wrote it.
    contexts : tuple of (id, name)
    entered
        What `Exports.enter` returned.
    """

    name: str
    structured: bool
    extended: bool
    contexts: tuple[tuple[int, str], ...]
    entered: Entered


class _RefusedError(Exception):
    """An option that gets an error as its reply."""

    def __init__(self, reply: Reply, message: str) -> None:
        super().__init__(message)
        self.reply = reply


class Handshake(Generic[Entered]):
    """One client's handshake.

    Parameters
    ----------
    stream : Stream
    exports : callable
        Gives what the client may see; it is asked anew when TLS has told who the client is.
    start_tls : callable, optional
        Does the handshake of TLS and returns the stream to go on with. None: there is no TLS here.
    tls_required : bool
    stopping : callable, optional
        Whether the server is about to stop.
    """

    def __init__(
        self,
        stream: Stream,
        exports: Callable[[], Exports[Entered]],
        *,
        start_tls: Callable[[], Stream] | None = None,
        tls_required: bool = False,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._stream = stream
        self._see = exports
        self._exports = exports()
        self._start_tls = start_tls
        self._tls_required = tls_required
        self._stopping = stopping
        self._secure = False
        self._zeroes = True
        self._forget()

    def _forget(self) -> None:
        """All that options have set: TLS begins with nothing."""
        self._structured = False
        self._extended = False
        self._contexts: tuple[tuple[int, str], ...] = ()
        self._contexts_of: str | None = None

    def run(self) -> Negotiated[Entered] | None:
        """Until the transmission phase; None when the client ended the session as it should.

        Raises
        ------
        EndedError
            The session ended in another way.
        """
        self._stream.send(struct.pack(">QQH", NBD_MAGIC, OPTION_MAGIC, _ALL_FLAGS))
        (flags,) = struct.unpack(">I", self._stream.receive(4))
        if flags & ~_ALL_FLAGS:
            raise EndedError(f"the client set flags {flags:#x} that do not exist")
        fixed = bool(flags & HandshakeFlag.FIXED_NEWSTYLE)
        self._zeroes = not flags & HandshakeFlag.NO_ZEROES
        for _ in range(MAX_OPTIONS):
            magic, option, length = struct.unpack(">QII", self._stream.receive(16))
            if magic != OPTION_MAGIC:
                raise EndedError("what the client sent is no option")
            if option == Option.EXPORT_NAME:
                return self._export_name(length)
            if not fixed:
                raise EndedError("the client sent options without having said that it knows their replies")
            if length > MAX_OPTION_BYTES:
                self._skip(length)
                self._reply(option, Reply.ERR_TOO_BIG, f"an option has at most {MAX_OPTION_BYTES} bytes".encode())
                continue
            data = self._stream.receive(length)
            if option == Option.ABORT:
                self._reply(option, Reply.ACK)
                return None
            try:
                found = self._answer(option, data)
            except _RefusedError as error:
                self._reply(option, error.reply, _message(str(error)))
            else:
                if found is not None:
                    return found
        raise EndedError("the client sent options without end")

    def _skip(self, length: int) -> None:
        if length > MAX_SKIPPED_BYTES:
            raise EndedError(f"the client sent an option of {length} bytes")
        while length:
            length -= len(self._stream.receive(min(length, MAX_OPTION_BYTES)))

    def _reply(self, option: int, reply: Reply, data: bytes = b"") -> None:
        self._stream.send(_packed_reply(option, reply, data))

    def _answer(self, option: int, data: bytes) -> Negotiated[Entered] | None:
        """What is agreed on when the option was the last one."""
        if self._stopping():
            raise _RefusedError(Reply.ERR_SHUTDOWN, "the server is stopping")
        if option == Option.STARTTLS:
            self._begin_tls(data)
            return None
        if self._tls_required and not self._secure:
            raise _RefusedError(Reply.ERR_TLS_REQD, "this server wants TLS: send NBD_OPT_STARTTLS first")
        if option in (Option.LIST, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS) and data:
            raise _RefusedError(Reply.ERR_INVALID, "this option has no data")
        match option:
            case Option.LIST:
                self._list(option)
            case Option.STRUCTURED_REPLY:
                if self._extended:
                    raise _RefusedError(Reply.ERR_EXT_HEADER_REQD, "extended headers are agreed on already")
                self._structured = True
                self._reply(option, Reply.ACK)
            case Option.EXTENDED_HEADERS:
                if self._extended:
                    raise _RefusedError(Reply.ERR_INVALID, "extended headers are agreed on already")
                # They have the place for all that structured replies need.
                self._structured = self._extended = True
                self._reply(option, Reply.ACK)
            case Option.INFO | Option.GO:
                return self._info(option, data)
            case Option.LIST_META_CONTEXT | Option.SET_META_CONTEXT:
                self._meta_context(option, data)
            case _:
                raise _RefusedError(Reply.ERR_UNSUP, f"option {option} is not known here")
        return None

    def _begin_tls(self, data: bytes) -> None:
        if data:
            raise _RefusedError(Reply.ERR_INVALID, "this option has no data")
        if self._secure:
            raise _RefusedError(Reply.ERR_INVALID, "TLS has begun already")
        if self._start_tls is None:
            raise _RefusedError(Reply.ERR_POLICY, "this server has no certificate, so no TLS")
        self._reply(Option.STARTTLS, Reply.ACK)
        self._stream = self._start_tls()
        self._secure = True
        # What was said in the open may have been said by somebody else.
        self._forget()
        self._exports = self._see()

    def _list(self, option: int) -> None:
        found = bytearray()
        for name, description in self._exports.names():
            raw = name.encode()
            if len(raw) <= MAX_STRING_BYTES:
                found += _packed_reply(option, Reply.SERVER, struct.pack(">I", len(raw)) + raw + _message(description))
            if len(found) > MAX_OPTION_BYTES:
                self._stream.send(bytes(found))
                found.clear()
        self._stream.send(bytes(found) + _packed_reply(option, Reply.ACK))

    def _info(self, option: int, data: bytes) -> Negotiated[Entered] | None:
        fields = _Fields(data)
        name = fields.string()
        wanted = set(fields.numbers(fields.number(">H")))
        fields.end()
        facts = self._asked(lambda: self._exports.facts(name))
        if option == Option.INFO:
            self._stream.send(self._described(option, facts, name, wanted) + _packed_reply(option, Reply.ACK))
            return None
        contexts = self._contexts_for(name)
        entered = self._asked(lambda: self._exports.enter(name, contexts))
        try:
            # As it is now: it may have grown since.
            facts = self._asked(lambda: self._exports.facts(name))
            self._stream.send(self._described(option, facts, name, wanted) + _packed_reply(option, Reply.ACK))
        except BaseException:
            self._exports.leave(entered)
            raise
        return Negotiated(name, self._structured, self._extended, contexts, entered)

    def _contexts_for(self, name: str) -> tuple[tuple[int, str], ...]:
        """They were set for one export, and mean nothing for another."""
        return self._contexts if self._contexts_of == name else ()

    def _described(self, option: int, facts: Facts, name: str, wanted: set[int]) -> bytes:
        parts = [struct.pack(">HQH", Info.EXPORT, facts.size_bytes, self._flags(facts))]
        if Info.NAME in wanted:
            parts.append(struct.pack(">H", Info.NAME) + (facts.name or name).encode())
        if Info.DESCRIPTION in wanted and facts.description:
            parts.append(struct.pack(">H", Info.DESCRIPTION) + _message(facts.description))
        if Info.BLOCK_SIZE in wanted:
            sizes = (MIN_BLOCK_BYTES, PREFERRED_BLOCK_BYTES, MAX_REQUEST_BYTES)
            parts.append(struct.pack(">HIII", Info.BLOCK_SIZE, *sizes))
        return b"".join(_packed_reply(option, Reply.INFO, part) for part in parts)

    def _flags(self, facts: Facts) -> int:
        return facts.flags if self._structured else facts.flags & ~TransmissionFlag.SEND_DF

    def _export_name(self, length: int) -> Negotiated[Entered]:
        """The old way in, which has no place for an error."""
        if length > MAX_STRING_BYTES:
            raise EndedError(f"the client sent a name of {length} bytes")
        raw = self._stream.receive(length)
        if self._stopping():
            raise EndedError("the server is stopping")
        if self._tls_required and not self._secure:
            raise EndedError("the client chose an export without TLS, which this server wants")
        try:
            name = _text(raw)
            contexts = self._contexts_for(name)
            entered = self._asked(lambda: self._exports.enter(name, contexts))
        except _RefusedError as error:
            raise EndedError(str(error)) from None
        try:
            facts = self._exports.facts(name)
            said = struct.pack(">QH", facts.size_bytes, self._flags(facts))
            self._stream.send(said + bytes(124 if self._zeroes else 0))
        except Error as error:
            self._exports.leave(entered)
            raise EndedError(str(error)) from None
        except BaseException:
            self._exports.leave(entered)
            raise
        return Negotiated(name, self._structured, self._extended, contexts, entered)

    def _meta_context(self, option: int, data: bytes) -> None:
        setting = option == Option.SET_META_CONTEXT
        if setting:
            self._contexts, self._contexts_of = (), None
        if not self._structured:
            raise _RefusedError(Reply.ERR_INVALID, "structured replies must be agreed on first")
        fields = _Fields(data)
        name = fields.string()
        queries = [fields.string() for _ in range(fields.count())]
        fields.end()
        self._asked(lambda: self._exports.facts(name))
        found: dict[str, None] = {}
        if not queries and not setting:
            found.update(dict.fromkeys(self._asked(lambda: self._exports.contexts(name, None))))
        for query in queries:
            # What ends so leads to others, which can be asked for but not all be set at once.
            if not (setting and query.endswith(":")):
                found.update(dict.fromkeys(self._asked(lambda: self._exports.contexts(name, query))))  # noqa: B023
        if not setting:
            listed = ((0, context) for context in found)
            self._stream.send(_packed_contexts(option, listed) + _packed_reply(option, Reply.ACK))
            return
        if len(found) > MAX_CONTEXTS:
            raise _RefusedError(Reply.ERR_TOO_BIG, f"at most {MAX_CONTEXTS} meta contexts can be set")
        self._contexts, self._contexts_of = tuple(enumerate(found, start=1)), name
        self._stream.send(_packed_contexts(option, self._contexts) + _packed_reply(option, Reply.ACK))

    def _asked(self, ask: Callable[[], _Answer]) -> _Answer:
        """An answer of the exports; their errors become replies."""
        try:
            return ask()
        except NotFoundError as error:
            raise _RefusedError(Reply.ERR_UNKNOWN, str(error)) from None
        except Error as error:
            raise _RefusedError(Reply.ERR_POLICY, str(error)) from None


_Answer = TypeVar("_Answer")


class _Fields:
    """The data of an option, field by field. What does not fit is refused."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)

    def _take(self, count: int) -> memoryview:
        if count > len(self._data):
            _invalid("the option ends too early")
        taken, self._data = self._data[:count], self._data[count:]
        return taken

    def number(self, layout: str) -> int:
        (number,) = struct.unpack(layout, self._take(struct.calcsize(layout)))
        return int(number)

    def numbers(self, count: int) -> tuple[int, ...]:
        return struct.unpack(f">{count}H", self._take(2 * count))

    def count(self) -> int:
        """How many strings follow, of which each takes 4 bytes at least."""
        count = self.number(">I")
        if count > len(self._data) // 4:
            _invalid("the option ends too early")
        return count

    def string(self) -> str:
        length = self.number(">I")
        if length > MAX_STRING_BYTES:
            _invalid(f"a string has at most {MAX_STRING_BYTES} bytes")
        return _text(bytes(self._take(length)))

    def end(self) -> None:
        if self._data:
            _invalid("the option is longer than what it says")


def _invalid(message: str) -> NoReturn:
    raise _RefusedError(Reply.ERR_INVALID, message)


def _text(raw: bytes) -> str:
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        _invalid("a string is UTF-8")
    if _NOT_IN_STRINGS in text:
        _invalid("a string has no NUL in it")
    return text


def _message(text: str) -> bytes:
    """For people, cut to what a string may have."""
    raw = text.replace(_NOT_IN_STRINGS, " ").encode(errors="replace")[:MAX_STRING_BYTES]
    return raw.decode(errors="ignore").encode()


def _packed_reply(option: int, reply: Reply, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", REPLY_MAGIC, option, reply, len(data)) + data


def _packed_contexts(option: int, contexts: Iterable[tuple[int, str]]) -> bytes:
    return b"".join(
        _packed_reply(option, Reply.META_CONTEXT, struct.pack(">I", number) + context.encode())
        for number, context in contexts
    )
