"""`snapcore group`: snapshots of several disks at one instant, in a pool and in a repository."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from snapcore.cli import image_files, output
from snapcore.cli.unlocking import Unlocking, chain_options, key_options
from snapcore.errors import NotFoundError
from snapcore.source import formats

if TYPE_CHECKING:
    from snapcore.pool import Snapshot
    from snapcore.repository import KeyChoice, Manifest, Repository

_disks_option = click.option("--disk", "disks", multiple=True, metavar="NAME", help="Only this one; may be repeated.")


@click.group()
def group() -> None:
    """Take snapshots of several disks of a pool at one instant, archive, restore and roll them back together."""


@group.command()
@click.argument("disks", metavar="DISK…", nargs=-1, required=True)
@output.pool_option
@click.option("-r", "--repo", metavar="DIR", help="Archive the group in this repository, all of it or nothing.")
@click.option("--name", help="Of each of the snapshots, and of the group.")
@click.option("--freeze", metavar="COMMAND", help="Run this before the cut. A failure does not stop it, and is told.")
@click.option("--thaw", metavar="COMMAND", help="Run this after the cut, whatever came of it.")
@click.option("--timeout", type=float, default=60.0, show_default=True, help="Seconds that each of the two may take.")
@click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE", help="Of archived members; may be repeated.")
@output.rate_option
@chain_options
@key_options
@output.json_option
def create(
    disks: tuple[str, ...],
    place: str,
    repo: str | None,
    name: str | None,
    freeze: str | None,
    thaw: str | None,
    timeout: float,
    tags: tuple[str, ...],
    rate: int,
    key: str | KeyChoice | None,
    keys: Unlocking,
    as_json: bool,
) -> None:
    """Cut a snapshot of each DISK, all at one instant."""
    from snapcore.cli import pooled
    from snapcore.pool import Pool
    from snapcore.service import Archives, Hooks
    from snapcore.service import group as groups

    repository = None if repo is None else keys.open(repo)
    with Pool.open(place, regions=keys.regions()) as found, Archives(found) as archives:
        hooks = Hooks(freeze, thaw, timeout)
        started = time.monotonic()
        made = groups.cut(found, archives.journal, [found.open_disk(disk) for disk in disks], name, hooks)
        spent = time.monotonic() - started
        facts: dict[str, object] = {
            "id": made[0].group,
            "name": name,
            "created": output.instant(made[0].created_ns),
            "snapshots": [pooled.snapshot_facts(item) for item in made],
            "freeze": hooks.froze,
            "thaw": hooks.thawed,
            "consistency": "application" if hooks.froze is not None and hooks.froze.ok else "crash",
            "duration_s": round(spent, 6),
        }
        if not as_json:
            for item in made:
                click.echo(f"snapshot {item.id} of {output.text(item.disk)}")
            for what, run in (("freeze", hooks.froze), ("thaw", hooks.thawed)):
                if run is not None and not run.ok:
                    why = "ran out of time" if run.timed_out else f"ended with {run.exit_code}"
                    click.echo(f"  note: {what} {why}")
        if repository is not None:
            with output.bar() as progress:
                stored = groups.archive(
                    archives,
                    repository,
                    made,
                    name=name,
                    tags=output.tag_pairs(tags),
                    key=key,
                    hooks=hooks,
                    rate_bytes_s=rate,
                    progress=progress,
                )
            facts |= {"archived": stored}
            if not as_json:
                click.echo(f"archived as group {stored.id}")
        if as_json:
            output.print_json(facts)


@group.command("list")
@output.place_option
@key_options
@output.json_option
def list_(place: output.Place, keys: Unlocking, as_json: bool) -> None:
    """List groups of which snapshots are there; with --json one object a line. Not those under keys not unlocked."""
    if not place.is_pool:
        _list_archived(keys.open(place.path), as_json=as_json)
        return
    groups = _local(place.path)
    if as_json:
        for facts in groups:
            output.print_json(facts)
        return
    rows = [
        [
            str(facts["id"]),
            str(facts["name"] or ""),
            str(facts["created"])[:19],
            ", ".join(f"{item['id']} of {item['disk']}" for item in facts["snapshots"]),  # type: ignore[attr-defined]
        ]
        for facts in groups
    ]
    output.table(["id", "name", "created (UTC)", "snapshots"], rows)


def _local(place: str) -> list[dict[str, object]]:
    """Groups of a pool as JSON has them."""
    from snapcore.cli import pooled
    from snapcore.pool import Pool
    from snapcore.service.journal import Journal

    groups: dict[str, list[Snapshot]] = {}
    journal = Journal(place)
    with Pool.open(place, read_only=True) as found:
        for item in found.snapshots():
            if item.group is not None:
                groups.setdefault(item.group, []).append(item)
        facts = []
        for number, members in groups.items():
            first = pooled.snapshot_facts(members[0])
            hooks = journal.hooks(number)
            facts.append(
                {
                    "id": number,
                    "name": first["name"],
                    "created": first["created"],
                    "snapshots": [pooled.snapshot_facts(item) for item in members],
                    "freeze": hooks.freeze,
                    "thaw": hooks.thaw,
                }
            )
    return facts


def _list_archived(repository: Repository, *, as_json: bool) -> None:
    found = repository.groups()
    if as_json:
        for item in found:
            output.print_json(item)
        return
    rows = [
        [
            item.id[:12],
            item.name or "",
            item.created[:19],
            item.consistency,
            ", ".join(one.disk for one in item.members),
        ]
        for item in found
    ]
    output.table(["id", "name", "created (UTC)", "consistency", "disks"], rows)


@group.command()
@click.argument("ref", metavar="GROUP")
@output.place_option
@key_options
@output.json_option
def show(ref: str, place: output.Place, keys: Unlocking, as_json: bool) -> None:
    """Show a group: its members, which of them are gone, and what came of freeze and thaw."""
    import msgspec

    if place.is_pool:
        found = [facts for facts in _local(place.path) if ref in (facts["id"], facts["name"])]
        if len(found) != 1:
            raise NotFoundError(f"{place.path} has {len(found)} groups {ref!r}")
        facts = found[0]
    else:
        repository = keys.open(place.path)
        wanted = repository.group(ref)
        there = {item.id for item in repository.snapshots()}
        missing = [item.snapshot for item in wanted.members if item.snapshot not in there]
        facts = msgspec.to_builtins(wanted) | {"missing": missing}
    if as_json:
        output.print_json(facts)
        return
    for key, value in facts.items():
        click.echo(f"{key:12} {'-' if value is None else output.text(value)}")


@group.command()
@click.argument("ref", metavar="GROUP")
@output.pool_option
@_disks_option
@output.json_option
def rollback(ref: str, place: str, disks: tuple[str, ...], as_json: bool) -> None:
    """Roll the disks of a pool's group back to it. Nobody may be attached to one."""
    from snapcore.cli import pooled
    from snapcore.pool import Pool
    from snapcore.service import group as groups

    with Pool.open(place) as found:
        for disk in groups.rollback(found, ref, disks):
            if as_json:
                output.print_json(pooled.disk_facts(disk))
            else:
                click.echo(f"disk {output.text(disk.name)} is as in group {output.text(ref)} again")


@group.command()
@click.argument("ref", metavar="GROUP")
@output.repository_option
@click.option("-p", "--pool", envvar="SNAPCORE_POOL", metavar="DIR", help="To disks of this pool.")
@click.option("--to", "folder", metavar="DIR", help="To image files in this folder, called as the disks.")
@_disks_option
@click.option("--in-place", is_flag=True, help="The disks, or raw images, exist: write only what differs.")
@click.option("--format", "written_format", type=click.Choice(formats.WRITTEN_FORMATS), help="Of files. Default: raw.")
@image_files.packing_option
@key_options
@output.json_option
def restore(
    ref: str,
    place: str,
    pool: str | None,
    folder: str | None,
    disks: tuple[str, ...],
    in_place: bool,
    written_format: str | None,
    packing: str | None,
    keys: Unlocking,
    as_json: bool,
) -> None:
    """Restore the members of an archived group to disks of a pool, or to files; with --json one object a line."""
    named = click.get_current_context().get_parameter_source("pool") is ParameterSource.COMMANDLINE
    if (folder is None and pool is None) or (folder is not None and named):
        raise click.UsageError("give one place: a pool (-p DIR), or a folder for image files (--to DIR)")
    if folder is None and (written_format is not None or packing is not None):
        raise click.UsageError("--format and --packing are for files (--to DIR)")
    from snapcore.service import group as groups

    repository = keys.open(place)
    wanted = repository.group(ref)
    chosen = groups.chosen(repository, wanted, disks)
    if folder is not None:
        _to_files(
            repository, chosen, folder, written_format or formats.RAW, packing, in_place=in_place, as_json=as_json
        )
        return
    from snapcore.cli import archiving
    from snapcore.pool import Pool
    from snapcore.service import into_disk, into_new_disk

    with Pool.open(str(pool), regions=keys.regions()) as found:
        existing = {name: found.open_disk(name) for name, _ in chosen} if in_place else {}
        with found.holding([*existing.values()], f"the restore of group {wanted.id}"):
            pass
        for name, snapshot in chosen:
            with output.bar() as progress:
                if in_place:
                    done = into_disk(found, existing[name], repository, snapshot, progress)
                else:
                    done = into_new_disk(found, name, repository, snapshot, progress)
            if as_json:
                output.print_json(archiving.restored_facts(done) | {"snapshot": snapshot.id})
            else:
                click.echo(f"restored {output.text(name)}: {output.size(done.written_bytes)} written")


def _to_files(
    repository: Repository,
    chosen: list[tuple[str, Manifest]],
    folder: str,
    written_format: str,
    packing: str | None,
    *,
    in_place: bool,
    as_json: bool,
) -> None:
    from snapcore.service import group as groups
    from snapcore.service.files import write_all

    files = groups.files(chosen, folder, written_format)
    image_files.check_target(files[0][2], written_format, packing, in_place=in_place, as_json=as_json)
    if in_place:
        missing = [path for _, _, path in files if not os.path.exists(path)]
        if missing:
            raise NotFoundError(f"there is no {', '.join(missing)} to restore into; leave --in-place out for new files")
        for name, snapshot, path in files:
            with output.bar() as progress:
                done = repository.restore(snapshot, path, in_place=True, progress=progress)
            facts = {"disk": name, "snapshot": snapshot.id, "target": path, "written_bytes": done.written_bytes}
            if as_json:
                output.print_json(facts)
            else:
                click.echo(output.text(f"restored {path}: {output.size(done.written_bytes)} written"))
        return
    with output.bar() as progress:
        written = write_all(
            repository,
            [(snapshot, path) for _, snapshot, path in files],
            written_format,
            compression=packing,
            forbidden_folder=repository.url,
            progress=progress,
        )
    for (name, snapshot, path), image in zip(files, written, strict=True):
        facts = {"disk": name, "snapshot": snapshot.id, "target": path}
        image_files.say_written(image, facts, "restored", as_json=as_json)


@group.command()
@click.argument("ref", metavar="GROUP")
@output.place_option
@click.option("--force", is_flag=True, help="Also one with snapshots that lazy disks still need (`snapcore pin`).")
@key_options
@output.json_option
def delete(ref: str, place: output.Place, force: bool, keys: Unlocking, as_json: bool) -> None:
    """Delete a group with its snapshots; in a repository also what is left of one that was never complete."""
    if place.is_pool:
        from snapcore.pool import Pool
        from snapcore.service import Archives

        with Pool.open(place.path) as found, Archives(found) as archives:
            members = [item for item in found.snapshots() if item.group is not None and item.group == ref]
            if not members:
                raise NotFoundError(f"{place.path} has no group {ref!r}; see `snapcore group list -p {place.path}`")
            archives.delete_snapshots(members)
        gone_id, gone = ref, [item.id for item in members]
    else:
        from snapcore.service import group as groups

        gone_id, gone = groups.delete(keys.open(place.path), ref, force=force)
    if as_json:
        output.print_json({"deleted": gone_id, "snapshots": gone})
    else:
        click.echo(f"deleted group {gone_id} and {len(gone)} snapshots")
