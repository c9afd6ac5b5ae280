"""An S3 server for tests: moto in this process, or the one that SNAPCORE_TEST_S3 names.

`SNAPCORE_TEST_S3=http://host:port` with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY runs the same tests against a real
one. Every test gets a prefix of its own in one bucket.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator

import pytest

from snapcore.store import Store, open_store
from snapcore.store.s3 import S3Store

BUCKET = "snapcore-test"
# Whatever is set on this machine for other programs is no concern of the tests.
_FOREIGN = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE", "AWS_ENDPOINT", "AWS_ENDPOINT_URL_S3")


def environment(endpoint: str) -> dict[str, str]:
    """What a program needs to reach the server."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": os.environ.get("AWS_ACCESS_KEY_ID", "AKTEST"),
        "AWS_SECRET_ACCESS_KEY": os.environ.get("AWS_SECRET_ACCESS_KEY", "a-secret-that-nobody-shows"),
        "AWS_REGION": os.environ.get("AWS_REGION", "us-east-1"),
    }


def use(patch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Let this process use the server."""
    for name in _FOREIGN:
        patch.delenv(name, raising=False)
    for name, value in environment(endpoint).items():
        patch.setenv(name, value)


def make_bucket(endpoint: str) -> None:
    """Make the bucket of the tests; one that is there is fine."""
    import boto3
    from botocore.exceptions import ClientError

    found = environment(endpoint)
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name=found["AWS_REGION"],
        aws_access_key_id=found["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=found["AWS_SECRET_ACCESS_KEY"],
    )
    try:
        client.create_bucket(Bucket=BUCKET)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
            raise
    finally:
        client.close()


def new_place() -> str:
    """A place in the bucket that no other test uses."""
    return f"s3://{BUCKET}/{secrets.token_hex(8)}"


def bare_store() -> Store:
    """A store at a new place without its decorators."""
    return S3Store(BUCKET, secrets.token_hex(8))


def whole_store() -> Store:
    """One as users get it."""
    return open_store(new_place())


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The address of a server that has the bucket."""
    given = os.environ.get("SNAPCORE_TEST_S3")
    if given:
        make_bucket(given)
        yield given
        return
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        make_bucket(f"http://{host}:{port}")
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same, and this process uses it."""
    use(monkeypatch, s3_server)
    return s3_server
