"""Everything the scan finds is built, or stands in `not_built.toml` with its error."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from . import zoo
from .families import (
    MAX_MODEL_BYTES,
    build_experts,
    build_zoo,
    causal_families,
    one_line,
    present,
    prompt_ids,
    zoo_classes,
)
from .scan import scan

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NOT_BUILT = tomllib.loads((Path(__file__).parent / "not_built.toml").read_text(encoding="utf-8"))
# What transformers 5.24.0 must reach; other releases have fewer families.
LEAST_SHARE_OF_MODULES = 62 / 68
LEAST_SHARE_OF_FAMILIES = 40 / 55


@pytest.mark.parametrize("entry", scan(), ids=lambda entry: entry.key)
def test_each_decorated_class_is_built_or_listed_with_its_error(entry):
    listed = NOT_BUILT["modules"].get(entry.key)
    try:
        module = build_experts(entry, torch.float32)
    except Exception as error:
        assert listed, f"{entry.key} is not built and not listed: {one_line(error)}"
        assert one_line(error).startswith(listed)
        return
    assert listed is None, f"{entry.key} builds now: take it out of not_built.toml"
    assert all(getattr(module, name) == value for name, value in entry.flags)


@pytest.mark.parametrize("entry", causal_families(), ids=lambda entry: entry.family)
def test_each_family_with_a_causal_lm_is_built_or_listed_with_its_error(entry, family_model):
    listed = NOT_BUILT["models"].get(entry.family)
    try:
        built = family_model(entry.family)
    except Exception as error:
        assert listed, f"{entry.family} is not built and not listed: {one_line(error)}"
        assert one_line(error).startswith(listed)
        return
    assert listed is None, f"{entry.family} builds now: take it out of not_built.toml"
    assert built.sites
    assert sum(p.numel() * p.element_size() for p in built.model.parameters()) <= MAX_MODEL_BYTES


def test_enough_is_built():
    modules = len(scan()) - len(NOT_BUILT["modules"])
    families = len(causal_families()) - len(NOT_BUILT["models"])
    assert modules >= LEAST_SHARE_OF_MODULES * len(scan())
    assert families >= LEAST_SHARE_OF_FAMILIES * len(causal_families())


def test_nothing_is_listed_that_this_transformers_lacks():
    families = {entry.family for entry in causal_families()}
    assert set(NOT_BUILT["modules"]) <= {entry.key for entry in scan()}
    assert set(NOT_BUILT["models"]) | set(NOT_BUILT["refused"]) <= families


@pytest.mark.parametrize(
    "tiny", present(zoo.CAUSAL_LMS, decorated=True), ids=lambda tiny: tiny.name
)
def test_each_zoo_model_generates(tiny):
    built = build_zoo(tiny)
    tokens = built.model.generate(prompt_ids(built), max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] > prompt_ids(built).shape[1]


@pytest.mark.parametrize(
    "tiny", present(zoo.TEXT_MODELS, decorated=True), ids=lambda tiny: tiny.name
)
def test_each_zoo_text_model_runs(tiny):
    config_class, cls = zoo_classes(tiny)
    torch.manual_seed(0)
    model = cls(config_class(**tiny.full_kwargs())).eval()
    with torch.no_grad():
        hidden = model(torch.randint(3, 128, (1, 5))).last_hidden_state
    assert hidden.shape == (1, 5, 32)
    assert bool(hidden.isfinite().all())
