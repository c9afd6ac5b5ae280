"""`snapcore snapshot`: take, list, compare and delete snapshots, of images in a repository or of a pool's disks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from snapcore.cli import image_files, output
from snapcore.cli.unlocking import KEY_OPTIONS, Unlocking, chain_options, key_options
from snapcore.source import formats

if TYPE_CHECKING:
    from snapcore.repository import KeyChoice

_PLACES = ("pool", "repo", "as_json")


@click.group()
def snapshot() -> None:
    """Take, list, compare and delete snapshots."""


@snapshot.command()
@click.argument("image", metavar="IMAGE|DISK", type=click.Path())
@output.places_option
@click.option("--disk", help="Name of the chain; for an image it must be given, a pool's disk has one.")
@click.option("--parent", metavar="ID", help="Compare with this snapshot and not with the disk's newest one.")
@click.option(
    "--changed",
    metavar="FILE",
    help='All that may differ from the parent, as {"extents": [[offset, length], …]}; "-" reads standard input.',
)
@click.option("--paranoid", is_flag=True, help="Compare by content id, not by the fingerprints kept on this host.")
@click.option("--allow-changing", is_flag=True, help="Accept a raw image that is written meanwhile.")
@click.option(
    "--format",
    "read_format",
    type=click.Choice(formats.READ_FORMATS),
    help="Of IMAGE. Default: what its name says; any other name means raw.",
)
@image_files.backing_option
@click.option("--compression", type=click.Choice(["lz4", "zstd", "none"]), help="Default: the repository's.")
@click.option("--name", "label", help="A name to find the snapshot by.")
@click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE", help="May be given several times.")
@chain_options
@key_options
@output.rate_option
@click.option("--keep-local", type=int, help="Then delete all but so many archived local snapshots of the disk.")
@output.json_option
def create(
    image: str,
    repo: str | None,
    pool: str | None,
    disk: str | None,
    parent: str | None,
    changed: str | None,
    paranoid: bool,
    allow_changing: bool,
    read_format: str | None,
    backing_folders: tuple[str, ...],
    compression: str | None,
    label: str | None,
    tags: tuple[str, ...],
    key: str | KeyChoice | None,
    keys: Unlocking,
    rate: int,
    keep_local: int | None,
    as_json: bool,
) -> None:
    """Take a snapshot of IMAGE, a file or block device: full the first time, then only what changed.

    An image whose name ends in .qcow2, .vhd, .vhdx or .vmdk is read as that.

    With -p: of DISK of the pool, in constant time; of the options only --name is for that. With -p and -r: of DISK of
    the pool, and then stored in the repository: what changed since the last one there. Interrupted, it is gone on with
    by `snapcore snapshot archive`, or by the next one.
    """
    if pool is not None and repo is not None:
        _refuse_options("label", "disk", "tags", "rate", "keep_local", "key", "no_key", *KEY_OPTIONS)
        from snapcore.cli import archiving

        archiving.create(
            pool,
            keys.open(repo),
            image,
            label,
            disk,
            output.tag_pairs(tags),
            key=key,
            regions=keys.regions(),
            rate=rate,
            keep_local=keep_local,
            as_json=as_json,
        )
        return
    if pool is not None:
        _refuse_options("label")
        from snapcore.cli import snapshot_pool

        snapshot_pool.create(pool, image, label, as_json=as_json)
        return
    if rate or keep_local is not None:
        raise click.UsageError("--rate and --keep-local are for disks of a pool that are archived")
    if disk is None:
        raise click.UsageError("Missing option '--disk': the name of the disk that IMAGE is of")
    from snapcore.source import open_as_named

    found = keys.open(str(repo))
    with (
        open_as_named(image, read_format, backing_folders=backing_folders, allow_changing=allow_changing) as source,
        output.bar() as progress,
    ):
        done = found.snapshot(
            source,
            disk=disk,
            parent=parent,
            changed=None if changed is None else output.read_changed(changed),
            paranoid=paranoid,
            compression=compression,
            label=label,
            tags=output.tag_pairs(tags),
            key=key,
            progress=progress,
        )
    made = done.snapshot
    if as_json:
        output.print_json(
            {
                "id": made.id,
                "disk": made.disk,
                "name": made.label,
                "parent": made.parent,
                "key": made.key,
                "created": made.created,
                "size_bytes": made.size_bytes,
                "read_bytes": done.read_bytes,
                "written_bytes": made.written_bytes,
                "changed_bytes": made.changed_bytes,
                "new_bytes": made.new_bytes,
                "stored_bytes": made.stored_bytes,
                "fallback_reason": made.fallback_reason,
                "duration_s": round(done.duration_s, 6),
            }
        )
        return
    click.echo(f"snapshot {made.id} of {made.disk}")
    click.echo(
        f"  read {output.size(done.read_bytes)}, changed {output.size(made.changed_bytes)}, "
        f"stored {output.size(made.stored_bytes)} in {done.duration_s:.2f} s"
    )
    if made.fallback_reason:
        click.echo(f"  note: {made.fallback_reason}")


def _refuse_options(*allowed: str) -> None:
    """UsageError for an option of the running command that a pool has no use for."""
    context = click.get_current_context()
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if given and isinstance(option, click.Option) and option.name not in (*_PLACES, *allowed):
            raise click.UsageError(f"{option.opts[-1]} is for images, not for disks of a pool")


@snapshot.command()
@click.argument("refs", metavar="[SNAPSHOT…]", nargs=-1)
@output.repository_option
@click.option("-p", "--pool", required=True, envvar="SNAPCORE_POOL", metavar="DIR", help="The pool.")
@output.rate_option
@chain_options
@key_options
@output.json_option
def archive(
    refs: tuple[str, ...],
    place: str,
    pool: str,
    rate: int,
    key: str | KeyChoice | None,
    keys: Unlocking,
    as_json: bool,
) -> None:
    """Archive snapshots of a pool in a repository; without one, finish what was begun. With --json an object a line."""
    if key is not None and not refs:
        raise click.UsageError("--key and --no-key are for snapshots that are named; what was begun has its key")
    from snapcore.cli import archiving

    archiving.archive(pool, keys.open(place), refs, key=key, regions=keys.regions(), rate=rate, as_json=as_json)


@snapshot.command("list")
@output.place_option
@click.option("--disk", help="Only those of this disk.")
@key_options
@output.json_option
def list_(place: output.Place, disk: str | None, keys: Unlocking, as_json: bool) -> None:
    """List snapshots; with --json one object a line. Of those under keys that are not unlocked, that they are there."""
    if place.is_pool:
        from snapcore.cli import snapshot_pool

        snapshot_pool.list_(place.path, disk, as_json=as_json)
        return
    repository = keys.open(place.path)
    found = repository.snapshots(disk)
    locked = repository.locked_snapshots() if disk is None else []
    names = {item.id: item.name for item in repository.keyring.listed()} if locked or any(f.key for f in found) else {}
    if as_json:
        for item in found:
            output.print_json(item)
        for hidden in locked:
            known = {"id": hidden.id, "disk": None, "key": hidden.key, "key_name": names.get(hidden.key)}
            output.print_json(known | {"locked": True})
        return
    rows = [
        [
            item.id[:12],
            item.disk,
            item.label or "",
            item.created[:19],
            output.size(item.size_bytes),
            output.size(item.written_bytes),
            output.size(item.changed_bytes),
            output.size(item.stored_bytes),
        ]
        for item in found
    ]
    rows += [[hidden.id[:12], "(locked)", "", "", "", "", "", ""] for hidden in locked]
    headings = ["id", "disk", "name", "created (UTC)", "size", "written", "changed", "stored"]
    if names:
        headings.append("key")
        under = [item.key for item in found] + [hidden.key for hidden in locked]
        rows = [[*row, "" if key is None else names.get(key, key)] for row, key in zip(rows, under, strict=True)]
    output.table(headings, rows, right=frozenset({4, 5, 6, 7}))


@snapshot.command()
@click.argument("ids", metavar="ID…", nargs=-1, required=True)
@output.place_option
@key_options
@output.json_option
def show(ids: tuple[str, ...], place: output.Place, keys: Unlocking, as_json: bool) -> None:
    """Show snapshots, and what deleting all the given ones would free."""
    if place.is_pool:
        from snapcore.cli import snapshot_pool

        snapshot_pool.show(place.path, ids, as_json=as_json)
        return
    import msgspec

    found = keys.open(place.path)
    chosen = [found.find(item) for item in ids]
    unique = found.unique(chosen)
    if as_json:
        facts = msgspec.to_builtins(chosen[0]) if len(chosen) == 1 else {"ids": [item.id for item in chosen]}
        output.print_json(facts | {"unique_bytes": unique.plain_bytes, "unique_stored_bytes": unique.stored_bytes})
        return
    for item in chosen:
        for key, value in msgspec.to_builtins(item).items():
            shown = f"{value} ({output.size(value)})" if key.endswith("_bytes") else value
            click.echo(f"{key:16} {'-' if shown is None else output.text(shown)}")
        click.echo()
    click.echo(
        f"deleting {'this' if len(chosen) == 1 else 'these'} frees {output.size(unique.stored_bytes)} "
        f"({output.size(unique.plain_bytes)} before compression)"
    )


@snapshot.command()
@click.argument("a")
@click.argument("b")
@output.place_option
@key_options
@output.json_option
def diff(a: str, b: str, place: output.Place, keys: Unlocking, as_json: bool) -> None:
    """Print where two snapshots differ, in bytes. With -p either may be a disk: as it is now."""
    if place.is_pool:
        from snapcore.cli import snapshot_pool

        snapshot_pool.diff(place.path, a, b, as_json=as_json)
        return
    rows = keys.open(place.path).diff(a, b)
    if as_json:
        output.print_json({"extents": output.extents_json(rows)})
        return
    output.print_extents(rows)


@snapshot.command()
@click.argument("ids", metavar="ID…", nargs=-1, required=True)
@output.place_option
@click.option("--force", is_flag=True, help="In a repository: also those that lazy disks still need (`snapcore pin`).")
@key_options
@output.json_option
def delete(ids: tuple[str, ...], place: output.Place, force: bool, keys: Unlocking, as_json: bool) -> None:
    """Delete snapshots, in any order. In a repository `snapcore repo collect` frees their space."""
    if place.is_pool:
        if force:
            raise click.UsageError("--force is for snapshots in a repository")
        from snapcore.cli import snapshot_pool

        snapshot_pool.delete(place.path, ids, as_json=as_json)
        return
    found = keys.open(place.path)
    for item in ids:
        gone = found.delete(item, force=force)
        if as_json:
            output.print_json({"deleted": gone})
        else:
            click.echo(f"deleted {gone}")
