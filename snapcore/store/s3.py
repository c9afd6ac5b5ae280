"""A store in an S3 bucket, or in a part of one: objects are keys under a prefix.

Creation is one PUT with `If-None-Match: *`, whatever the size. Before its first creation a store makes sure that the
bucket keeps to that (docs/DESIGN.md, "Stores"). Nothing here tries again: that is for RetryStore, which knows what a
lost answer may mean.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError
from obstore.store import S3Store as Client

from snapcore.errors import (
    DamagedError,
    Error,
    ExistsError,
    NotFoundError,
    OutOfSpaceError,
    StoreError,
    StoreRefusedError,
    UsageError,
)
from snapcore.persist import Buffer
from snapcore.store.local import checked_name, is_name

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Config, S3CredentialProvider

# Names under tmp/ are no objects: no list shows this one.
_PROBE = "tmp/create-only"
_PROBE_TEXT = b"snapcore puts this under its name twice: the second time has to be refused. It may be removed."
# A dead connection is noticed after this; an upload, of which nothing is heard until its end, may take this and
# 16 s a MiB (64 KiB/s) on top.
_QUIET_S = 30
_UPLOAD_S_PER_MIB = 16
_CONNECT_S = 10
_PUT_LIMIT_BYTES = 5 << 30
_PAGE = 1000
# Beyond this no object reaches, and offsets stay what HTTP clients can count in.
_OFFSET_LIMIT = 1 << 62

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")
_FULL = re.compile(r"Quota|StorageFull|InsufficientStorage")

Answer = TypeVar("Answer")


class S3Store:
    """Objects in a bucket.

    Endpoint, region and credentials are those of the environment, as for other programs: `AWS_ENDPOINT_URL`,
    `AWS_REGION`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_PROFILE`, `AWS_CA_BUNDLE` and so on.

    Parameters
    ----------
    bucket : str
    prefix : str
        What all keys begin with, without the "/" at its end; empty: the whole bucket.
    """

    def __init__(self, bucket: str, prefix: str = "") -> None:
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._profile = _profile()
        self._reading = self._client(read_timeout=timedelta(seconds=_QUIET_S), timeout=timedelta(days=1))
        self._small = self._client(timeout=timedelta(seconds=_QUIET_S))
        self._uploading = functools.cache(self._client_for_mib)
        self._creates_only = False
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[S3Store], tuple[str, str]]:
        """For another process: the same place, with the endpoint and credentials of that process's environment."""
        return S3Store, (self._bucket, self._prefix.removesuffix("/"))

    @property
    def url(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    @property
    def folder(self) -> None:
        return None

    def get(self, name: str, limit_bytes: int) -> bytes:
        key = self._key(name)

        def read() -> bytes:
            found = obstore.get(self._reading, key)
            size_bytes = found.meta["size"]
            if size_bytes > limit_bytes:
                raise DamagedError(
                    f"{self.url}/{name} has {size_bytes} bytes where {limit_bytes} are the most; "
                    "remove it or restore it from another copy of the repository"
                )
            return self._whole(name, found.bytes().to_bytes(), size_bytes)

        return self._ask("reading", name, read)

    def get_range(self, name: str, offset_bytes: int, length_bytes: int) -> bytes:
        key = self._key(name)
        if offset_bytes < 0 or length_bytes < 0:
            raise UsageError(f"offset {offset_bytes} or length {length_bytes} is negative")
        if length_bytes == 0 or offset_bytes + length_bytes > _OFFSET_LIMIT:
            # HTTP has no empty range, and cannot ask for one that ends nowhere.
            if offset_bytes + length_bytes > self.size(name):
                raise self._ends_early(name, offset_bytes, length_bytes)
            return b""

        def read() -> bytes:
            try:
                found = obstore.get_range(self._reading, key, start=offset_bytes, length=length_bytes).to_bytes()
            except BaseError as error:
                if _status(error) == 416:
                    raise self._ends_early(name, offset_bytes, length_bytes) from None
                raise
            if len(found) < length_bytes:
                raise self._ends_early(name, offset_bytes, length_bytes)
            return self._whole(name, found, length_bytes)

        return self._ask("reading", name, read)

    def size(self, name: str) -> int:
        key = self._key(name)
        return self._ask("looking for", name, lambda: obstore.head(self._small, key)["size"])

    def list(self, prefix: str, after: str = "") -> Iterator[tuple[str, int]]:
        if prefix:
            checked_name(prefix.removesuffix("/"))
        cut = len(self._prefix)
        last = self._prefix + after
        pages = obstore.list(self._reading, self._prefix + prefix, offset=last or None, chunk_size=_PAGE)
        while page := self._ask("listing", prefix, lambda: next(pages, ())):
            for row in page:
                key = row["path"]
                if key <= last:
                    raise StoreRefusedError(
                        f"{self.url} lists {key} behind {last}, not in the order of names; snapcore cannot use such a "
                        "bucket (those of S3 Express are so)"
                    )
                last = key
                # Nothing else is an object: the probe, or what somebody else put there.
                if is_name(key[cut:]):
                    yield key[cut:], row["size"]

    def put_new(self, name: str, buffers: Sequence[Buffer]) -> int:
        key = self._key(name)
        # Bytes of our own: what the caller does to its buffers meanwhile is of no concern.
        data = b"".join(buffers)
        if len(data) > _PUT_LIMIT_BYTES:
            raise UsageError(f"{self.url}/{name}: {len(data)} bytes in one object; S3 takes {_PUT_LIMIT_BYTES}")
        self._check_creates_only()
        self._create(name, key, data)
        return len(data)

    def delete(self, name: str) -> None:
        key = self._key(name)
        # S3 says nothing about whether there was anything.
        self.size(name)
        self._ask("removing", name, lambda: obstore.delete(self._small, key))

    def settle(self, prefix: str) -> None:
        """S3 answers when it is durable."""
        del prefix

    def sweep(self) -> int:
        """A PUT leaves a whole object or nothing."""
        return 0

    def _create(self, name: str, key: str, data: bytes) -> None:
        # Classes of sizes, so that there are few clients.
        client = self._uploading(1 << (len(data) >> 20).bit_length())

        def put() -> None:
            try:
                obstore.put(client, key, data, mode="create", use_multipart=False)
            except AlreadyExistsError as error:
                if _status(error) == 409:
                    # Two met, and it may be that neither won: no answer yet.
                    raise StoreError(f"{self.url}/{name}: somebody else writes that name just now; try again") from None
                raise ExistsError(f"{self.url}/{name} exists already") from error

        self._ask("writing", name, put)

    def _check_creates_only(self) -> None:
        """StoreRefusedError for a bucket in which a name can be created twice."""
        with self._lock:
            if self._creates_only:
                return
            try:
                if self._probed() or self._probed():
                    self._creates_only = True
                    return
            except StoreRefusedError as error:
                if _status(error.__cause__) != 501:
                    raise
                raise StoreRefusedError(self._cannot("answers 501, not implemented")) from error
            with contextlib.suppress(Error):
                self._ask("removing", _PROBE, lambda: obstore.delete(self._small, self._prefix + _PROBE))
            raise StoreRefusedError(self._cannot("created one name twice"))

    def _probed(self) -> bool:
        """Whether a creation of what is there already was refused, in one try."""
        try:
            self._create(_PROBE, self._prefix + _PROBE, _PROBE_TEXT)
        except ExistsError:
            return True
        return False

    def _cannot(self, what: str) -> str:
        return (
            f"{self.url} cannot hold a repository: it {what}. Writers without locks need a store that creates a name "
            "only once (a PUT with If-None-Match: *), as AWS, Ceph from 16 on and MinIO do"
        )

    def _key(self, name: str) -> str:
        return self._prefix + checked_name(name)

    def _whole(self, name: str, data: bytes, size_bytes: int) -> bytes:
        if len(data) != size_bytes:
            raise StoreError(f"{self.url}/{name}: {len(data)} bytes came of {size_bytes}; try again")
        return data

    def _ends_early(self, name: str, offset_bytes: int, length_bytes: int) -> DamagedError:
        return DamagedError(
            f"{self.url}/{name} ends before byte {offset_bytes + length_bytes}, where {length_bytes} bytes from "
            f"{offset_bytes} on were expected; run `snapcore verify` on the repository"
        )

    def _ask(self, doing: str, name: str, call: Callable[[], Answer]) -> Answer:
        """What the library answers, with its errors as ours."""
        try:
            return call()
        except (FileNotFoundError, BaseError, PermissionError, TimeoutError) as error:
            raise self._error(error, doing, f"{self.url}/{name}") from error

    def _error(self, error: Exception, doing: str, where: str) -> Error:
        text = str(error)
        code, status = _first(_CODE, text), _status(error)
        said = " ".join(part for part in (str(status or ""), code, _first(_MESSAGE, text)) if part)
        if code == "NoSuchBucket":
            return StoreRefusedError(
                f"there is no bucket {self._bucket} ({doing} {where}); make it or check the endpoint"
            )
        if status == 404 or isinstance(error, FileNotFoundError):
            return NotFoundError(f"there is no object {where}")
        if status == 507 or _FULL.search(code):
            return OutOfSpaceError(
                f"no room for {doing} {where} ({said}); free some or raise the quota, then try again"
            )
        if status in (401, 403) or code in ("ExpiredToken", "InvalidToken", "AuthorizationHeaderMalformed"):
            return StoreRefusedError(
                f"{doing} {where} is not allowed ({said}); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or "
                "AWS_PROFILE, AWS_REGION, and that the key may list, get, put and delete there"
            )
        if "without LOCATION" in text:
            return StoreRefusedError(f"{doing} {where}: the bucket is in another region; set AWS_REGION to its own")
        if status == 501 or (400 <= status < 500 and status not in (408, 409, 429)):
            return StoreRefusedError(
                f"{doing} {where} was refused ({said}); docs/regions.md says what a bucket must do"
            )
        if not status:
            # The first line has the address and the reason, what follows is for who works on the library.
            said = text.split("\n", 1)[0].rpartition("Error performing ")[2]
        return StoreError(f"{said} while {doing} {where}; check the network and the endpoint, then try again")

    def _client(self, **timeouts: timedelta) -> Client:
        endpoint = _endpoint()
        plain = endpoint.startswith("http://")
        options: ClientConfig = {"allow_http": plain, "connect_timeout": timedelta(seconds=_CONNECT_S), **timeouts}  # type: ignore[typeddict-item]
        if bundle := os.environ.get("AWS_CA_BUNDLE"):
            options["root_certificate"] = _certificates(bundle)
        config: S3Config = {"unsigned_payload": not plain, "disable_bulk_delete": True}
        if endpoint:
            config["endpoint"] = endpoint
        return Client(
            self._bucket,
            config=config,
            client_options=options,
            retry_config={"max_retries": 0},
            credential_provider=self._profile,
        )

    def _client_for_mib(self, mib: int) -> Client:
        return self._client(timeout=timedelta(seconds=_QUIET_S + _UPLOAD_S_PER_MIB * mib))


def _first(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found[1] if found else ""


def _status(error: BaseException | None) -> int:
    """The HTTP status that an error of the library tells of; 0 for none."""
    return int(_first(_STATUS, str(error)) or 0)


def _endpoint() -> str:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    return next(filter(None, map(os.environ.get, names)), "")


def _certificates(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UsageError(f"AWS_CA_BUNDLE: {path}: {error.strerror}") from error


def _profile() -> S3CredentialProvider | None:
    """Credentials of a profile file, where the environment names a profile or holds no key and there is such a file."""
    environment = os.environ
    if "AWS_PROFILE" not in environment:
        path = environment.get("AWS_SHARED_CREDENTIALS_FILE", "~/.aws/credentials")
        if "AWS_ACCESS_KEY_ID" in environment or not os.path.exists(os.path.expanduser(path)):
            return None
    try:
        import boto3
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider
    except ModuleNotFoundError as error:
        raise UsageError("profiles need the library boto3: pip install 'snapcore[s3]'") from error
    try:
        return Boto3CredentialProvider(boto3.Session())
    except (BotoCoreError, ValueError) as error:
        raise UsageError(
            f"no credentials in the profile {environment.get('AWS_PROFILE', 'default')}: {error}"
        ) from error
