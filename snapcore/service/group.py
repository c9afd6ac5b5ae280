"""Groups of disks: cut at one instant, archived all or nothing, rolled back (docs/DESIGN.md, "Two tiers")."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime

import msgspec

from snapcore.errors import CancelledError, DamagedError, Error, ExistsError, NotFoundError, RefusedError
from snapcore.pool import Disk, Pool, Snapshot
from snapcore.progress import ProgressCallback
from snapcore.repository import Group, KeyChoice, Manifest, Member, Repository
from snapcore.service.archives import Archive, Archives
from snapcore.service.base import key_word
from snapcore.service.hooks import Hooks
from snapcore.service.journal import CutHooks, Journal, Wanted
from snapcore.source.formats import RAW


def cut(
    pool: Pool, journal: Journal, disks: Sequence[Disk], name: str | None = None, hooks: Hooks | None = None
) -> list[Snapshot]:
    """Cut snapshots of disks at one instant, between freeze and thaw; what came of those is written down."""
    hooks = hooks or Hooks()
    with hooks.around():
        made = pool.snapshot_group(disks, name)
    if (hooks.froze or hooks.thawed) and made[0].group is not None:
        alive = {item.group for item in pool.snapshots() if item.group is not None}
        journal.cut(made[0].group, CutHooks(freeze=hooks.froze, thaw=hooks.thawed), alive)
    return made


def archive(
    archives: Archives,
    repository: Repository,
    snapshots: Sequence[Snapshot],
    *,
    name: str | None = None,
    tags: dict[str, str] | None = None,
    key: str | KeyChoice | None = None,
    hooks: Hooks | None = None,
    rate_bytes_s: int = 0,
    progress: ProgressCallback | None = None,
) -> Group:
    """Archive snapshots that were cut together as one group; all or nothing.

    Parameters
    ----------
    archives : Archives
    repository : Repository
    snapshots : sequence of Snapshot
    name : str, optional
        Of the group and of each member.
    tags : dict of str, optional
        Of each member.
    key : str or NO_KEY, optional
        As for `Archives.archive`. All members are under one key, and the group too.
    hooks : Hooks, optional
        That ran around the cut; default: what the journal says of a local group.
    rate_bytes_s, progress
        As for `Archives.archive`, for each member.

    Raises
    ------
    Error
        What the first member that failed failed with. No group is there, and none of its members.
    """
    known = (
        CutHooks(freeze=hooks.froze, thaw=hooks.thawed) if hooks else archives.journal.hooks(snapshots[0].group or "")
    )
    wanted = Wanted(
        id=secrets.token_hex(16),
        repository=repository.id,
        url=repository.url,
        snapshots=[item.id for item in snapshots],
        name=name,
        tags=tags or {},
        key=key_word(key),
        group=True,
        freeze=known.freeze,
        thaw=known.thaw,
    )
    archives.journal.want(wanted)
    begun = [archives.begin(repository, wanted, item, rate_bytes_s, progress) for item in snapshots]
    return _complete(archives, repository, wanted, begun)


def finish(
    archives: Archives, repository: Repository, rate_bytes_s: int = 0, progress: ProgressCallback | None = None
) -> list[Group]:
    """Go on with the groups that are wanted for a repository and not under way."""
    done = []
    for wanted in archives.unfinished(repository):
        if not wanted.group:
            continue
        try:
            snapshots = [archives.pool.snapshot(local) for local in wanted.snapshots]
        except NotFoundError:
            # A member was deleted: it can never be whole, and nobody wants it any more.
            _remove(repository, wanted.id)
            archives.journal.drop(wanted.id)
            continue
        begun = [archives.begin(repository, wanted, item, rate_bytes_s, progress, looked=False) for item in snapshots]
        done.append(_complete(archives, repository, wanted, begun))
    return done


def _complete(archives: Archives, repository: Repository, wanted: Wanted, begun: Sequence[Archive]) -> Group:
    try:
        done = [item.result() for item in begun]
        group = Group(
            id=wanted.id,
            name=wanted.name,
            created=_instant(begun[0].snapshot.created_ns),
            members=[Member(disk=item.archived.disk, snapshot=item.archived.id) for item in done],
            freeze=wanted.freeze,
            thaw=wanted.thaw,
            consistency="application" if wanted.freeze is not None and wanted.freeze.ok else "crash",
        )
        # After a crash it may be there already; its members were found by their origin and are the same.
        with contextlib.suppress(ExistsError):
            repository.put_group(group)
    except BaseException as error:
        for item in begun:
            item.stop()
        for item in begun:
            item.ended()
        if isinstance(error, Error) and not isinstance(error, CancelledError):
            with contextlib.suppress(Error):
                _remove(repository, wanted.id)
            with contextlib.suppress(Error):
                archives.journal.want(msgspec.structs.replace(wanted, error=str(error)))
        raise
    alive = [item.id for item in archives.pool.snapshots()]
    archives.journal.done(wanted, {item.local.id: item.archived.id for item in done}, alive)
    return group


def members(repository: Repository, group_id: str) -> list[str]:
    """Ids of the snapshots that say that they belong to a group, whether it is there or not."""
    return [item.id for item in repository.snapshots() if item.group == group_id]


def _remove(repository: Repository, group_id: str) -> None:
    for snapshot_id in members(repository, group_id):
        with contextlib.suppress(NotFoundError):
            repository.delete(snapshot_id)


def delete(repository: Repository, ref: str, *, force: bool = False) -> tuple[str, list[str]]:
    """Delete a group and the snapshots in it. Returns its id and theirs.

    Also what is left of one that was never complete, by its whole id. RefusedError when an image holds one of the
    snapshots, or when one is pinned (`Repository.delete`), unless forced: nothing is deleted then.
    """
    try:
        found: Group | None = repository.group(ref)
    except NotFoundError:
        found = None
    group_id = found.id if found is not None else ref
    gone = members(repository, group_id)
    repository.check_deletable(gone)
    if found is None and not gone:
        raise NotFoundError(f"{repository.url} has no group {ref!r}, and no snapshot that says that it belongs to one")
    for snapshot_id in gone if not force else ():
        with contextlib.suppress(NotFoundError):
            repository.check_unpinned(snapshot_id)
    # The object first: a crash leaves snapshots without a group, and doing it again removes them.
    if found is not None:
        repository.delete_group(found)
    for snapshot_id in gone:
        with contextlib.suppress(NotFoundError):
            repository.delete(snapshot_id, force=force)
    return group_id, gone


def chosen(repository: Repository, group: Group, disks: Sequence[str] = ()) -> list[tuple[str, Manifest]]:
    """(disk, snapshot) of the members of a group, or of those that are named: all are looked for before any is used.

    Raises
    ------
    NotFoundError
        One of the names is none of a member, or a member was deleted.
    DamagedError
        A snapshot says that it belongs elsewhere: what is sealed says so itself, whatever somebody made of the group.
    """
    unknown = {*disks} - {item.disk for item in group.members}
    if unknown:
        raise NotFoundError(f"group {group.id} has no snapshot of {', '.join(sorted(unknown))}")
    found = [(item.disk, repository.find(item.snapshot)) for item in group.members if not disks or item.disk in disks]
    for name, snapshot in found:
        if (snapshot.disk, snapshot.group) != (name, group.id):
            raise DamagedError(f"group {group.id} names {snapshot.id} as of {name}, and that says otherwise")
    return found


def files(members: Sequence[tuple[str, Manifest]], folder: str, format: str) -> list[tuple[str, Manifest, str]]:
    """(disk, snapshot, path) of image files in a folder, called as the disks.

    Raises
    ------
    RefusedError
        A disk's name is none of a file in a folder.
    """
    ending = "img" if format == RAW else format
    found = []
    for name, snapshot in members:
        if "/" in name or name.startswith("."):
            raise RefusedError(
                f"the disk {name!r} cannot be a file of that name; leave it out with --disk, and "
                f"`snapcore restore {snapshot.id} FILE` gives it another one"
            )
        found.append((name, snapshot, os.path.join(folder, f"{name}.{ending}")))
    return found


def rollback(pool: Pool, group_id: str, disks: Sequence[str] = ()) -> list[Disk]:
    """Roll the disks of a local group, or those that are named, back to it. Returns them.

    Raises
    ------
    BusyError
        Somebody is attached to one of them; none was touched.
    NotFoundError, RefusedError
    """
    cuts = [item for item in pool.snapshots() if item.group is not None and group_id in (item.group, item.name)]
    groups = {item.group for item in cuts}
    if len(groups) != 1:
        raise NotFoundError(
            f"{pool.path} has {len(groups)} groups {group_id!r}; see `snapcore group list -p {pool.path}`"
        )
    unknown = {*disks} - {item.disk for item in cuts}
    if unknown:
        raise RefusedError(f"group {group_id} has no snapshot of {', '.join(sorted(unknown))}")
    there = {disk.id: disk for disk in pool.disks()}
    chosen = [item for item in cuts if not disks or item.disk in disks]
    missing = sorted(item.disk for item in chosen if item.disk_id not in there)
    if missing:
        raise NotFoundError(f"{', '.join(missing)} of group {group_id} are no disks any more; name the others")
    rolled = [there[item.disk_id] for item in chosen]
    with pool.holding(rolled, f"the rollback of group {group_id}"):
        pass
    for disk, item in zip(rolled, chosen, strict=True):
        disk.rollback(item)
    return rolled


def _instant(since_1970_ns: int) -> str:
    return datetime.fromtimestamp(since_1970_ns // 1_000_000 / 1000, UTC).isoformat(timespec="milliseconds")
