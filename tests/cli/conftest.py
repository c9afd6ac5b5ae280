"""What tests of the command line share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from snapcore.cli import main
from tests.support.command import Run
from tests.support.s3 import s3, s3_server

__all__ = ["run", "s3", "s3_server"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs a command in this process; gives exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["snapcore", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        code = ended.value.code
        assert isinstance(code, int)
        return code, out, err

    return call
