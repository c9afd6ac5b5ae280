"""Tests against real programs: skipped with a reason where one is missing, an error where CI requires all."""

from __future__ import annotations

import os
import shutil

import pytest


def needs(*programs: str, root: bool = False) -> None:
    """Skip the test unless these programs (and root, where asked) are there."""
    missing = [program for program in programs if shutil.which(program) is None]
    if root and os.geteuid() != 0:
        missing.append("root")
    if not missing:
        return
    reason = f"needs {', '.join(missing)}"
    if os.environ.get("SNAPCORE_REQUIRE_TOOLS"):
        pytest.fail(f"{reason}, and SNAPCORE_REQUIRE_TOOLS is set")
    pytest.skip(reason)
