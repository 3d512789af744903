"""CheckpointPlan: every expert, bit for bit, from byte ranges; every lie refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sluice.config import OffloadOptions
from sluice.errors import CheckpointError, UnsupportedModelError
from sluice.hf import describe, layout
from sluice.hf.checkpoint import ingest
from sluice.hf.checkpoint.files import shard_files
from sluice.hf.checkpoint.plan import CheckpointPlan, plan_checkpoint
from sluice.hf.detect import find_expert_sites

from . import tiny

OPTIONS = OffloadOptions(device_memory="100%")


def plan_of(folder: Path, dtype: torch.dtype | None = None) -> CheckpointPlan:
    model = describe.build_on_meta(folder, dtype)
    return plan_checkpoint(model, find_expert_sites(model), shard_files(folder))


def rewrite(folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint in one file, with its tensors changed."""
    copy = tmp_path / "changed"
    copy.mkdir()
    shutil.copy(folder / "config.json", copy)
    tensors: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.mark.parametrize("per_expert", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_every_expert_is_rebuilt_bit_for_bit(
    saved: Callable[..., Path], family: str, dtype: torch.dtype, per_expert: bool
) -> None:
    plan = plan_of(saved(family, per_expert=per_expert, dtype=dtype))
    assert not plan.needs_ingest
    store = ingest.store_in_place(plan, OPTIONS)
    original = tiny.sites_of(tiny.build(family, dtype))
    for layer, site_plan in enumerate(plan.sites):
        site = site_plan.site
        rebuilt = layout.read_tensors(store, layer, site, dtype)
        for section, name in site.parameters.items():
            assert torch.equal(rebuilt[section], getattr(original[site.name], name)), name


def test_a_mixtral_expert_is_three_ranges(saved: Callable[..., Path]) -> None:
    (first, *_) = plan_of(saved("mixtral")).sites
    pieces = [piece for piece in first.pieces() if piece.expert == 3]
    assert [(p.section, p.transform) for p in pieces] == [
        ("w13", "copy"),
        ("w13", "copy"),
        ("w2", "copy"),
    ]
    assert pieces[1].section_offset == pieces[0].nbytes


def test_a_gpt_oss_expert_is_two_transposes_and_two_vectors(saved: Callable[..., Path]) -> None:
    (first, *_) = plan_of(saved("gpt_oss", dtype=torch.bfloat16)).sites
    pieces = [piece for piece in first.pieces() if piece.expert == 0]
    assert {p.section: p.transform for p in pieces} == {
        "w13": "transpose",
        "w2": "transpose",
        "b13": "widen",
        "b2": "widen",
    }


def test_the_experts_number_is_the_integer_in_the_key_not_its_place(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    def reverse(tensors: dict[str, Any]) -> None:
        for key in sorted(tensors, reverse=True):
            tensors[key] = tensors.pop(key)

    plan = plan_of(rewrite(saved("mixtral"), tmp_path, reverse))
    store = ingest.store_in_place(plan, OPTIONS)
    original = tiny.sites_of(tiny.build("mixtral"))
    (first, *_) = plan.sites
    rebuilt = layout.read_tensors(store, 0, first.site, torch.float32)
    assert torch.equal(rebuilt["w13"], original[first.site.name].gate_up_proj)


@pytest.mark.parametrize("dtype", [None, torch.float16], ids=["in place", "ingested"])
def test_a_shard_that_is_replaced_while_it_is_loaded_is_refused(
    saved: Callable[..., Path], tmp_path: Path, dtype: torch.dtype | None
) -> None:
    folder = rewrite(saved("mixtral"), tmp_path, lambda _: None)
    model = describe.build_on_meta(folder, dtype)
    plan = plan_checkpoint(model, find_expert_sites(model), shard_files(folder))
    assert bool(plan.needs_ingest) == (dtype is not None)
    (shard,) = plan.files
    other = Path(shard).with_suffix(".other")
    other.write_bytes(Path(shard).read_bytes())
    other.replace(shard)
    with pytest.raises(CheckpointError, match="replaced meanwhile"):
        if dtype is None:
            ingest.store_in_place(plan, OPTIONS)
        else:
            ingest.convert_site(plan, plan.sites[0])


def test_keys_that_the_model_ignores_are_ignored(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    def add_mtp_layer(tensors: dict[str, Any]) -> None:
        key = "model.layers.2.block_sparse_moe.experts.0.w1.weight"
        tensors[key.replace("layers.2", "layers.7")] = tensors[key].clone()

    assert len(plan_of(rewrite(saved("mixtral"), tmp_path, add_mtp_layer)).sites) == 3


KEY = "model.layers.1.block_sparse_moe.experts.5.w2.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEY), r"layers\.1\.mlp\.experts: expert 5 has no tensor like .*w2"),
        (
            lambda t: [t.pop(k) for k in list(t) if "layers.1" in k and ".w2." in k],
            r"layers\.1\.mlp\.experts\.down_proj: got no tensor",
        ),
        (
            lambda t: t.update({KEY: t[KEY][:, :8].clone()}),
            r"w2\.weight: got shape \[32, 8\], expected \[32, 48\] for .*MixtralExperts",
        ),
        (
            lambda t: t.update({KEY.replace("experts.5", "experts.8"): t[KEY].clone()}),
            r"got expert 8 .*expected 0 … 7",
        ),
    ],
    ids=["missing-expert", "missing-projection", "wrong-shape", "one-too-many"],
)
def test_a_checkpoint_that_lies_about_experts_is_refused(
    saved: Callable[..., Path], tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        plan_of(rewrite(saved("mixtral"), tmp_path, change))


def test_quantised_experts_are_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    def to_bytes(tensors: dict[str, Any]) -> None:
        tensors[KEY] = tensors[KEY].to(torch.uint8)

    with pytest.raises(UnsupportedModelError, match=r"w2\.weight: got U8 experts"):
        plan_of(rewrite(saved("mixtral"), tmp_path, to_bytes))


def test_the_same_tensor_in_two_shards_is_refused(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    folder = saved("mixtral")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    stale = tmp_path / "stale.safetensors"
    shutil.copy(folder / index[KEY], stale)
    model = describe.build_on_meta(folder)
    files = [*shard_files(folder), str(stale)]
    with pytest.raises(CheckpointError, match="two tensors of this name"):
        plan_checkpoint(model, find_expert_sites(model), files)


def test_fused_and_per_expert_at_once_are_refused(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    def add_fused(tensors: dict[str, Any]) -> None:
        fused = tiny.sites_of(tiny.build("mixtral"))["model.layers.1.mlp.experts"]
        tensors["model.layers.1.mlp.experts.down_proj"] = fused.down_proj.detach().clone()

    with pytest.raises(CheckpointError, match="the same experts twice"):
        plan_of(rewrite(saved("mixtral"), tmp_path, add_fused))


def test_a_missing_shard_is_named(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved("mixtral"), tmp_path / "copy")
    victim = sorted(folder.glob("model-*.safetensors"))[3]
    victim.unlink()
    with pytest.raises(CheckpointError, match=victim.name):
        plan_of(folder)


def test_a_truncated_shard_is_named(saved: Callable[..., Path], tmp_path: Path) -> None:
    folder = shutil.copytree(saved("mixtral"), tmp_path / "copy")
    victim = sorted(folder.glob("model-*.safetensors"))[3]
    victim.write_bytes(victim.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=victim.name):
        plan_of(folder)


def test_pickles_are_refused_with_advice(saved: Callable[..., Path], tmp_path: Path) -> None:
    model = describe.build_on_meta(saved("mixtral"))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*save_pretrained"):
        plan_checkpoint(model, find_expert_sites(model), [str(tmp_path / "pytorch_model.bin")])


def test_a_wider_dtype_keeps_the_stored_bytes(saved: Callable[..., Path]) -> None:
    plan = plan_of(saved("mixtral", dtype=torch.bfloat16), torch.float32)
    assert not plan.needs_ingest
    assert {p.stored for p in plan.sites} == {"BF16"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrower_dtype_is_ingested_as_transformers_casts(
    saved: Callable[..., Path], dtype: torch.dtype
) -> None:
    plan = plan_of(saved("mixtral"), dtype)
    assert "F32 is converted to" in plan.needs_ingest
    (first, *_) = plan.sites
    made = ingest.convert_site(plan, first)
    expected = tiny.sites_of(tiny.build("mixtral"))[first.site.name].gate_up_proj.to(dtype)
    assert torch.equal(made["w13"], expected)


def test_memory_pieces_and_unpacking_are_inverse() -> None:
    for family in tiny.CONFIGS:
        for site in find_expert_sites(tiny.build(family)):
            builder = layout.empty_builder(OPTIONS)
            tensors = {s: getattr(site.module, n).detach() for s, n in site.parameters.items()}
            layer = layout.add_layer(builder, site, "F32")
            layout.add_tensors(builder, layer, site, tensors)
            rebuilt = layout.read_tensors(builder.build(), layer, site, torch.float32)
            for section, tensor in tensors.items():
                assert torch.equal(rebuilt[section], tensor)
