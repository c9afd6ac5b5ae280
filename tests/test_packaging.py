"""The source distribution is complete: what is installed from it alone works, and ships types and C API."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _python(*arguments: str, cwd: Path, path: Path | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (ROOT / "setup.py").exists():
        pytest.skip("only the tests are here, not the checkout that they belong to")
    folder = tmp_path_factory.mktemp("sdist")
    # Of a copy: building leaves files in the folder for a moment, and other tests look at the checkout meanwhile.
    left_out = shutil.ignore_patterns(".*cache", ".git", ".venv", ".hypothesis", "build", "*.egg-info", "__pycache__")
    copy = shutil.copytree(ROOT, folder / "checkout", ignore=left_out)
    _python("-m", "build", "--sdist", "--no-isolation", "--outdir", str(folder), str(copy), cwd=folder)
    (found,) = folder.glob("*.tar.gz")
    return found


def test_the_sdist_holds_everything_that_git_does(sdist: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs the git checkout to compare with")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert set(tracked.splitlines()) - held <= {".gitignore"}


def test_what_is_installed_from_the_sdist_alone_works(sdist: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    pip = ["-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--target", str(target), str(sdist)]
    _python(*pip, cwd=tmp_path)
    package = target / "snapcore"
    for name in ("py.typed", "scan.pxd", "scan.pyi", "digest.pxd", "digest.pyi"):
        assert (package / name).exists(), name
    (tmp_path / "disk.img").write_bytes(os.urandom(300_000))
    code = (
        "import snapcore; assert snapcore.__file__.startswith({!r}), snapcore.__file__;"
        "r = snapcore.Repository.create('repo'); s = r.snapshot('disk.img', disk='d').snapshot;"
        "r.restore(s, 'out.img'); print(open('out.img', 'rb').read() == open('disk.img', 'rb').read())"
    )
    assert _python("-c", code.format(str(target)), cwd=tmp_path, path=target) == "True\n"
