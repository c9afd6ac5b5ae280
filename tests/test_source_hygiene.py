"""The source holds itself to its rules: layers, docstrings, twins of kernels, formatting, lint and types.

The layers: cli → server → service → repository, pool → source, store, keys → the files directly in snapcore/, which
every room may use. Nothing imports upwards, and rooms of one layer do not import each other.
"""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "snapcore"

if not (ROOT / "src_pyx").is_dir():
    pytest.skip("only the tests are here, not the checkout that they belong to", allow_module_level=True)

BASE = "base"
LAYERS = [["cli"], ["server"], ["service"], ["repository", "pool"], ["source", "store", "keys"], [BASE]]
RANK = {room: len(LAYERS) - number for number, rooms in enumerate(LAYERS) for room in rooms}
# A call of the operating system, and what happens to slots rather than to what they hold: nothing to compare with. That
# slots are taken and given up rightly is seen by what trees reach (tests/kernels/test_blockmap.py).
WITHOUT_TWIN = {"populate", "Trees.mark"}
WITHOUT_TWIN |= {f"PageFile.{name}" for name in ("free_pages", "used_slots", "dirty", "freeze", "written", "release")}
# Classes whose twin is the model of a whole pool: a dict of blocks (tests/pool/test_model.py), or an oracle of bytes.
MODELLED = {"Core", "Volume", "Export", "Connection"}
# What they do to space, to the log and to gates, as functions.
MODELLED |= {"reclaim", "free_blocks", "rewrite", "settle_freed", "used_bitmap", "append_event", "commit", "freeze"}
MODELLED |= {"release", "close_gates", "open_gates"}

MODULES = sorted(PACKAGE.rglob("*.py"))
KERNELS = sorted((ROOT / "src_pyx").glob("*.pyx"))


def module_name(path: Path) -> str:
    """Dotted name of a file of the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {module_name(path) for path in MODULES} | {f"snapcore.{path.stem}" for path in KERNELS}


def room_of(module: str) -> str:
    """The room that a module of the package lies in: its folder, or the ground floor."""
    parts = module.split(".")
    if parts[-1] == "__main__":
        return "cli"
    return parts[1] if len(parts) > 1 and (PACKAGE / parts[1]).is_dir() else BASE


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, wherever in the file; of a package's member, the member when it is a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            for name in node.names:
                member = f"{node.module}.{name.name}"
                yield node.lineno, member if member in NAMES else str(node.module)


def own_imports(path: Path) -> Iterator[tuple[int, str]]:
    """Those of snapcore itself."""
    yield from ((line, name) for line, name in imports_of(path) if name.split(".")[0] == "snapcore")


def test_the_source_is_found_and_read() -> None:
    assert {"snapcore", "snapcore.extents", "snapcore.repository.tree", "snapcore.scan"} <= NAMES
    imported = {name for _, name in own_imports(PACKAGE / "repository" / "record.py")}
    assert {"snapcore.scan", "snapcore.errors", "snapcore.repository.codec"} <= imported


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_down_the_layers_only(path: Path) -> None:
    if path == PACKAGE / "__init__.py":
        return
    here = room_of(module_name(path))
    assert here in RANK, f"{path}: the room {here!r} has no layer; say where it stands in {Path(__file__).name}"
    for line, name in own_imports(path):
        there = room_of(name)
        assert name in NAMES and name != "snapcore", f"{path}:{line}: {name} is no module to import from within"
        assert there == here or RANK[there] < RANK[here], f"{path}:{line}: {here} must not import {there} ({name})"


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {module_name(path): {name for _, name in own_imports(path)} for path in MODULES}
    # A package imports its modules; that they import each other through it would be a circle too.
    list(graphlib.TopologicalSorter(graph).static_order())


def test_kernels_import_nothing_of_ours_but_other_kernels() -> None:
    ours = re.compile(r"^[ \t]*(?:c?import|from)[ \t]+snapcore.*$", re.MULTILINE)
    allowed = re.compile(r"from snapcore\.(\w+) c?import\b")
    graph: dict[str, set[str]] = {}
    for path in KERNELS:
        found = [(line, allowed.match(line)) for line in ours.findall(path.read_text(encoding="utf-8"))]
        assert all(match for _, match in found), f"{path}: {[line for line, match in found if not match]}"
        graph[path.stem] = {match[1] for _, match in found if match}
    assert set().union(*graph.values()) <= graph.keys()
    list(graphlib.TopologicalSorter(graph).static_order())


def test_what_is_imported_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    # What a part may need that not everybody uses.
    declared = project["dependencies"] + [name for extra in extras.keys() - {"test"} for name in extras[extra]]
    known = {re.split(r"[^a-zA-Z0-9_.-]", name, maxsplit=1)[0].lower().replace("-", "_") for name in declared}
    known = {name.split(".")[0] for name in known} | {"compression", "botocore"}
    for path in MODULES:
        for line, name in imports_of(path):
            top = name.split(".")[0]
            assert top in known | {"snapcore"} | sys.stdlib_module_names, f"{path}:{line}: {top} is not declared"


def described(path: Path) -> dict[str, ast.FunctionDef | ast.ClassDef]:
    """Functions and classes of a file by name; the methods of a class, but for properties, as Class.method."""
    found: dict[str, ast.FunctionDef | ast.ClassDef] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            methods = (member for member in node.body if isinstance(member, ast.FunctionDef))
            found |= {f"{node.name}.{method.name}": method for method in methods if not method.decorator_list}
    return {name: node for name, node in found.items() if not name.split(".")[-1].startswith("_")}


def defined(path: Path) -> set[str]:
    """The same of a kernel; exceptions, which are not computed, count as described and need no twin."""
    text = re.sub(r"@(property|\w+\.setter)\n\s+def", "", path.read_text(encoding="utf-8"))
    names: set[str] = set()
    owner = ""
    for indent, _, name in re.findall(r"^( {4})?(def|(?:cdef )?class) (\w+)\b", text, re.MULTILINE):
        owner = owner if indent else name
        if not name.startswith("_"):
            names.add(f"{owner}.{name}" if indent else name)
    return names


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_every_kernel_has_a_c_api_a_stub_and_twins(path: Path) -> None:
    assert (PACKAGE / f"{path.stem}.pxd").is_file() and (PACKAGE / f"{path.stem}.pyi").is_file()
    public = defined(path)
    stub = described(PACKAGE / f"{path.stem}.pyi")
    assert public and public == set(stub)
    assert all(ast.get_docstring(node) for node in stub.values())
    exceptions = {name for name, node in stub.items() if isinstance(node, ast.ClassDef) and node.bases}
    public -= {name for name in public if name.split(".")[0] in MODELLED}
    assert public - exceptions - WITHOUT_TWIN <= set(described(ROOT / "tests" / "reference.py"))
    assert f'"{path.stem}"' in (ROOT / "setup.py").read_text(encoding="utf-8")
    assert (ROOT / "tests" / "kernels" / f"test_{path.stem}.py").is_file()


def test_every_module_begins_with_a_docstring() -> None:
    folders = [PACKAGE, ROOT / "tests", ROOT / "bench"]
    files = [*(path for folder in folders for path in folder.rglob("*.py")), *PACKAGE.glob("*.pyi"), ROOT / "setup.py"]
    missing = [path for path in files if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))]
    missing += [path for path in KERNELS if not path.read_text(encoding="utf-8").startswith('"""')]
    assert missing == []


def test_every_public_name_of_the_package_has_a_docstring() -> None:
    missing = []
    # The contracts of the methods of stores and of holders stand in their interfaces, for whatever has them.
    interfaces = [PACKAGE / room / "interface.py" for room in ("store", "keys")]
    nodes = [node for path in interfaces for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    contracts = {node.name for node in nodes if isinstance(node, ast.FunctionDef) and ast.get_docstring(node)}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            body = node.body if isinstance(node, (ast.Module, ast.ClassDef)) else []
            if isinstance(node, ast.ClassDef) and (node.name.startswith("_") or node.bases):
                # Methods of a class with a base may be those of the base.
                body = []
            for member in body:
                named = isinstance(member, (ast.FunctionDef, ast.ClassDef)) and not member.name.startswith("_")
                if named and member.name not in contracts and not ast.get_docstring(member):
                    missing.append(f"{path}:{member.lineno}: {member.name}")
    assert missing == []


def run(*command: str) -> None:
    """Run a tool as a module of this Python over the checkout; its findings are the failure."""
    tool = command[0].split(".")[0]
    if importlib.util.find_spec(tool) is None:
        reason = f"needs {tool} (the extra `test`)"
        if os.environ.get("SNAPCORE_REQUIRE_TOOLS"):
            pytest.fail(f"{reason}, and SNAPCORE_REQUIRE_TOOLS is set")
        pytest.skip(reason)
    # cython-lint calls a program that lies beside this Python, which need not be on the path.
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    done = subprocess.run(
        [sys.executable, "-P", "-m", *command],
        cwd=ROOT,
        env=os.environ | {"PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def test_ruff_finds_nothing() -> None:
    run("ruff", "check", ".")


def test_everything_is_formatted() -> None:
    run("ruff", "format", "--check", ".")


def test_types_are_complete_and_right() -> None:
    run("mypy")


def test_cython_lint_finds_nothing() -> None:
    run("cython_lint.cython_lint", "src_pyx", "snapcore")
