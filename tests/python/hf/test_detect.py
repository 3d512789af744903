"""Detection by structure: what is a site, what is refused, and that the message says why."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from sluice.errors import ConfigError, UnsupportedModelError
from sluice.hf import compat
from sluice.hf.detect import find_expert_sites, survey_experts

from . import tiny


@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_finds_one_site_per_moe_layer(family: str) -> None:
    model = tiny.build(family)
    sites = find_expert_sites(model)
    assert [site.name for site in sites] == list(tiny.sites_of(model))
    for site in sites:
        assert site.num_experts == tiny.NUM_EXPERTS
        assert site.module.down_proj.numel() == site.num_experts * site.hidden * site.intermediate


def test_sizes_come_from_the_tensors_and_flags_from_the_decorator() -> None:
    (first, *_) = find_expert_sites(tiny.build("gpt_oss"))
    assert (first.hidden, first.intermediate) == (32, 40)
    assert (first.gated, first.has_bias, first.transposed) == (True, True, True)
    (first, *_) = find_expert_sites(tiny.build("nemotron_h"))
    assert (first.hidden, first.intermediate, first.gated) == (16, 24, False)


def test_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = tiny.build("mixtral")
    assert [site.hidden for site in find_expert_sites(model)] == [32, 32, 32]


def test_exclude_leaves_layers_out() -> None:
    model = tiny.build("mixtral")
    sites = find_expert_sites(model, exclude=[r"layers\.1\."])
    assert [site.name for site in sites] == [
        "model.layers.0.mlp.experts",
        "model.layers.2.mlp.experts",
    ]


def test_exclude_that_is_no_pattern_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"exclude: got '\('"):
        find_expert_sites(tiny.build("mixtral"), exclude=["("])


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="mixture-of-experts"):
        find_expert_sites(nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 4, 3)))


class BareExperts(nn.Module):
    """The same tensors behind a class that transformers' interface does not govern."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = original.gate_up_proj, original.down_proj

    @functools.wraps(nn.Module.forward)  # __wrapped__ alone proves nothing
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


class FlaggedExperts(BareExperts):
    """It even has the decorator's flags, yet its forward is its own."""

    has_gate, has_bias, is_transposed = True, False, False

    def forward(self, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Any:
        return hidden


class DenseCallExperts(FlaggedExperts):
    """Flags and `__wrapped__`, and another call (Llama 4's)."""

    forward = BareExperts.forward


def _undecorated(model: Any, kind: type[BareExperts] = BareExperts) -> None:
    layer = model.model.layers[1].mlp
    layer.experts = kind(layer.experts)


@pytest.mark.parametrize("kind", [BareExperts, FlaggedExperts, DenseCallExperts])
def test_an_undecorated_class_is_refused_by_name(kind: type[BareExperts]) -> None:
    model = tiny.build("mixtral")
    _undecorated(model, kind)
    with pytest.raises(UnsupportedModelError) as error:
        find_expert_sites(model)
    for part in ("model.layers.1.mlp.experts", kind.__name__, compat.version(), "exclude="):
        assert part in str(error.value)


def test_not_strict_leaves_it_resident_and_says_so() -> None:
    model = tiny.build("mixtral")
    _undecorated(model)
    survey = survey_experts(model, strict=False)
    assert len(survey.sites) == 2
    assert survey.left_resident == ("model.layers.1.mlp.experts",)


def test_a_bank_of_expert_modules_is_refused() -> None:
    class ToyExperts(nn.ModuleDict):
        pass

    bank = ToyExperts({f"expert_{i}": nn.Linear(4, 4) for i in range(3)})
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"experts": bank})})
    with pytest.raises(UnsupportedModelError, match=r"mlp\.experts \(ToyExperts\)"):
        find_expert_sites(model)


def test_an_unknown_decorator_flag_away_from_its_default_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compat, "unknown_decorator_flags", lambda: {"has_spin": False})
    model = tiny.build("mixtral")
    assert len(find_expert_sites(model)) == 3
    model.model.layers[2].mlp.experts.has_spin = True
    with pytest.raises(UnsupportedModelError, match="has_spin=True is unknown"):
        find_expert_sites(model)


def test_a_stranger_among_the_parameters_is_refused() -> None:
    model = tiny.build("mixtral")
    model.model.layers[0].mlp.experts.scale = nn.Parameter(torch.ones(8))
    with pytest.raises(UnsupportedModelError, match="parameters that experts do not have: scale"):
        find_expert_sites(model)
