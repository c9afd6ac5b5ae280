"""`snapcore restore`: a snapshot back into a file or device."""

from __future__ import annotations

import click

from snapcore.cli import image_files, output
from snapcore.cli.unlocking import Unlocking, key_options


@click.command()
@click.argument("snapshot")
@click.argument("target", metavar="TARGET|DISK", type=click.Path())
@output.repository_option
@key_options
@click.option("-p", "--pool", metavar="DIR", help="Restore into a disk of this pool.")
@click.option("--in-place", is_flag=True, help="TARGET exists: write only what differs.")
@click.option("--allow-damaged", is_flag=True, help="Write zeros where the repository is damaged, and list them.")
@image_files.written_format_option
@image_files.packing_option
@output.json_option
def restore(
    snapshot: str,
    target: str,
    place: str,
    keys: Unlocking,
    pool: str | None,
    in_place: bool,
    allow_damaged: bool,
    written_format: str | None,
    packing: str | None,
    as_json: bool,
) -> None:
    """Write SNAPSHOT to TARGET, a new file, or with --in-place an existing file or block device.

    "-" is standard output: for raw, vhd and vmdk. With -p: to DISK of the pool, a new one, or with --in-place an
    existing one.
    """
    if pool is not None:
        if allow_damaged or written_format is not None or packing is not None:
            raise click.UsageError("--allow-damaged and the options of formats are for images, not for disks of a pool")
        from snapcore.cli import archiving

        archiving.restore(
            pool, keys.open(place), snapshot, target, regions=keys.regions(), in_place=in_place, as_json=as_json
        )
        return
    written_format = image_files.format_of(target, written_format)
    as_image = image_files.check_target(target, written_format, packing, in_place=in_place, as_json=as_json)
    if as_image and allow_damaged:
        raise click.UsageError("--allow-damaged is for raw images in files and devices")
    found = keys.open(place)
    wanted = found.find(snapshot)
    if as_image:
        with found.open_snapshot(wanted) as reader, output.bar() as progress:
            written = image_files.write(reader, target, written_format, packing, place, progress)
        image_files.say_written(written, {"snapshot": wanted.id, "target": target}, "restored", as_json=as_json)
        return
    with output.bar() as progress:
        done = found.restore(wanted, target, in_place=in_place, allow_damaged=allow_damaged, progress=progress)
    if as_json:
        output.print_json(
            {
                "snapshot": wanted.id,
                "target": target,
                "written_bytes": done.written_bytes,
                "missing": output.extents_json(done.missing),
                "duration_s": round(done.duration_s, 6),
            }
        )
    else:
        click.echo(f"restored {target}: {output.size(done.written_bytes)} written in {done.duration_s:.2f} s")
        for offset, length in done.missing.tolist():
            click.echo(f"missing: {length} bytes at offset {offset}, zeros stand there")
    if len(done.missing):
        click.get_current_context().exit(1)
