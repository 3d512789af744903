"""A family's config, shrunk by introspection until its model is well under a megabyte.

No family is named here: a rule says what a field of a given name may shrink to, and only fields
that the config class declares are touched. What no rule can get right stands in `zoo.py`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

Fields = dict[str, Any]
Rule = Callable[[Any, Fields], Any]

# Widths are multiples of 8 (grouped_mm wants 16-byte strides). Expert widths avoid 16 and 32:
# H is 32, and a square projection hides a transposition.
HIDDEN = 32
EXPERT_WIDTH = 24
DENSE_WIDTH = 48
ONLY_WIDTH = 40  # of experts that share `intermediate_size` with nothing else
NUM_LAYERS = 3
NUM_EXPERTS = 8
TOP_K = 2
HEADS = 4
WINDOW = 16


def _always(value: Any) -> Rule:
    return lambda default, fields: value


def _if_set(value: Any) -> Rule:
    """`value`, unless the family leaves the field None or 0, which means "not used"."""
    return lambda default, fields: value if default else default


def _at_most(limit: int) -> Rule:
    return lambda default, fields: min(default, limit) if isinstance(default, int) else default


def _kv_heads(default: Any, fields: Fields) -> Any:
    if default is None or default == 1:
        return default
    if "kv_lora_rank" in fields or default == fields.get("num_attention_heads"):
        return HEADS
    return HEADS // 2


def _dense_width(default: Any, fields: Fields) -> Any:
    return DENSE_WIDTH if "moe_intermediate_size" in fields else ONLY_WIDTH


LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type")

# The first rule whose pattern matches the whole name decides.
RULES: tuple[tuple[str, Rule], ...] = (
    (r"pad_token_id", _always(0)),
    (r"bos_token_id", _always(1)),
    (r"eos_token_id", _always(2)),
    (r"tie_word_embeddings", _always(False)),  # tied, greedy decoding repeats one token
    (r"(unpadded_)?vocab_size(_per_layer_input)?", _if_set(128)),
    (r"hidden_size", _always(HIDDEN)),
    (r"hidden_size_per_layer_input", _always(0)),
    (r"moe_hidden_size", _if_set(HIDDEN // 2)),
    (r"num_hidden_layers", _always(NUM_LAYERS)),
    (r"max_position_embeddings", _always(128)),
    (r"(swa_|linear_)?num_(attention_)?heads", _if_set(HEADS)),
    (r"(swa_)?num_key_value_heads", _kv_heads),
    (r"(head_dim|swa_head_dim|qk_rope_head_dim|rotary_dim)", _if_set(8)),
    (r".*head_dim", _if_set(16)),
    (r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts)", _always(NUM_EXPERTS)),
    (r"(num_experts_per_tok|moe_topk|moe_k|top_k_experts)", _always(TOP_K)),
    (r"(n_|num_|moe_num_)shared_experts", _at_most(1)),
    (r"n_group", _at_most(2)),
    (r"topk_group", _at_most(1)),
    (r"moe_intermediate_size", _always(EXPERT_WIDTH)),
    (r"intermediate_size", _dense_width),
    (r".*intermediate_size", _if_set(DENSE_WIDTH)),
    (r".*_rank|hc_lowrank|router_hidden_size", _if_set(16)),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", _at_most(1)),
    (r"num_mtp_layers|num_nextn_predict_layers", _at_most(0)),
    (r"sliding_window(_size)?|rel_extent|index_block_size", _if_set(WINDOW)),
    (r".*chunk_size|block_size", _if_set(8)),
    (r"index_topk", _if_set(8)),
    (r"index_kpool", _at_most(4)),
    (r"index_n_heads|indexer_n_heads", _if_set(HEADS)),
    (r"linear_num_key_heads", _if_set(HEADS)),
    (r"linear_num_value_heads", _if_set(2 * HEADS)),
    (r"mamba_n_heads|mamba_num_heads", _if_set(HEADS)),
    (r"mamba_d_state|ssm_state_size", _if_set(8)),
    (r"(hc_mult|hc_count|n_groups|o_groups)", _at_most(2)),
    (r"use_mamba_kernels", _always(False)),
    (r"n_layers_per_attn_res_block|loop_layer_index_start", _at_most(1)),
    (r"loop_layer_index_end", _at_most(NUM_LAYERS)),
    (r"loop_num_passes", _at_most(2)),
)


def small_fields(config_class: type) -> Fields:
    """What the rules make of the fields `config_class` declares; the others keep their default."""
    defaults = {f.name: _default(f) for f in dataclasses.fields(config_class)}
    small = _layer_kinds(config_class, defaults)
    for name, default in defaults.items():
        rule = next((rule for pattern, rule in RULES if re.fullmatch(pattern, name)), None)
        if rule is not None:
            value = rule(default, defaults)
            if value != default:
                small[name] = value
    return small


def small_config(config_class: type, **overrides: Any) -> Any:
    """The shrunk config of a family, `overrides` applied last."""
    return config_class(**(small_fields(config_class) | overrides))


def _layer_kinds(config_class: type, defaults: Fields) -> Fields:
    """Each kind of layer that the family's own default config mixes, in order of appearance.

    The last kind fills up: one dense layer and two sparse ones, or one of each of three kinds.
    """
    lists = [name for name in LAYER_LISTS if name in defaults]
    full_size = config_class() if lists else None
    small: Fields = {}
    for name in lists:
        kinds = list(dict.fromkeys(getattr(full_size, name) or ()))
        if len(kinds) > 1:
            small[name] = [kinds[min(i, len(kinds) - 1)] for i in range(NUM_LAYERS)]
    return small


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None
