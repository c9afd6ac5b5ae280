"""Errors and names that the package hands out."""

from __future__ import annotations

import pickle

import pytest

import snapcore
from snapcore import errors

CLASSES = [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, errors.Error)]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_comes_whole_out_of_another_process(kind: type[errors.Error]) -> None:
    if issubclass(kind, errors.ReadError):
        error: errors.Error = kind("disk.img", 4096, 512, 5, "Input/output error")
    else:
        error = kind("what happened")
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is kind
    assert str(found) == str(error)
    assert vars(found) == vars(error)


def test_every_public_name_is_there() -> None:
    for name in snapcore.__all__:
        assert getattr(snapcore, name) is not None
    results = {"Created", "Restored", "Verified", "Collected", "Usage", "Session", "Snapshot"}
    assert results | {"Source", "Store", "LocalStore", "MemoryStore", "ProgressCallback"} <= set(snapcore.__all__)
    assert snapcore.Snapshot is snapcore.Manifest
