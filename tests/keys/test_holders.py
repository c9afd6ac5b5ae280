"""Holders: the same secret gives the same wrapping key, another one does not, and none is shown to anybody."""

from __future__ import annotations

import base64
import os
import pickle
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snapcore.errors import DamagedError, ExistsError, LockedError, UsageError
from snapcore.keys import AwsKms, Holder, KeyFile, Parameters, Passphrase
from snapcore.keys.interface import Place
from snapcore.keys.secret import Secret, wiped
from snapcore.keys.wrapping import unwrap, wrap

PLACE = Place("d" * 32, "a" * 32)
HERE = Place("d" * 32, "b" * 32)


@pytest.fixture
def kms(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A KMS of this process."""
    moto = pytest.importorskip("moto")
    boto3 = pytest.importorskip("boto3")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-central-1")
    with moto.mock_aws():
        yield boto3.client("kms")


def test_a_passphrase_leads_to_its_key_again_and_another_one_does_not() -> None:
    parameters, key = Passphrase("correct horse").make(PLACE)
    assert parameters["memory_kib"] == 64 << 10
    assert Passphrase("correct horse").find(parameters, PLACE) == key
    assert Passphrase("correct horsE").find(parameters, PLACE) != key
    again, other = Passphrase("correct horse").make(PLACE)
    assert again["salt"] != parameters["salt"] and other != key


def test_a_passphrase_is_the_same_however_its_letters_are_composed() -> None:
    parameters, key = Passphrase("caf\u00e9").make(PLACE)
    assert Passphrase("cafe\u0301").find(parameters, PLACE) == key


@pytest.mark.parametrize(
    "wrong",
    [
        {"memory_kib": 1 << 21},
        {"memory_kib": 8},
        {"memory_kib": -1},
        {"passes": 0},
        {"passes": 10_000},
        {"lanes": 0},
        {"lanes": 1 << 20},
        {"salt": "AAAA"},
        {"salt": "no base64"},
        {"salt": 7},
        {"memory_kib": "much"},
        {"more": 1},
    ],
)
def test_parameters_that_ask_for_too_much_or_make_no_sense_are_refused(wrong: Parameters) -> None:
    right: Parameters = {"salt": base64.b64encode(bytes(16)).decode(), "memory_kib": 64 << 10, "passes": 3, "lanes": 4}
    with pytest.raises(DamagedError, match="parameters"):
        Passphrase("x").find(right | wrong, PLACE)


@pytest.mark.parametrize("wrong", [{}, {"salt": 1}, {"salt": "AAAA"}, {"salt": "!"}, {"salt": "A", "more": 1}])
def test_parameters_of_a_key_file_that_make_no_sense_are_refused(wrong: Parameters, tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="parameters"):
        KeyFile.create(tmp_path / "key").find(wrong, PLACE)


def test_a_passphrase_comes_from_the_first_line_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"correct horse\r\nnothing of this\n")
    parameters, key = Passphrase.from_file(tmp_path / "file").make(PLACE)
    assert Passphrase("correct horse").find(parameters, PLACE) == key
    for content in (b"", b"\n", b"\xff\xfe\n", b"x" * 2000):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(UsageError, match="file"):
            Passphrase.from_file(tmp_path / "file")
    with pytest.raises(UsageError, match="cannot read"):
        Passphrase.from_file(tmp_path / "none")


def test_a_key_file_is_made_for_its_owner_alone_and_never_written_over(tmp_path: Path) -> None:
    parameters, key = KeyFile.create(tmp_path / "key").make(PLACE)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert KeyFile(tmp_path / "key").find(parameters, PLACE) == key
    assert KeyFile.create(tmp_path / "other").find(parameters, PLACE) != key
    content = (tmp_path / "key").read_bytes()
    with pytest.raises(ExistsError):
        KeyFile.create(tmp_path / "key")
    assert (tmp_path / "key").read_bytes() == content


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o777])
def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    KeyFile.create(tmp_path / "key")
    os.chmod(tmp_path / "key", mode)
    with pytest.raises(UsageError, match="chmod 600"):
        KeyFile(tmp_path / "key")


@pytest.mark.parametrize("change", ["cut", "heading", "letters", "more", "long", "empty"])
def test_what_is_no_key_file_is_refused_and_not_shown(tmp_path: Path, change: str) -> None:
    path = tmp_path / "key"
    KeyFile.create(path)
    comment, heading, key, _ = path.read_text().split("\n")
    changed = {
        "cut": f"{heading}\n{key[:-1]}\n",
        "heading": f"snapcore key file 2\n{key}\n",
        "letters": f"{heading}\n{key[:-1]}g\n",
        "more": f"{heading}\n{key}\n{key}\n",
        "long": f"{comment * 100}\n{heading}\n{key}\n",
        "empty": "",
    }
    path.write_text(changed[change])
    with pytest.raises(UsageError, match="no key file") as raised:
        KeyFile(path)
    assert key[:16] not in str(raised.value)


def test_a_key_of_kms_opens_what_it_made_and_says_why_it_does_not(kms: Any) -> None:
    arn = kms.create_key()["KeyMetadata"]["Arn"]
    other = kms.create_key()["KeyMetadata"]["Arn"]
    parameters, key = AwsKms(arn).make(PLACE)
    assert len(key) == 32 and AwsKms(arn).find(parameters, PLACE) == key
    with pytest.raises(LockedError, match="held by the KMS key"):
        AwsKms(other).find(parameters, PLACE)
    with pytest.raises(LockedError, match="did not make this data key"):
        AwsKms(arn).find(parameters, HERE)
    with pytest.raises(LockedError, match="does not exist"):
        AwsKms("arn:aws:kms:eu-central-1:123456789012:key/00000000-0000-0000-0000-000000000000").make(PLACE)


@pytest.mark.parametrize(
    ("code", "says"),
    [("DisabledException", "is disabled"), ("AccessDeniedException", "may not be used"), ("Strange", "does not give")],
)
def test_what_kms_refuses_is_a_key_that_is_locked(kms: Any, code: str, says: str) -> None:
    """moto goes on with keys that are disabled, so the answers of the service are put into its client."""
    stub = pytest.importorskip("botocore.stub")
    parameters, _ = AwsKms("k", client=_Giving()).make(PLACE)
    with stub.Stubber(kms) as answers:
        answers.add_client_error("decrypt", code)
        answers.add_client_error("generate_data_key", code)
        with pytest.raises(LockedError, match=says):
            AwsKms("k", client=kms).find(parameters, PLACE)
        with pytest.raises(LockedError, match=says):
            AwsKms("k", client=kms).make(PLACE)


class _Giving:
    """A client whose service always gives the same data key."""

    def generate_data_key(self, **_: Any) -> dict[str, bytes]:
        return {"CiphertextBlob": b"blob", "Plaintext": bytes(32)}


@pytest.mark.parametrize(
    "wrong", [{}, {"key": 1, "data_key": "AAAA"}, {"key": "k", "data_key": "?"}, {"key": "k", "data_key": ""}]
)
def test_parameters_of_kms_that_make_no_sense_are_refused(wrong: Parameters) -> None:
    with pytest.raises(DamagedError, match="parameters"):
        AwsKms("k", client=object()).find(wrong, PLACE)


def test_kms_is_not_reached_without_a_region(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("boto3")
    for name in ("AWS_DEFAULT_REGION", "AWS_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    with pytest.raises(UsageError, match="KMS"):
        AwsKms("alias/x")


def test_a_root_unwraps_under_its_key_and_binding_only() -> None:
    key, root = bytearray(b"k" * 32), bytearray(range(32))
    wrapped = wrap(key, root, b"bound")
    assert unwrap(key, wrapped, b"bound") == root
    assert unwrap(bytearray(b"K" * 32), wrapped, b"bound") is None
    assert unwrap(key, wrapped, b"Bound") is None
    for at in range(len(wrapped) * 8):
        changed = bytearray(wrapped)
        changed[at // 8] ^= 1 << at % 8
        assert unwrap(key, bytes(changed), b"bound") is None
    for length in range(len(wrapped)):
        assert unwrap(key, wrapped[:length], b"bound") is None
    assert wrap(key, root, b"bound") != wrapped


def test_no_secret_is_shown_or_pickled(tmp_path: Path) -> None:
    file = KeyFile.create(tmp_path / "key")
    key = (tmp_path / "key").read_text().split("\n")[2]
    holders: list[Holder] = [Passphrase("correct horse"), file]
    for holder in holders:
        assert isinstance(holder, Holder)
        shown = f"{holder} {holder!r} {vars(holder)}"
        assert "horse" not in shown and key not in shown and bytes.fromhex(key).__repr__()[2:12] not in shown
        with pytest.raises(TypeError):
            pickle.dumps(holder)
    assert "horse" not in repr(Secret(b"horse"))


def test_secrets_are_overwritten_when_they_are_done_with(tmp_path: Path) -> None:
    with wiped(bytearray(b"secret")) as secret:
        assert secret == b"secret"
    assert secret == bytes(6)
    holder = Passphrase("horse")
    held = holder._secret.reveal()
    holder.forget()
    assert held == bytes(5)
    file = KeyFile.create(tmp_path / "key")
    held = file._secret.reveal()
    file.forget()
    assert held == bytes(32)
