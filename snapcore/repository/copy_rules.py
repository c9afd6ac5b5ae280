"""Under which key a copy goes: nothing encrypted becomes plain, and within a repository a copy is under another key.

| source | goes to | no key asked for | key K | no key |
| --- | --- | --- | --- | --- |
| plain | another repository | that of the chain there, else plain without keys there | K | plain, if the chain is |
| under D | another repository | that of the chain there, else D if it has that key | K | refused |
| plain | the same repository | refused | K | refused |
| under D | the same repository | refused | K, but not D | refused |

Of several chains under keys there, that under D goes on; without one, the caller must say which.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from snapcore.errors import LockedError, RefusedError, UsageError
from snapcore.repository.domain import PLAIN, Domain
from snapcore.repository.keyring import Keyring
from snapcore.repository.lineage import NO_KEY, KeyChoice
from snapcore.repository.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Destination:
    """A repository that copies go to.

    Attributes
    ----------
    url : str
    keyring : Keyring
    same : bool
        It is the one that they come from.
    """

    url: str
    keyring: Keyring
    same: bool


def choose(
    source: Domain,
    snapshot: Manifest,
    to: Destination,
    key: str | KeyChoice | None,
    has_chain: Callable[[Domain], bool],
) -> Domain:
    """The domain of a copy. `has_chain` tells whether the snapshot's disk has a chain in a domain over there.

    Parameters
    ----------
    source : Domain
        That of the snapshot.
    """
    chosen = _chosen(source, snapshot, to, key, has_chain)
    if chosen.sealing is None and source.sealing is not None:
        raise RefusedError(
            f"the snapshot {snapshot.id} of {snapshot.disk} is encrypted, and what is encrypted stays so: a copy "
            f"without a key is refused. Name a key of {to.url}: --key NAME"
        )
    if to.same and chosen.id == source.id:
        raise RefusedError(
            f"the snapshot {snapshot.id} is in {to.url} already; there a copy must be under another key: --key NAME"
        )
    to.keyring.check_enabled(chosen)
    return chosen


def _chosen(
    source: Domain,
    snapshot: Manifest,
    to: Destination,
    key: str | KeyChoice | None,
    has_chain: Callable[[Domain], bool],
) -> Domain:
    keys = {found.id: found for found in to.keyring.listed()}
    domains = dict(to.keyring.domains)
    if source.key_id in keys:
        # Unlocked where it comes from is unlocked: the root is the same.
        domains[source.id] = source
    if isinstance(key, str):
        if source.key_id in keys and key in (source.key_id, keys[source.key_id].name) and not _is_another(key, to):
            return source
        return to.keyring.find(key)
    if to.same:
        return source
    chains = [domain for domain in domains.values() if domain.sealing is not None and has_chain(domain)]
    if key is NO_KEY:
        if chains and source.sealing is None:
            raise RefusedError(
                f"{snapshot.disk} is under the key {keys[str(chains[0].key_id)].name} in {to.url}; what is encrypted "
                "stays so: leave --no-key away"
            )
        return PLAIN
    if source in chains:
        return source
    if len(chains) > 1:
        listed = ", ".join(keys[str(domain.key_id)].name for domain in chains)
        raise UsageError(f"{snapshot.disk} has chains under the keys {listed} in {to.url}; say which: --key NAME")
    if chains:
        return chains[0]
    if source.sealing is not None:
        if source.id in domains:
            return source
        raise LockedError(
            f"{to.url} has not the key that {snapshot.disk} is under. Give it a holder there (`snapcore key share`), "
            "and the copy moves as it is; or name another key: --key NAME, for a full copy",
            source.key_id,
        )
    if keys and not has_chain(PLAIN):
        raise RefusedError(
            f"{to.url} has keys and {snapshot.disk} no snapshot there that can be read with those given. Say what the "
            "copies shall be: --key NAME, or --no-key for plain ones; if they are under a key already, give its holder"
        )
    return PLAIN


def _is_another(key: str, to: Destination) -> bool:
    """Whether an unlocked key over there has that name, which then is the one that was meant, or an error."""
    return any(domain.key_id == key for domain in to.keyring.domains.values()) or any(
        found.unlocked and found.name == key for found in to.keyring.listed()
    )
