"""How the source is laid out: short functions and modules, imports without circles, private names used at home only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_FUNCTION, MAX_MODULE = 80, 450  # lines
COMMANDS = {"train", "evaluate", "caption", "gradio_main", "scenes", "download", "importers"}
PATHS = [path for folder in (".", "benchmarks", "images") for path in sorted((ROOT / folder).glob("*.py"))]
PATHS += sorted((ROOT / "captioning").rglob("*.py"))
TREES = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text("utf-8")) for path in PATHS}
NAMES = {path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path for path in TREES}


def imports(tree: ast.Module, top_level: bool = False) -> Iterator[tuple[str, str]]:
    """The project's modules that a module imports, each with the name that it takes from there ("" for all)."""
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name in NAMES)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if f"{node.module}.{alias.name}" in NAMES:
                    yield f"{node.module}.{alias.name}", ""
                elif node.module in NAMES:
                    yield node.module, alias.name


@pytest.mark.parametrize("path", TREES)
def test_modules_and_functions_are_short(path: str):
    assert len((ROOT / path).read_text("utf-8").splitlines()) <= MAX_MODULE
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MAX_FUNCTION, node.name


@pytest.mark.parametrize("path", TREES)
def test_no_private_name_is_imported_and_no_command_by_the_library(path: str):
    for module, name in imports(TREES[path]):
        assert not name.startswith("_"), f"{module}.{name}"
        assert module not in COMMANDS or not path.startswith("captioning/"), module


def test_no_import_runs_in_a_circle():
    needed = {name: {module for module, _ in imports(TREES[path], True)} - {name} for name, path in NAMES.items()}
    while free := [name for name, modules in needed.items() if not modules]:
        needed = {name: modules - set(free) for name, modules in needed.items() if modules}
    assert not needed
