"""`snapcore disk`: the live disks of a pool."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import click

from snapcore.cli import image_files, output
from snapcore.cli.unlocking import Unlocking, key_options
from snapcore.source import formats

if TYPE_CHECKING:
    from snapcore.pool import Disk


@click.group()
def disk() -> None:
    """Make, change, import and export the live disks of a pool."""


def _say(facts: dict[str, object], line: str, *, as_json: bool) -> None:
    if as_json:
        output.print_json(facts)
    else:
        click.echo(output.text(line))


@disk.command()
@click.argument("name")
@output.pool_option
@click.option("--size", type=output.Size(), help="Default: that of what it is made from.")
@click.option(
    "--from",
    "source",
    metavar="SNAPSHOT|DISK|IMAGE|REPO:SNAPSHOT",
    help="What it holds at first. An image is read from where it stands, and must stay as it is; of a repository's "
    "snapshot is fetched what is read.",
)
@click.option(
    "--format",
    "image_format",
    type=click.Choice([formats.RAW]),
    help="IMAGE is raw whatever its name and its first bytes say. Others are imported.",
)
@output.hydrate_option("What of a repository's snapshot is not read, `snapcore serve` fetches at this rate.", "full")
@key_options
@output.json_option
def create(
    name: str,
    place: str,
    size: int | None,
    source: str | None,
    image_format: str | None,
    hydrate: float,
    keys: Unlocking,
    as_json: bool,
) -> None:
    """Make a disk, in constant time: an empty one, or one that shares all blocks with what it is made from."""
    from snapcore.cli import pooled
    from snapcore.pool import Pool

    regions = keys.regions()
    with Pool.open(place, regions=regions) as found:
        region = None if source is None or os.path.exists(source) else regions.find(source)
        made = found.create_disk(name, size, source if region is None else region, image_format=image_format)
        if region is not None:
            found.plan_hydration(made, hydrate if hydrate >= 0 else None)
        _say(pooled.disk_facts(made), f"made disk {made.name} of {output.size(made.size_bytes)}", as_json=as_json)


@disk.command("list")
@output.pool_option
@output.json_option
def list_(place: str, as_json: bool) -> None:
    """List disks; with --json one object a line."""
    from snapcore.cli import pooled
    from snapcore.pool import Pool

    with Pool.open(place, read_only=True) as found:
        disks = found.disks()
        if as_json:
            for item in disks:
                output.print_json(pooled.disk_facts(item))
            return
        counts = [str(len(found.snapshots(item))) for item in disks]
        rows = [
            [item.id, item.name, output.instant(item.created_ns)[:19], count, output.size(item.size_bytes)]
            for item, count in zip(disks, counts, strict=True)
        ]
    output.table(["id", "name", "created (UTC)", "snapshots", "size"], rows, right=frozenset({3, 4}))


@disk.command()
@click.argument("name")
@output.pool_option
@output.json_option
def show(name: str, place: str, as_json: bool) -> None:
    """Show a disk, its snapshots, and what deleting it would free."""
    from snapcore import extents
    from snapcore.cli import pooled
    from snapcore.pool import Pool

    with Pool.open(place, read_only=True) as found:
        wanted = found.open_disk(name)
        taken = {
            "mapped_bytes": extents.total_bytes(wanted.extents().allocated),
            "unique_bytes": found.unique_bytes([wanted]),
        }
        facts = pooled.disk_facts(wanted) | taken
        snapshots = found.snapshots(wanted)
    if as_json:
        output.print_json(facts | {"snapshots": [item.id for item in snapshots]})
        return
    pooled.show_facts(facts)
    click.echo(f"{'snapshots':16} {output.text(', '.join(item.name for item in snapshots) or '-')}")


@disk.command()
@click.argument("name")
@click.argument("new_name", metavar="NEW")
@output.pool_option
@output.json_option
def clone(name: str, new_name: str, place: str, as_json: bool) -> None:
    """Make a disk NEW that holds what disk NAME holds now, in constant time."""
    from snapcore.cli import pooled
    from snapcore.pool import Pool

    with Pool.open(place) as found:
        made = found.open_disk(name).clone(new_name)
        _say(pooled.disk_facts(made), f"made disk {made.name}, a clone of {name}", as_json=as_json)


@disk.command()
@click.argument("name")
@click.argument("snapshot", metavar="SNAPSHOT|REPO:SNAPSHOT")
@output.pool_option
@click.option("--dry-run", is_flag=True, help="Change nothing; say what would be.")
@key_options
@output.json_option
def rollback(name: str, snapshot: str, place: str, dry_run: bool, keys: Unlocking, as_json: bool) -> None:
    """Go back to one of the disk's own snapshots, in constant time. All snapshots stay.

    One that is only in a repository must be of this disk; what is read of it is fetched then.
    """
    from snapcore import extents
    from snapcore.cli import pooled
    from snapcore.pool import Pool, Region

    regions = keys.regions()
    with Pool.open(place, read_only=dry_run, regions=regions) as found:
        wanted = found.open_disk(name)
        own = regions.find_own(snapshot, found, wanted)
        if isinstance(own, Region):
            facts: dict[str, object] = {"disk": wanted.name, "snapshot": own.snapshot, "dry_run": dry_run}
            line = f"disk {wanted.name} {'would be' if dry_run else 'is'} as snapshot {own.snapshot} again"
            if not dry_run:
                found.rollback_disk(wanted, own)
            _say(facts | {"region": own.url}, line, as_json=as_json)
            return
        point = own or pooled.own_snapshot(found, wanted, snapshot)
        facts = {"disk": wanted.name, "snapshot": point.id, "dry_run": dry_run}
        facts |= {"size_bytes": point.size_bytes}
        if not dry_run:
            wanted.rollback(point)
            _say(facts, f"disk {wanted.name} is as snapshot {point.name} again", as_json=as_json)
            return
        rows = found.diff(point, wanted)
        changed = extents.total_bytes(rows)
        facts |= {"changed_bytes": changed, "lost_bytes": found.unique_bytes([wanted])}
        resized = "" if point.size_bytes == wanted.size_bytes else f", and its size to {output.size(point.size_bytes)}"
        where = f"{len(rows)} place{'' if len(rows) == 1 else 's'}"
        line = f"would set back {output.size(changed)} in {where}{resized}; nothing was changed"
        _say(facts, line, as_json=as_json)


@disk.command()
@click.argument("name")
@output.pool_option
@output.json_option
def reset(name: str, place: str, as_json: bool) -> None:
    """Go back to the snapshot or image that the disk was made from, or to empty."""
    from snapcore.cli import pooled
    from snapcore.pool import Pool

    with Pool.open(place) as found:
        wanted = found.open_disk(name)
        wanted.reset()
        facts = pooled.disk_facts(wanted)
        _say(facts, f"disk {wanted.name} is as it was made", as_json=as_json)


@disk.command()
@click.argument("name")
@output.pool_option
@click.option("--rate", type=output.Size(), help="Bytes in a second at the most.")
@click.option("--wait", is_flag=True, help="Fetch what is not here; without it, only say how far it is.")
@key_options
@output.json_option
def hydrate(name: str, place: str, rate: int | None, wait: bool, keys: Unlocking, as_json: bool) -> None:
    """Say how much is here of a disk that was made from a repository's snapshot, and with --wait fetch the rest."""
    from snapcore.pool import Pool

    with Pool.open(place, regions=keys.regions()) as found:
        wanted = found.open_disk(name)
        if wait:
            with output.bar() as progress:
                wanted.hydrate(rate, wait=True, progress=progress)
        _say_hydration(wanted, as_json=as_json)


def _say_hydration(wanted: Disk, *, as_json: bool) -> None:
    found = wanted.hydration()
    if found is None:
        _say({"disk": wanted.name, "lazy": False}, f"disk {wanted.name} needs no repository", as_json=as_json)
        return
    percent = 100 * found.here_bytes / found.total_bytes
    facts: dict[str, object] = {"disk": wanted.name, "lazy": True, "here_bytes": found.here_bytes}
    facts |= {"total_bytes": found.total_bytes, "percent": round(percent, 3)}
    here, total = output.size(found.here_bytes), output.size(found.total_bytes)
    _say(facts, f"disk {wanted.name}: {here} of {total} here ({percent:.1f} %)", as_json=as_json)


@disk.command()
@click.argument("name")
@output.pool_option
@key_options
@output.json_option
def decouple(name: str, place: str, keys: Unlocking, as_json: bool) -> None:
    """Fetch all that is not here of a disk that was made from a repository's snapshot; it needs that no more."""
    from snapcore.pool import Pool

    with Pool.open(place, regions=keys.regions()) as found:
        wanted = found.open_disk(name)
        with output.bar() as progress:
            wanted.decouple(progress)
        _say_hydration(wanted, as_json=as_json)


@disk.command()
@click.argument("name")
@click.argument("size", type=output.Size())
@output.pool_option
@output.json_option
def resize(name: str, size: int, place: str, as_json: bool) -> None:
    """Grow a disk to SIZE; what is new reads as zeros."""
    from snapcore.cli import pooled
    from snapcore.pool import Pool

    with Pool.open(place) as found:
        wanted = found.open_disk(name)
        wanted.resize(size)
        line = f"disk {wanted.name} has {output.size(wanted.size_bytes)} now"
        _say(pooled.disk_facts(wanted), line, as_json=as_json)


@disk.command()
@click.argument("name")
@click.argument("new_name", metavar="NEW")
@output.pool_option
@output.json_option
def rename(name: str, new_name: str, place: str, as_json: bool) -> None:
    """Call disk NAME by the name NEW; its snapshots remember the old one."""
    from snapcore.cli import pooled
    from snapcore.pool import Pool

    with Pool.open(place) as found:
        wanted = found.open_disk(name)
        found.rename_disk(wanted, new_name)
        _say(pooled.disk_facts(wanted), f"disk {name} is called {wanted.name} now", as_json=as_json)


@disk.command()
@click.argument("names", metavar="NAME…", nargs=-1, required=True)
@output.pool_option
@output.json_option
def delete(names: tuple[str, ...], place: str, as_json: bool) -> None:
    """Delete disks; their snapshots stay."""
    from snapcore.pool import Pool
    from snapcore.service import Regions

    with Pool.open(place, regions=Regions()) as found:
        for name in names:
            gone = found.open_disk(name)
            found.delete_disk(gone)
            _say({"deleted": gone.id, "name": gone.name}, f"deleted disk {gone.name}", as_json=as_json)


@disk.command()
@click.argument("name")
@output.pool_option
@output.json_option
def extents(name: str, place: str, as_json: bool) -> None:
    """Print what of a disk or snapshot is where: allocated, zero or absent, offset and length in bytes."""
    from snapcore.cli import pooled
    from snapcore.pool import Pool

    with Pool.open(place, read_only=True) as found:
        parts = pooled.find(found, name).extents()
    if as_json:
        output.print_json({kind: output.extents_json(rows) for kind, rows in parts._asdict().items()})
        return
    rows = sorted((*row, kind) for kind, found_rows in parts._asdict().items() for row in found_rows.tolist())
    click.echo("".join(f"{offset} {length} {kind}\n" for offset, length, kind in rows), nl=False)


@disk.command("import")
@click.argument("image", type=click.Path())
@output.pool_option
@click.option("--name", required=True, help="Of the new disk.")
@click.option("--size", type=output.Size(), help="If the disk shall be longer than the image.")
@image_files.read_format_option
@image_files.backing_option
@click.option("--allow-changing", is_flag=True, help="Accept a raw image that is written meanwhile.")
@output.json_option
def import_(
    image: str,
    place: str,
    name: str,
    size: int | None,
    read_format: str | None,
    backing_folders: tuple[str, ...],
    allow_changing: bool,
    as_json: bool,
) -> None:
    """Copy IMAGE, a file (raw, qcow2, VHD, VHDX or VMDK) or a block device, into a new disk."""
    from snapcore import extents
    from snapcore.cli import pooled
    from snapcore.pool import Pool
    from snapcore.source import open_image

    started = time.monotonic()
    with Pool.open(place) as found:
        with open_image(image, read_format, backing_folders=backing_folders, allow_changing=allow_changing) as source:
            with output.bar() as progress:
                made = found.import_image(name, source, size_bytes=size, progress=progress)
        mapped = extents.total_bytes(made.extents().allocated)
        spent = time.monotonic() - started
        facts = pooled.disk_facts(made) | {"mapped_bytes": mapped, "duration_s": round(spent, 6)}
        line = f"made disk {made.name} of {output.size(made.size_bytes)}: {output.size(mapped)} copied in {spent:.2f} s"
        _say(facts, line, as_json=as_json)


@disk.command()
@click.argument("name")
@click.argument("target", type=click.Path())
@output.pool_option
@click.option("--in-place", is_flag=True, help="TARGET exists: write only what differs.")
@image_files.written_format_option
@image_files.packing_option
@key_options
@output.json_option
def export(
    name: str,
    target: str,
    place: str,
    in_place: bool,
    written_format: str | None,
    packing: str | None,
    keys: Unlocking,
    as_json: bool,
) -> None:
    """Copy disk or snapshot NAME to TARGET, a new file, or with --in-place an existing file or block device.

    "-" is standard output: for raw, vhd and vmdk.
    """
    written_format = image_files.format_of(target, written_format)
    as_image = image_files.check_target(target, written_format, packing, in_place=in_place, as_json=as_json)
    from snapcore.cli import pooled

    with pooled.opened(place, keys.regions(), read_only=True) as found:
        wanted = pooled.find(found, name)
        if as_image:
            with output.bar() as progress:
                written = image_files.write(wanted, target, written_format, packing, place, progress)
            named: dict[str, object] = {"id": wanted.id, "name": wanted.name, "target": target}
            image_files.say_written(written, named, "exported", as_json=as_json)
            return
        with output.bar() as progress:
            done = wanted.export(target, in_place=in_place, progress=progress)
        facts: dict[str, object] = {"id": wanted.id, "name": wanted.name, "target": target}
        facts |= {"written_bytes": done.written_bytes, "duration_s": round(done.duration_s, 6)}
        line = f"exported {target}: {output.size(done.written_bytes)} written in {done.duration_s:.2f} s"
        _say(facts, line, as_json=as_json)
