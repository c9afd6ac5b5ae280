#!/bin/sh
# Runs the kernel tests with kernels built under gcc's address and undefined-behaviour sanitizers, or, with
# SANITIZERS=thread, the tests in which many threads use a pool under its thread sanitizer.
#
#   bench/sanitize.sh [pytest arguments]
#   SANITIZERS=thread bench/sanitize.sh [pytest arguments]
#   bench/sanitize.sh --fuzz objects|pool|nbd [options of bench/fuzz/…]
#
# The tree is copied to a scratch folder and built there: kernels in the checkout stay as they are. What building and
# testing need is installed there too, unless PYTHON names a Python that has it (the `test` extra). The first error
# ends the run.
# Python itself is not instrumented, so the runtimes are preloaded, its own leaks are ignored, and its
# allocator is malloc, so that a byte beyond a bytes object is seen.
set -eu

sanitizers=${SANITIZERS:-address,undefined}
root=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

cd "$root"
cp -R --parents setup.py pyproject.toml README.md LICENSE src_pyx snapcore tests bench "$scratch"
find "$scratch/snapcore" -name '*.so' -delete
cd "$scratch"

if [ -n "${PYTHON:-}" ]; then
    python=$(command -v "$PYTHON")
else
    python3 -m venv venv
    python=$scratch/venv/bin/python
    "$python" -m pip install -q '.[test]'
fi

CC=${CC:-gcc}
export CC
CFLAGS="-fno-sanitize-recover=all" SNAPCORE_SANITIZE=$sanitizers "$python" setup.py -q build_ext --inplace

if [ "$sanitizers" = thread ]; then
    # Python is not instrumented: its own locks are seen through pthread, and its reference counts stay unseen. The
    # runtime wants its place in memory, so addresses are not randomized.
    export LD_PRELOAD="$("$CC" -print-file-name=libtsan.so)"
    export TSAN_OPTIONS="halt_on_error=1 exitcode=66 history_size=7 report_signal_unsafe=0"
    export PYTHONDONTWRITEBYTECODE=1
    PYTHONPATH=$scratch setarch -R "$python" - "$scratch" <<'CHECK'
import sys
from snapcore import blockmap, core, log, nbd, pages, presence, space, volume
for kernel in (blockmap, core, log, nbd, pages, presence, space, volume):
    assert kernel.__file__.startswith(sys.argv[1]), f"{kernel.__file__} is not the kernel that was built"
    with open(kernel.__file__, "rb") as file:
        assert b"__tsan_" in file.read(), f"{kernel.__file__} is not instrumented"
CHECK
    [ $# -gt 0 ] || set -- tests/pool/test_concurrency.py tests/kernels/test_nbd.py
    PYTHONPATH=$scratch setarch -R "$python" -m pytest -q "$@"
    exit
fi

runtimes="$("$CC" -print-file-name=libasan.so) $("$CC" -print-file-name=libubsan.so)"
export LD_PRELOAD="$runtimes"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1:detect_stack_use_after_return=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONMALLOC=malloc
export PYTHONDONTWRITEBYTECODE=1

# What is tested is what was built here, and it is instrumented.
"$python" - "$scratch" <<'CHECK'
import sys
from snapcore import blockmap, core, digest, log, lz, nbd, pages, presence, scan, space, volume
for kernel in (blockmap, core, digest, log, lz, nbd, pages, presence, scan, space, volume):
    assert kernel.__file__.startswith(sys.argv[1]), f"{kernel.__file__} is not the kernel that was built"
    with open(kernel.__file__, "rb") as file:
        code = file.read()
    assert b"__asan_report" in code and b"__ubsan_handle" in code, f"{kernel.__file__} is not instrumented"
CHECK

if [ "${1:-}" = --fuzz ]; then
    target=$2
    shift 2
    # A hostile length may ask for more memory than there is.
    ASAN_OPTIONS=$ASAN_OPTIONS:allocator_may_return_null=1 PYTHONPATH=$scratch "$python" "bench/fuzz/$target.py" "$@"
    exit
fi

"$python" -m pytest -q tests/kernels "$@"
