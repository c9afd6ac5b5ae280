"""The handshake byte by byte: what each option gets, and that nothing a client sends does harm."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snapcore.errors import NotFoundError, RefusedError
from snapcore.server.nbd.handshake import MAX_OPTION_BYTES, MAX_SKIPPED_BYTES, Facts, Handshake, Negotiated
from snapcore.server.nbd.protocol import HandshakeFlag, Info, Option, Reply, TransmissionFlag
from snapcore.server.nbd.stream import EndedError
from tests.support.nbd import GREETING, Answer, answers, contexts, flags, go, option, string

SIZE = 123_456_789
FLAGS = TransmissionFlag.HAS_FLAGS | TransmissionFlag.SEND_FLUSH | TransmissionFlag.SEND_DF
WITHOUT_DF = FLAGS & ~TransmissionFlag.SEND_DF
CONTEXTS = ["base:allocation", "snapcore:changed:1", "snapcore:changed:2"]
ALL_INFOS = (Info.EXPORT, Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE)


class Shown:
    """Two exports, of which one cannot be entered; counts who is inside."""

    def __init__(self) -> None:
        self.inside = 0
        self.entered: list[tuple[str, Sequence[tuple[int, str]]]] = []

    def names(self) -> Sequence[tuple[str, str]]:
        return [("disk", "a disk"), ("locked", "")]

    def facts(self, name: str) -> Facts:
        if name not in ("", "disk", "locked"):
            raise NotFoundError(f"no export {name!r}")
        return Facts(name or "disk", "a disk", SIZE, FLAGS)

    def contexts(self, name: str, query: str | None) -> Sequence[str]:
        return [context for context in CONTEXTS if query is None or context.startswith(query)]

    def enter(self, name: str, contexts: Sequence[tuple[int, str]]) -> str:
        self.facts(name)
        if name == "locked":
            raise RefusedError("locked")
        self.inside += 1
        self.entered.append((name, contexts))
        return "inside"

    def leave(self, entered: object) -> None:
        assert entered == "inside"
        self.inside -= 1


class Script:
    """A client that sends all it has at once and then is gone."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.said = b""
        self.most_asked = 0

    def receive(self, length_bytes: int) -> bytes:
        self.most_asked = max(self.most_asked, length_bytes)
        if length_bytes > len(self.data):
            self.data = b""
            raise EndedError("the client went away")
        taken, self.data = self.data[:length_bytes], self.data[length_bytes:]
        return taken

    def send(self, data: bytes) -> None:
        self.said += data


def talk(*parts: bytes, first: bytes | None = None) -> tuple[list[Answer], Negotiated[str] | None, Shown]:
    """What a client gets that sends these options, and what is agreed on; it may end without either."""
    script, shown = Script((flags() if first is None else first) + b"".join(parts)), Shown()
    try:
        agreed = Handshake(script, lambda: shown).run()
    except EndedError:
        agreed = None
    assert script.said.startswith(GREETING)
    return answers(script.said[len(GREETING) :]), agreed, shown


def ended(*parts: bytes, first: bytes | None = None) -> str:
    """Why a session ends."""
    with pytest.raises(EndedError) as error:
        Handshake(Script((flags() if first is None else first) + b"".join(parts)), Shown).run()
    return str(error.value)


def kinds(found: list[Answer]) -> list[int]:
    return [answer.reply for answer in found]


def export_info(found: list[Answer]) -> tuple[int, int]:
    """Size and flags."""
    (data,) = [answer.data for answer in found if answer.reply == Reply.INFO and answer.data[:2] == bytes(2)]
    size, transmission = struct.unpack(">QH", data[2:])
    return size, transmission


# The ways in


def test_go_enters_and_tells_size_and_flags() -> None:
    found, agreed, shown = talk(go("disk"))
    assert kinds(found) == [Reply.INFO, Reply.ACK]
    assert export_info(found) == (SIZE, WITHOUT_DF)
    assert agreed == Negotiated("disk", False, False, (), "inside")
    assert shown.inside == 1


def test_info_tells_the_same_and_enters_nothing() -> None:
    found, agreed, shown = talk(go("disk", *ALL_INFOS, number=Option.INFO), go("disk", *ALL_INFOS))
    half = len(found) // 2
    assert [(one.reply, one.data) for one in found[:half]] == [(one.reply, one.data) for one in found[half:]]
    assert agreed is not None and len(shown.entered) == 1


def test_asked_for_information_comes_and_unknown_kinds_are_ignored() -> None:
    found, _, _ = talk(go("", *ALL_INFOS, 99, 4711))
    data = [answer.data for answer in found[:-1]]
    assert data[1:] == [
        struct.pack(">H", Info.NAME) + b"disk",
        struct.pack(">H", Info.DESCRIPTION) + b"a disk",
        struct.pack(">HIII", Info.BLOCK_SIZE, 1, 4096, 32 << 20),
    ]


@pytest.mark.parametrize("zeroes", [False, True])
def test_export_name_enters_with_or_without_zeroes(zeroes: bool) -> None:
    said = HandshakeFlag.FIXED_NEWSTYLE if zeroes else HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES
    script, shown = Script(flags(said) + option(Option.EXPORT_NAME, b"disk")), Shown()
    agreed = Handshake(script, lambda: shown).run()
    assert agreed is not None and agreed.name == "disk"
    assert script.said[len(GREETING) :] == struct.pack(">QH", SIZE, WITHOUT_DF) + bytes(124 if zeroes else 0)


def test_export_name_works_without_fixed_newstyle_and_nothing_else_does() -> None:
    assert Handshake(Script(flags(0) + option(Option.EXPORT_NAME, b"disk")), Shown).run() is not None
    assert "options" in ended(option(Option.LIST), first=flags(0))


@pytest.mark.parametrize("name", [b"nothing", b"locked", b"\xff", b"a\0b", b"x" * 4097])
def test_export_name_of_what_cannot_be_entered_ends_the_session(name: bytes) -> None:
    ended(option(Option.EXPORT_NAME, name))


@pytest.mark.parametrize(
    ("name", "reply"), [("nothing", Reply.ERR_UNKNOWN), ("locked", Reply.ERR_POLICY)], ids=["unknown", "refused"]
)
def test_go_to_what_cannot_be_entered_gets_an_error_and_the_client_may_go_on(name: str, reply: Reply) -> None:
    found, agreed, _ = talk(go(name), go("disk"))
    assert kinds(found) == [reply, Reply.INFO, Reply.ACK]
    assert found[0].data
    assert agreed is not None and agreed.name == "disk"


def test_a_client_that_goes_away_before_it_is_told_leaves_the_export() -> None:
    class Gone(Script):
        def send(self, data: bytes) -> None:
            if self.said:
                raise EndedError("the client went away")
            super().send(data)

    for way_in in (go("disk"), option(Option.EXPORT_NAME, b"disk")):
        shown = Shown()
        with pytest.raises(EndedError):
            Handshake(Gone(flags() + way_in), lambda: shown).run()  # noqa: B023
        assert len(shown.entered) == 1 and shown.inside == 0


# Options


def test_abort_is_acknowledged_and_ends_the_session() -> None:
    found, agreed, _ = talk(option(Option.ABORT), go("disk"))
    assert (kinds(found), agreed) == ([Reply.ACK], None)


def test_list_names_every_export() -> None:
    found, _, _ = talk(option(Option.LIST))
    assert [answer.data for answer in found] == [string("disk") + b"a disk", string("locked"), b""]
    assert kinds(found) == [Reply.SERVER, Reply.SERVER, Reply.ACK]


@pytest.mark.parametrize("number", [0, 4, 99, 1 << 31, (1 << 32) - 1])
def test_unknown_options_are_skipped_with_an_error(number: int) -> None:
    found, agreed, _ = talk(option(number, b"whatever"), go("disk"))
    assert found[0].reply == Reply.ERR_UNSUP and found[0].option == number
    assert agreed is not None


@pytest.mark.parametrize("number", [Option.LIST, Option.STRUCTURED_REPLY, Option.EXTENDED_HEADERS, Option.STARTTLS])
def test_options_without_data_refuse_data(number: Option) -> None:
    found, agreed, _ = talk(option(number, b"x"), go("disk"))
    assert found[0].reply == Reply.ERR_INVALID
    assert agreed is not None and not agreed.structured and not agreed.extended


def test_structured_replies_bring_df() -> None:
    found, agreed, _ = talk(option(Option.STRUCTURED_REPLY), go("disk"))
    assert agreed is not None and agreed.structured and not agreed.extended
    assert export_info(found)[1] == FLAGS


def test_extended_headers_bring_structured_replies_and_are_agreed_on_once() -> None:
    found, agreed, _ = talk(
        option(Option.EXTENDED_HEADERS), option(Option.STRUCTURED_REPLY), option(Option.EXTENDED_HEADERS), go("disk")
    )
    assert kinds(found)[:3] == [Reply.ACK, Reply.ERR_EXT_HEADER_REQD, Reply.ERR_INVALID]
    assert agreed is not None and agreed.structured and agreed.extended
    assert export_info(found)[1] == FLAGS


def test_extended_headers_may_come_after_structured_replies() -> None:
    _, agreed, _ = talk(option(Option.STRUCTURED_REPLY), option(Option.EXTENDED_HEADERS), go("disk"))
    assert agreed is not None and agreed.extended


def test_tls_is_refused_where_there_is_none() -> None:
    found, agreed, _ = talk(option(Option.STARTTLS), go("disk"))
    assert found[0].reply == Reply.ERR_POLICY
    assert agreed is not None


def test_a_server_that_wants_tls_tells_nothing_before() -> None:
    parts = [option(Option.LIST), go("disk"), go("nothing", number=Option.INFO), contexts("disk"), option(99)]
    script = Script(flags() + b"".join(parts) + option(Option.ABORT))
    assert Handshake(script, Shown, start_tls=lambda: script, tls_required=True).run() is None
    assert kinds(answers(script.said[len(GREETING) :])) == [Reply.ERR_TLS_REQD] * len(parts) + [Reply.ACK]
    hasty = Script(flags() + option(Option.EXPORT_NAME, b"disk"))
    with pytest.raises(EndedError, match="TLS"):
        Handshake(hasty, Shown, start_tls=lambda: hasty, tls_required=True).run()


def test_tls_forgets_what_was_agreed_on_before_and_begins_once() -> None:
    outside = Script(
        flags() + option(Option.STRUCTURED_REPLY) + contexts("disk", "base:allocation") + option(Option.STARTTLS)
    )
    inside = Script(option(Option.STARTTLS) + contexts("disk", "base:allocation") + go("disk"))
    views: list[Shown] = []

    def see() -> Shown:
        views.append(Shown())
        return views[-1]

    agreed = Handshake(outside, see, start_tls=lambda: inside, tls_required=False).run()
    assert kinds(answers(inside.said))[:2] == [Reply.ERR_INVALID, Reply.ERR_INVALID]
    assert agreed == Negotiated("disk", False, False, (), "inside")
    # Who the client is may decide what it sees.
    assert [view.inside for view in views] == [0, 1]


def test_a_server_that_stops_says_so_and_lets_nobody_in() -> None:
    script = Script(flags() + option(Option.LIST) + go("disk") + option(Option.ABORT))
    assert Handshake(script, Shown, stopping=lambda: True).run() is None
    assert kinds(answers(script.said[len(GREETING) :])) == [Reply.ERR_SHUTDOWN, Reply.ERR_SHUTDOWN, Reply.ACK]


# Meta contexts


def test_meta_contexts_need_structured_replies() -> None:
    found, agreed, _ = talk(contexts("disk", "base:allocation"), go("disk"))
    assert found[0].reply == Reply.ERR_INVALID
    assert agreed is not None and agreed.contexts == ()


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        ((), CONTEXTS),
        (("base:",), CONTEXTS[:1]),
        (("snapcore:", "base:"), CONTEXTS[1:] + CONTEXTS[:1]),
        (("other:thing",), []),
        (("",), CONTEXTS),
    ],
)
def test_listed_meta_contexts_are_those_that_the_queries_lead_to(queries: tuple[str, ...], expected: list[str]) -> None:
    listing = contexts("disk", *queries, number=Option.LIST_META_CONTEXT)
    found, _, _ = talk(option(Option.STRUCTURED_REPLY), listing)
    assert [answer.data for answer in found[1:-1]] == [bytes(4) + name.encode() for name in expected]
    assert found[-1].reply == Reply.ACK


def test_set_meta_contexts_get_numbers_and_wildcards_set_nothing() -> None:
    asked = contexts("disk", "snapcore:changed:2", "snapcore:", "base:allocation", "base:", "other:x")
    found, agreed, shown = talk(option(Option.STRUCTURED_REPLY), asked, go("disk"))
    expected = ((1, "snapcore:changed:2"), (2, "base:allocation"))
    assert agreed is not None and agreed.contexts == expected
    assert [answer.data for answer in found[1:3]] == [struct.pack(">I", n) + name.encode() for n, name in expected]
    assert shown.entered == [("disk", expected)]


def test_the_last_set_counts_even_when_it_fails() -> None:
    structured, first = option(Option.STRUCTURED_REPLY), contexts("disk", "base:allocation")
    for second in (contexts("disk"), contexts("nothing", "base:allocation"), option(Option.SET_META_CONTEXT, b"junk")):
        _, agreed, _ = talk(structured, first, second, go("disk"))
        assert agreed is not None and agreed.contexts == ()
        _, agreed, _ = talk(structured, second, first, go("disk"))
        assert agreed is not None and len(agreed.contexts) == 1


@pytest.mark.parametrize("way_in", [go(""), option(Option.EXPORT_NAME, b"")])
def test_meta_contexts_of_another_export_are_forgotten(way_in: bytes) -> None:
    script, shown = (
        Script(flags() + option(Option.STRUCTURED_REPLY) + contexts("disk", "base:allocation") + way_in),
        Shown(),
    )
    agreed = Handshake(script, lambda: shown).run()
    assert agreed is not None and agreed.contexts == () and shown.entered == [("", ())]


def test_a_look_at_another_export_forgets_no_meta_contexts() -> None:
    parts = [contexts("disk", "base:allocation"), go("", number=Option.INFO), go("nothing"), go("disk")]
    _, agreed, _ = talk(option(Option.STRUCTURED_REPLY), *parts)
    assert agreed is not None and agreed.contexts == ((1, "base:allocation"),)


# Hostile clients


def test_unknown_client_flags_end_the_session() -> None:
    for bit in range(2, 32):
        assert "flags" in ended(first=flags(3 | 1 << bit))


def test_what_is_no_option_ends_the_session() -> None:
    assert "no option" in ended(b"GET / HTTP/1.1\r\n\r\n")


def test_an_option_that_is_too_long_is_skipped_without_being_kept() -> None:
    script = Script(flags() + option(Option.LIST, bytes(MAX_OPTION_BYTES + 1)) + go("disk"))
    assert Handshake(script, Shown).run() is not None
    assert answers(script.said[len(GREETING) :])[0].reply == Reply.ERR_TOO_BIG
    assert script.most_asked <= MAX_OPTION_BYTES


@pytest.mark.parametrize("number", [Option.EXPORT_NAME, Option.GO, 99])
def test_an_absurd_length_ends_the_session_before_anything_is_read_for_it(number: int) -> None:
    for length in (MAX_SKIPPED_BYTES + 1, (1 << 32) - 1):
        script = Script(flags() + option(number, length=length))
        with pytest.raises(EndedError):
            Handshake(script, Shown).run()
        assert script.most_asked <= 16


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0",
        struct.pack(">I", 5) + b"disk",
        struct.pack(">I", (1 << 32) - 1) + b"disk\0\0",
        string("disk"),
        string("disk") + b"\0",
        string("disk") + struct.pack(">H", 1),
        string("disk") + struct.pack(">H", 0xFFFF) + bytes(4),
        string("disk") + struct.pack(">HH", 0, 0),
        string(b"\xff\xfe") + bytes(2),
        string("a\0b") + bytes(2),
        string("x" * 4097) + bytes(2),
    ],
)
def test_a_go_that_says_nonsense_is_invalid(data: bytes) -> None:
    found, agreed, _ = talk(option(Option.GO, data), go("disk"))
    assert found[0].reply == Reply.ERR_INVALID
    assert agreed is not None


@pytest.mark.parametrize(
    "data",
    [
        string("disk"),
        string("disk") + struct.pack(">I", 1),
        string("disk") + struct.pack(">I", (1 << 32) - 1) + bytes(64),
        string("disk") + struct.pack(">I", 1) + struct.pack(">I", 100) + b"short",
        string("disk") + struct.pack(">I", 1) + string("x" * 4097),
        string("disk") + struct.pack(">I", 0) + b"more",
    ],
)
def test_meta_contexts_that_say_nonsense_are_invalid(data: bytes) -> None:
    for number in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
        found, agreed, _ = talk(option(Option.STRUCTURED_REPLY), option(number, data), go("disk"))
        assert found[1].reply == Reply.ERR_INVALID
        assert agreed is not None


def test_options_without_end_end_the_session() -> None:
    assert "without end" in ended(option(99) * 2000)


WHOLE = [
    option(Option.LIST),
    option(Option.STRUCTURED_REPLY),
    contexts("disk", number=Option.LIST_META_CONTEXT),
    contexts("disk", "base:allocation"),
    go("disk", *ALL_INFOS, number=Option.INFO),
    option(99, b"unknown"),
    go("disk", *ALL_INFOS),
]


def test_a_session_cut_off_at_any_byte_leaves_nobody_inside() -> None:
    session = flags() + b"".join(WHOLE)
    for length in range(len(session)):
        shown = Shown()
        with pytest.raises(EndedError):
            Handshake(Script(session[:length]), lambda: shown).run()  # noqa: B023
        assert shown.inside == 0 and not shown.entered


@given(st.lists(st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=8)), max_size=6), st.binary(max_size=64))
def test_whatever_is_sent_the_session_ends_in_order_and_reads_no_more_than_it_may(
    changes: list[tuple[int, bytes]], more: bytes
) -> None:
    session = bytearray(flags() + b"".join(WHOLE[:-1]) + more + WHOLE[-1])
    for place, data in changes:
        session[place : place + len(data)] = data
    script, shown = Script(bytes(session)), Shown()
    try:
        agreed = Handshake(script, lambda: shown).run()
    except EndedError:
        agreed = None
    assert shown.inside == (agreed is not None)
    assert script.most_asked <= MAX_OPTION_BYTES
