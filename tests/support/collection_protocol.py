"""The protocol of writers and collectors as a model that is explored exhaustively (docs/DESIGN.md, "Collection").

Every interleaving of writers, collectors, a deleter, and a human who ends sessions; each may stop for good before any
step, and any may be so slow that others take it for dead. A step is one call to the store, which is atomic. The steps
have the names that the code's comments have ("step see", "step publish", …), in snapcore/repository/session.py,
create.py, collect.py and generations.py.

What is true of every state that can be reached: whatever a manifest reaches lies in a pack that is there and that an
index object names. What is true of every end: a collection by somebody else, whatever was left behind, removes all
that nothing reaches, and nobody has to help it.

Content: an id is a letter. `P` holds A and B, `S…` what a session stored, `N…` what a collector moved: A. Snapshots
reach A, some B.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Ids = frozenset[str]
NOTHING: frozenset[Any] = frozenset()
AB, A = frozenset("AB"), frozenset("A")


class Generation(NamedTuple):
    """One object of generations/: what may not be used any more, and what may be removed by whomever."""

    number: int
    condemned: Ids
    doomed: Ids
    index: Ids
    ignored: Ids


class Named(NamedTuple):
    """An index object: its name, the generation that its writer had seen, the packs that it speaks of."""

    name: str
    author: int
    packs: Ids


class State(NamedTuple):
    """All objects of the store, and what each process has in its head."""

    generations: tuple[Generation, ...]
    sessions: frozenset[tuple[str, int]]
    manifests: frozenset[tuple[str, Ids]]
    tombstones: Ids
    deleted: frozenset[tuple[str, Ids]]
    index: frozenset[Named]
    packs: Ids
    processes: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Scene:
    """Who is there. `broken` names a rule that is left out, to see that the model notices."""

    writers: int = 2
    tries: int = 2
    collectors: int = 1
    rounds: int = 2
    deletions: int = 1
    ends: int = 0
    crashes: bool = True
    moves: bool = True
    merges: bool = False
    adopts: bool = False
    parents: bool = True
    started: str = ""
    broken: str = ""


@dataclass
class Explored:
    """What was found: the number of states, and the way to the first loss."""

    states: int = 0
    ends: int = 0
    loss: str | None = None
    way: list[str] = field(default_factory=list)


def content(pack: str) -> Ids:
    """What a pack holds."""
    return AB if pack == "P" else A


def reach(manifests: frozenset[tuple[str, Ids]]) -> Ids:
    """What manifests need."""
    return NOTHING.union(*(ids for _, ids in manifests))


def held(packs: Ids) -> Ids:
    """What packs hold together."""
    return NOTHING.union(*map(content, packs))


def counted(state: State, latest: Generation, broken: str) -> frozenset[Named]:
    """Index objects that a writer trusts: those that the generation names, and those of who has seen it or the last."""
    if broken == "late index objects count":
        return state.index
    return frozenset(item for item in state.index if item.name in latest.index or item.author >= latest.number - 1)


# A writer: ("writer", its name, try, step, generation seen, what its snapshot needs, what it has stored).


def writer(scene: Scene, state: State, me: int) -> Iterator[tuple[str, State]]:
    """Steps of who takes a snapshot of A."""
    kind, name, tried, step, seen, needs, stored = state.processes[me]
    session = f"{name}{tried}"

    def to(
        step: str, seen: Any = seen, needs: Any = needs, stored: Any = stored, tried: int = tried, **new: Any
    ) -> State:
        processes = list(state.processes)
        processes[me] = (kind, name, tried, step, seen, needs, stored)
        return state._replace(processes=tuple(processes), **new)

    latest = state.generations[-1]
    own = (session, seen.number if seen else 0)
    if step == "see":
        yield "see", to("register", latest)
    elif step == "register":
        yield "register", to("look", sessions=state.sessions | {own})
    elif step == "look":
        if latest.number != seen.number and scene.broken != "no second look":
            yield "look: newer", to("see", None, sessions=state.sessions - {own})
        else:
            yield "look", to("load")
            if scene.parents:
                # The manifest of the parent is read after the session was registered; all below its root is shared.
                for parent, ids in state.manifests:
                    yield f"look: parent {parent}", to("commit", needs=ids | A)
    elif step == "load":
        away = NOTHING
        if scene.broken != "condemned packs are used":
            away |= seen.condemned
        if scene.broken != "doomed packs are used":
            away |= seen.doomed
        usable = NOTHING.union(*(item.packs for item in counted(state, seen, scene.broken))) - away
        strays = state.packs - NOTHING.union(*(item.packs for item in state.index)) - away if scene.adopts else NOTHING
        if "A" in held(usable):
            yield "load: is there", to("commit", needs=A)
        elif "A" in held(strays):
            # Nobody's index object speaks of it: the own one does, before the commit.
            yield "load: adopt", to("index", needs=A, stored=strays)
        else:
            yield "load: store anew", to("store", needs=A)
    elif step == "store":
        new = frozenset({f"S{session}"})
        yield "store: pack", to("index", stored=new, packs=state.packs | new)
    elif step == "index":
        named = Named(f"i{session}", seen.number, stored)
        yield "store: index", to("commit", stored=NOTHING, index=state.index | {named})
    elif step == "commit":
        if session in state.tombstones:
            after = "see" if tried + 1 < scene.tries else "gave up"
            yield "commit: fenced", to(after, None, NOTHING, NOTHING, tried + 1, sessions=state.sessions - {own})
        else:
            yield "commit", to("merge" if scene.merges else "end", manifests=state.manifests | {(session, needs)})
    elif step == "merge":
        old = frozenset(item for item in counted(state, seen, scene.broken) if len(item.packs))
        packs = NOTHING.union(*(item.packs for item in old)) - seen.doomed
        if scene.broken == "merges leave out condemned packs":
            packs -= seen.condemned
        merged = Named(f"m{session}", seen.number, packs)
        yield "merge: put", to("unmerge", stored=frozenset(item.name for item in old), index=state.index | {merged})
        yield "merge: none needed", to("end")
    elif step == "unmerge":
        yield (
            "merge: delete",
            to("end", stored=NOTHING, index=frozenset(x for x in state.index if x.name not in stored)),
        )
    elif step == "end":
        yield "end", to("done", None, NOTHING, NOTHING, sessions=state.sessions - {own})
    if scene.crashes and step not in ("see", "done", "gave up", "dead"):
        yield "crash", to("dead", None, NOTHING, NOTHING)


# A collector: ("collector", its name, round, step, head). The head fills from left to right.


class Head(NamedTuple):
    """What a collector has seen and decided."""

    seen: Generation | None = None
    known: frozenset[tuple[str, Ids]] = NOTHING
    names: Ids = NOTHING
    roots: Ids = NOTHING
    pinned: Ids = NOTHING
    index: frozenset[Named] = NOTHING
    packs: Ids = NOTHING
    moved: Ids = NOTHING
    next: Generation | None = None
    superseded: Ids = NOTHING


def collector(scene: Scene, state: State, me: int) -> Iterator[tuple[str, State]]:
    """Steps of a collection: each round makes one generation of the last one."""
    kind, name, turn, step, head = state.processes[me]

    def to(step: str, head: Head = head, turn: int = turn, **new: Any) -> State:
        processes = list(state.processes)
        processes[me] = (kind, name, turn, step, head)
        return state._replace(processes=tuple(processes), **new)

    again = to("see", Head(), turn + 1) if turn + 1 < scene.rounds else to("done", Head(), turn + 1)
    latest = state.generations[-1]
    seen = head.seen
    if step == "see":
        yield "see", to("wait", Head(seen=latest))
    elif step == "wait":
        assert seen is not None
        old = [item for item in state.sessions if item[1] < seen.number]
        for session in old:
            taken = any(manifest == session[0] for manifest, _ in state.manifests)
            fenced = state.tombstones if taken or scene.broken == "no tombstone" else state.tombstones | {session[0]}
            yield f"fence {session[0]}", to("wait", tombstones=fenced, sessions=state.sessions - {session})
        if not old or scene.broken == "no wait":
            yield "wait: over", to("known")
    elif step == "known":
        yield "list deleted", to("list", head._replace(known=state.deleted))
    elif step == "list":
        yield "list manifests", to("read", head._replace(names=frozenset(item for item, _ in state.manifests)))
    elif step == "read":
        roots = reach(frozenset(item for item in state.manifests if item[0] in head.names))
        yield "read manifests", to("pinned", head._replace(names=NOTHING, roots=roots))
    elif step == "pinned":
        assert seen is not None
        # Those that were deleted before the last mark bind nobody who is left.
        listed = head.known if scene.broken == "deleted ones listed once" else state.deleted
        pinned = reach(frozenset(item for item in listed if item[0] not in seen.ignored))
        pinned = NOTHING if scene.broken == "deleted ones forgotten" else pinned
        yield (
            "read deleted",
            to("packs" if scene.broken == "packs before index" else "index", head._replace(pinned=pinned)),
        )
    elif step == "index":
        after = "mark" if scene.broken == "packs before index" else "packs"
        yield "read index", to(after, head._replace(index=state.index))
    elif step == "packs":
        after = "index" if scene.broken == "packs before index" else "mark"
        yield "list packs", to(after, head._replace(packs=state.packs))
    elif step == "mark":
        choices = list(mark(scene, head, f"N{name}{turn}"))
        for what, choice in choices:
            yield what, to("move" if choice.moved else "write", choice)
        if not choices and len(state.generations) > 1:
            # Nothing to do, but for what somebody did not clear away before it died.
            assert seen is not None
            newer = tuple(item for item in state.generations if item.number >= seen.number)
            yield "clear", to("done", Head(), generations=newer)
    elif step == "move":
        yield "move", to("write", packs=state.packs | head.moved)
    elif step == "write":
        assert seen is not None and head.next is not None
        (own,) = head.next.index
        kept = (head.packs | head.moved) - head.next.doomed
        yield "write index", to("publish", index=state.index | {Named(own, seen.number, kept)})
    elif step == "publish":
        assert head.next is not None
        new = head.next
        if scene.broken == "stale marks are published":
            new = new._replace(number=latest.number + 1)
        if any(item.number == new.number for item in state.generations):
            yield "publish: too late", again
        else:
            generations = tuple(sorted({*state.generations, new}))
            yield "publish", to("confirm", head._replace(next=new), generations=generations)
    elif step == "confirm":
        assert head.next is not None
        if latest.number != head.next.number and scene.broken != "publication not confirmed":
            # Its number had been taken and cleared away: what is latest counts.
            yield "confirm: too late", again
        else:
            yield "confirm", to("drop index")
    elif step == "drop index":
        left = frozenset(item for item in state.index if item.name not in head.superseded)
        yield "drop index", to("drop packs", index=left)
    elif step == "drop packs":
        assert head.next is not None
        yield "drop packs", to("clear", packs=state.packs - head.next.doomed)
    elif step == "clear":
        assert head.next is not None and seen is not None
        deleted = frozenset(item for item in state.deleted if item[0] not in seen.ignored)
        generations = tuple(item for item in state.generations if item.number >= head.next.number)
        again = again._replace(deleted=deleted, generations=generations)
        yield "clear", again
    if scene.crashes and step not in ("see", "done", "dead"):
        yield "crash", to("dead", Head())


def mark(scene: Scene, head: Head, new_pack: str) -> Iterator[tuple[str, Head]]:
    """What the next generation says, from what was listed."""
    seen = head.seen
    assert seen is not None
    packs = head.packs
    if scene.broken == "packs before index":
        named = NOTHING.union(*(item.packs for item in head.index))
        packs = packs & named | (packs - named)
    usable = sorted(packs - seen.condemned - seen.doomed)
    spared = sorted((packs & seen.condemned) - seen.doomed)
    live: set[str] = set()
    for wanted in head.roots:
        # A copy that is not condemned counts before one that is: so what was moved does not keep its old place.
        place = next((pack for pack in [*usable, *spared] if wanted in content(pack)), None)
        if place is None:
            return  # Something reachable is missing: the collection refuses to go on. `safe` reports the state.
        live.add(place)
    pinned: set[str] = set()
    for wanted in head.pinned - head.roots:
        place = next((pack for pack in [*usable, *spared] if wanted in content(pack)), None)
        if place is not None:
            pinned.add(place)
    if scene.broken == "no relist":
        doomed = seen.doomed & packs | (seen.condemned & packs)
    else:
        doomed = seen.doomed & packs | ((seen.condemned & packs) - live - pinned)
    if scene.broken == "doomed packs forgotten":
        doomed -= seen.doomed
    condemned = packs - doomed - live
    if scene.broken == "condemned at once gone":
        doomed, condemned = doomed | condemned, NOTHING
    index = frozenset({f"x{new_pack}"})
    ignored = frozenset(item for item, _ in head.known)
    superseded = frozenset(item.name for item in head.index)
    following = Generation(seen.number + 1, condemned, doomed, index, ignored)
    slim = Head(seen=seen, packs=packs, next=following, superseded=superseded)
    tidy = len(head.index) < 2 and NOTHING.union(*(item.packs for item in head.index)) <= packs
    if (condemned, doomed, head.known) == (seen.condemned, NOTHING, NOTHING) and tidy:
        return
    yield "mark", slim
    if scene.moves and "P" in live and "B" not in head.roots:
        # Mostly dead: what lives in it moves, and its old place is condemned.
        moved = following._replace(condemned=condemned | {"P"})
        yield "mark: move", slim._replace(moved=frozenset({new_pack}), next=moved)


# ("deleter", step, what it deletes, deletions left), ("human", ends left)


def deleter(scene: Scene, state: State, me: int) -> Iterator[tuple[str, State]]:
    """Deletes snapshots: each is first put among the deleted ones, then its manifest goes."""
    kind, step, chosen, left = state.processes[me]

    def to(*process: Any, **new: Any) -> State:
        processes = list(state.processes)
        processes[me] = (kind, *process)
        return state._replace(processes=tuple(processes), **new)

    if step == "choose" and left:
        for item in state.manifests:
            yield f"delete {item[0]}: pin", to("delete", item, left, deleted=state.deleted | {item})
    elif step == "delete":
        yield f"delete {chosen[0]}", to("choose", None, left - 1, manifests=state.manifests - {chosen})


def human(scene: Scene, state: State, me: int) -> Iterator[tuple[str, State]]:
    """Ends any session at any time, however new it is."""
    kind, left = state.processes[me]
    for session in state.sessions if left else ():
        processes = list(state.processes)
        processes[me] = (kind, left - 1)
        taken = any(manifest == session[0] for manifest, _ in state.manifests)
        fenced = state.tombstones if taken else state.tombstones | {session[0]}
        yield (
            f"human ends {session[0]}",
            state._replace(processes=tuple(processes), tombstones=fenced, sessions=state.sessions - {session}),
        )


STEPS = {"writer": writer, "collector": collector, "deleter": deleter, "human": human}


def safe(state: State) -> str | None:
    """What is lost, if anything is: something that a manifest reaches and that no reader finds."""
    doomed = NOTHING.union(*(item.doomed for item in state.generations))
    there = (NOTHING.union(*(item.packs for item in state.index)) & state.packs) - doomed
    missing = reach(state.manifests) - held(there)
    return f"{sorted(missing)} of {sorted(state.manifests)}" if missing else None


def clean_end(scene: Scene, state: State) -> str | None:
    """What is not right when somebody collects after all others have ended, died or stopped for good."""
    calm = Scene(rounds=9, crashes=False, moves=False)
    state = state._replace(processes=(("collector", "z", 0, "see", Head()),))
    for _ in range(400):
        found = next(iter(collector(calm, state, 0)), None)
        if found is None:
            break
        state = found[1]
        lost = safe(state)
        if lost:
            return lost
    named = NOTHING.union(*(item.packs for item in state.index))
    if named - state.packs:
        return f"index objects speak of {named - state.packs}, which are gone"
    if held(state.packs) and not reach(state.manifests):
        return f"garbage is left: {state.packs}"
    if len(state.packs) > len(reach(state.manifests)):
        return f"garbage is left: {state.packs}"
    latest = state.generations[-1].number
    # A session that has seen the last generation is in nobody's way; the next generation ends it.
    if state.deleted or len(state.generations) > 1 or any(seen < latest for _, seen in state.sessions):
        return f"left over: {state.sessions} {state.deleted} {state.generations}"
    return None


def begin(scene: Scene) -> State:
    """A repository with one snapshot that needs A; B is garbage."""
    processes: list[tuple[Any, ...]] = [
        ("writer", f"w{number}", 0, "see", None, NOTHING, NOTHING) for number in range(scene.writers)
    ]
    processes += [("collector", f"c{number}", 0, "see", Head()) for number in range(scene.collectors)]
    if scene.deletions:
        processes.append(("deleter", "choose", None, scene.deletions))
    if scene.ends:
        processes.append(("human", scene.ends))
    start = Generation(0, NOTHING, NOTHING, NOTHING, NOTHING)
    manifests = frozenset({("m", A)})
    if scene.started:
        # A was condemned while nothing reached it. "garbage": so it is still. "revived": a late commit reaches it.
        start = Generation(1, frozenset({"P"}), NOTHING, frozenset({"i"}), NOTHING)
        manifests = frozenset({("r", A)}) if scene.started == "revived" else NOTHING
    index = frozenset({Named("i", 0, frozenset({"P"}))})
    return State((start,), NOTHING, manifests, NOTHING, NOTHING, index, frozenset({"P"}), tuple(processes))


def explore(scene: Scene, limit: int = 100_000_000) -> Explored:
    """Visit every state that can be reached; stops at the first loss and tells the way to it."""
    found = Explored()
    start = begin(scene)
    came: dict[State, tuple[State, str] | None] = {start: None}
    left = [start]
    while left:
        state = left.pop()
        wrong = safe(state)
        follows = 0
        if wrong is None:
            for me, process in enumerate(state.processes):
                for what, new in STEPS[process[0]](scene, state, me):
                    follows += 1
                    if new not in came:
                        came[new] = state, f"{process[0]} {me}: {what}"
                        left.append(new)
            if follows == 0:
                found.ends += 1
                wrong = clean_end(scene, state)
        if wrong is not None:
            found.loss = wrong
            at: State | None = state
            while at is not None:
                step = came[at]
                if step is None:
                    break
                found.way.append(step[1])
                at = step[0]
            found.way.reverse()
            break
        if len(came) >= limit:
            break
    found.states = len(came)
    return found
