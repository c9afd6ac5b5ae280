"""The keys of a repository: which there are, who holds them, and those that are unlocked in this process.

A key is a domain with a name. Its root lies under `keys/`, wrapped by each of its holders; steps and crashes:
docs/FORMAT.md, "Keys". Roots and domain keys live here from `unlock` on, until `lock`; nothing prints them.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Iterator
from datetime import UTC, datetime

import msgspec

from snapcore.errors import (
    DamagedError,
    Error,
    ExistsError,
    LockedError,
    NotFoundError,
    RefusedError,
    UnsupportedFormatError,
    UsageError,
)
from snapcore.keys import Holder, Parameters
from snapcore.keys.root import domain_id, new_root
from snapcore.keys.secret import Secret, wipe, wiped
from snapcore.keys.wrapping import unwrap, wrap
from snapcore.repository import domain
from snapcore.repository import wrap as wraps
from snapcore.repository.domain import PLAIN, Domain, Domains
from snapcore.repository.wrap import Wrap
from snapcore.store.interface import Store

UNREADABLE = "unreadable"
# Each costs a reader a request, and a passphrase a tenth of a second.
_OBJECTS_LIMIT = 256


class KeyHolder(msgspec.Struct, frozen=True):
    """One who can open a key.

    Attributes
    ----------
    id : str
        32 hexadecimal digits.
    kind : str
        "passphrase", "key-file", "aws-kms" or a word of others; "unreadable" for a damaged one.
    created : str
        UTC, RFC 3339.
    parameters : dict
        Nothing secret.
    """

    id: str
    kind: str
    created: str
    parameters: Parameters


class Key(msgspec.Struct, frozen=True):
    """A key of a repository.

    Attributes
    ----------
    id : str
        Of its domain, 32 hexadecimal digits.
    name : str
        For people. Of a key that is not unlocked it is what the repository says; nobody has vouched for it.
    holders : list of KeyHolder
    disabled, unlocked : bool
    """

    id: str
    name: str
    holders: list[KeyHolder]
    disabled: bool
    unlocked: bool


class _Found:
    """What lies under `keys/` for one domain."""

    def __init__(self) -> None:
        self.holders: list[str] = []
        self.leaving: set[str] = set()
        self.disabled = False


class Keyring:
    """The keys of a repository; safe from many threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._names: dict[str, str] = {}
        self._roots: dict[str, Secret] = {}
        self._domains: dict[bytes, Domain] = {PLAIN.id: PLAIN}

    @property
    def domains(self) -> Domains:
        """The plain domain and those that are unlocked, by their ids."""
        with self._lock:
            return dict(self._domains)

    def listed(self) -> list[Key]:
        """All keys, by name."""
        found = [self._described(key_id, listed) for key_id, listed in self._found().items()]
        return sorted(found, key=lambda key: (key.name, key.id))

    def any(self) -> bool:
        """Whether the repository has keys: one request."""
        return next(iter(self._store.list(wraps.PREFIX)), None) is not None

    def _found(self) -> dict[str, _Found]:
        found: dict[str, _Found] = {}
        for number, (object_name, _) in enumerate(self._store.list(wraps.PREFIX)):
            if number >= _OBJECTS_LIMIT:
                raise DamagedError(
                    f"{self._store.url} has more than {_OBJECTS_LIMIT} objects under {wraps.PREFIX}; "
                    "remove what does not belong there"
                )
            parsed = wraps.parse_name(object_name)
            if parsed is None:
                continue
            listed = found.setdefault(parsed.domain, _Found())
            if parsed.holder is None:
                listed.disabled = True
            elif parsed.mark:
                listed.leaving.add(parsed.holder)
            else:
                listed.holders.append(parsed.holder)
        # Marks alone, which a removal may have left, are no key.
        return {key_id: listed for key_id, listed in found.items() if listed.holders}

    def _described(self, key_id: str, listed: _Found) -> Key:
        holders, names = [], []
        for holder in listed.holders:
            found = self._wrap(key_id, holder)
            if found is None:
                holders.append(KeyHolder(holder, UNREADABLE, "", {}))
            else:
                holders.append(KeyHolder(holder, found.kind, found.created, found.parameters))
                names.append(found.name)
        name = self._names.get(key_id) or (names[0] if names else "?")
        return Key(key_id, name, holders, listed.disabled, key_id in self._roots)

    def _wrap(self, key_id: str, holder: str) -> Wrap | None:
        """A wrap; None for one that cannot be read or was removed meanwhile: another holder may do."""
        try:
            return wraps.read(self._store, key_id, holder)
        except (DamagedError, NotFoundError, UnsupportedFormatError):
            return None

    def unlock(self, holder: Holder) -> list[Key]:
        """Unlock every key that a holder opens.

        Returns
        -------
        list of Key
            Those that it opened.

        Raises
        ------
        LockedError
            It opens none; the message says why.
        """
        opened: list[str] = []
        reasons: list[str] = []
        listed = self._found()
        for key_id, found in listed.items():
            if found.disabled:
                name = self._described(key_id, found).name
                reasons.append(f"{name} is disabled (`snapcore key enable {name}` ends that)")
            elif self._opens(holder, key_id, found.holders, reasons):
                opened.append(key_id)
        if not opened:
            because = f": {'; '.join(reasons)}" if reasons else ""
            raise LockedError(f"the {holder.kind} that was given opens no key of {self._store.url}{because}")
        return sorted(
            (self._described(key_id, listed[key_id]) for key_id in opened), key=lambda key: (key.name, key.id)
        )

    def _opens(self, holder: Holder, key_id: str, holders: list[str], reasons: list[str]) -> bool:
        for item in holders:
            found = self._wrap(key_id, item)
            if found is None or found.kind != holder.kind:
                continue
            try:
                root = _unwrapped(holder, found)
            except (LockedError, DamagedError) as error:
                reasons.append(f"{found.name}: {error}")
                continue
            if root is not None:
                self._keep(found.name, root)
                return True
            reasons.append(f"{found.name} is held by another {found.kind}")
        return False

    def _keep(self, name: str, root: bytearray) -> Domain:
        """Take up a root, which is the keyring's from now on."""
        made = domain.of_root(root)
        key_id = made.id.hex()
        with self._lock:
            if key_id in self._roots:
                wipe(root)
                return self._domains[made.id]
            self._names[key_id] = name
            self._roots[key_id] = Secret(root)
            wipe(root)
            self._domains[made.id] = made
        return made

    def lock(self) -> None:
        """Forget all keys. What works with them still ends its work."""
        with self._lock:
            for secret in self._roots.values():
                secret.wipe()
            self._roots.clear()
            self._names.clear()
            self._domains = {PLAIN.id: PLAIN}

    def find(self, key: str) -> Domain:
        """The domain of an unlocked key, by its name or id.

        Raises
        ------
        NotFoundError, UsageError
            There is no such key; there are several.
        LockedError
            It is not unlocked, or disabled.
        """
        found = self._key(key)
        if found.disabled:
            raise self._disabled(found.name, found.id)
        if not found.unlocked:
            raise LockedError(f"the key {found.name} of {self._store.url} is not unlocked; {_GIVE}", found.id)
        return self.domains[bytes.fromhex(found.id)]

    def _key(self, key: str) -> Key:
        """A key by its name, unlocked ones first, or by its id."""
        keys = self.listed()
        for matching in (
            [item for item in keys if item.unlocked and item.name == key],
            [item for item in keys if item.name == key],
            [item for item in keys if item.id == key],
        ):
            if len(matching) > 1:
                listed = ", ".join(item.id for item in matching)
                raise UsageError(f"{key!r} stands for {len(matching)} keys: {listed}; give the id")
            if matching:
                return matching[0]
        raise NotFoundError(f"{self._store.url} has no key {key!r}; see `snapcore key list -r {self._store.url}`")

    def check_enabled(self, key_domain: Domain) -> None:
        """LockedError for a domain whose key was disabled."""
        if key_domain.key_id is None:
            return
        try:
            self._store.size(wraps.disabled_name(key_domain.key_id))
        except NotFoundError:
            return
        raise self._disabled(self._names.get(key_domain.key_id, key_domain.key_id), key_domain.key_id)

    def _disabled(self, name: str, key_id: str) -> LockedError:
        return LockedError(
            f"the key {name} of {self._store.url} is disabled; `snapcore key enable {name} -r {self._store.url}` "
            "ends that",
            key_id,
        )

    def locked(self, error: LockedError) -> LockedError:
        """The error of something sealed under a key that is not unlocked, with the key's name."""
        found = next((key for key in self.listed() if key.id == error.key), None)
        if found is None:
            return LockedError(f"{error}; {self._store.url} has no holder of that key any more", error.key)
        if found.disabled:
            return LockedError(f"{error}: {self._disabled(found.name, found.id)}", error.key)
        return LockedError(f"{error} ({found.name}); {_GIVE}", error.key)

    def create(self, name: str, holder: Holder) -> Key:
        """Make a key with one holder, and unlock it. ExistsError when there is one of that name."""
        _check_name(name)
        if any(key.name == name for key in self.listed()):
            raise ExistsError(f"{self._store.url} has a key {name} already")
        return self._adopt(name, new_root(), holder)

    def _adopt(self, name: str, root: bytearray, holder: Holder) -> Key:
        """Give a root a holder here, and unlock its key."""
        key_id = domain_id(root).hex()
        with wiped(root):
            self._write(key_id, name, root, holder)
            self._keep(name, bytearray(root))
        return self._key(key_id)

    def share(self, key: str, other: Keyring, holder: Holder) -> Key:
        """Make an unlocked key one of another repository too, with a holder there: chains move there as they are."""
        found = self._key(key)
        if any(item.name == found.name and item.id != found.id for item in other.listed()):
            raise ExistsError(f"{other._store.url} has another key {found.name} already")
        return other._adopt(found.name, bytearray(self._root(found)), holder)

    def add(self, key: str, holder: Holder) -> KeyHolder:
        """Give an unlocked key one more holder."""
        found = self._key(key)
        made = self._write(found.id, found.name, self._root(found), holder)
        return KeyHolder(made.holder, made.kind, made.created, made.parameters)

    def _root(self, key: Key) -> bytearray:
        with self._lock:
            secret = self._roots.get(key.id)
        if secret is None:
            raise LockedError(f"the key {key.name} of {self._store.url} is not unlocked; {_GIVE}", key.id)
        return secret.reveal()

    def _write(self, key_id: str, name: str, root: bytearray, holder: Holder) -> Wrap:
        """Write a wrap, and read it as whoever needs it will."""
        made = Wrap(
            domain=key_id,
            holder=secrets.token_hex(16),
            name=name,
            kind=holder.kind,
            parameters={},
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        parameters, key = holder.make(made.place)
        made = msgspec.structs.replace(made, parameters=parameters)
        with wiped(key):
            made = made.with_root(wrap(key, root, made.bound))
        object_name = wraps.name(key_id, made.holder)
        self._store.put_new(object_name, [made.to_bytes()])
        with wiped(_unwrapped(holder, wraps.read(self._store, key_id, made.holder)) or bytearray()) as found:
            if found != root:
                with contextlib.suppress(Error):
                    self._store.delete(object_name)
                raise DamagedError(f"{object_name} did not read back as it was written; nothing relies on it")
        return made

    def remove(self, key: str, holder: str) -> str:
        """Take a key from a holder, by its id or the beginning of it. Returns the id.

        RefusedError for the last one: without it nobody could read what the key seals.
        """
        found = self._key(key)
        matching = [item.id for item in found.holders if item.id.startswith(holder)]
        if len(matching) != 1 or not holder:
            raise NotFoundError(f"the key {found.name} has {len(matching)} holders {holder!r}")
        (holder_id,) = matching
        mark = wraps.removal_name(found.id, holder_id)
        with contextlib.suppress(ExistsError):
            # A removal that was interrupted has left it.
            self._store.put_new(mark, [wraps.mark(holder_id)])
        with self._taken_back(mark):
            # Looked for after the mark is written: of two removals at once at least one sees the other's.
            listed = self._found().get(found.id, _Found())
            staying = [item for item in listed.holders if item not in listed.leaving]
            if not any(self._wrap(found.id, item) for item in staying):
                leaving = sorted(listed.leaving - {holder_id})
                also = f"; the removal of {leaving[0]} was begun too: finish that one first" if leaving else ""
                raise RefusedError(
                    f"{holder_id} is the last holder of the key {found.name}: without it nobody can read what the key "
                    f"seals. Add another one first (`snapcore key add {found.name}`){also}"
                )
        with contextlib.suppress(NotFoundError):
            self._store.delete(wraps.name(found.id, holder_id))
        for item in listed.leaving - {*listed.holders} | {holder_id}:
            with contextlib.suppress(NotFoundError):
                self._store.delete(wraps.removal_name(found.id, item))
        return holder_id

    @contextlib.contextmanager
    def _taken_back(self, mark: str) -> Iterator[None]:
        try:
            yield
        except BaseException:
            with contextlib.suppress(Error):
                self._store.delete(mark)
            raise

    def rotate(self, key: str, old: str, holder: Holder) -> KeyHolder:
        """Put a new holder in the place of an old one (an id, or its beginning). No data is written again.

        Whoever had the old one and has read its key object can still open the key: what is at stake then is the key
        itself, and only a full copy under another one helps.
        """
        self._root(self._key(key))
        matching = [item for item in self._key(key).holders if old and item.id.startswith(old)]
        if len(matching) != 1:
            raise NotFoundError(f"the key {key} has {len(matching)} holders {old!r}")
        made = self.add(key, holder)
        self.remove(key, matching[0].id)
        return made

    def disable(self, key: str) -> Key:
        """Refuse all work with a key from now on. Whoever has a holder and the repository can still read it."""
        found = self._key(key)
        with contextlib.suppress(ExistsError):
            self._store.put_new(wraps.disabled_name(found.id), [wraps.mark(found.id)])
        return msgspec.structs.replace(found, disabled=True)

    def enable(self, key: str) -> Key:
        """Allow work with a key again."""
        found = self._key(key)
        with contextlib.suppress(NotFoundError):
            self._store.delete(wraps.disabled_name(found.id))
        return msgspec.structs.replace(found, disabled=False)

    def __repr__(self) -> str:
        return f"Keyring({self._store.url!r})"


_GIVE = "give its holder: a key file, a passphrase or a KMS key"


def _unwrapped(holder: Holder, found: Wrap) -> bytearray | None:
    """The root in a wrap; None when the holder's key is another one."""
    with wiped(holder.find(found.parameters, found.place)) as key:
        root = unwrap(key, found.wrapped_bytes, found.bound)
    if root is not None and domain_id(root).hex() != found.domain:
        wipe(root)
        raise DamagedError(f"{wraps.name(found.domain, found.holder)} holds the root of another key")
    return root


def _check_name(name: str) -> None:
    if not wraps.NAME.fullmatch(name):
        raise UsageError(
            f"the name of a key is a letter and up to 63 letters, digits, dots, hyphens or underscores, not {name!r}"
        )
