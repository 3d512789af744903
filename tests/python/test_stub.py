"""`_core.pyi` says what `_core` is: names, parameters, defaults."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from sluice import _core

STUB = Path(__file__).parents[2] / "python/sluice/_core.pyi"
TREE = ast.parse(STUB.read_text())

FUNCTIONS = {node.name: node for node in TREE.body if isinstance(node, ast.FunctionDef)}
CLASSES = {node.name: node for node in TREE.body if isinstance(node, ast.ClassDef)}
METHODS = [
    (owner, member.name, member)
    for owner, node in CLASSES.items()
    for member in node.body
    if isinstance(member, ast.FunctionDef)
]


def parameters_of_stub(node: ast.FunctionDef) -> list[str]:
    """Names in order, "*" before those that are keywords only, "=" behind those with a default."""
    arguments = node.args
    names = [argument.arg for argument in arguments.args]
    defaults = [False] * (len(names) - len(arguments.defaults)) + [True] * len(arguments.defaults)
    listed = [name + "=" * has for name, has in zip(names, defaults, strict=True)]
    if arguments.kwonlyargs:
        listed.append("*")
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
            listed.append(argument.arg + "=" * (default is not None))
    return listed


def parameters_of_module(function: object, name: str) -> list[str]:
    """The same from the signature line that pybind11 writes."""
    line = (function.__doc__ or "").splitlines()[0]
    inner = line[line.index("(") + 1 : line.rindex(") ->")]
    assert line.startswith(name)
    listed = []
    depth, part = 0, ""
    for character in inner + ",":
        depth += (character in "[({<") - (character in "])}>")
        if character == "," and depth == 0:
            if part.strip():
                bare = re.sub(r":.*?(?= = |$)", "", part.strip(), count=1, flags=re.DOTALL)
                listed.append(bare.partition(" = ")[0].strip() + "=" * (" = " in bare))
            part = ""
        else:
            part += character
    return listed


def public_names(scope: object) -> set[str]:
    return {name for name in vars(scope) if not name.startswith("_")}


def test_module_has_the_names_of_the_stub() -> None:
    assert public_names(_core) == FUNCTIONS.keys() | CLASSES.keys()


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_functions_take_what_the_stub_says(name: str) -> None:
    assert parameters_of_module(getattr(_core, name), name) == parameters_of_stub(FUNCTIONS[name])


@pytest.mark.parametrize("name", ["Store", "StoreBuilder", "PackWriter", "Session"])
def test_classes_have_the_members_of_the_stub(name: str) -> None:
    members = {member for owner, member, _ in METHODS if owner == name}
    assert public_names(getattr(_core, name)) == {m for m in members if not m.startswith("_")}


@pytest.mark.parametrize(
    ("owner", "name", "node"), METHODS, ids=[f"{owner}.{name}" for owner, name, _ in METHODS]
)
def test_methods_take_what_the_stub_says(owner: str, name: str, node: ast.FunctionDef) -> None:
    member = getattr(getattr(_core, owner), name)
    if any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list):
        assert isinstance(vars(getattr(_core, owner))[name], property)
    else:
        assert parameters_of_module(member, name) == parameters_of_stub(node)


@pytest.mark.parametrize("name", sorted(n for n in CLASSES if n.endswith("Error")))
def test_errors_have_the_parents_of_the_stub(name: str) -> None:
    stated = [base.id for base in CLASSES[name].bases if isinstance(base, ast.Name)]
    assert [base.__name__ for base in getattr(_core, name).__bases__] == stated
