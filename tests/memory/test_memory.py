"""Memory and disk traffic, not by sluice's own word: the kernel's counters of whole processes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import MixtralConfig, MixtralForCausalLM

CHILD = Path(__file__).with_name("child.py")
MIB = 1 << 20


def write_mixtral(folder: Path, *, hidden: int, intermediate: int, layers: int) -> int:
    """A Mixtral checkpoint of random weights, a shard per layer, per-expert tensors as on the hub.

    Returns the bytes of all experts. One random block repeats: nothing here depends on its values.
    """
    config = MixtralConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=4,
        num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=512,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        meta = MixtralForCausalLM(config)
    block = (
        torch.randn(intermediate * hidden, generator=torch.Generator().manual_seed(0)) * 0.02
    ).bfloat16()

    def tensor(shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
        count = torch.Size(shape).numel()
        repeats = -(-count // block.numel())
        return block.repeat(repeats)[:count].view(shape).clone()

    experts = 0
    weight_map: dict[str, str] = {}
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in meta.named_parameters():
        shard = f"{name.split('.')[2]}.safetensors" if ".layers." in name else "rest.safetensors"
        if ".experts." not in name:
            file_name = name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
            router = name.endswith("mlp.gate.weight")  # its own values, or all layers would agree
            value = torch.randn(parameter.shape).bfloat16() if router else tensor(parameter.shape)
            shards.setdefault(shard, {})[file_name] = value
    for layer in range(layers):
        shard = shards[f"{layer}.safetensors"]
        for expert in range(8):
            stem = f"model.layers.{layer}.block_sparse_moe.experts.{expert}"
            wide, tall = (intermediate, hidden), (hidden, intermediate)
            for name, shape in (("w1", wide), ("w3", wide), ("w2", tall)):
                shard[f"{stem}.{name}.weight"] = tensor(shape)
                experts += shape[0] * shape[1] * 2
        save_file(shard, folder / f"{layer}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, f"{layer}.safetensors")
        shard.clear()
    rest = shards["rest.safetensors"]
    save_file(rest, folder / "rest.safetensors", metadata={"format": "pt"})
    weight_map |= dict.fromkeys(rest, "rest.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return experts


def run_child(*arguments: object) -> dict[str, Any]:
    # One arena: what malloc keeps for threads that come and go would blur the comparison.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    result = subprocess.run(
        [sys.executable, str(CHILD), *map(str, arguments)],
        capture_output=True, text=True, check=False, env=environment, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture
def disk_folder(tmp_path: Path) -> Any:
    """A folder on a real disk (O_DIRECT, counted by the kernel), emptied afterwards."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


def test_two_budgets_differ_by_their_bytes_and_the_kernel_confirms_the_reads(
    disk_folder: Path,
) -> None:
    experts = write_mixtral(disk_folder, hidden=1024, intermediate=1792, layers=13)
    assert experts >= 1024 * MIB
    small = run_child(disk_folder, "12.5%", 8)
    large = run_child(disk_folder, "100%", 8)
    assert small["tokens"] == large["tokens"]
    for one in (small, large):
        assert one["peak_resident_bytes"] <= one["budget_bytes"]
        assert one["read_bytes"] == pytest.approx(one["bytes_read"], rel=0.01)
    # Slots are written when an expert first comes: at 100 % the child brings them all.
    assert large["peak_resident_bytes"] == large["budget_bytes"]
    difference = large["budget_bytes"] - small["budget_bytes"]
    assert large["peak_rss_anon"] - small["peak_rss_anon"] == pytest.approx(difference, rel=0.05)


def test_a_checkpoint_of_three_gib_generates_in_its_budget_and_768_mib(disk_folder: Path) -> None:
    experts = write_mixtral(disk_folder, hidden=2048, intermediate=7168, layers=5)
    assert experts >= 3072 * MIB
    found = run_child(disk_folder, 256 * MIB, 3, 768 * MIB)
    assert found["limit"] in {"cgroup", "RLIMIT_DATA"}
    assert len(found["tokens"]) == 256 + 3
    assert found["peak_resident_bytes"] <= 256 * MIB
    # Loading reads the dense part through transformers, and no expert.
    assert found["load_read_bytes"] < 512 * MIB
