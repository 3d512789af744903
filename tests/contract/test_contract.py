"""The installed transformers against its recording, and against what must always hold.

`SLUICE_RECORD=1 pytest tests/contract` writes the recording of a new release; read its diff.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import transformers

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from . import probe

RECORDED = Path(__file__).parent / "recorded"
pytestmark = pytest.mark.contract


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return {name: json.loads(json.dumps(fact)) for name, fact in probe.facts().items()}


def recording() -> Path:
    return RECORDED / f"{transformers.__version__}.jsonl"


def test_this_release_is_recorded(found: dict[str, Any]) -> None:
    if os.environ.get("SLUICE_RECORD") == "1":
        lines = [json.dumps({"check": name, "fact": fact}) for name, fact in found.items()]
        recording().write_text("\n".join(lines) + "\n")
    assert recording().exists(), (
        f"transformers {transformers.__version__} has no recording; run the probe with "
        "SLUICE_RECORD=1 and read how it differs from its neighbours"
    )


@pytest.mark.parametrize("name", list(probe.CHECKS))
def test_a_fact_is_as_recorded(found: dict[str, Any], name: str) -> None:
    held = [json.loads(line) for line in recording().read_text().splitlines()]
    assert {"check": name, "fact": found[name]} in held, json.dumps(found[name])


def test_decorator_flags_are_those_we_know(found: dict[str, Any]) -> None:
    from sluice.hf.compat import EXPERT_FLAGS

    assert found["decorator_flags"].items() <= EXPERT_FLAGS.items()


def test_experts_functions_take_hidden_states_ids_and_weights(found: dict[str, Any]) -> None:
    for name, parameters in found["built_in_experts_functions"].items():
        assert parameters == ["self", "hidden_states", "top_k_index", "top_k_weights"], name


def test_keys_are_renamed_by_position(found: dict[str, Any]) -> None:
    assert found["rename_source_key_parameters"][:5] == [
        "source_key",
        "weight_renamings",
        "weight_converters",
        "base_model_prefix",
        "meta_state_dict",
    ]


def test_the_quantizer_gets_the_checkpoints_files(found: dict[str, Any]) -> None:
    assert {"checkpoint_files", "device_map"} <= set(found["kwargs_before_loading"])


def test_registration_is_strict(found: dict[str, Any]) -> None:
    assert set(found["registration"].values()) == {"TypeError", "ValueError"}


@pytest.mark.parametrize("style", ["per_expert", "fused"])
def test_no_expert_is_read_and_no_key_reported(found: dict[str, Any], style: str) -> None:
    seen = found["expert_reads_while_loading"][style]
    assert seen["expert tensors read"] == 0
    assert seen["dense tensors read"] > 0
    assert seen["unexpected"] == seen["missing"] == []


def test_the_loaded_model_carries_no_trace_of_a_quantizer(found: dict[str, Any]) -> None:
    model = found["loaded_model"]
    assert not model["hf_quantizer"]
    assert not model["is_quantized"]
    assert not model["quantization_config"]
    assert not model["_is_quantized"]
    assert not model["saved config names it"]
    assert model["_weight_conversions"]
    assert model["implementation"] == "sluice"


def test_the_decode_loop_leaves_our_implementation_alone(found: dict[str, Any]) -> None:
    assert found["decode_toggle"]["stock"] > 0, "the probe must see a toggle where there is one"
    assert found["decode_toggle"]["offloaded"] == 0
    assert found["disabled_compile_is_honoured"]


def test_our_name_is_no_default(found: dict[str, Any]) -> None:
    assert found["experts_without_implementation"] in ("grouped_mm", "eager")


def test_a_failed_load_leaves_nothing_behind(found: dict[str, Any]) -> None:
    assert found["a_failed_load_leaves_nothing_behind"]
