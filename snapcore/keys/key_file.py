"""A key file as a holder: 32 random bytes as text, on a medium that the repository is not on."""

from __future__ import annotations

import base64
import os
import re
import secrets
import stat

import msgspec

from snapcore.errors import DamagedError, ExistsError, UsageError, from_os_error
from snapcore.keys.interface import WRAPPING_KEY_BYTES, Parameters, Place
from snapcore.keys.root import derived
from snapcore.keys.secret import Secret, wiped
from snapcore.persist import Medium

_HEADING = "snapcore key file 1"
_KEY_BYTES = 32
_SALT_BYTES = 16
_FILE_LIMIT_BYTES = 4096
_PURPOSE = "key file"


class _Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    salt: str


class KeyFile:
    """A key file.

    Parameters
    ----------
    path : path
        Of a file that `KeyFile.create` made. It must not be readable by others than its owner.
    """

    kind = "key-file"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = os.fspath(path)
        self._secret = Secret(_read(self._path))

    @classmethod
    def create(cls, path: str | os.PathLike[str]) -> KeyFile:
        """Make a key file, readable by its owner alone, durable on return; ExistsError where something is."""
        name = os.fspath(path)
        text = f"# Opens repositories of snapcore. Without it nobody can: keep a copy elsewhere.\n{_HEADING}\n"
        try:
            descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError as error:
            raise ExistsError(f"{name} exists already; a key file is never written over") from error
        except OSError as error:
            raise from_os_error(error, f"making the key file {name}") from error
        medium = Medium()
        try:
            medium.write_at(descriptor, [text.encode(), secrets.token_hex(_KEY_BYTES).encode(), b"\n"], 0)
            medium.sync(descriptor)
            medium.sync_folder(os.path.dirname(os.path.abspath(name)))
        except OSError as error:
            raise from_os_error(error, f"writing the key file {name}") from error
        finally:
            os.close(descriptor)
        return cls(name)

    def make(self, place: Place) -> tuple[Parameters, bytearray]:
        parameters: Parameters = {"salt": base64.b64encode(secrets.token_bytes(_SALT_BYTES)).decode()}
        return parameters, self.find(parameters, place)

    def find(self, parameters: Parameters, place: Place) -> bytearray:
        del place
        try:
            salt = base64.b64decode(msgspec.convert(parameters, _Parameters).salt, validate=True)
        except (msgspec.ValidationError, ValueError) as error:
            raise DamagedError(f"the parameters are none of a key file: {error}") from error
        if len(salt) != _SALT_BYTES:
            raise DamagedError(f"the parameters have a salt of {len(salt)} bytes")
        return bytearray(derived(self._secret.reveal(), _PURPOSE, WRAPPING_KEY_BYTES, salt))

    def forget(self) -> None:
        """Overwrite the key in memory; the holder opens nothing any more."""
        self._secret.wipe()

    def __repr__(self) -> str:
        return f"KeyFile({self._path!r})"


def _read(path: str) -> bytearray:
    """The key in a file. Nothing that the file holds gets into a message."""
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            data = bytearray(file.read(_FILE_LIMIT_BYTES + 1))
    except OSError as error:
        raise UsageError(f"cannot read the key file {path}: {error.strerror}") from error
    with wiped(data):
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UsageError(
                f"the key file {path} can be read by others than its owner (mode {mode & 0o777:o}); "
                f"run `chmod 600 {path}`, and make a new key if somebody may have"
            )
        lines = [line.strip() for line in data.split(b"\n") if line.strip() and not line.startswith(b"#")]
        right = len(lines) == 2 and lines[0] == _HEADING.encode() and re.fullmatch(rb"[0-9a-f]{64}", lines[1])
        if not right or len(data) > _FILE_LIMIT_BYTES:
            raise UsageError(f"{path} is no key file of snapcore; `snapcore key create … --key-file` makes one")
        return bytearray.fromhex(lines[1].decode())
