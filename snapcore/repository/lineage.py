"""Under which key a snapshot goes: the disk's first one decides, later ones follow, and nothing sealed becomes plain.

| the disk has here | no key asked for | key K | no key |
| --- | --- | --- | --- |
| nothing that can be read | that of the parent; refused without one, if there are keys | K | plain |
| a plain chain | plain | refused: copy it | plain |
| a chain under K (and a plain one it was copied from) | K | K | refused |
| a chain under L | L | refused: copy it | refused |
| chains under K and L | refused: say which | K | refused |

A repository without keys has plain chains only. A parent under another key shares no chunk, so the snapshot is a full
one and says so; a sealed parent of a plain snapshot is refused. A chain under a key that is not unlocked cannot be
seen: that is why a disk that is not known is refused unless the caller says what it shall be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from snapcore.errors import RefusedError, UsageError
from snapcore.repository.domain import PLAIN, Domain
from snapcore.repository.keyring import Keyring
from snapcore.repository.manifest import Manifest


class KeyChoice(Enum):
    """What may stand in the place of a key's name."""

    NO_KEY = "no key"


NO_KEY = KeyChoice.NO_KEY


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a snapshot goes, and what it is compared with.

    Attributes
    ----------
    domain : Domain
    parent : Manifest or None
        What the caller named, when it is of the same domain.
    reason : str or None
        Why the parent does not count.
    """

    domain: Domain
    parent: Manifest | None
    reason: str | None


def choose(
    keyring: Keyring,
    url: str,
    disk: str,
    key: str | KeyChoice | None,
    parent: Manifest | None,
    has_chain: Callable[[Domain], bool],
) -> Lineage:
    """The domain of the next snapshot of a disk. `has_chain` tells whether the disk has one in a domain."""
    domains = keyring.domains
    if key in (None, NO_KEY) and len(domains) == 1 and not keyring.any():
        return Lineage(PLAIN, parent, None)
    asked = PLAIN if key is NO_KEY else keyring.find(key) if isinstance(key, str) else None
    chains = [domain for domain in domains.values() if has_chain(domain)]
    sealed = [domain for domain in chains if domain.sealing is not None]
    if asked is None:
        chosen = _following(keyring, url, disk, parent, chains, sealed)
    else:
        _refuse_another(keyring, disk, asked, chains, sealed)
        chosen = asked
    keyring.check_enabled(chosen)
    if parent is None or parent.key == chosen.key_id:
        return Lineage(chosen, parent, None)
    if chosen.sealing is None:
        raise RefusedError(
            f"the parent {parent.id} is encrypted and a snapshot without a key was asked for; what is encrypted stays "
            "so: give its key"
        )
    return Lineage(
        chosen,
        None,
        f"the parent {parent.id} is {_under(keyring, parent.key)} and this chain {_under(keyring, chosen.key_id)}: "
        "they share nothing, so all of it was read",
    )


def _following(
    keyring: Keyring, url: str, disk: str, parent: Manifest | None, chains: list[Domain], sealed: list[Domain]
) -> Domain:
    """The domain when none was asked for."""
    if len(sealed) > 1:
        listed = ", ".join(_name(keyring, domain.key_id) for domain in sealed)
        raise UsageError(f"{disk} has chains under the keys {listed}; say which one goes on: --key NAME")
    # A plain chain beside a sealed one is what that was copied from, or somebody's fake.
    if sealed or chains:
        return (sealed or chains)[0]
    if parent is not None:
        return keyring.domains[PLAIN.id if parent.key is None else bytes.fromhex(parent.key)]
    if keyring.any():
        raise RefusedError(
            f"{url} has keys and {disk} no snapshot that can be read with those given. Say what this chain shall be: "
            "--key NAME, or --no-key for a plain one; if it is under a key already, give that key's holder"
        )
    return PLAIN


def _refuse_another(keyring: Keyring, disk: str, asked: Domain, chains: list[Domain], sealed: list[Domain]) -> None:
    """RefusedError when a disk's chain is under another key than was asked for."""
    if not chains or (asked in chains and (asked.sealing is not None or not sealed)):
        return
    other = (sealed or chains)[0]
    if asked.sealing is None:
        raise RefusedError(
            f"{disk} is {_under(keyring, other.key_id)}; what is encrypted stays so. Leave --no-key away"
        )
    raise RefusedError(
        f"{disk} is {_under(keyring, other.key_id)} here, and another key needs a full copy of it: "
        f"`snapcore copy … --key {_name(keyring, asked.key_id)}`, and go on with that key then"
    )


def _name(keyring: Keyring, key_id: str | None) -> str:
    return next((key.name for key in keyring.listed() if key.id == key_id), str(key_id))


def _under(keyring: Keyring, key_id: str | None) -> str:
    return "plain" if key_id is None else f"under the key {_name(keyring, key_id)}"
