"""`sluice plan` says before loading what a session finds afterwards."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sluice
from sluice.errors import CapacityError, ConfigError
from sluice.hf.auto import load_causal_lm
from sluice.hf.describe import describe_model
from sluice.plan import LayerShape, plan_model
from sluice.reference import reference_model


def layer(experts: int = 8, top_k: int = 2, slot_bytes: int = 4096) -> LayerShape:
    return LayerShape("experts", experts, top_k, 64, "BF16", slot_bytes, slot_bytes)


def plan_json(*arguments: str) -> dict:
    command = [sys.executable, "-m", "sluice", "plan", *arguments, "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.parametrize("budget", ["12.5%", "25%", "100%", "1MiB"])
def test_a_session_gets_the_slots_that_were_planned(budget: str) -> None:
    shapes = describe_model(reference_model() / "config.json")
    planned = plan_model("reference", shapes, budget)
    options = sluice.OffloadOptions(device_memory=budget)
    model = load_causal_lm(reference_model(), offload=options)
    with model.sluice as session, torch.no_grad():
        model(torch.tensor([[1]]))
        assert session.store.total_slot_bytes == planned.total_bytes
        assert sum(map(len, session.residency())) == planned.budgets[0].slots
        assert session.stats().slab_bytes == planned.budgets[0].slab_bytes
        assert session.stats().workspace_bytes <= planned.workspace_bytes
        assert session.stats().requests == sum(min(layer.top_k, 32) for layer in shapes)


def test_the_bytes_of_mixtral_are_those_of_its_published_shape(tmp_path: Path) -> None:
    from transformers import MixtralConfig

    MixtralConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        dtype="bfloat16",
    ).save_pretrained(tmp_path)
    plan = plan_json(str(tmp_path / "config.json"), "--device-memory", "50%")
    expert = 3 * 4096 * 14336 * 2
    assert plan["layers"][0]["expert_bytes"] == expert
    assert plan["total_bytes"] == 256 * expert
    (budget,) = plan["budgets"]
    assert budget["slots"] == 128
    assert budget["most_bytes_per_token"] == 64 * expert
    assert budget["expected_bytes_per_token"] == 32 * expert
    assert plan["pack_bytes"] == 256 * expert


def test_without_a_budget_there_is_a_table_down_to_the_least_that_works() -> None:
    plan = plan_json(str(reference_model()))
    labels = [budget["label"] for budget in plan["budgets"]]
    assert labels == ["100%", "50%", "25%", "12.5%", "two slots", "least"]
    slots = [budget["slots"] for budget in plan["budgets"]]
    assert slots == [256, 128, 64, 32, 2, 1]
    assert [budget["waves_at_decode"] for budget in plan["budgets"]] == [1, 1, 1, 1, 2, 4]
    assert plan["budgets"][0]["expected_bytes_per_token"] == 0


def test_a_budget_below_one_slot_of_each_size_names_those_that_work() -> None:
    shapes = [layer(slot_bytes=4096), layer(slot_bytes=8192)]
    with pytest.raises(CapacityError, match=str(4096 + 8192)):
        plan_model("two sizes", shapes, 4096 + 8191)
    assert plan_model("two sizes", shapes, 4096 + 8192).budgets[0].slots == 2


def test_sizes_of_their_own_share_a_budget_by_their_experts_bytes() -> None:
    shapes = [layer(experts=8, slot_bytes=4096), layer(experts=24, slot_bytes=4096)]
    plan = plan_model("one size", shapes, "25%")
    assert plan.budgets[0].slots == 8
    assert plan.budgets[0].expected_bytes_per_token == 4 * 4096 * 3 // 4


def test_a_budget_is_a_size_or_a_share_and_nothing_else() -> None:
    shapes = [layer(experts=1000, slot_bytes=1 << 20)]
    bought = {
        size: plan_model("m", shapes, size).budgets[0].budget_bytes
        for size in ("25%", "6GiB", "6GB", 1 << 20)
    }
    assert bought == {"25%": 250 << 20, "6GiB": 6 << 30, "6GB": 6_000_000_000, 1 << 20: 1 << 20}
    with pytest.raises(ConfigError, match="parsecs"):
        plan_model("m", shapes, "6 parsecs")
