"""What a guard module defines without an underscore is what it exports, and nothing else."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import guard

MODULES = sorted(module.name for module in pkgutil.iter_modules(guard.__path__, "guard."))


def defined_names(tree: ast.Module) -> Iterator[str]:
    """Names that a module defines at its top level; imported ones are not its own."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (
                name.id for t in node.targets for name in ast.walk(t) if isinstance(name, ast.Name)
            )
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def test_the_guard_has_modules() -> None:
    assert {"guard.kl", "guard.gate", "guard.artifact", "guard.session"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_exports_exactly_its_public_names(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    public = {found for found in defined_names(tree) if not found.startswith("_")}
    assert set(module.__all__) == public
    assert len(module.__all__) == len(public)


def test_the_package_itself_exports_nothing_and_imports_nothing() -> None:
    tree = ast.parse(Path(str(guard.__file__)).read_text(encoding="utf-8"))
    assert [type(node) for node in tree.body] == [ast.Expr]
