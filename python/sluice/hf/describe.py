"""A model's experts from its config alone: built on meta, asked by the same detection."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sluice.errors import ConfigError, SluiceError, UnsupportedModelError
from sluice.hf import compat, layout
from sluice.hf.detect import find_expert_sites
from sluice.hf.site import ExpertSite, dtype_name
from sluice.plan import LayerShape, plan_model, table_of

# Names that families give to K; read for tables of budgets only, never for computing.
_TOP_K_NAMES = (
    "top_k",
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "moe_top_k",
    "top_k_experts",
)


def build_on_meta(config_path: str | os.PathLike[str], dtype: torch.dtype | None = None) -> Any:
    """The model of a config.json (or of the folder that holds it), without memory for weights.

    Raises:
        ConfigError: No such config, or one that transformers cannot build.
        UnsupportedModelError: The checkpoint is quantised already.
    """
    compat.version()
    import transformers

    path = Path(config_path)
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"{path}: got no config.json, expected a checkpoint folder or the file")
    try:
        config = transformers.AutoConfig.from_pretrained(str(file))
        refuse_quantised(config, str(path))
        kind = _model_class(config)
        wanted = dtype or getattr(config, "dtype", None) or torch.float32
        with torch.device("meta"):
            if hasattr(kind, "from_config"):
                return kind.from_config(config, dtype=wanted)
            return kind._from_config(config, dtype=wanted)
    except SluiceError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{file}: transformers {compat.version()} cannot build this model ({error}); does it "
            "need a newer transformers or code of its own?"
        ) from error


def describe_model(config_path: str | os.PathLike[str]) -> list[LayerShape]:
    """Every MoE layer of a config.json, as `sluice.plan.plan_model` takes them.

    Raises:
        ConfigError: There is no config, or transformers cannot build it.
        UnsupportedModelError: Its experts are of no structure that sluice knows.
    """
    model = build_on_meta(config_path)
    return layers_of(model, find_expert_sites(model))


def layers_of(model: Any, sites: Sequence[ExpertSite]) -> list[LayerShape]:
    """The sites of a built model as shapes."""
    layers: list[LayerShape] = []
    for site in sites:
        dtype = dtype_name(site.dtype)
        layers.append(
            LayerShape(
                name=site.name,
                num_experts=site.num_experts,
                top_k=_top_k(model, site),
                hidden=site.hidden,
                dtype=dtype,
                expert_bytes=layout.expert_bytes(site, dtype),
                slot_bytes=layout.slot_bytes(site, dtype),
            )
        )
    return layers


def missing_budget(model: Any, sites: Sequence[ExpertSite]) -> ConfigError:
    """The error for a missing `device_memory`: what budgets buy for this very model."""
    name = type(model).__name__
    return ConfigError(
        f"device_memory: got nothing, expected bytes, a size like '12GiB' or a share like '25%'; "
        f"{name} can have:\n{table_of(plan_model(name, layers_of(model, sites)))}"
    )


def load_config(model_id: Any, hf_kwargs: dict[str, Any]) -> Any:
    """The config that `from_pretrained` would read, by the same arguments."""
    import transformers

    names = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "trust_remote_code")
    chosen = {name: hf_kwargs[name] for name in names if name in hf_kwargs}
    return transformers.AutoConfig.from_pretrained(model_id, **chosen)


def refuse_quantised(config: Any, name: str) -> None:
    """Raises UnsupportedModelError for a checkpoint that is quantised already."""
    for nested in compat.sub_configs(config):
        held = getattr(nested, "quantization_config", None)
        if held:
            method = held.get("quant_method") if isinstance(held, dict) else held.quant_method
            raise UnsupportedModelError(
                f"{name}: got a checkpoint quantised with {getattr(method, 'value', method)}, "
                "expected plain bf16, fp16 or fp32 weights; use the unquantised checkpoint"
            )


def config_sha256(folder: str | os.PathLike[str]) -> str:
    """Hash of the config as it means, whatever its spacing and order of keys."""
    import hashlib

    text = (Path(folder) / "config.json").read_text()
    return hashlib.sha256(json.dumps(json.loads(text), sort_keys=True).encode()).hexdigest()


def _model_class(config: Any) -> Any:
    """The class that the checkpoint was saved from, else the causal language model."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        kind = getattr(transformers, name, None)
        if kind is not None:
            return kind
    return transformers.AutoModelForCausalLM


def _top_k(model: Any, site: ExpertSite) -> int:
    parent = model.get_submodule(site.name.rpartition(".")[0])
    config = getattr(site.module, "config", None)
    for owner in (*parent.children(), parent, config):
        for name in _TOP_K_NAMES:
            value = getattr(owner, name, None)
            if isinstance(value, list | tuple) and value:
                value = max(value)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return min(value, site.num_experts)
    return 1
