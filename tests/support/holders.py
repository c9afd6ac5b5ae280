"""A holder of the tests' own: any secret, no cost."""

from __future__ import annotations

import secrets

import blake3

from snapcore.errors import DamagedError
from snapcore.keys import Parameters
from snapcore.keys.interface import Place


class Fixed:
    """Holds keys by a word."""

    kind = "fixed"

    def __init__(self, word: str) -> None:
        self._word = word

    def make(self, place: Place) -> tuple[Parameters, bytearray]:
        """A wrapping key of the word and a salt."""
        parameters: Parameters = {"salt": secrets.token_hex(16)}
        return parameters, self.find(parameters, place)

    def find(self, parameters: Parameters, place: Place) -> bytearray:
        """The wrapping key of the word and that salt."""
        if "salt" not in parameters:
            raise DamagedError("the parameters are none of a word: they have no salt")
        text = f"{self._word} {parameters['salt']} {place.domain}"
        return bytearray(blake3.blake3(text.encode(), derive_key_context="snapcore test holder").digest())
