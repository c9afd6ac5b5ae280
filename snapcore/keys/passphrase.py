"""A passphrase as a holder: Argon2id (RFC 9106) makes the wrapping key of it."""

from __future__ import annotations

import base64
import os
import secrets
import unicodedata

import msgspec
from cryptography.hazmat.primitives.kdf.argon2 import Argon2id

from snapcore.errors import DamagedError, UsageError
from snapcore.keys.interface import WRAPPING_KEY_BYTES, Parameters, Place
from snapcore.keys.secret import Secret

# The second choice of RFC 9106: 0.13 s and 64 MiB on a 2-core EPYC VM.
_MEMORY_KIB, _PASSES, _LANES = 64 << 10, 3, 4
_MEMORY_LIMITS_KIB = (64 << 10, 1 << 20)
_PASSES_LIMIT, _LANES_LIMIT = 16, 16
_SALT_BYTES = 16
_FILE_LIMIT_BYTES = 64 << 10


class _Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    salt: str
    memory_kib: int
    passes: int
    lanes: int


class Passphrase:
    """A passphrase.

    Parameters
    ----------
    passphrase : str
        1 to 1,024 characters; compared after Unicode normalization (NFC).
    """

    kind = "passphrase"

    def __init__(self, passphrase: str) -> None:
        if not 1 <= len(passphrase) <= 1024:
            raise UsageError(f"a passphrase has 1 to 1024 characters, not {len(passphrase)}")
        try:
            self._secret = Secret(unicodedata.normalize("NFC", passphrase).encode())
        except UnicodeEncodeError:
            # Not chained: the original holds the passphrase.
            raise UsageError("a passphrase is text, and this one has bytes that are none") from None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> Passphrase:
        """The first line of a file."""
        try:
            with open(path, "rb") as file:
                line = file.read(_FILE_LIMIT_BYTES).split(b"\n", 1)[0].removesuffix(b"\r")
        except OSError as error:
            raise UsageError(f"cannot read the passphrase file {os.fspath(path)}: {error.strerror}") from error
        try:
            return cls(line.decode())
        except UnicodeDecodeError:
            raise UsageError(f"the first line of {os.fspath(path)} is no UTF-8 text") from None
        except UsageError as error:
            raise UsageError(f"{os.fspath(path)}: {error}") from None

    def make(self, place: Place) -> tuple[Parameters, bytearray]:
        salt = base64.b64encode(secrets.token_bytes(_SALT_BYTES)).decode()
        parameters: Parameters = {"salt": salt, "memory_kib": _MEMORY_KIB, "passes": _PASSES, "lanes": _LANES}
        return parameters, self.find(parameters, place)

    def find(self, parameters: Parameters, place: Place) -> bytearray:
        del place
        try:
            found = msgspec.convert(parameters, _Parameters)
            salt = base64.b64decode(found.salt, validate=True)
        except (msgspec.ValidationError, ValueError) as error:
            raise DamagedError(f"the parameters are none of a passphrase: {error}") from error
        low, high = _MEMORY_LIMITS_KIB
        bounded = (
            low <= found.memory_kib <= high
            and 1 <= found.passes <= _PASSES_LIMIT
            and 1 <= found.lanes <= _LANES_LIMIT
            and len(salt) == _SALT_BYTES
        )
        if not bounded:
            raise DamagedError(
                f"the parameters ask for {found.memory_kib} KiB, {found.passes} passes and {found.lanes} lanes; "
                f"{low} to {high} KiB, {_PASSES_LIMIT} passes and {_LANES_LIMIT} lanes are the bounds"
            )
        derivation = Argon2id(
            salt=salt,
            length=WRAPPING_KEY_BYTES,
            iterations=found.passes,
            lanes=found.lanes,
            memory_cost=found.memory_kib,
        )
        return bytearray(derivation.derive(bytes(self._secret.reveal())))

    def forget(self) -> None:
        """Overwrite the passphrase; the holder opens nothing any more."""
        self._secret.wipe()

    def __repr__(self) -> str:
        return "Passphrase(<secret>)"
