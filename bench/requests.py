"""What a repository costs in requests and bytes, by kind of work: `python bench/requests.py [--size MIB]`.

An image of random data is snapshotted, changed in 4-KiB pages here and there, snapshotted again, restored, thinned out
and collected, all on a store in memory that counts. A list counts one request for each thousand names. A delete of
S3 is two requests, for S3 does not say whether there was anything: HEAD and DELETE. What a process asks once for
(config, and the look whether a bucket creates a name only once) is in the first row.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from snapcore import MemoryStore, Repository
from tests.support.counting import CountingStore

MIB = 1 << 20
PAGE = 4096
METHODS = ("put_new", "get", "get_range", "size", "list", "delete")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024, metavar="MIB", help="of the image (default: 1024)")
    parser.add_argument("--many", type=int, default=10_000, help="snapshots in the list of many (default: 10000)")
    chosen = parser.parse_args()
    print("| work | plain MiB | PUT | GET | GET range | HEAD | LIST | DELETE | MiB in | MiB out |")
    print("| --- " * 10 + "|")
    with tempfile.TemporaryDirectory() as folder:
        one_disk(Path(folder), chosen.size)
        many(Path(folder), chosen.many)


def row(work: str, plain_bytes: int, store: CountingStore) -> None:
    """One line of the table."""
    counts = " | ".join(f"{store.total(method):,}" for method in METHODS)
    moved = f"{store.sent_bytes / MIB:,.1f} | {store.received_bytes / MIB:,.1f}"
    print(f"| {work} | {plain_bytes / MIB:,.0f} | {counts} | {moved} |", flush=True)


def one_disk(folder: Path, size_mib: int) -> None:
    """The life of a disk."""
    store = CountingStore(MemoryStore())
    image = folder / "disk.img"
    random_ = random.Random(1)
    with image.open("wb") as file:
        for _ in range(size_mib):
            # Compresses to about a half.
            file.write(random_.randbytes(MIB // 2) + bytes([random_.randrange(256)]) * (MIB // 2))

    def counted(work: str, plain_bytes: int, job: Callable[[Repository], object]) -> None:
        store.reset()
        job(Repository.open(store))
        row(work, plain_bytes, store)

    def change() -> int:
        pages = size_mib * MIB // PAGE
        chosen = random_.sample(range(pages), pages // 100)
        with image.open("r+b") as file:
            for number in chosen:
                file.seek(number * PAGE)
                file.write(random_.randbytes(PAGE))
        return len(chosen) * PAGE

    store.reset()
    Repository.create(store)
    row("init", 0, store)
    counted("create, full", size_mib * MIB, lambda repository: repository.snapshot(image, disk="disk"))
    for _ in range(3):
        changed = change()
        counted("increment, 1 % of pages", changed, lambda repository: repository.snapshot(image, disk="disk"))
    first, *_, last = Repository.open(store).snapshots()
    restored = folder / "restored.img"
    counted("restore", size_mib * MIB, lambda repository: repository.restore(last, restored))
    restored.unlink()
    counted("list of 4", 0, lambda repository: repository.snapshots())
    counted("delete the first", 0, lambda repository: repository.delete(first))
    counted("collect", 0, lambda repository: repository.collect())
    counted("verify", size_mib * MIB, lambda repository: repository.verify())


def many(folder: Path, snapshots: int) -> None:
    """A repository with many snapshots: what the next one costs, a list of all, a deletion and a collection."""
    store = CountingStore(MemoryStore())
    repository = Repository.create(store, chunk_bytes=PAGE)
    image = folder / "small.img"
    for number in range(snapshots):
        image.write_bytes(number.to_bytes(4, "little") * (PAGE // 4))
        repository.snapshot(image, disk=f"disk-{number % 100}")
        if number % 100 == 99:
            # As in life: what a collection joins (index objects) is joined.
            repository.collect()
    store.reset()
    image.write_bytes(b"last" * (PAGE // 4))
    repository.snapshot(image, disk="disk-0")
    row(f"increment beside {snapshots:,} others", PAGE, store)
    store.reset()
    repository.snapshots("disk-0")
    row(f"list of the {snapshots // 100 + 1:,} of one disk", 0, store)
    store.reset()
    repository.snapshots()
    row(f"list of {snapshots + 1:,}", 0, store)
    store.reset()
    repository.delete(repository.snapshots("disk-1")[0])
    row(f"find and delete one of {snapshots + 1:,}", 0, store)
    store.reset()
    repository.collect()
    row(f"collect beside {snapshots:,}", 0, store)


if __name__ == "__main__":
    main()
