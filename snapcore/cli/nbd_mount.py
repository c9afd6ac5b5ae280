"""`snapcore nbd-mount`: a disk or snapshot as a file, by nbdfuse."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile

import click

from snapcore.cli import output
from snapcore.cli.unlocking import Unlocking, key_options
from snapcore.errors import NotFoundError, StoreError

_FILE = "disk"


@click.command("nbd-mount")
@click.argument("name", metavar="DISK")
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False))
@output.pool_option
@click.option("--read-only", is_flag=True, help="Let nobody write.")
@key_options
@output.json_option
def nbd_mount(name: str, folder: str, place: str, read_only: bool, keys: Unlocking, as_json: bool) -> None:
    """Show DISK as the file DIR/disk until it is unmounted, or SIGTERM or SIGINT comes. Needs nbdfuse.

    DISK is the name of an export, as for `snapcore serve`. The file can be put under a loop device.
    """
    from urllib.parse import quote

    from snapcore.cli import pooled
    from snapcore.cli.serving import until_told
    from snapcore.server.nbd import NbdServer

    nbdfuse = shutil.which("nbdfuse")
    if nbdfuse is None:
        raise NotFoundError("nbdfuse is not installed here; it comes with libnbd (Debian: libnbd-bin)")
    path = os.path.join(folder, _FILE)
    with (
        until_told() as told,
        pooled.opened(place, keys.regions(), read_only=read_only) as pool,
        tempfile.TemporaryDirectory(prefix="snapcore-") as private,
    ):
        where = os.path.join(private, "nbd")
        with NbdServer(pool, listen=[f"unix:{where}"], read_only=read_only):
            uri = f"nbd+unix:///{quote(name, safe='')}?socket={quote(where)}"
            words = [nbdfuse, *(["--readonly"] if read_only else []), path, uri]
            # In a group of its own: the signal of a terminal is for us, and nbdfuse ends when it is unmounted.
            child = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
            try:
                while not os.path.exists(path) and child.poll() is None and not told.wait(0.02):
                    pass
                if child.poll() is None and not told.wait(0):
                    if as_json:
                        output.print_json({"file": path})
                    else:
                        click.echo(output.text(f"{name} is {path} now"))
                    sys.stdout.flush()
                while child.poll() is None and not told.wait(0.2):
                    pass
            finally:
                if child.poll() is None:
                    _unmount(folder)
                _, said = child.communicate()
        if child.returncode and not told.wait(0):
            raise StoreError(f"nbdfuse failed: {said.strip() or child.returncode}")


def _unmount(folder: str) -> None:
    for words in (["fusermount3", "-u", folder], ["fusermount", "-u", folder], ["umount", folder]):
        if shutil.which(words[0]) and subprocess.run(words, stderr=subprocess.DEVNULL, check=False).returncode == 0:
            return
    # Somebody uses it still: gone from sight at once, and gone when they are.
    subprocess.run(["umount", "--lazy", folder], stderr=subprocess.DEVNULL, check=False)
