"""What the probe reads of routers is what they choose by; and the next gate runs on it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import sluice
from sluice.errors import ConfigError, UnsupportedModelError
from sluice.hf.detect import find_expert_sites
from sluice.hf.router_probe import router_weights
from sluice.predict.training_free.next_gate import NextGate

from . import tiny


def watched(model: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per MoE layer of one forward: what entered the experts, and who was chosen."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def hook(module: Any, args: tuple[Any, ...]) -> None:
        hidden, ids = args[0], args[1]
        seen.append(
            (hidden.reshape(-1, hidden.shape[-1]).numpy(), ids.reshape(len(ids), -1).numpy())
        )

    handles = [
        model.get_submodule(site.name).register_forward_pre_hook(hook)
        for site in find_expert_sites(model)
    ]
    with torch.no_grad():
        model(torch.arange(3, 23)[None])
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen2_moe"])
def test_what_is_read_chooses_as_the_routers_do(family: str) -> None:
    model = tiny.build(family)
    with torch.no_grad():  # norms and biases of a fresh model are ones and zeros
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("router.bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    routers = router_weights(model)
    layers = watched(model)
    assert len(layers) == len(routers.gate) >= 2
    for layer, (hidden, ids) in enumerate(layers):
        choices = routers.choices_of_entering(hidden, layer)
        top = np.argsort(-choices, axis=-1)[:, : ids.shape[1]]
        np.testing.assert_array_equal(np.sort(top, -1), np.sort(ids, -1))
        # The norm is undone and done again, but for its epsilon beside these small states.
        again = routers.choices(routers.normal_states(hidden, layer), layer)
        spread = np.abs(choices).max()
        np.testing.assert_allclose(again / spread, choices / spread, atol=0.05)


def test_an_offloaded_model_reads_the_same() -> None:
    model = tiny.build("mixtral")
    before = router_weights(model)
    with sluice.offload(model, device_memory="50%"):
        after = router_weights(model)
    for name, array in before.state().items():
        np.testing.assert_array_equal(array, after.state()[name])


def test_a_router_that_reads_other_states_than_its_experts_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no router beside it"):
        router_weights(tiny.build("nemotron_h"))


def test_next_gate_from_a_model_is_bound_to_its_shape() -> None:
    predictor = NextGate.from_model(tiny.build("mixtral"), top_k=2)
    assert predictor.shape is not None
    assert (predictor.shape.num_layers, predictor.shape.num_experts) == (3, 8)
    assert predictor.plan(2) == []  # no state was seen, no rates are known
    with pytest.raises(ConfigError, match="routers of 3 layers"):
        predictor.bind(type(predictor.shape)(4, 8, 2))
