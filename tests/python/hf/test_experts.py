"""OffloadedExperts beside the experts class that it stands for."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import sluice
from sluice.errors import SluiceError, UnsupportedModelError

from . import tiny

SITE = "model.layers.1.mlp.experts"


@pytest.fixture(params=["mixtral", "gpt_oss"])
def pair(request: pytest.FixtureRequest) -> Any:
    """(stock experts, offloaded experts of an equal model, its session)."""
    stock, model = tiny.build(request.param), tiny.build(request.param)
    session = sluice.offload(model, device_memory="25%")
    yield stock.get_submodule(SITE), model.get_submodule(SITE), session
    session.close()


@pytest.fixture
def offloaded() -> Any:
    model = tiny.build("mixtral")
    with sluice.offload(model, device_memory="25%"):
        yield model


def routing(tokens: int, top_k: int, experts: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(tokens + top_k)
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)] or [])
    return ids, torch.rand(tokens, top_k)


@pytest.mark.parametrize("tokens", [1, 2, 33])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_agrees_with_the_class_itself(pair: Any, tokens: int, top_k: int) -> None:
    stock, ours, _ = pair
    ids, weights = routing(tokens, top_k)
    hidden = torch.randn(tokens, 32)
    with torch.no_grad():
        expected, got = stock(hidden, ids, weights), ours(hidden, ids, weights)
    assert got.dtype == hidden.dtype
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_no_tokens_are_no_output(pair: Any) -> None:
    _, ours, _ = pair
    empty = torch.empty(0, 2, dtype=torch.int64)
    out = ours(torch.empty(0, 32), empty, torch.empty(0, 2))
    assert out.shape == (0, 32)


def test_both_keyword_styles_and_positions_are_one_call(pair: Any) -> None:
    _, ours, _ = pair
    ids, weights = routing(3, 2)
    hidden = torch.randn(3, 32)
    positional = ours(hidden, ids, weights)
    assert torch.equal(positional, ours(hidden, top_k_index=ids, top_k_weights=weights))
    assert torch.equal(positional, ours(hidden, router_indices=ids, routing_weights=weights))


def test_strided_inputs_and_narrow_ids_are_taken(pair: Any) -> None:
    _, ours, _ = pair
    ids, weights = routing(4, 2)
    hidden = torch.randn(32, 4).T
    assert not hidden.is_contiguous()
    expected = ours(hidden.contiguous(), ids, weights)
    assert torch.equal(expected, ours(hidden, ids.int(), weights.T.contiguous().T))


def test_a_repeated_id_counts_twice_and_a_sentinel_not_at_all(pair: Any) -> None:
    _, ours, _ = pair
    hidden = torch.randn(2, 32)
    half = torch.full((2, 2), 0.5)
    twice = ours(hidden, torch.tensor([[3, 3], [3, 3]]), half)
    once = ours(hidden, torch.tensor([[3], [3]]), torch.ones(2, 1))
    torch.testing.assert_close(twice, once)
    masked = ours(hidden, torch.tensor([[3, 8], [3, 8]]), torch.ones(2, 2))
    torch.testing.assert_close(masked, once)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_routing_weights_may_be_of_another_type(weights_dtype: torch.dtype) -> None:
    stock, model = tiny.build("mixtral", torch.bfloat16), tiny.build("mixtral", torch.bfloat16)
    with sluice.offload(model, device_memory="25%"):
        ids, weights = routing(5, 2)
        hidden = torch.randn(5, 32, dtype=torch.bfloat16)
        with torch.no_grad():
            got = model.get_submodule(SITE)(hidden, ids, weights.to(weights_dtype))
            expected = stock.get_submodule(SITE)(hidden, ids, weights.bfloat16())
        assert got.dtype == torch.bfloat16
        assert (got - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("tokens", [1, 33])
def test_bits_do_not_depend_on_the_number_of_slots(tokens: int) -> None:
    ids, weights = routing(tokens, 2)
    hidden = torch.randn(tokens, 32)
    outputs = []
    for budget in ("5%", "25%", "100%"):
        model = tiny.build("mixtral")
        with sluice.offload(model, device_memory=budget):
            outputs.append(model.get_submodule(SITE)(hidden, ids, weights))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(2, 3, 32), torch.zeros(2, 2).long(), torch.ones(2, 2)), r"\[T, 32\]"),
        ((torch.randn(2, 32), torch.zeros(2, 2).long(), torch.ones(2, 8)), r"both \[2, K\]"),
        ((torch.randn(2, 32), torch.zeros(2, 2).long(), None), "no expert ids or no weights"),
    ],
    ids=["3-D", "dense-weights", "no-weights"],
)
def test_another_call_is_refused_by_name(offloaded: Any, arguments: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as error:
        offloaded.get_submodule(SITE)(*arguments)
    assert SITE in str(error.value)


def test_training_mode_raises_with_the_way_out(offloaded: Any) -> None:
    offloaded.train()
    with pytest.raises(UnsupportedModelError, match=r"training mode.*model\.eval\(\)"):
        offloaded(tiny.PROMPT)
    offloaded.eval()
    offloaded(tiny.PROMPT)


def test_a_forward_with_gradients_runs_and_its_backward_raises(offloaded: Any) -> None:
    loss = offloaded(tiny.PROMPT).logits.sum()
    with pytest.raises(UnsupportedModelError, match="no gradient"):
        loss.backward()
    with torch.no_grad():
        assert not offloaded(tiny.PROMPT).logits.requires_grad


@pytest.mark.parametrize("move", ["half", "bfloat16", "double"])
def test_a_change_of_dtype_raises_and_changes_nothing(offloaded: Any, move: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"load the model with dtype="):
        getattr(offloaded, move)()
    assert {p.dtype for p in offloaded.parameters()} == {torch.float32}
    offloaded.float().to("cpu")(tiny.PROMPT)


def test_a_move_to_another_device_raises_and_changes_nothing(offloaded: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="got a move to meta"):
        offloaded.to("meta")
    assert {p.device.type for p in offloaded.parameters()} == {"cpu"}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
def test_copies_are_refused_by_name(offloaded: Any, duplicate: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.experts .*pickled"):
        duplicate(offloaded)


def test_reading_a_weight_gives_advice(offloaded: Any) -> None:
    with pytest.raises(AttributeError, match=r"no gate_up_proj.*sluice\.restore"):
        _ = offloaded.get_submodule(SITE).gate_up_proj
    assert not hasattr(offloaded.get_submodule(SITE), "down_proj")
    assert offloaded.get_submodule(SITE).num_experts == 8


def test_it_prints_what_it_stands_for(offloaded: Any) -> None:
    text = repr(offloaded.get_submodule(SITE))
    for part in ("OffloadedExperts", "MixtralExperts", "num_experts=8", "hidden=32", "offloaded"):
        assert part in text


def test_it_has_no_parameters_but_the_norm_it_keeps(offloaded: Any) -> None:
    assert list(offloaded.get_submodule(SITE).parameters()) == []


def test_after_close_a_forward_says_so() -> None:
    model = tiny.build("mixtral")
    session = sluice.offload(model, device_memory="25%")
    module = model.get_submodule(SITE)
    session.close()
    with pytest.raises(SluiceError, match="closed"):
        module(torch.randn(2, 32), *routing(2, 2))
