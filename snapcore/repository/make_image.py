"""Makes images: a writer's session that stores nothing, and commits under the image's name (docs/DESIGN.md, Images)."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import msgspec

from snapcore import extents
from snapcore.errors import BusyError, Error, ExistsError, FencedError, NotFoundError, RefusedError
from snapcore.parallel import SPAN_BYTES, executor_or_own, in_order
from snapcore.progress import Meter, ProgressCallback
from snapcore.repository import generations, groups, images, index, manifest, pack, pins, session
from snapcore.repository.context import Context
from snapcore.repository.domain import Domain
from snapcore.repository.images import PREFIX, Image, ImageDisk, Labels
from snapcore.repository.manifest import Manifest
from snapcore.repository.reader import SnapshotReader
from snapcore.repository.session import Session
from snapcore.store.interface import Store
from snapcore.version import VERSION

_TRIES = 3
_REGISTRATIONS = 10


def with_checksums(
    disks: Sequence[ImageDisk],
    opened: Callable[[Manifest], SnapshotReader],
    progress: ProgressCallback | None,
) -> list[ImageDisk]:
    """The same, with the SHA-256 of the bytes of each snapshot, all of which are read."""
    meter = Meter(progress, "checksum", sum(disk.snapshot.size_bytes for disk in disks if disk.snapshot is not None))
    found = []
    for disk in disks:
        checksum = None
        if disk.snapshot is not None:
            with opened(disk.snapshot) as reader:
                checksum = _sha256(reader, meter)
        found.append(msgspec.structs.replace(disk, sha256=checksum))
    return found


def _sha256(reader: SnapshotReader, meter: Meter) -> str:
    digest = hashlib.sha256()
    filled = extents.from_pairs(reader.data_extents())
    at = 0
    zeros = memoryview(bytes(SPAN_BYTES))

    def read(span: tuple[int, int]) -> tuple[int, memoryview]:
        data = memoryview(bytearray(span[1]))
        reader.read_into(data, span[0])
        return span[0], data

    with executor_or_own(None) as hands:
        for start, data in in_order(hands, read, extents.spans(filled, SPAN_BYTES)):
            for hole in range(at, start, SPAN_BYTES):
                digest.update(zeros[: start - hole])
            digest.update(data)
            meter.advance(start + len(data) - at)
            at = start + len(data)
    for hole in range(at, reader.size_bytes, SPAN_BYTES):
        digest.update(zeros[: reader.size_bytes - hole])
    meter.advance(reader.size_bytes - at)
    return digest.hexdigest()


def make(context: Context, labels: Labels, disks: Sequence[ImageDisk]) -> Image:
    """Make an image of snapshots of the context's domain; see `Repository.create_image`."""
    labels.check()
    found = images.check_disks(disks)
    for left in reversed(range(_TRIES)):
        try:
            return _attempt(context, labels, found)
        except FencedError:
            # Somebody took this writer for dead.
            if not left:
                raise
    raise AssertionError("unreachable")


def _attempt(context: Context, labels: Labels, disks: list[ImageDisk]) -> Image:
    store, domain = context.store, context.domain
    image = Image(
        id=secrets.token_hex(16),
        name=labels.name,
        created=datetime.now(UTC).isoformat(timespec="milliseconds"),
        architecture=labels.architecture,
        boot=labels.boot,
        os=labels.os,
        disks=disks,
        tags=dict(labels.tags),
        software=f"snapcore {VERSION}",
        key=domain.key_id,
    )
    own = _register(context, image)
    tried = False
    try:
        _check_there(context, image)
        # What the image relies on may not be durable yet.
        for prefix in (pack.PREFIX, index.PREFIX):
            store.settle(prefix + domain.folder)
        session.check(store, own)
        tried = True
        images.write(store, image, domain)
        _check_kept(store, image, domain)
    except BaseException as error:
        _leave(store, own, fence=tried)
        if isinstance(error, ExistsError):
            raise FencedError(
                f"the session of image {image.name} was ended by somebody else before it was done; make it again"
            ) from error
        raise
    with contextlib.suppress(Error):
        session.withdraw(store, own)
    return image


def _register(context: Context, image: Image) -> Session:
    """Steps "see", "register" and "look" of a writer."""
    store, domain = context.store, context.domain
    for _ in range(_REGISTRATIONS):
        seen = generations.latest(store, domain)
        own = session.register(store, session.CREATE, PREFIX + image.id, domain=domain, generation=seen.number)
        try:
            if generations.latest_number(store, domain) == seen.number:
                return own
        except BaseException:
            _leave(store, own, fence=False)
            raise
        session.withdraw(store, own)
    raise BusyError(f"collections of {store.url} follow each other without a pause; try again later")


def _check_there(context: Context, image: Image) -> None:
    """Refuse snapshots that were deleted, or whose group is not complete."""
    store = context.store
    for snapshot in image.snapshots:
        name = manifest.name(context.domain, snapshot.disk, snapshot.sequence, snapshot.id)
        if manifest.read_now(store, name, context.domains, context.config.chunk_bytes) != snapshot:
            raise NotFoundError(f"{store.url} has no snapshot {snapshot.id} any more; it was deleted meanwhile")
        if snapshot.group is not None and not groups.is_there(store, snapshot.group):
            raise RefusedError(
                f"the snapshot {snapshot.id} is of the group {snapshot.group}, which is not complete; finish it with "
                "`snapcore snapshot archive`, or take another one"
            )


def _check_kept(store: Store, image: Image, domain: Domain) -> None:
    """BusyError, and the image is taken back, when a snapshot is being deleted by who may not have seen the image."""
    for snapshot in image.snapshots:
        marks = [pin for pin in pins.of_snapshot(store, snapshot.id, {domain.id: domain}) if pin.deletes]
        if marks:
            images.delete(store, image.id)
            raise BusyError(
                f"snapshot {snapshot.id} of {store.url} is being deleted; if that was interrupted, delete it again, or "
                f"`snapcore pin remove {marks[0].id} -r {store.url}`"
            )


def _leave(store: Store, own: Session, *, fence: bool) -> None:
    """End after an error; a commit without an answer must not arrive behind a collection that did not see it."""
    try:
        if fence:
            session.end(store, own)
    except Exception:  # noqa: BLE001 - the first error is on its way to the caller
        session.abandon(own)
        return
    with contextlib.suppress(Error):
        session.withdraw(store, own)
