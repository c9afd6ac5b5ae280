"""A key of AWS KMS as a holder: the service makes the wrapping key and opens it again, the master key stays there.

Credentials and region come from the usual environment of boto3 (the extra `kms`).
"""

from __future__ import annotations

import base64
import importlib
from typing import Any

import msgspec

from snapcore.errors import DamagedError, LockedError, UsageError
from snapcore.keys.interface import WRAPPING_KEY_BYTES, Parameters, Place

_DATA_KEY_LIMIT_BYTES = 8 << 10
_KEY_LIMIT = 2048


class _Parameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: str
    data_key: str


class AwsKms:
    """A symmetric key of AWS KMS.

    Parameters
    ----------
    key : str
        Its ARN, id or alias. Only wraps that name it in the same way are opened.
    client : optional
        A boto3 client of KMS; default: one from the environment.
    """

    kind = "aws-kms"

    def __init__(self, key: str, client: Any = None) -> None:
        if not 1 <= len(key) <= _KEY_LIMIT:
            raise UsageError(f"the name of a KMS key has 1 to {_KEY_LIMIT} characters")
        self._key = key
        self._client = _client(key) if client is None else client

    def make(self, place: Place) -> tuple[Parameters, bytearray]:
        found = self._call("generate_data_key", KeyId=self._key, KeySpec="AES_256", EncryptionContext=_context(place))
        parameters: Parameters = {
            "key": self._key,
            "data_key": base64.b64encode(found["CiphertextBlob"]).decode(),
        }
        return parameters, bytearray(found["Plaintext"])

    def find(self, parameters: Parameters, place: Place) -> bytearray:
        try:
            found = msgspec.convert(parameters, _Parameters)
            data_key = base64.b64decode(found.data_key, validate=True)
        except (msgspec.ValidationError, ValueError) as error:
            raise DamagedError(f"the parameters are none of AWS KMS: {error}") from error
        if not 1 <= len(data_key) <= _DATA_KEY_LIMIT_BYTES:
            raise DamagedError(f"the parameters have a data key of {len(data_key)} bytes")
        if found.key != self._key:
            # The caller's word counts, and not what a repository says: else it could have anything opened.
            raise LockedError(f"it is held by the KMS key {found.key}, not by {self._key}")
        opened = self._call("decrypt", KeyId=self._key, CiphertextBlob=data_key, EncryptionContext=_context(place))
        key = bytearray(opened["Plaintext"])
        if len(key) != WRAPPING_KEY_BYTES:
            raise DamagedError(f"the data key has {len(key)} bytes")
        return key

    def _call(self, method: str, **arguments: Any) -> dict[str, Any]:
        errors = importlib.import_module("botocore.exceptions")
        try:
            answer: dict[str, Any] = getattr(self._client, method)(**arguments)
        except errors.ClientError as error:
            code = error.response.get("Error", {}).get("Code", "")
            reason = _REASONS.get(code, "does not give it")
            raise LockedError(f"the KMS key {self._key} {reason} ({code})") from error
        except errors.BotoCoreError as error:
            raise LockedError(f"the KMS key {self._key} cannot be asked: {error}") from error
        return answer

    def __repr__(self) -> str:
        return f"AwsKms({self._key!r})"


_REASONS = {
    "DisabledException": "is disabled",
    "NotFoundException": "does not exist",
    "AccessDeniedException": "may not be used by who asks",
    "KMSInvalidStateException": "is disabled or about to be deleted",
    "InvalidCiphertextException": "did not make this data key",
}


def _context(place: Place) -> dict[str, str]:
    return {"snapcore-domain": place.domain, "snapcore-holder": place.holder}


def _client(key: str) -> Any:
    try:
        boto3 = importlib.import_module("boto3")
        errors = importlib.import_module("botocore.exceptions")
    except ImportError as error:
        raise UsageError("keys of AWS KMS need boto3: pip install 'snapcore[kms]'") from error
    parts = key.split(":")
    region = parts[3] if key.startswith("arn:") and len(parts) > 5 else None
    try:
        return boto3.client("kms", region_name=region)
    except errors.BotoCoreError as error:
        raise UsageError(f"cannot reach AWS KMS: {error}") from error
