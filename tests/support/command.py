"""Commands of `snapcore`, run within the process of the test."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

# Called with the words of a command; gives exit code, standard output and standard error.
Run = Callable[..., tuple[int, str, str]]


def asked(run: Run, *words: str) -> Any:
    """What a command that goes well prints with --json."""
    code, out, err = run(*words, "--json")
    assert (code, err) == (0, ""), f"{words}: {code} {err}"
    return json.loads(out)


def listed(run: Run, *words: str) -> list[Any]:
    """The same of a command that prints one object a line."""
    code, out, err = run(*words, "--json")
    assert (code, err) == (0, ""), f"{words}: {code} {err}"
    return [json.loads(line) for line in out.splitlines()]
