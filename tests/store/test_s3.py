"""What is particular to S3: buckets that do not keep the promise, errors in its words, credentials."""

from __future__ import annotations

import os
from pathlib import Path

import obstore
import pytest

from snapcore import Repository
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
from snapcore.store import LocalStore, MemoryStore, RetryStore, open_store
from snapcore.store.s3 import S3Store
from tests.support.gateway import Gateway, self_signed, serving
from tests.support.s3 import BUCKET, bare_store, new_place, use, whole_store

SECRET = "a-secret-that-nobody-shows"


def keys(store: S3Store) -> list[str]:
    """All keys of a place, the probe too."""
    return [row["path"] for page in obstore.list(store._reading, store._prefix) for row in page]


# The promise


class Without(Gateway):
    """As Swift's s3api: a condition is not implemented."""

    def respond(self, method: str, path: str, body: bytes) -> None:
        if method == "GET" and path == f"/{BUCKET}":
            self.answer(200, b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>")
        elif method == "PUT" and "if-none-match" in {key.lower() for key in self.headers}:
            self.refuse(501, "NotImplemented")
        else:
            super().respond(method, path, body)


class Heedless(Without):
    """As s3rver: the condition is not looked at."""

    def respond(self, method: str, path: str, body: bytes) -> None:
        if method == "PUT":
            Gateway.respond(self, method, path, body)
        else:
            super().respond(method, path, body)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Without, "501, not implemented"), (Heedless, "created one name twice")],
    ids=["501", "ignores"],
)
def test_a_bucket_without_conditional_put_is_refused_at_init_with_the_reason(
    kind: type[Gateway], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(kind) as (address, held):
        use(monkeypatch, address)
        with pytest.raises(StoreRefusedError, match=f"cannot hold a repository: it .*{reason}.*If-None-Match"):
            Repository.create(f"s3://{BUCKET}/here")
        assert held.objects == {}
        assert all(path.endswith(("tmp/create-only", f"/{BUCKET}")) for _, path, _ in held.requests)


def test_a_bucket_that_loses_conditional_put_is_refused_when_a_repository_is_opened_for_writing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with serving(Heedless) as (address, held):
        use(monkeypatch, address)
        store = S3Store(BUCKET, "here")
        store._creates_only = True
        Repository.create(store)
        before = dict(held.objects)
        found = Repository.open(f"s3://{BUCKET}/here")
        assert found.snapshots() == []
        with pytest.raises(StoreRefusedError, match="created one name twice"):
            found.collect()
        assert held.objects == before


def test_the_promise_costs_two_requests_once_and_one_in_every_process_after_that(s3: str) -> None:
    place = new_place()
    first, second = open_store(place), open_store(place)
    first.put_new("a", [b"1"])
    second.put_new("b", [b"2"])
    assert dict(second.list("")) == {"a": 1, "b": 1}
    inner = S3Store(BUCKET, place.rpartition("/")[2])
    assert [key.partition("/")[2] for key in keys(inner)] == ["a", "b", "tmp/create-only"]


# Errors


class Telling(Gateway):
    """Answers objects under /STATUS/CODE/ with that."""

    def respond(self, method: str, path: str, body: bytes) -> None:
        parts = path.split("/")
        if "create-only" in path:
            self.refuse(412, "PreconditionFailed")
        elif len(parts) > 3 and parts[2].isdecimal():
            self.refuse(int(parts[2]), parts[3])
        else:
            super().respond(method, path, body)


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (403, "AccessDenied", StoreRefusedError),
        (403, "QuotaExceeded", OutOfSpaceError),
        (507, "InsufficientStorage", OutOfSpaceError),
        (400, "ExpiredToken", StoreRefusedError),
        (400, "InvalidArgument", StoreRefusedError),
        (405, "MethodNotAllowed", StoreRefusedError),
        (404, "NoSuchBucket", StoreRefusedError),
        (408, "RequestTimeout", StoreError),
        (409, "ConditionalRequestConflict", StoreError),
        (429, "SlowDown", StoreError),
        (500, "InternalError", StoreError),
        (503, "SlowDown", StoreError),
        (412, "PreconditionFailed", ExistsError),
    ],
)
def test_an_answer_of_the_server_is_an_error_of_the_right_kind_that_names_the_object(
    status: int, code: str, kind: type[Error], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Telling) as (address, _):
        use(monkeypatch, address)
        store = S3Store(BUCKET, f"{status}/{code}")
        calls = [lambda: store.put_new("a", [b"data"])]
        if status not in (409, 412):
            calls += [lambda: store.get("a", 10), lambda: store.get_range("a", 0, 1)]
        for call in calls:
            with pytest.raises(kind, match=f"s3://{BUCKET}/{status}/{code}/a") as caught:
                call()
            assert type(caught.value) is kind
            assert SECRET not in str(caught.value)


def test_two_that_meet_at_one_name_is_no_answer_and_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Meeting(Telling):
        def respond(self, method: str, path: str, body: bytes) -> None:
            puts = [asked for command, asked, _ in self.requests if command == "PUT"]
            if method == "PUT" and "create-only" not in path and puts.count(path) == 1:
                self.refuse(409, "ConditionalRequestConflict")
            else:
                super().respond(method, path, body)

    with serving(Meeting) as (address, held):
        use(monkeypatch, address)
        assert RetryStore(S3Store(BUCKET), first_wait_s=0.0).put_new("a", [b"data"]) == 4
        assert held.objects == {f"/{BUCKET}/a": b"data"}


def test_a_body_that_ends_early_is_a_fault_and_never_the_object(monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(Gateway):
        def respond(self, method: str, path: str, body: bytes) -> None:
            self.answer(206 if "range" in {key.lower() for key in self.headers} else 200, b"half", length="8")
            self.close_connection = True

    with serving(Short) as (address, _):
        use(monkeypatch, address)
        store = S3Store(BUCKET)
        with pytest.raises(StoreError):
            store.get("a", 100)
        with pytest.raises(StoreError):
            store.get_range("a", 0, 8)


def test_a_server_that_is_not_there_is_a_fault_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(StoreError, match=r"http://127\.0\.0\.1:9/.*check the network and the endpoint"):
        S3Store(BUCKET).get("a", 1)


def test_a_bucket_that_is_not_there_is_said_by_every_method_that_can_tell(s3: str) -> None:
    store = S3Store("no-such-bucket")
    for call in (
        lambda: store.get("a", 1),
        lambda: store.get_range("a", 0, 1),
        lambda: store.put_new("a", [b""]),
        lambda: list(store.list("")),
    ):
        with pytest.raises(StoreRefusedError, match="there is no bucket no-such-bucket"):
            call()
    with pytest.raises(NotFoundError):
        store.size("a")


def test_only_a_try_that_was_answered_with_a_fault_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for status, tries in ((503, 3), (403, 1), (501, 1), (400, 1)):
        with serving(Telling) as (address, held):
            use(monkeypatch, address)
            store = RetryStore(S3Store(BUCKET, f"{status}/Code"), budget_s=0.4, first_wait_s=0.1)
            with pytest.raises(StoreError):
                store.get("a", 1)
            assert (len(held.requests) >= min(tries, 2)) and (tries > 1 or len(held.requests) == 1)


def test_a_list_that_is_not_in_order_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Express(Gateway):
        def respond(self, method: str, path: str, body: bytes) -> None:
            rows = "".join(
                f"<Contents><Key>{key}</Key><LastModified>2026-11-24T00:00:00Z</LastModified><Size>1</Size></Contents>"
                for key in ("b", "a")
            )
            self.answer(200, f"<ListBucketResult><IsTruncated>false</IsTruncated>{rows}</ListBucketResult>".encode())

    with serving(Express) as (address, _):
        use(monkeypatch, address)
        with pytest.raises(StoreRefusedError, match="lists a behind b"):
            list(S3Store(BUCKET).list(""))


# Listing


def test_a_list_of_more_than_a_page_is_complete_and_what_is_no_object_is_not_in_it(s3: str) -> None:
    store = bare_store()
    assert isinstance(store, S3Store)
    for number in range(1030):
        obstore.put(store._small, f"{store._prefix}p/{number:05}", b"")
    for key in ("p/Photo.JPG", "tmp/left", "p/00001x_y"):
        obstore.put(store._small, store._prefix + key, b"")
    assert [name for name, _ in store.list("")] == [f"p/{number:05}" for number in range(1030)]
    assert [name for name, _ in store.list("p/", after="p/01000")] == [f"p/{number:05}" for number in range(1001, 1030)]


def test_two_places_of_which_one_begins_like_the_other_do_not_see_each_other(s3: str) -> None:
    one, other = S3Store(BUCKET, "place"), S3Store(BUCKET, "place-2")
    one.put_new("a", [b"1"])
    other.put_new("b", [b"2"])
    assert (list(one.list("")), list(other.list(""))) == ([("a", 1)], [("b", 1)])
    one.delete("a")
    other.delete("b")


# Places


def test_the_place_says_which_store(tmp_path: Path) -> None:
    assert isinstance(open_store(tmp_path), LocalStore)
    assert isinstance(open_store("memory:"), MemoryStore)
    store = MemoryStore()
    assert open_store(store) is store


def test_a_store_in_s3_opens_again_by_its_own_url(s3: str) -> None:
    store = whole_store()
    store.put_new("a", [b"data"])
    assert open_store(store.url).get("a", 10) == open_store(store.url + "/").get("a", 10) == b"data"


@pytest.mark.parametrize(
    "place",
    [
        f"s3://AK:{SECRET}@host/bucket",
        f"s3://bucket/a?secret={SECRET}",
        f"s3://bucket/{SECRET}/../x",
        f"s3://bucket//{SECRET}",
        "s3://",
        "s3:///x",
        "s3://ab",
        "s3://bucket/.",
        f"ftp://user:{SECRET}@host",
    ],
)
def test_a_place_that_is_none_is_refused_and_not_repeated(place: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_store(place)
    assert SECRET not in str(caught.value)


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "snapcore.store.s3", raising=False)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(UsageError, match=r"obstore: pip install 'snapcore\[s3\]'"):
        open_store("s3://bucket")


# Credentials


def test_nothing_that_is_printed_has_the_secret(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A server that looks at signatures refuses this one; it has to keep quiet about the secret all the same.
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    store = open_store(new_place())
    shown = [repr(store), store.url, repr(vars(store))]
    for call in (lambda: store.get("a", 1), lambda: store.delete("a")):
        with pytest.raises((NotFoundError, StoreRefusedError)) as caught:
            call()
        shown += [str(caught.value), repr(caught.value.__cause__)]
    assert all(SECRET not in text for text in shown)


def test_credentials_come_from_a_profile_when_the_environment_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(Telling) as (address, held):
        use(monkeypatch, address)
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        (tmp_path / "credentials").write_text(f"[work]\naws_access_key_id = AKWORK\naws_secret_access_key = {SECRET}\n")
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
        monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("AWS_PROFILE", "work")
        with pytest.raises(NotFoundError):
            S3Store(BUCKET).get("a", 1)
        assert "Credential=AKWORK/" in held.requests[0][2]["authorization"]
        monkeypatch.setenv("AWS_PROFILE", "nobody")
        with pytest.raises(UsageError, match="nobody"):
            S3Store(BUCKET)


def test_a_payload_is_signed_where_no_tls_protects_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Telling) as (address, held):
        use(monkeypatch, address)
        S3Store(BUCKET).put_new("a", [b"data"])
        assert all(headers["x-amz-content-sha256"] != "UNSIGNED-PAYLOAD" for _, _, headers in held.requests)


def test_over_tls_the_payload_is_not_signed_and_the_authority_is_that_of_aws_ca_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = self_signed(tmp_path)
    with serving(Telling, certificate) as (address, held):
        use(monkeypatch, address)
        with pytest.raises(StoreError, match="check the network"):
            S3Store(BUCKET).get("a", 1)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(certificate))
        S3Store(BUCKET).put_new("a", [b"data"])
        put = [headers for command, _, headers in held.requests if command == "PUT"]
        assert put and all(headers["x-amz-content-sha256"] == "UNSIGNED-PAYLOAD" for headers in put)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(tmp_path / "missing"))
        with pytest.raises(UsageError, match=r"AWS_CA_BUNDLE: .*missing"):
            S3Store(BUCKET)


def test_an_object_beyond_its_limit_is_not_fetched(s3: str) -> None:
    store = bare_store()
    store.put_new("a", [bytes(1 << 20)])
    with pytest.raises(DamagedError, match="1048576 bytes where 10 are the most"):
        store.get("a", 10)
