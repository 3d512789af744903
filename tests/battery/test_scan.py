"""The scan sees every decorated class, in any spelling, and imports no model code."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from .scan import DECORATOR, scan, scan_file, transformers_root

DEFAULTS = {"has_gate": True, "has_bias": False}
SPELLINGS = {
    "bare": "@use_experts_implementation\nclass A: pass",
    "called": "@use_experts_implementation(has_bias=True)\nclass A: pass",
    "attribute": "@integrations.use_experts_implementation(has_bias=True)\nclass A: pass",
    "alias": f"from x import {DECORATOR} as d\n@d(has_bias=True)\nclass A: pass",
    "below another": "@other\n@use_experts_implementation\nclass A: pass",
    "applied": "class A: pass\nA = use_experts_implementation(A)",
    "applied with flags": "class A: pass\nA = use_experts_implementation(has_bias=True)(A)",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_decorated_class_is_found_in_any_spelling(spelling):
    (found,) = scan_file(SPELLINGS[spelling], "fam", "modeling_fam", DEFAULTS, frozenset())
    assert (found.name, found.flag("has_gate")) == ("A", True)
    assert found.flag("has_bias") == ("has_bias=True" in SPELLINGS[spelling])


@pytest.mark.parametrize("text", ["class A: pass", "@other\nclass A: pass", "x = other(A)"])
def test_a_class_without_the_decorator_is_not_found(text):
    assert not list(scan_file(text, "fam", "modeling_fam", DEFAULTS, frozenset()))


def test_the_scan_agrees_with_the_imported_classes():
    """At run time the decorator leaves a closure over `experts_interface` in `forward`."""
    at_run_time: set[str] = set()
    for path in sorted(transformers_root().glob("models/*/modeling_*.py")):
        if DECORATOR not in path.read_text(encoding="utf-8"):
            continue
        name = f"transformers.models.{path.parent.name}.{path.stem}"
        for value in vars(importlib.import_module(name)).values():
            code = getattr(getattr(value, "forward", None), "__code__", None)
            own = inspect.isclass(value) and value.__module__ == name and "forward" in vars(value)
            if own and code is not None and "experts_interface" in code.co_freevars:
                at_run_time.add(f"{path.parent.name}.{value.__name__}")
    assert at_run_time == {entry.key for entry in scan()}


def test_the_scan_imports_no_model_code():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from battery.scan import scan; "
        "assert scan(); sys.exit(any(m.startswith(('transformers', 'torch')) for m in sys.modules))"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent.parent)], check=True, timeout=120
    )


def test_the_scan_is_sorted_and_has_no_class_twice():
    keys = [entry.key for entry in scan()]
    assert keys == sorted(set(keys))
