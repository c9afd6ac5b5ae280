"""The command line: one file a command group, the tree of them in root.py, nothing here but the exit codes.

Exit codes: 0 done, 1 failed (an error of `snapcore.Error`, or damage found), 2 usage, 130 interrupted.
"""

from __future__ import annotations

import gc
import os
import sys

from snapcore.errors import Error, UsageError

# Nothing here does linear algebra; numpy's threads for it would spin for a tenth of a second at the start.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def main() -> None:
    """Run a command; errors go to standard error, a line each."""
    code = _code()
    # All that is left goes with the process: looking through it for what could go before takes milliseconds.
    gc.freeze()
    sys.exit(code)


def _code() -> int:
    try:
        code = _run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _failed("interrupted; run it again to go on", 130)
    except BrokenPipeError:
        # Whoever read our output has enough; Python would complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Error as error:
        return _failed(str(error), 2 if isinstance(error, UsageError) else 1)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _failed(f"{error.strerror or error}{where}", 1)
    return code


def _run() -> int:
    words = sys.argv[1:]
    if len(words) == 3 and words[0] == "diff" and not any(map(_is_option, words)) and not sys.stderr.isatty():
        # The plain call of a script: click, of which it needs nothing, takes as long as the compare of 500 MB.
        from snapcore.cli import difference

        difference.plain(*words[1:])
        return 0
    from snapcore.cli import root

    return root.run()


def _is_option(word: str) -> bool:
    return word.startswith("-")


def _failed(what: str, code: int) -> int:
    print(f"snapcore: {what}", file=sys.stderr)
    return code
