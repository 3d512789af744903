"""Path I: a built model gives its experts away and gets the very same ones back."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sluice
from sluice.errors import CapacityError, ConfigError, IoError, UnsupportedModelError
from sluice.hf import inplace, restore

from . import tiny

BACKINGS = ("ram", "disk")


def identity(model: Any) -> dict[str, Any]:
    """Every module and parameter object, and every bit."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "parameters": {name: id(p) for name, p in model.named_parameters()},
        "bits": {name: p.detach().clone() for name, p in model.named_parameters()},
        "attributes": set(vars(model)),
        "implementation": model.config._experts_implementation,
        "generation": model.generation_config.to_dict(),
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
    }


def assert_same(model: Any, before: dict[str, Any]) -> None:
    after = identity(model)
    bits = before["bits"], after["bits"]
    assert all(torch.equal(value, bits[1][name]) for name, value in bits[0].items())
    for key in before.keys() - {"bits"}:
        assert before[key] == after[key], key


@pytest.mark.emulated
@pytest.mark.parametrize("backing", BACKINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_restore_is_exact(family: str, dtype: torch.dtype, backing: str) -> None:
    model = tiny.build(family, dtype)
    before = identity(model)
    with sluice.offload(model, device_memory="25%", backing=backing) as session:
        assert model.sluice is session
        assert not [n for n, p in model.named_parameters() if ".experts." in n and p.ndim == 3]
        tiny.greedy(model)
    assert_same(model, before)
    sluice.offload(model, device_memory="25%", backing=backing)
    sluice.restore(model)
    assert_same(model, before)


@pytest.mark.emulated
@pytest.mark.parametrize("backing", BACKINGS)
def test_tokens_are_the_stock_models(backing: str) -> None:
    model = tiny.build("mixtral")
    expected = tiny.greedy(model)
    with sluice.offload(model, device_memory="25%", backing=backing):
        assert torch.equal(tiny.greedy(model), expected)
    assert torch.equal(tiny.greedy(model), expected)


def test_both_backings_give_the_same_bits() -> None:
    outputs = []
    for backing in BACKINGS:
        for budget in ("5%", "100%"):
            model = tiny.build("gpt_oss")
            with (
                torch.no_grad(),
                sluice.offload(model, device_memory=budget, backing=backing),
            ):
                outputs.append(model(tiny.PROMPT).logits)
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_adopted_experts_are_counted_and_lie_where_they_lay() -> None:
    model = tiny.build("mixtral")
    addresses = {n: m.down_proj.data_ptr() for n, m in tiny.sites_of(model).items()}
    total = sum(
        p.numel() * p.element_size() for n, p in model.named_parameters() if ".experts." in n
    )
    with sluice.offload(model, device_memory="25%", backing="ram") as session:
        stats = session.stats()
        assert stats.adopted_bytes == total
        assert stats.degradations["adopted_in_ram"] == 3
        assert session.store.adopted_bytes == total
    assert {n: m.down_proj.data_ptr() for n, m in tiny.sites_of(model).items()} == addresses


def test_spilled_experts_leave_memory_and_their_file_leaves_the_folder(tmp_path: Path) -> None:
    model = tiny.build("mixtral")
    originals = list(tiny.sites_of(model).values())
    with sluice.offload(model, device_memory="25%", offload_dir=str(tmp_path)) as session:
        assert all(m.gate_up_proj.numel() == 0 for m in originals)
        assert session.stats().adopted_bytes == 0
        assert list(tmp_path.iterdir()) == []  # unlinked while open: gone whatever happens
        tiny.greedy(model)


def test_twice_is_an_error() -> None:
    model = tiny.build("mixtral")
    with sluice.offload(model, device_memory="25%"):
        with pytest.raises(ConfigError, match="offloads already"):
            sluice.offload(model, device_memory="25%")
        tiny.greedy(model)
    with pytest.raises(ConfigError, match="does not offload"):
        sluice.restore(model)


def test_without_a_budget_the_error_has_a_table_for_this_model() -> None:
    model = tiny.build("mixtral")
    before = identity(model)
    with pytest.raises(ConfigError, match="MixtralForCausalLM can have") as error:
        sluice.offload(model)
    assert "12.5%" in str(error.value)
    assert_same(model, before)


@pytest.mark.emulated
@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"device_memory": 100}, CapacityError),
        ({"device_memory": "25%", "pack": "some.sluice.safetensors"}, ConfigError),
        ({"device_memory": "25%", "offload_dir": "/proc/nowhere"}, OSError),
        ({"device_memory": "25%", "polcy": "lru"}, ConfigError),
    ],
    ids=["budget", "pack", "folder", "field"],
)
def test_an_error_leaves_the_model_as_it_was(fields: Any, error: type[Exception]) -> None:
    model = tiny.build("mixtral")
    before, expected = identity(model), tiny.greedy(model)
    with pytest.raises(error):
        sluice.offload(model, **fields)
    assert_same(model, before)
    assert torch.equal(tiny.greedy(model), expected)


@pytest.mark.emulated
@pytest.mark.parametrize("step", ["open_session", "_spill"])
def test_a_failure_in_the_middle_leaves_the_model_as_it_was(
    step: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny.build("mixtral")
    before = identity(model)

    def fail(*args: Any) -> Any:
        raise IoError("the disk is gone")

    monkeypatch.setattr(inplace, step, fail)
    with pytest.raises(IoError, match="the disk is gone"):
        sluice.offload(model, device_memory="25%", offload_dir=str(tmp_path))
    assert_same(model, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.emulated
def test_restoring_without_memory_is_refused_and_the_model_stays_offloaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.build("mixtral")
    session = sluice.offload(model, device_memory="25%")
    expected = tiny.greedy(model)
    with monkeypatch.context() as patch:
        patch.setattr(restore, "available_bytes", lambda: 1000)
        with pytest.raises(CapacityError, match=r"restore: got 1000 B of free RAM"):
            sluice.restore(model)
        with pytest.raises(CapacityError):
            session.close()
    assert not session.closed
    assert torch.equal(tiny.greedy(model), expected)
    sluice.restore(model)
    assert torch.equal(tiny.greedy(model), expected)


def test_adopted_experts_are_saved_and_read_like_the_stock_models(tmp_path: Path) -> None:
    model = tiny.build("mixtral")
    stock = {name: value.clone() for name, value in model.state_dict().items()}
    tiny.save(model, tmp_path / "stock")
    with sluice.offload(model, device_memory="25%", backing="ram"):
        state = model.state_dict()
        assert state.keys() == stock.keys()
        assert all(torch.equal(value, stock[name]) for name, value in state.items())
        tiny.save(model, tmp_path / "ours")
    names = sorted(path.name for path in (tmp_path / "stock").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "ours").iterdir())
    for name in names:
        ours, theirs = tmp_path / "ours" / name, tmp_path / "stock" / name
        if name.endswith(".safetensors"):
            expected = load_file(theirs)
            assert all(torch.equal(v, expected[k]) for k, v in load_file(ours).items())
        else:
            assert ours.read_text() == theirs.read_text()


def test_spilled_experts_are_not_saved() -> None:
    model = tiny.build("mixtral")
    with (
        sluice.offload(model, device_memory="25%"),
        pytest.raises(UnsupportedModelError, match="a checkpoint without experts"),
    ):
        model.state_dict()


def test_experts_under_a_hook_of_accelerate_are_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny.build("mixtral")
    module = model.model.layers[0].mlp.experts
    accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.experts.*hook"):
        sluice.offload(model, device_memory="25%")


def test_experts_that_are_not_contiguous_are_refused() -> None:
    model = tiny.build("mixtral")
    down = model.model.layers[0].mlp.experts.down_proj
    down.data = down.data.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(UnsupportedModelError, match="contiguous experts"):
        sluice.offload(model, device_memory="25%")


def test_modules_that_strict_lets_pass_are_counted() -> None:
    model = tiny.build("mixtral")
    strange = torch.nn.Module()
    strange.stacked_experts = torch.nn.Parameter(torch.zeros(4, 3, 5))
    model.strange_experts = strange
    with pytest.raises(UnsupportedModelError, match="strange_experts"):
        sluice.offload(model, device_memory="25%")
    with sluice.offload(model, device_memory="25%", strict=False) as session:
        assert session.stats().degradations["experts_left_resident"] == 1


@pytest.mark.emulated
@pytest.mark.parametrize("backing", BACKINGS)
def test_deleting_the_model_closes_its_session(backing: str) -> None:
    model = tiny.build("mixtral")
    session = sluice.offload(model, device_memory="25%", backing=backing)
    tiny.greedy(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert session.closed


@pytest.mark.emulated
def test_a_closed_session_has_given_the_experts_back() -> None:
    model = tiny.build("mixtral")
    before = identity(model)
    session = sluice.offload(model, device_memory="25%")
    session.close()
    session.close()
    assert session.closed
    assert_same(model, before)


@pytest.mark.emulated
def test_an_exception_in_the_block_restores_too() -> None:
    model = tiny.build("mixtral")
    before = identity(model)
    with pytest.raises(KeyError), sluice.offload(model, device_memory="25%"):
        raise KeyError("the user's own")
    assert_same(model, before)
