"""Synthetic checkpoints: real layer shapes, random weights, per-expert files as on the hub.

Made once after a look at free disk, kept under `sluice.folders.bench_folder()`, found again by the
hash of what they were made from.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from machine import canonical
from sluice.folders import bench_folder

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def build_config(model: dict[str, Any]) -> Any:
    """The transformers config of a scenario's `[model]` table."""
    from transformers import AutoConfig

    kwargs = {**model["config"], **dict.fromkeys(model.get("none", []))}
    return AutoConfig.for_model(model["family"], **kwargs)


def checkpoint(model: dict[str, Any]) -> Path:
    """The folder of the checkpoint that `[model]` describes, made if it is not there."""
    what = {k: model.get(k) for k in ("family", "config", "none", "dtype", "seed")}
    digest = hashlib.sha256(canonical(what).encode()).hexdigest()[:16]
    folder = bench_folder() / f"{model['family']}-{digest}"
    if (folder / "complete").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make(model, folder)
    (folder / "complete").write_text(canonical(what))
    return folder


def make(model: dict[str, Any], folder: Path) -> None:
    """Writes config and shards, one per decoder layer; at most one layer is in memory."""
    from transformers import AutoModelForCausalLM

    config = build_config(model)
    dtype = DTYPES[model["dtype"]]
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(config, dtype=dtype)
    sizes = {name: p.numel() * dtype.itemsize for name, p in meta.named_parameters()}
    free = shutil.disk_usage(folder).free
    if free < sum(sizes.values()) * 1.05:
        raise OSError(f"{folder}: needs {sum(sizes.values())} bytes, {free} are free")
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(model["seed"])
    index: dict[str, str] = {}
    groups: dict[str, list[str]] = {}
    for name in sizes:
        parts = name.split(".")
        group = ".".join(parts[:3]) if parts[1] == "layers" else "rest"
        groups.setdefault(group, []).append(name)
    shapes = {name: tuple(p.shape) for name, p in meta.named_parameters()}
    for number, (group, names) in enumerate(groups.items()):
        sys.stderr.write(f"\r{folder.name}: {group} ({number + 1}/{len(groups)})   ")
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            tensors.update(random_tensors(name, shapes[name], dtype, generator))
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))
    sys.stderr.write("\n")
    total = {"total_size": sum(sizes.values())}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": total, "weight_map": index})
    )


def random_tensors(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """What one parameter is on disk: itself, or, for fused experts, a tensor per expert."""
    if len(shape) == 1:
        return {name: torch.ones(shape, dtype=dtype)}
    scale = shape[-1] ** -0.5
    if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
        return {name: normal(shape, scale, dtype, generator)}
    stem, kind = name.rsplit(".", 1)
    out: dict[str, torch.Tensor] = {}
    for expert in range(shape[0]):
        if kind == "down_proj":
            value = normal(shape[1:], scale, dtype, generator)
            out[f"{stem}.{expert}.down_proj.weight"] = value
            continue
        gate, up = normal(shape[1:], scale, dtype, generator).chunk(2)
        out[f"{stem}.{expert}.gate_proj.weight"] = gate.contiguous()
        out[f"{stem}.{expert}.up_proj.weight"] = up.contiguous()
    return out


def normal(
    shape: tuple[int, ...], scale: float, dtype: torch.dtype, generator: torch.Generator
) -> torch.Tensor:
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def clean() -> list[Path]:
    """Removes every synthetic checkpoint (and what arms wrote beside them); returns them."""
    home = bench_folder()
    folders = sorted(p for p in home.iterdir() if p.is_dir()) if home.exists() else []
    for folder in folders:
        shutil.rmtree(folder)
    return folders
