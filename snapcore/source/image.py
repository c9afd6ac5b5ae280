"""Disk images of any format: which one a file has, and opening it with the files below it.

The name of a file decides its format and its first bytes must agree: a guest can write the header of another format
into its own raw disk (docs/DESIGN.md, "Image formats"). Files below an image are opened only where the caller says
they may lie.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from snapcore.errors import RefusedError, UnsupportedFormatError, UsageError, from_os_error
from snapcore.source import formats, qcow2, vhd, vhdx, vmdk
from snapcore.source.container import Container
from snapcore.source.formats import RAW
from snapcore.source.interface import Source
from snapcore.source.raw import RawSource, open_source

_MAGICS = (
    (qcow2.MAGIC, "qcow2"),
    (vhdx.MAGIC, "vhdx"),
    (vmdk.MAGIC, "vmdk"),
    (vmdk.DESCRIPTOR_MAGIC, "vmdk"),
    (vhd.COOKIE, "vhd"),
)
_QEMU_FORMATS = {"raw": RAW, "qcow2": "qcow2", "vpc": "vhd", "vhdx": "vhdx", "vmdk": "vmdk"}
_CHAIN_LIMIT = 64


@contextmanager
def open_image(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    backing_folders: Sequence[str | os.PathLike[str]] = (),
    allow_changing: bool = False,
) -> Iterator[Source]:
    """Open a disk image as it is at this instant.

    Parameters
    ----------
    path : path
    format : str, optional
        "raw", "qcow2", "vhd", "vhdx" or "vmdk"; default: what the name says, and the first bytes must say the same.
    backing_folders : sequence of paths
        Where backing files may lie, in these folders or below. In no other place one is opened.
    allow_changing : bool
        Of raw images: do not mind a file that is written meanwhile, or a device that is mounted for writing.

    Raises
    ------
    ImageError
        The file contradicts itself or was cut off.
    UnsupportedFormatError
        It is encrypted, a difference to another disk, or has a feature that is not known.
    RefusedError
        Name and first bytes disagree, or a backing file lies where none may be opened.
    NotFoundError, BusyError, UsageError, StoreError, ReadError
    """
    place = os.fspath(path)
    if format is not None:
        formats.check_read(format)
    with ExitStack() as opened:
        source = opened.enter_context(open_source(place, allow_changing=allow_changing))
        wanted = format or _agreed_format(source)
        if wanted != RAW and allow_changing:
            raise UsageError(f"{place} is read as {wanted}, whose tables must not change: a mixture of them is no disk")
        yield _Chain(opened, backing_folders).layer(source, wanted)


@contextmanager
def open_as_named(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    backing_folders: Sequence[str | os.PathLike[str]] = (),
    allow_changing: bool = False,
) -> Iterator[Source]:
    """As `open_image`, for disks whose guests are at work: raw, whatever it begins with, if its name says no format."""
    if format is None and formats.of_name(path) == RAW:
        format = RAW
    with open_image(path, format, backing_folders=backing_folders, allow_changing=allow_changing) as source:
        yield source


def check_raw(path: str) -> None:
    """RefusedError for an image file that is of another format by its name, or by its first bytes."""
    with open_source(path, allow_changing=True) as source:
        named, found = formats.of_name(path), format_of_bytes(source)
    if named != RAW or found != RAW:
        raise RefusedError(
            f"{path} {f'is called {named}' if named != RAW else f'begins as {found}'}, and only raw images can be "
            "read in place: `snapcore disk import` takes in the others; if it is a raw image, say --format raw"
        )


def _agreed_format(source: RawSource) -> str:
    """What name and first bytes both say; RefusedError when they disagree."""
    named, found = formats.of_name(source.name), format_of_bytes(source)
    if named == found or (named == "vhd" and found == RAW):
        # A fixed VHD begins with the disk itself, and has its mark at the end.
        return named
    if found == RAW:
        raise RefusedError(f"{source.name} does not begin as {named}; if it is a raw image, say --format raw")
    raise RefusedError(
        f"{source.name} begins as {found}, and its name does not say so; say --format {found}, or --format raw for "
        "a raw disk whose guest may have written that"
    )


def format_of_bytes(source: RawSource) -> str:
    """The format whose mark stands in the first bytes; "raw" without one."""
    head = memoryview(bytearray(min(source.size_bytes, 32)))
    source.read_into(head, 0)
    return next((name for magic, name in _MAGICS if bytes(head).startswith(magic)), RAW)


class _Chain:
    """An image and the files below it, which are opened on the way and closed with `opened`."""

    def __init__(self, opened: ExitStack, folders: Sequence[str | os.PathLike[str]]) -> None:
        self._opened = opened
        self._folders = [os.path.realpath(os.fspath(folder)) for folder in folders]
        self._seen: set[tuple[int, int]] = set()

    def layer(self, file: RawSource, kind: str) -> Source:
        """The image in a file that is open."""
        if kind == RAW:
            return file
        self._note(file)
        container = Container(file, kind)
        if kind == "vhd":
            return vhd.VhdImage(container)
        if kind == "vhdx":
            return vhdx.VhdxImage(container)
        if kind == "vmdk":
            return vmdk.VmdkImage(container)
        header = qcow2.read_header(container)
        below = None if header.backing is None else self._below(file, header.backing)
        return qcow2.Qcow2Image(container, header, below)

    def _note(self, file: RawSource) -> None:
        """Refuse a chain that is too long or comes back to itself."""
        try:
            status = os.stat(file.name)
        except OSError as error:
            raise from_os_error(error, f"looking at {file.name}") from error
        here = (status.st_dev, status.st_ino)
        if here in self._seen or len(self._seen) == _CHAIN_LIMIT:
            what = "comes back to itself" if here in self._seen else f"has more than {_CHAIN_LIMIT} files"
            raise RefusedError(f"the chain of backing files {what} at {file.name}")
        self._seen.add(here)

    def _below(self, file: RawSource, backing: qcow2.Backing) -> Source:
        """Open a backing file, where it may be."""
        name = backing.path
        if ":" in name.split("/", 1)[0]:
            raise RefusedError(f"{file.name} names the backing file {name!r}: only plain paths are followed")
        path = os.path.realpath(os.path.join(os.path.dirname(os.path.realpath(file.name)), name))
        if not any(path.startswith(os.path.join(folder, "")) for folder in self._folders):
            raise RefusedError(
                f"{file.name} has the backing file {path}, and no backing files may be opened there; if you trust "
                f"the image, allow it with --backing-in {os.path.dirname(path)}"
            )
        if not backing.format:
            raise RefusedError(
                f"{file.name} does not say which format its backing file {path} has, and guessing is not safe; "
                f"say it with `qemu-img rebase -u -b {name} -F FORMAT {file.name}`"
            )
        if backing.format not in _QEMU_FORMATS:
            raise UnsupportedFormatError(
                f"{file.name} has a backing file of the format {backing.format!r}, which is not read"
            )
        # What an image of others says is opened as a file only: opening some devices does things.
        if os.path.exists(path) and not os.path.isfile(path):
            raise RefusedError(f"{file.name} has the backing file {path}, which is no file")
        below = self._opened.enter_context(open_source(path))
        return self.layer(below, _QEMU_FORMATS[backing.format])
