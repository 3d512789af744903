"""Small random models of the structures that differ, built in memory and saved to folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    MixtralConfig,
    NemotronHConfig,
    Qwen2MoeConfig,
)

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
NUM_EXPERTS = 8
ROUTER_SCALE = 50.0  # top-k is decisive: rounding must not choose other experts


def mixtral_config(**overrides: Any) -> MixtralConfig:
    fields = {"intermediate_size": 48, "num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2}
    return MixtralConfig(**{**COMMON, **fields, **overrides})


def _gpt_oss() -> GptOssConfig:
    return GptOssConfig(
        **COMMON,
        intermediate_size=40,
        head_dim=8,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
        sliding_window=16,
    )


def _qwen2_moe() -> Qwen2MoeConfig:
    return Qwen2MoeConfig(
        **COMMON,
        intermediate_size=48,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=32,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
        mlp_only_layers=[0],
    )


def _nemotron_h() -> NemotronHConfig:
    common = {k: v for k, v in COMMON.items() if k != "num_hidden_layers"}
    return NemotronHConfig(
        **common,
        intermediate_size=48,
        moe_intermediate_size=24,
        n_routed_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_shared_expert_intermediate_size=32,
        head_dim=8,
        layers_block_type=["mamba", "moe", "attention", "moe"],
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=8,
        n_groups=2,
        n_group=1,
        topk_group=1,
        use_mamba_kernels=False,
        moe_latent_size=16,
    )


CONFIGS: dict[str, Callable[[], Any]] = {
    "mixtral": mixtral_config,  # the common layout, one file tensor per expert
    "gpt_oss": _gpt_oss,  # transposed, interleaved, with biases, fused in the file
    "qwen2_moe": _qwen2_moe,  # dense layers between, a shared expert
    "nemotron_h": _nemotron_h,  # no gate, latent width
}


def build(family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A family's model in eval mode, with decisive routers; the same bytes every time."""
    torch.manual_seed(0)
    kwargs = {"attn_implementation": "eager"} if family == "gpt_oss" else {}
    config = mixtral_config(**overrides) if overrides else CONFIGS[family]()
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **kwargs).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gate.weight", "router.weight")):
                parameter.mul_(ROUTER_SCALE)
            if name.endswith("_proj_bias"):
                parameter.normal_(std=0.5)
    return model


def save(model: Any, folder: Path, *, per_expert: bool = True) -> Path:
    """Saves in shards of 20 KB, in the original style or with fused experts."""
    model.save_pretrained(folder, max_shard_size="20KB", save_original_format=per_expert)
    return folder


def load(folder: Path, family: str = "mixtral", device_memory: Any = "25%", **fields: Any) -> Any:
    """Loads by path Q."""
    import sluice

    kwargs: dict[str, Any] = {"attn_implementation": "eager"} if family == "gpt_oss" else {}
    if "dtype" in fields:
        kwargs["dtype"] = fields.pop("dtype")
    config = sluice.OffloadConfig(device_memory=device_memory, **fields)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **kwargs)


PROMPT = torch.tensor([[1, 5, 9, 77, 20], [1, 33, 4, 100, 6]])


def greedy(model: Any, ids: torch.Tensor = PROMPT, **kwargs: Any) -> torch.Tensor:
    """Eight greedy tokens."""
    mask = torch.ones_like(ids)
    fields = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **kwargs}
    return model.generate(ids, attention_mask=mask, **fields)


def sites_of(model: Any) -> dict[str, torch.nn.Module]:
    """Every module called `experts`."""
    return {n: m for n, m in model.named_modules() if n.endswith(".experts")}
