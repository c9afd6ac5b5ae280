"""`snapcore image`: templates of machines, made of snapshots, and machines' disks made of them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from snapcore.cli import image_files, output
from snapcore.cli.unlocking import Unlocking, chain_options, key_options

if TYPE_CHECKING:
    from snapcore.pool import Disk, Pool, Snapshot
    from snapcore.repository import Image, ImageDisk, KeyChoice, Labels
    from snapcore.service import Machine
    from snapcore.source import Source

_DEVICE = "DEVICE is xvdb to xvdz; may be repeated."


@click.group()
def image() -> None:
    """Make images of machines, move them in and out, and make the disks of machines of them."""


def _label_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command what an image says of itself, as `labels`, and what its disks shall be."""

    def called(name: str, architecture: str, boot: str, os_: str, tags: tuple[str, ...], **options: object) -> None:
        from snapcore.repository import Labels

        labels = Labels(name=name, architecture=architecture, boot=boot, os=os_, tags=output.tag_pairs(tags))  # type: ignore[arg-type]
        labels.check()
        command(labels=labels, **options)

    functools.update_wrapper(called, command)
    wrapped: Callable[..., None] = called
    for option in (
        click.option("--checksums", is_flag=True, help="Read all of it, and note the SHA-256 of each disk."),
        click.option("--min-size", type=output.Size(), help="Of the system disk. Default: as it is."),
        click.option("--tag", "tags", multiple=True, metavar="KEY=VALUE", help="May be repeated."),
        click.option("--os", "os_", default="", metavar="TEXT", help="What is on it."),
        click.option("--boot", type=click.Choice(["bios", "uefi"]), default="bios", show_default=True),
        click.option("--arch", "architecture", default="x86_64", show_default=True, help="Of the machines."),
        click.option("--empty", multiple=True, metavar="DEVICE=SIZE", help=f"An empty disk more. {_DEVICE}"),
    ):
        wrapped = option(wrapped)
    return wrapped


@image.command()
@click.argument("name")
@output.repository_option
@click.option("-p", "--pool", metavar="DIR", help="Of this pool's snapshots or disks.")
@click.option(
    "--system", required=True, metavar="SNAPSHOT", help="Of the system disk. With -p: of the pool, or a disk."
)
@click.option("--data", multiple=True, metavar="DEVICE=SNAPSHOT", help=f"A data disk. {_DEVICE}")
@_label_options
@chain_options
@key_options
@output.json_option
def create(
    labels: Labels,
    place: str,
    pool: str | None,
    system: str,
    data: tuple[str, ...],
    empty: tuple[str, ...],
    min_size: int | None,
    checksums: bool,
    key: str | KeyChoice | None,
    keys: Unlocking,
    as_json: bool,
) -> None:
    """Make an image NAME of snapshots.

    They are the repository's; with -p the pool's, which are archived first: what changed since the last one there. Of
    a disk of the pool a snapshot is cut, of several disks at one instant.
    """
    words = {**_pairs("--data", data), **_sizes(empty)}
    if pool is None and key is not None:
        raise click.UsageError("--key and --no-key are for disks of a pool; an image is under the key of its snapshots")
    repository = keys.open(place)
    with output.bar() as progress:
        if pool is None:
            made = repository.create_image(
                labels.name,
                system,
                words,
                architecture=labels.architecture,
                boot=labels.boot,
                os=labels.os,
                min_size_bytes=min_size,
                tags=labels.tags,
                checksums=checksums,
                progress=progress,
            )
        else:
            from snapcore.pool import Pool
            from snapcore.service import Archives
            from snapcore.service import image as images

            with Pool.open(pool, regions=keys.regions()) as found, Archives(found) as archives:
                made = images.create_from_pool(
                    archives,
                    repository,
                    labels,
                    _local(found, system),
                    {device: one if isinstance(one, int) else _local(found, one) for device, one in words.items()},
                    key=key,
                    min_size_bytes=min_size,
                    checksums=checksums,
                    progress=progress,
                )
    _say_made(made, as_json=as_json)


def _local(pool: Pool, ref: str) -> Disk | Snapshot:
    from snapcore.cli import pooled

    return pooled.find(pool, ref)


def _pairs(option: str, words: tuple[str, ...]) -> dict[str, str | int]:
    found: dict[str, str | int] = {}
    for word in words:
        device, sign, rest = word.partition("=")
        if not device or not sign or not rest:
            raise click.UsageError(f"{option} has the form DEVICE=…, not {word!r}")
        if device in found:
            raise click.UsageError(f"{option}: {device} is one disk: two were given for it")
        found[device] = rest
    return found


def _sizes(words: tuple[str, ...]) -> dict[str, str | int]:
    return {
        device: output.Size().convert(size, None, click.get_current_context())
        for device, size in _pairs("--empty", words).items()
    }


def _say_made(made: Image, *, as_json: bool) -> None:
    if as_json:
        output.print_json(_facts(made))
        return
    click.echo(output.text(f"made image {made.name} ({made.id})"))
    for disk in made.disks:
        click.echo(f"  {disk.device} {_disk_line(disk)}")


def _disk_line(disk: ImageDisk) -> str:
    what = "empty" if disk.snapshot is None else f"snapshot {disk.snapshot.id} of {disk.snapshot.disk}"
    return output.text(f"{output.size(disk.min_size_bytes)}, {what}")


def _facts(found: Image) -> dict[str, object]:
    """An image as JSON has it; of its snapshots what tells which they are."""
    return {
        "id": found.id,
        "name": found.name,
        "created": found.created,
        "architecture": found.architecture,
        "boot": found.boot,
        "os": found.os,
        "tags": found.tags,
        "key": found.key,
        "disks": [_disk_facts(disk) for disk in found.disks],
    }


def _disk_facts(disk: ImageDisk) -> dict[str, object]:
    facts: dict[str, object] = {"device": disk.device, "min_size_bytes": disk.min_size_bytes, "sha256": disk.sha256}
    if disk.snapshot is None:
        return facts | {"snapshot": None}
    held = disk.snapshot
    facts |= {"snapshot": held.id, "disk": held.disk, "size_bytes": held.size_bytes}
    return facts | {"written_bytes": held.written_bytes, "root": held.root}


@image.command("list")
@output.repository_option
@key_options
@output.json_option
def list_(place: str, keys: Unlocking, as_json: bool) -> None:
    """List images; with --json one object a line. Not those under keys that are not unlocked."""
    found = keys.open(place).images()
    if as_json:
        for item in found:
            output.print_json(_facts(item))
        return
    rows = [
        [
            item.id[:12],
            item.name,
            item.created[:19],
            item.os,
            item.architecture,
            item.boot,
            str(len(item.disks)),
            output.size(item.disks[0].min_size_bytes),
        ]
        for item in found
    ]
    output.table(
        ["id", "name", "created (UTC)", "os", "arch", "boot", "disks", "system"], rows, right=frozenset({6, 7})
    )


@image.command()
@click.argument("ref", metavar="IMAGE")
@output.repository_option
@key_options
@output.json_option
def show(ref: str, place: str, keys: Unlocking, as_json: bool) -> None:
    """Show an image and its disks."""
    found = keys.open(place).image(ref)
    if as_json:
        output.print_json(_facts(found))
        return
    for key, value in _facts(found).items():
        if key == "disks":
            continue
        shown = ", ".join(f"{one}={two}" for one, two in value.items()) if isinstance(value, dict) else value
        click.echo(f"{key:12} {'-' if shown in (None, '') else output.text(shown)}")
    for disk in found.disks:
        click.echo(f"{disk.device:12} {_disk_line(disk)}")
        if disk.sha256 is not None:
            click.echo(f"{'':12} sha256 {disk.sha256}")


@image.command()
@click.argument("refs", metavar="IMAGE…", nargs=-1, required=True)
@output.repository_option
@click.option("--with-snapshots", is_flag=True, help="And its snapshots, but those that other images hold.")
@key_options
@output.json_option
def delete(refs: tuple[str, ...], place: str, with_snapshots: bool, keys: Unlocking, as_json: bool) -> None:
    """Delete images. Their snapshots stay, and can be deleted then."""
    from snapcore.service import image as images

    repository = keys.open(place)
    for ref in refs:
        gone_id, gone = images.delete(repository, ref, with_snapshots=with_snapshots)
        if as_json:
            output.print_json({"deleted": gone_id, "snapshots": gone})
        else:
            click.echo(f"deleted image {gone_id}" + (f" and {len(gone)} snapshots" if with_snapshots else ""))


@image.command()
@click.argument("ref", metavar="IMAGE")
@click.argument("target", type=click.Path())
@output.repository_option
@click.option("--device", help="Only this disk, to TARGET itself.")
@image_files.written_format_option
@image_files.packing_option
@key_options
@output.json_option
def export(
    ref: str,
    target: str,
    place: str,
    device: str | None,
    written_format: str | None,
    packing: str | None,
    keys: Unlocking,
    as_json: bool,
) -> None:
    """Write the disks of IMAGE to new files: the system disk to TARGET, others beside it, as TARGET-xvdb and so on.

    "-" is standard output, for one disk as raw, vhd or vmdk. With --json an object a line.
    """
    written_format = image_files.format_of(target, written_format)
    image_files.check_target(target, written_format, packing, in_place=False, as_json=as_json)
    from snapcore.service import image as images
    from snapcore.service.files import write_all

    repository = keys.open(place)
    found = repository.image(ref)
    wanted = images.targets(found, target)
    if device is not None:
        chosen = found.disk(device)
        if chosen.snapshot is None:
            raise click.UsageError(f"{chosen.device} of image {found.name} is an empty disk")
        wanted = [(chosen, chosen.snapshot, target)]
    if target == image_files.PIPE:
        if len(wanted) > 1:
            raise click.UsageError("standard output takes one disk; name it with --device")
        with repository.open_snapshot(wanted[0][1]) as reader, output.bar() as progress:
            image_files.write(reader, target, written_format, packing, place, progress)
        return
    with output.bar() as progress:
        written = write_all(
            repository,
            [(snapshot, path) for _, snapshot, path in wanted],
            written_format,
            compression=packing,
            forbidden_folder=place,
            progress=progress,
        )
    for (disk, _, path), done in zip(wanted, written, strict=True):
        facts: dict[str, object] = {"image": found.id, "device": disk.device, "target": path}
        image_files.say_written(done, facts, "exported", as_json=as_json)


@image.command("import")
@click.argument("file", type=click.Path())
@click.option("--name", required=True, help="Of the image.")
@output.repository_option
@click.option("--data", multiple=True, metavar="DEVICE=FILE", help=f"A data disk. {_DEVICE}")
@image_files.read_format_option
@image_files.backing_option
@_label_options
@chain_options
@key_options
@output.json_option
def import_(
    labels: Labels,
    file: str,
    place: str,
    data: tuple[str, ...],
    empty: tuple[str, ...],
    read_format: str | None,
    backing_folders: tuple[str, ...],
    min_size: int | None,
    checksums: bool,
    key: str | KeyChoice | None,
    keys: Unlocking,
    as_json: bool,
) -> None:
    """Make an image of FILE, the system disk, as raw, qcow2, VHD, VHDX or VMDK, and of files of data disks.

    --format is that of all of them. An image of the same name that is there shares with it what they have in common.
    """
    from snapcore.service import image as images
    from snapcore.source import open_image

    repository = keys.open(place)
    started = time.monotonic()
    with ExitStack() as opened, output.bar() as progress:

        def source(path: str) -> Source:
            return opened.enter_context(open_image(path, read_format, backing_folders=backing_folders))

        system = source(file)
        files = {device: source(str(path)) for device, path in _pairs("--data", data).items()}
        sizes = {device: int(size) for device, size in _sizes(empty).items()}
        made = images.take(
            repository,
            labels,
            system,
            {**files, **sizes},
            key=key,
            min_size_bytes=min_size,
            checksums=checksums,
            progress=progress,
        )
    spent = time.monotonic() - started
    if as_json:
        output.print_json(_facts(made) | {"duration_s": round(spent, 6)})
        return
    _say_made(made, as_json=False)
    stored = sum(item.stored_bytes for item in made.snapshots)
    click.echo(f"  stored {output.size(stored)} in {spent:.2f} s")


@image.command()
@click.argument("ref", metavar="IMAGE")
@output.repository_option
@click.option("-p", "--pool", required=True, envvar="SNAPCORE_POOL", metavar="DIR", help="The pool.")
@click.option("--count", type=click.IntRange(1), default=1, show_default=True, help="How many machines.")
@click.option("--name", required=True, help="Of the machine; of several with a run of #, the number: web-###.")
@click.option("--first", type=click.IntRange(0), default=1, show_default=True, help="The first number.")
@click.option("--size", type=output.Size(), help="Of the system disks. Default: the image's minimum.")
@click.option("--whole", is_flag=True, help="Fetch all, once for all machines; the repository is not needed then.")
@output.hydrate_option("What the machines do not read, `snapcore serve` fetches at this rate.", "full")
@key_options
@output.json_option
def launch(
    ref: str,
    place: str,
    pool: str,
    count: int,
    name: str,
    first: int,
    size: int | None,
    whole: bool,
    hydrate: float,
    keys: Unlocking,
    as_json: bool,
) -> None:
    """Make the disks of machines of IMAGE in a pool, all or none. They can be used at once.

    The system disk is called as the machine, others have the device behind that: web-001, web-001-xvdb. With --json an
    object for each machine, a line each.
    """
    from snapcore.pool import Pool
    from snapcore.service import image as images

    machines = images.names(name, count, first)
    repository = keys.open(place)
    found = repository.image(ref)
    started = time.monotonic()
    with Pool.open(pool, regions=keys.regions()) as opened, output.bar() as progress:
        made = images.launch(opened, repository, found, machines, size_bytes=size, whole=whole, progress=progress)
        spent = time.monotonic() - started
        for _, disk in made[0].disks:
            # All machines share what is fetched.
            opened.plan_hydration(disk, hydrate if hydrate >= 0 else None)
        if as_json:
            for machine in made:
                output.print_json(_machine_facts(machine, found))
            return
    disks = sum(len(machine.disks) for machine in made)
    of = f"the machine {machines[0]}" if count == 1 else f"{count} machines, {machines[0]} to {machines[-1]},"
    click.echo(output.text(f"made {disks} disk{'' if disks == 1 else 's'} of {of} in {spent:.2f} s"))


def _machine_facts(machine: Machine, found: Image) -> dict[str, object]:
    return {
        "machine": machine.name,
        "image": found.id,
        "disks": [
            {"device": device, "id": disk.id, "name": disk.name, "size_bytes": disk.size_bytes}
            for device, disk in machine.disks
        ],
    }
