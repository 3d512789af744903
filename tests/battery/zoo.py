"""Hand-written tiny models: what breaks the assumptions that the other families share.

The battery takes a family's kwargs from here only where the rules of `small_config.py` do not
get a working model with experts in it; the variants (a latent width, group-limited routing) and
the models that sluice must refuse have no other home. Everything is constructed, nothing is
downloaded. In kwargs common to all, expert widths avoid 16 and 32, which would make a projection
square and hide a transposition.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
COMMON: dict[str, Any] = IDS | {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,  # tied, greedy decoding repeats one token
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 8, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 2}
WIDTHS = {"intermediate_size": 48, "moe_intermediate_size": 24}
MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
DELTA_NET = {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 16,
    "linear_conv_kernel_dim": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 32,
}


@dataclass(frozen=True, slots=True)
class ZooModel:
    """One tiny model.

    Attributes:
        config: Name of its config class in transformers.
        model: Name of its model class.
        kwargs: What the config is built with.
        variant: Distinguishes several models of one config class; "" is the family's own.
        without: Common kwargs this config must not get.
    """

    config: str
    model: str
    kwargs: dict[str, Any]
    variant: str = ""
    without: tuple[str, ...] = field(default=())

    @property
    def name(self) -> str:
        stem = self.config.removesuffix("Config").removesuffix("Text")
        return f"{stem}-{self.variant}" if self.variant else stem

    def full_kwargs(self) -> dict[str, Any]:
        common = {k: v for k, v in COMMON.items() if k not in self.without}
        return common | self.kwargs


_NOT_COMMON = tuple(k for k in COMMON if k not in IDS)  # for configs with names of their own


def _lm(stem: str, kwargs: dict[str, Any], **how: Any) -> ZooModel:
    config = how.pop("config", f"{stem}Config")
    return ZooModel(config, f"{stem}ForCausalLM", kwargs, **how)


def _deepseek_v2(**extra: Any) -> dict[str, Any]:
    kwargs = {"num_key_value_heads": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
    return kwargs | WIDTHS | ROUTED | MLA | {"kv_lora_rank": 32} | extra


def _nemotron_h(**extra: Any) -> dict[str, Any]:
    kwargs = {
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": 32,
        "head_dim": 8,
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "n_group": 1,
        "topk_group": 1,
        "use_mamba_kernels": False,
    }
    return kwargs | WIDTHS | ROUTED | extra


CAUSAL_LMS: tuple[ZooModel, ...] = (
    _lm("Mixtral", {"intermediate_size": 48} | LOCAL),
    _lm("Phimoe", {"intermediate_size": 48} | LOCAL),  # its sparsemixer is written for top 2
    _lm(
        "Qwen2Moe",
        {"shared_expert_intermediate_size": 32, "mlp_only_layers": [0]} | WIDTHS | EXPERTS,
    ),
    _lm("Qwen3Moe", {"norm_topk_prob": True} | WIDTHS | EXPERTS),
    _lm("Qwen3Next", DELTA_NET | EXPERTS),
    _lm("Qwen3_5Moe", DELTA_NET | EXPERTS, config="Qwen3_5MoeTextConfig"),
    _lm("Olmoe", {"intermediate_size": 24} | EXPERTS),
    _lm("FlexOlmo", {"intermediate_size": 24} | EXPERTS),
    _lm("DeepseekV2", _deepseek_v2()),
    _lm(
        "DeepseekV2",
        _deepseek_v2(topk_method="group_limited_greedy", n_group=2, topk_group=1),
        variant="group-limited",
    ),
    _lm(
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        }
        | WIDTHS
        | ROUTED
        | MLA
        | {"q_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 32},
    ),
    _lm("GptOss", {"intermediate_size": 40, "head_dim": 8, "sliding_window": 16} | LOCAL),
    _lm("GraniteMoe", {"intermediate_size": 40} | LOCAL),
    _lm(
        "GraniteMoeHybrid",
        {
            "intermediate_size": 40,
            "shared_intermediate_size": 48,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
        }
        | LOCAL,
    ),
    _lm(
        "Jamba",
        {
            "intermediate_size": 40,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
    _lm("MiniMax", {"intermediate_size": 40, "block_size": 4} | LOCAL),
    _lm("MiniMaxM2", {"intermediate_size": 24, "head_dim": 8} | LOCAL),
    _lm("Glm4Moe", {"n_shared_experts": 1, "first_k_dense_replace": 1} | WIDTHS | ROUTED),
    _lm(
        "Dots1",
        {"n_shared_experts": 1, "first_k_dense_replace": 1, "sliding_window": None}
        | WIDTHS
        | ROUTED,
    ),
    _lm(
        "Dots3Note",
        {
            "num_key_value_heads": 4,
            "n_shared_experts": 1,
            "shared_experts_intermediate_size": 24,
            "layer_types": ["indexed_attention", "sliding_attention", "sliding_attention"],
            "sliding_window": 16,
            "head_dim": 32,
            "index_topk": 8,
            "index_head_dim": 16,
            "index_n_heads": 4,
            "n_group": 2,
            "topk_group": 1,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 16,
            "swa_kv_lora_rank": 16,
            "swa_head_dim": 32,
            "swa_qk_nope_head_dim": 16,
            "swa_v_head_dim": 16,
        }
        | WIDTHS
        | ROUTED
        | MLA,
        config="Dots3NoteTextConfig",
    ),
    _lm(
        "Ernie4_5_Moe",
        {
            "intermediate_size": 48,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_intermediate_size": 24,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    _lm(
        "HunYuanMoEV1",
        {"intermediate_size": 40, "num_experts": 8, "moe_topk": 2, "head_dim": 8},
    ),
    _lm(
        "Lfm2Moe",
        {"num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv"]}
        | WIDTHS
        | EXPERTS,
    ),
    _lm("NemotronH", _nemotron_h(), without=("num_hidden_layers",)),
    _lm(
        "NemotronH",
        _nemotron_h(moe_latent_size=16),
        variant="latent",
        without=("num_hidden_layers",),
    ),
    _lm(
        "Gemma4",
        {
            "intermediate_size": 48,
            "head_dim": 8,
            "global_head_dim": 16,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 24,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "hidden_size_per_layer_input": 0,
        },
        config="Gemma4TextConfig",
    ),
    _lm(
        "DeepseekV4",
        {
            "num_key_value_heads": 1,
            "head_dim": 32,
            "moe_intermediate_size": 24,
            "q_lora_rank": 16,
            "o_groups": 2,
            "o_lora_rank": 16,
            "index_n_heads": 4,
            "index_head_dim": 16,
            "index_topk": 8,
            "hc_mult": 2,
            "sliding_window": 16,
            "mlp_layer_types": ["hash_moe", "moe", "moe"],
        }
        | ROUTED,
    ),
    _lm(
        "Zaya",
        {
            "moe_intermediate_size": 24,
            "num_experts": 8,
            "num_experts_per_tok": 1,  # only 1 is valid
            "head_dim": 8,
            "router_hidden_size": 16,
        },
    ),
    _lm(
        "AriaText",
        {"intermediate_size": 24, "moe_num_experts": 8, "moe_topk": 2, "moe_num_shared_experts": 1},
    ),
    _lm(
        "Inkling",
        {
            "n_shared_experts": 2,
            "head_dim": 8,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "sliding_window_size": 16,
            "d_rel": 4,
            "rel_extent": 16,
        }
        | WIDTHS
        | ROUTED,
        config="InklingTextConfig",
    ),
    _lm(
        "Qwen4Exp",
        DELTA_NET
        | {
            "layer_types": ["linear_attention", "full_attention"],
            "hc_lowrank": 16,
            "hc_count": 2,
            "indexer_n_heads": 4,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 4,
        }
        | EXPERTS,
        config="Qwen4ExpTextConfig",
    ),
)

# No causal LM of their own, but a text model whose experts are like no other's.
TEXT_MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "MuseSparkTextConfig",
        "MuseSparkTextModel",
        {"moe_hidden_size": 16, "moe_intermediate_size": 24, "head_dim": 8, "intermediate_size": 48}
        | LOCAL,
    ),
    ZooModel(
        "HYV4VLTextConfig",
        "HYV4VLTextModel",
        {
            "num_key_value_heads": 4,
            "n_shared_experts": 1,
            "index_topk": 8,
            "index_head_dim": 16,
            "index_n_heads": 4,
            "hc_mult": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 2, 2],
            },
        }
        | WIDTHS
        | ROUTED
        | MLA,
    ),
    ZooModel(
        "Ernie4_5_VLMoeTextConfig",
        "Ernie4_5_VLMoeTextModel",
        {
            "intermediate_size": 48,
            "moe_intermediate_size": [24, 40],  # text experts, vision experts
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            },
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
        },
    ),
)

# Experts, but not behind the interface: sluice refuses them by name until a shim claims them.
REFUSED: tuple[ZooModel, ...] = (
    _lm(
        "Llama4",
        {
            "intermediate_size": 40,
            "intermediate_size_mlp": 48,
            "head_dim": 8,
            "num_hidden_layers": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 64,
        },
        config="Llama4TextConfig",
    ),
    _lm(
        "LongcatFlash",
        {
            "num_layers": 2,
            "num_key_value_heads": 4,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 24,
            "n_routed_experts": 8,
            "zero_expert_num": 4,
            "moe_topk": 2,
            "head_dim": 16,
        }
        | MLA,
        without=("num_hidden_layers",),
    ),
    _lm(
        "Dbrx",
        {
            "vocab_size": 128,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
            "ffn_config": {
                "ffn_hidden_size": 24,
                "hidden_size": 32,
                "moe_num_experts": 8,
                "moe_top_k": 2,
                "moe_jitter_eps": 0.0,
            },
        },
        without=_NOT_COMMON,
    ),
    _lm(
        "JetMoe",
        {
            "intermediate_size": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "kv_channels": 8,
        },
    ),
    ZooModel(
        "SwitchTransformersConfig",
        "SwitchTransformersForConditionalGeneration",
        {
            "vocab_size": 128,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "num_experts": 4,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "router_jitter_noise": 0.0,
            "decoder_start_token_id": 0,
        },
        without=_NOT_COMMON,
    ),
    ZooModel(
        "NllbMoeConfig",
        "NllbMoeForConditionalGeneration",
        {
            "vocab_size": 128,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_experts": 4,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
            "encoder_layerdrop": 0.0,
            "decoder_layerdrop": 0.0,
        },
        without=_NOT_COMMON,
    ),
)
