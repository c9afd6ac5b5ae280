"""The commands of `snapcore snapshot` and `snapcore restore` that have a pool and a repository."""

from __future__ import annotations

import click

from snapcore.cli import output, pooled
from snapcore.pool import Pool
from snapcore.repository import KeyChoice, Repository
from snapcore.service import Archived, Archives, Regions, RestoredDisk, group, into_disk, into_new_disk


def create(
    pool: str,
    repository: Repository,
    disk: str,
    name: str | None,
    chain: str | None,
    tags: dict[str, str],
    *,
    key: str | KeyChoice | None,
    regions: Regions,
    rate: int,
    keep_local: int | None,
    as_json: bool,
) -> None:
    """Cut a snapshot of a disk and archive it, behind what was begun before."""
    with Pool.open(pool, regions=regions) as found, Archives(found) as archives, output.bar() as progress:
        wanted = found.open_disk(disk)
        cut = wanted.snapshot(name)
        earlier = archives.finish(repository, rate)
        begun = archives.archive(
            repository, cut, name=name, disk=chain, tags=tags, key=key, rate_bytes_s=rate, progress=progress
        )
        done = begun.result()
        # Their errors stand in the journal; this one is there.
        failed = [error for error in (item.ended() for item in earlier) if error is not None]
        dropped = [] if keep_local is None else archives.keep_local(repository, wanted.id, keep_local)
        facts = _facts(done) | {
            "deleted_local": [item.id for item in dropped],
            "earlier": {"finished": len(earlier) - len(failed), "failed": [str(error) for error in failed]},
        }
    if as_json:
        output.print_json(facts)
        return
    _say(done)
    for item in dropped:
        click.echo(f"  deleted the local snapshot {item.id}")
    for error in failed:
        click.echo(f"  note: an earlier archive failed again: {output.text(error)}")


def archive(
    pool: str,
    repository: Repository,
    refs: tuple[str, ...],
    *,
    key: str | KeyChoice | None,
    regions: Regions,
    rate: int,
    as_json: bool,
) -> None:
    """Archive local snapshots, or finish what was begun."""
    with Pool.open(pool, regions=regions) as found, Archives(found) as archives, output.bar() as progress:
        if refs:
            chosen = [found.snapshot(ref) for ref in refs]
            begun = [
                archives.archive(repository, item, key=key, rate_bytes_s=rate, progress=progress) for item in chosen
            ]
        else:
            begun = archives.finish(repository, rate, progress)
            for made in group.finish(archives, repository, rate, progress):
                if as_json:
                    output.print_json({"group": made.id, "name": made.name, "members": made.members})
                else:
                    click.echo(f"group {made.id}: {len(made.members)} snapshots")
        for item in begun:
            done = item.result()
            if as_json:
                output.print_json(_facts(done))
            else:
                _say(done)


def restore(
    pool: str, repository: Repository, ref: str, disk: str, *, regions: Regions, in_place: bool, as_json: bool
) -> None:
    """Restore an archived snapshot into a disk of a pool."""
    wanted = repository.find(ref)
    with Pool.open(pool, regions=regions) as found, output.bar() as progress:
        if in_place:
            done = into_disk(found, found.open_disk(disk), repository, wanted, progress)
        else:
            done = into_new_disk(found, disk, repository, wanted, progress)
        facts = restored_facts(done) | {"snapshot": wanted.id}
    if as_json:
        output.print_json(facts)
    else:
        click.echo(f"restored {disk}: {output.size(done.written_bytes)} written in {done.duration_s:.2f} s")


def restored_facts(done: RestoredDisk) -> dict[str, object]:
    """A restore into a disk as JSON has it."""
    return {
        "disk": pooled.disk_facts(done.disk),
        "written_bytes": done.written_bytes,
        "looked_at_bytes": done.looked_at_bytes,
        "duration_s": round(done.duration_s, 6),
    }


def _facts(done: Archived) -> dict[str, object]:
    made = done.archived
    return {
        "local": pooled.snapshot_facts(done.local),
        "id": made.id,
        "disk": made.disk,
        "name": made.label,
        "parent": made.parent,
        "state": "accomplished",
        "cut": output.instant(done.local.created_ns),
        "completed": made.created,
        "size_bytes": made.size_bytes,
        "read_bytes": done.read_bytes,
        "changed_bytes": made.changed_bytes,
        "new_bytes": made.new_bytes,
        "stored_bytes": made.stored_bytes,
        "base": None if done.base is None else {"local": done.base.local.id, "archived": done.base.archived.id},
        "fallback_reason": done.fallback_reason,
        "duration_s": round(done.duration_s, 6),
    }


def _say(done: Archived) -> None:
    made = done.archived
    click.echo(f"snapshot {done.local.id} of {output.text(done.local.disk)}, archived as {made.id}")
    click.echo(
        f"  read {output.size(done.read_bytes)}, changed {output.size(made.changed_bytes)}, "
        f"stored {output.size(made.stored_bytes)} in {done.duration_s:.2f} s"
    )
    if done.fallback_reason:
        click.echo(f"  note: {output.text(done.fallback_reason)}")
