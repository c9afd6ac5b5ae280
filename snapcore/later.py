"""Modules that are imported when something of them is first used: what starts fast does not wait for them."""

from __future__ import annotations

import importlib


class Later:
    """Stands for a module under its name until then, and behind it.

    Parameters
    ----------
    name : str
        Dotted name of the module.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> object:
        found = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, found)
        return found
