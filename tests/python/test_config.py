from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from sluice import _core
from sluice.config import OffloadOptions
from sluice.errors import ConfigError

ROOT = Path(__file__).parents[2]


def fields_of_struct(header: str, struct: str) -> dict[str, str]:
    """name → default of a C++ struct's fields."""
    text = (ROOT / header).read_text()
    body = text[text.index(f"struct {struct} {{") :]
    body = body[: body.index("};")]
    return dict(re.findall(r"^\s+[\w:<>]+ (\w+) = ([^;]+);", body, re.MULTILINE))


def test_fields_and_defaults_mirror_the_engine() -> None:
    options = OffloadOptions(device_memory=1)
    mirrored = fields_of_struct("csrc/engine/engine.h", "EngineOptions")
    in_bytes = {"device_memory", "host_memory", "pinned_cap"}
    assert mirrored.keys() == in_bytes | {
        "host_tier",
        "prefill",
        "policy",
        "io_threads",
        "timeline",
    }
    for name in in_bytes:
        assert hasattr(options, name)
        del mirrored[name]
    assert {name: json.loads(value) for name, value in mirrored.items()} == {
        name: getattr(options, name) for name in mirrored
    }


def test_fields_and_defaults_mirror_the_store() -> None:
    options = OffloadOptions(device_memory=1)
    mirrored = fields_of_struct("csrc/store/expert_store.h", "Options")
    assert mirrored.keys() == {"chunk_bytes", "verify", "direct", "read_rate"}
    assert mirrored["chunk_bytes"] == "kMiB"
    assert options.chunk_bytes_as_int() == 1 << 20
    assert mirrored["verify"] == f"Verify::k{options.verify.capitalize()}"
    assert json.loads(mirrored["direct"]) is options.direct


def test_every_field_is_documented() -> None:
    doc = OffloadOptions.__doc__ or ""
    for field in dataclasses.fields(OffloadOptions):
        assert re.search(rf"^\s+{field.name}: ", doc, re.MULTILINE), field.name


def test_options_survive_json() -> None:
    options = OffloadOptions(
        device_memory="25%", exclude=(r"layers\.0\.", "mtp"), policy="lru", offload_dir="there"
    )
    assert OffloadOptions.from_dict(json.loads(json.dumps(options.to_dict()))) == options


def test_missing_device_memory_says_what_to_pass() -> None:
    with pytest.raises(ConfigError, match=r'device_memory: missing.*"12GiB".*"25%".*sluice plan'):
        OffloadOptions()


def test_unknown_keys_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"device_memry.*did you mean 'device_memory'"):
        OffloadOptions.from_dict({"device_memry": "1GiB"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"device_memory": 0}, "more than 0"),
        ({"device_memory": "0%"}, r"device_memory: .*0%.*100%"),
        ({"device_memory": "101%"}, r"device_memory: .*101%.*100%"),
        ({"device_memory": -5}, "device_memory"),
        ({"device_memory": "lots"}, "device_memory: size: got"),
        ({"device_memory": True}, "device_memory: got True"),
        ({"device_memory": 1.5}, "device_memory: got 1.5"),
        ({"device_memory": {"cuda:0": "1GiB"}}, "mapping"),
        (
            {"host_memory": "1GiB", "host_tier": "none"},
            "host_memory: got '1GiB' beside host_tier='none', expected none.*leave one of them out",
        ),
        ({"policy": "lrru"}, "did you mean 'lru'"),
        ({"policy": "lru:5"}, "expected one of"),
        ({"policy": "decayed-lfu:x"}, "expected a half-life"),
        ({"chunk_bytes": 5000}, "expected whole 4096 bytes"),
        ({"io_threads": 64, "chunk_bytes": "4MiB"}, "at most 16777216; lower one"),
        ({"policy": dict}, "simulator"),
        ({"policy": 3}, "expected a name"),
        ({"backing": "rom"}, "did you mean 'ram'"),
        ({"verify": "sometimes"}, "first, always, never"),
        ({"io_threads": 0}, "1 to 64"),
        ({"io_threads": True}, "1 to 64"),
        ({"chunk_bytes": "1KiB"}, "4096"),
        ({"chunk_bytes": "50%"}, "chunk_bytes"),
        ({"exclude": ("(",)}, "regular expressions"),
        ({"exclude": 3}, "regular expressions"),
        ({"pack": 3}, "pack"),
        ({"pack": ""}, "pack"),
        ({"direct": 1}, "True or False"),
    ],
)
def test_a_value_that_cannot_work_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OffloadOptions(**{"device_memory": "1GiB", **fields})  # type: ignore[arg-type]


def test_every_live_policy_is_accepted() -> None:
    for name in [*_core.policy_names(), "decayed-lfu:16"]:
        assert OffloadOptions(device_memory=1, policy=name).policy == name


def test_a_lone_pattern_and_a_path_take_their_normal_form(tmp_path: Path) -> None:
    options = OffloadOptions(device_memory=1, exclude="mtp", offload_dir=tmp_path)  # type: ignore[arg-type]
    assert options.exclude == ("mtp",)
    assert options.offload_dir == str(tmp_path)


@pytest.mark.parametrize("percent", range(1, 101))
def test_a_percentage_of_whole_slots_buys_whole_slots(percent: int) -> None:
    slots, slot_bytes = 100, 4096 * 3
    options = OffloadOptions(device_memory=f"{percent}%")
    assert options.budget_bytes(slots * slot_bytes) // slot_bytes == percent


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("6GiB", 6 << 30), ("6GB", 6 * 10**9), ("1.5 MiB", 3 << 19), ("4096", 4096), ("0.1kb", 100)],
)
def test_sizes_are_exact(text: str, num_bytes: int) -> None:
    assert OffloadOptions(device_memory=text).budget_bytes(1) == num_bytes
