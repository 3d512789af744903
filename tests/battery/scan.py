"""Which experts classes the installed transformers has: an AST scan, no model code imported.

The battery is generated from this list, so a family that a new transformers brings is tested on
its first day or stands in `not_built.toml`. Nobody chooses what is covered.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

DECORATOR = "use_experts_implementation"
_SOURCE = "experts_interface"  # a registry, not a flag


@dataclass(frozen=True, slots=True)
class DecoratedClass:
    """One class of `models/*` that dispatches through the experts interface.

    Attributes:
        family: Name of its folder under `models/`.
        module: Dotted name of the modeling file.
        name: Name of the class.
        flags: The decorator's flags, its defaults filled in, sorted by name.
        config_reads: Config attributes its `__init__` reads, sorted.
        init_args: Names of `__init__`'s arguments after `self`.
        causal_lm: The family's causal LM class in the same file, or None.
    """

    family: str
    module: str
    name: str
    flags: tuple[tuple[str, Any], ...]
    config_reads: tuple[str, ...]
    init_args: tuple[str, ...]
    causal_lm: str | None

    @property
    def key(self) -> str:
        return f"{self.family}.{self.name}"

    def flag(self, name: str) -> Any:
        return dict(self.flags)[name]


def transformers_root() -> Path:
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


@cache
def scan() -> tuple[DecoratedClass, ...]:
    """Every decorated class of the installed transformers, sorted by key."""
    root = transformers_root()
    defaults = _flag_defaults(root / "integrations" / "moe.py")
    causal = _causal_lm_names(root / "models" / "auto" / "modeling_auto.py")
    found: list[DecoratedClass] = []
    for path in sorted(root.glob("models/*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        if DECORATOR in text:
            found.extend(scan_file(text, path.parent.name, path.stem, defaults, causal))
    return tuple(sorted(found, key=lambda c: c.key))


def scan_file(
    text: str,
    family: str,
    stem: str,
    defaults: dict[str, Any],
    causal: frozenset[str],
) -> Iterator[DecoratedClass]:
    """The decorated classes of one modeling file, whatever spelling decorates them."""
    tree = ast.parse(text)
    names = _spellings(tree)
    applied = dict(_applied_by_call(tree, names))
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
    lms = [c.name for c in classes if c.name.endswith("ForCausalLM")]
    lms += [c.name for c in classes if c.name in causal]
    for node in classes:
        calls = [d for d in node.decorator_list if _decorator_name(d) in names]
        if not calls and node.name not in applied:
            continue
        call = calls[0] if calls else applied[node.name]
        given = _keywords(call)
        init = next(
            (n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None
        )
        yield DecoratedClass(
            family=family,
            module=f"transformers.models.{family}.{stem}",
            name=node.name,
            flags=tuple(sorted((defaults | given).items())),
            config_reads=_config_reads(init),
            init_args=tuple(a.arg for a in init.args.args[1:]) if init else (),
            causal_lm=lms[0] if lms else None,
        )


def _spellings(tree: ast.Module) -> set[str]:
    """Names under which the decorator is known in this file (`import … as …` too)."""
    names = {DECORATOR}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name for a in node.names if a.name == DECORATOR}
    return names


def _decorator_name(node: ast.expr) -> str | None:
    if isinstance(node, ast.Call):
        return _decorator_name(node.func)
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None


def _applied_by_call(tree: ast.Module, names: set[str]) -> Iterator[tuple[str, ast.expr]]:
    """Classes decorated after the fact: `X = use_experts_implementation(…)(X)` or `…(X)`."""
    for node in tree.body:
        if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)):
            continue
        if _decorator_name(node.value) in names:
            inner = node.value.func
            for arg in node.value.args:
                if isinstance(arg, ast.Name):
                    yield arg.id, inner if isinstance(inner, ast.Call) else node.value


def _keywords(call: ast.expr) -> dict[str, Any]:
    if not isinstance(call, ast.Call):
        return {}
    return {
        k.arg: ast.literal_eval(k.value)
        for k in call.keywords
        if k.arg is not None and k.arg != _SOURCE
    }


def _config_reads(init: ast.FunctionDef | None) -> tuple[str, ...]:
    if init is None:
        return ()
    reads = {
        n.attr
        for n in ast.walk(init)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "config"
    }
    return tuple(sorted(reads))


def _flag_defaults(path: Path) -> dict[str, Any]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == DECORATOR:
            pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            return {
                arg.arg: ast.literal_eval(default)
                for arg, default in pairs
                if default is not None and arg.arg != _SOURCE
            }
    raise AssertionError(f"{DECORATOR}: not defined in integrations/moe.py of this transformers")


def _causal_lm_names(path: Path) -> frozenset[str]:
    """Class names of `MODEL_FOR_CAUSAL_LM_MAPPING_NAMES`, read from its literal."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        if isinstance(target, ast.Name) and target.id == "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES":
            assert isinstance(node, ast.Assign)
            strings = (n for n in ast.walk(node.value) if isinstance(n, ast.Constant))
            return frozenset(s.value for s in strings if isinstance(s.value, str))
    raise AssertionError("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES: not in this transformers")
