"""The gate is found by asking the module, and what no kernel computes runs the module itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import sluice
from sluice import _core
from sluice.errors import InternalError
from sluice.hf.detect import find_expert_sites
from sluice.hf.gates import closed_form, fingerprint
from sluice.hf.site import ExpertSite

from . import tiny

KINDS = {
    "mixtral": "silu",
    "qwen2_moe": "silu",
    "gpt_oss": "oai_swiglu",
    "nemotron_h": "relu2",
}


@pytest.mark.parametrize("family", KINDS)
def test_each_family_gets_its_kernel(family: str) -> None:
    for site in find_expert_sites(tiny.build(family)):
        assert fingerprint(site).kind == KINDS[family]


def test_interleaving_is_seen_not_believed() -> None:
    (site, *_) = find_expert_sites(tiny.build("gpt_oss"))
    assert fingerprint(site).interleaved
    lying = dataclasses.replace(site, concatenated=True)
    assert fingerprint(lying).interleaved


def test_every_kind_names_a_kernel_of_the_core() -> None:
    gate, up = torch.randn(2, 5), torch.randn(2, 5)
    for kind in set(_core.gate_names()) - {"generic"}:
        assert closed_form(kind, gate, up, 1.702, 7.0).shape == (2, 5)


def _with_gate(function: Any) -> ExpertSite:
    model = tiny.build("mixtral")
    (site, *_) = find_expert_sites(model)
    site.module._apply_gate = function
    return site


def test_parameters_are_read_off_the_module_and_confirmed() -> None:
    def clamped(joined: torch.Tensor) -> torch.Tensor:
        gate, up = joined.chunk(2, -1)
        return nn.functional.silu(gate.clamp(max=2.5)) * up.clamp(-2.5, 2.5)

    site = _with_gate(clamped)
    assert fingerprint(site).kind == "generic"  # nothing on the module says 2.5
    site.module.swiglu_limit = 2.5
    gate = fingerprint(site)
    assert (gate.kind, gate.limit) == ("clamped_silu", 2.5)


def test_a_gate_that_is_almost_silu_has_no_kernel() -> None:
    def almost(joined: torch.Tensor) -> torch.Tensor:
        gate, up = joined.chunk(2, -1)
        return nn.functional.silu(gate) * up.clamp(-50, 50)

    assert fingerprint(_with_gate(almost)).kind == "generic"


def test_a_gate_that_does_not_run_alone_has_no_kernel() -> None:
    def needy(joined: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("needs more")

    assert fingerprint(_with_gate(needy)).kind == "generic"


class SoftCap(nn.Module):
    """An activation that no kernel knows, and that can be told to fail."""

    broken = False

    def forward(self, gate: torch.Tensor) -> torch.Tensor:
        if self.broken:
            raise LookupError("the gate's own error")
        return torch.tanh(gate / 3) * 3


def _soft_capped(dtype: torch.dtype) -> tuple[Any, SoftCap]:
    model, act = tiny.build("mixtral", dtype), SoftCap()
    for module in tiny.sites_of(model).values():
        module.act_fn = act
    return model, act


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_generic_path_computes_what_the_module_computes(dtype: torch.dtype) -> None:
    model, _ = _soft_capped(dtype)
    expected = model(tiny.PROMPT).logits
    with sluice.offload(model, device_memory="25%") as session:
        got = model(tiny.PROMPT).logits
        assert session.stats().generic_gate_calls > 0
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert (got - expected).abs().max() < tolerance * expected.abs().max()


def test_an_exception_in_the_gate_comes_out_and_the_session_goes_on() -> None:
    model, act = _soft_capped(torch.float32)
    with sluice.offload(model, device_memory="25%") as session:
        expected = model(tiny.PROMPT).logits
        act.broken = True
        with pytest.raises(LookupError, match="the gate's own error"):
            model(tiny.PROMPT)
        act.broken = False
        assert torch.equal(model(tiny.PROMPT).logits, expected)
        assert all(slot[3] == 0 for pool in session.residency() for slot in pool)


def test_a_kernel_that_would_differ_from_the_class_is_found_when_the_session_opens() -> None:
    def gelu_gate(joined: torch.Tensor) -> torch.Tensor:
        gate, up = joined.chunk(2, -1)
        return nn.functional.gelu(gate) * up

    model = tiny.build("mixtral")
    for module in tiny.sites_of(model).values():
        module._apply_gate = gelu_gate
    with pytest.raises(InternalError, match=r"MixtralExperts.*gelu kernel differs"):
        sluice.offload(model, device_memory="25%")
    assert not hasattr(model, "sluice")
