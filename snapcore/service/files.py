"""Archived snapshots into image files: all of them, or none after an error."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from snapcore.errors import ExistsError
from snapcore.progress import ProgressCallback
from snapcore.repository import Manifest, Repository
from snapcore.source import Written, write_image


def write_all(
    repository: Repository,
    wanted: Sequence[tuple[Manifest, str]],
    format: str = "raw",
    *,
    compression: str | None = None,
    forbidden_folder: str | None = None,
    progress: ProgressCallback | None = None,
) -> list[Written]:
    """Write snapshots to new files. Durable on return.

    Parameters
    ----------
    wanted : sequence of (Manifest, path)
    format, compression, forbidden_folder, progress
        As for `write_image`, for each.

    Raises
    ------
    ExistsError
        There is a file of one of the names; nothing was written.
    """
    for _, path in wanted:
        if os.path.lexists(path):
            raise ExistsError(f"{path} exists already; choose another name")
    done: list[str] = []
    written = []
    try:
        for snapshot, path in wanted:
            with repository.open_snapshot(snapshot) as reader:
                written.append(
                    write_image(
                        reader,
                        path,
                        format,
                        compression=compression,
                        forbidden_folder=forbidden_folder,
                        progress=progress,
                    )
                )
            done.append(path)
    except BaseException:
        for path in done:
            with contextlib.suppress(OSError):
                os.unlink(path)
        raise
    return written
