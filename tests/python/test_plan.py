"""`sluice plan` says before loading what a session finds afterwards."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sluice
from sluice import cli, doctor
from sluice.cli import plan as cli_plan
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


def mixtral(folder: Path) -> Path:
    from transformers import MixtralConfig

    MixtralConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=32000,
        tie_word_embeddings=False,
        dtype="bfloat16",
    ).save_pretrained(folder)
    return folder / "config.json"


def qwen3_30b_a3b(folder: Path) -> Path:
    from transformers import Qwen3MoeConfig

    Qwen3MoeConfig(
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        vocab_size=151936,
        tie_word_embeddings=False,
        dtype="bfloat16",
    ).save_pretrained(folder)
    return folder / "config.json"


# Of the worked tables of the limit model, bf16: miss GB per token, ms on misses over PCIe 5 and 4,
# tok/s over PCIe 5.
PREDICTED = {
    mixtral: {0.1: "20.3 369 812 2.7", 0.5: "11.3 205 451 4.9", 0.9: "2.3 41 90 24"},
    qwen3_30b_a3b: {0.1: "3.26 59 130 17", 0.5: "1.81 33 72 30", 0.9: "0.36 6.6 14 140"},
}


@pytest.fixture
def no_constants(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("config_of", "dense_gb"),
    # The tables leave routers out of the dense part, 25 MB for Qwen3; a plan does not.
    [(mixtral, 2.95), (qwen3_30b_a3b, 2.46)],
    ids=["mixtral", "qwen3"],
)
def test_predictions_are_those_of_the_worked_tables(
    config_of: Callable[[Path], Path],
    dense_gb: float,
    tmp_path: Path,
    no_constants: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["plan", str(config_of(tmp_path)), "--device-memory", "50%", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert round(plan["dense_bytes"] / 1e9, 2) == dense_gb
    figures = PREDICTED[config_of][0.5].split()
    found = predicted_figures(plan["predictions"])
    decimals = [len(figure.partition(".")[2]) for figure in figures]
    assert [f"{v:.{d}f}" for v, d in zip(found, decimals, strict=True)] == figures

    # Other shares are no whole number of slots: a figure may be off by what one slot holds, and by
    # what the dense part of Qwen3 has more.
    layers = [LayerShape(**entry) for entry in plan["layers"]]
    experts = sum(each.num_experts for each in layers)
    for share, line in PREDICTED[config_of].items():
        planned = plan_model("m", layers, f"{share:.0%}")
        on_gpu = cli_plan.predictions(planned, plan["dense_bytes"], None)
        found = predicted_figures([machine.to_dict() for machine in on_gpu])
        slack = 1 / experts / (1 - share) + 0.01
        for value, figure in zip(found, line.split(), strict=True):
            half_digit = 0.5 / 10 ** len(figure.partition(".")[2])
            assert abs(value - float(figure)) <= half_digit + slack * value, (share, figure)


def predicted_figures(machines: list[dict]) -> tuple[float, ...]:
    """What a line of `PREDICTED` says, of both assumed machines."""
    pcie5, pcie4 = machines
    assert pcie5["assumed"] and pcie5["rates"]["name"] == "PCIe 5 x16, H200 class"
    assert pcie4["assumed"] and pcie4["rates"]["name"] == "PCIe 4 x16"
    (fast,), (slow,) = pcie5["budgets"], pcie4["budgets"]
    assert fast["bound"] == slow["bound"] == "h2d"
    assert fast["seconds_per_token"] == pytest.approx(1 / fast["tokens_per_s"])
    return (
        fast["missed_bytes_per_token"] / 1e9,
        fast["terms"]["h2d_s"] * 1e3,
        slow["terms"]["h2d_s"] * 1e3,
        fast["tokens_per_s"],
    )


def test_assumed_machines_are_printed_as_assumptions_with_their_constants(
    no_constants: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(reference_model())]) == 0
    text = capsys.readouterr().out
    for machine, link in (("PCIe 5 x16, H200 class", 55), ("PCIe 4 x16", 25)):
        assert (
            f"limit on a GPU, {machine} (assumed, not measured: GPU memory 4,200 GB/s, "
            f"link {link}.0 GB/s, every expert in RAM):"
        ) in text
    assert "missed/token" in text and "h2d" in text
    assert "on a machine with a GPU `sluice doctor` measures its own" in text


def test_a_budget_of_ram_sends_the_other_misses_to_the_disk(
    no_constants: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", str(reference_model()), "--device-memory", "50%", "--host-memory", "25%"]
    assert cli.main([*words, "--json"]) == 0
    for machine in json.loads(capsys.readouterr().out)["predictions"]:
        (budget,) = machine["budgets"]
        assert machine["host_bytes"] == 256 * 73728 // 4
        assert budget["store_bytes_per_token"] == budget["missed_bytes_per_token"] * 3 // 4
    assert cli.main(words) == 0
    assert "4.5 MiB of experts in RAM, disk 7.00 GB/s" in capsys.readouterr().out
    assert cli.main([*words[:-1], "much"]) == 1
    assert "host_memory" in capsys.readouterr().err


def gpu_constants(**fields: float) -> doctor.DeviceConstants:
    known = {
        entry.name: 1.0 for entry in dataclasses.fields(doctor.DeviceConstants)
    } | {"name": "NVIDIA H200", "device": "cuda:0", "copies_bytes_per_s": {}}  # fmt: skip
    return doctor.DeviceConstants(**known | fields)  # type: ignore[arg-type]


def test_a_measured_gpu_takes_the_place_of_assumed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    device = gpu_constants(memory_bytes_per_s=4e12, link_bytes_per_s=50e9)
    constants = doctor.Constants(1e11, {"4x1MiB": 5e9}, 1.0, device)
    planned = plan_model("m", [layer(experts=100, top_k=10, slot_bytes=1 << 20)], "50%")
    half_in_ram = planned.total_bytes // 2
    monkeypatch.setattr(cli_plan, "available_bytes", lambda: half_in_ram * 100 // 80)
    (found,) = cli_plan.predictions(planned, 1 << 20, constants)
    assert not found.assumed and found.rates.name == "doctor, NVIDIA H200"
    (budget,) = found.budgets
    assert budget.missed_bytes_per_token == 5 << 20
    assert budget.store_bytes_per_token == pytest.approx(5 << 19, rel=1e-6)
    assert budget.terms["h2d_s"] == pytest.approx((5 << 20) / 50e9)
    assert budget.terms["disk_s"] == pytest.approx((5 << 19) / 5e9, rel=1e-6)
    assert budget.terms["launch_s"] == 0.0, "latencies are no part of a limit"
    assert budget.bound == "disk"
    text = cli_plan.text_of(planned, constants, [found])
    assert "doctor, NVIDIA H200 (measured by sluice doctor: GPU memory 4,000 GB/s" in text
    assert "50.0 MiB of experts in RAM, disk 5.00 GB/s" in text
    assert "measures its own" not in text
    in_ram = cli_plan.predictions(planned, 1, doctor.Constants(1e11, {}, 1.0, device))[0]
    assert "disk not measured and left out" in cli_plan.prediction_text(in_ram)


def test_the_bytes_of_mixtral_are_those_of_its_published_shape(tmp_path: Path) -> None:
    plan = plan_json(str(mixtral(tmp_path)), "--device-memory", "50%")
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
