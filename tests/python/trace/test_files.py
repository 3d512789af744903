"""Traces on disk: what was saved comes back, and no file is believed."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from sluice import trace
from sluice.errors import CheckpointError, ConfigError
from sluice.trace import Trace, TraceSequence

DATA = Path(__file__).resolve().parents[3] / "benchmarks" / "data"


def make(
    *,
    num_experts: int = 8,
    lengths: tuple[int, ...] = (5, 3),
    ids: bool = True,
    hidden: bool = True,
) -> Trace:
    rng = np.random.default_rng(0)
    tokens = sum(lengths)
    ranked = np.argsort(rng.random((tokens, 3, num_experts)), axis=-1)[..., :2].astype(np.int16)
    ranked[0, 1, 1] = -1
    sequences: list[TraceSequence] = []
    start = 0
    for i, length in enumerate(lengths):
        sequences.append(TraceSequence(start, length, 2, f"task{i % 2}", f"request {i}"))
        start += length
    return Trace(
        experts=ranked,
        num_experts=num_experts,
        sequences=tuple(sequences),
        weights=np.sort(rng.random((tokens, 3, 2)), axis=-1)[..., ::-1].astype(np.float32),
        token_ids=rng.integers(0, 100, tokens, dtype=np.int32) if ids else None,
        steps=np.arange(tokens, dtype=np.int64) + 7,
        hidden=rng.standard_normal((tokens, 3, 4)).astype(np.float16) if hidden else None,
        model="Tiny:8x3",
        source="a test",
        own_text=True,
    )


def same(a: Any, b: Any) -> bool:
    return (a is None) == (b is None) and (a is None or bool((a == b).all()))


@pytest.mark.parametrize("num_experts", [8, 255, 256, 1000])
def test_a_trace_comes_back_and_states_what_its_weights_lost(
    tmp_path: Path, num_experts: int
) -> None:
    before = make(num_experts=num_experts)
    path = trace.save(before, tmp_path / "x")
    after = trace.load(path)
    assert path.name == "x.trace.safetensors"
    for name in ("experts", "token_ids", "steps", "hidden"):
        assert same(getattr(before, name), getattr(after, name)), name
    assert after.experts.min() == -1
    for name in ("num_experts", "model", "source", "own_text"):
        assert getattr(before, name) == getattr(after, name)
    assert [replace(s, content="") for s in after] == list(before)
    stored = header_of(path)
    lost = np.abs(after.weights.astype(np.float64) - before.weights).max()
    assert lost == pytest.approx(stored["weight_error"], abs=1e-7) and lost < 0.5001 / 65535
    wide = tensors_of(path)["experts"].dtype
    assert wide == (np.uint8 if num_experts <= 255 else np.int16)


def test_what_was_loaded_is_stored_without_further_loss(tmp_path: Path) -> None:
    once = trace.load(trace.save(make(), tmp_path / "a"))
    twice = trace.load(trace.save(once, tmp_path / "b"))
    assert same(once.weights, twice.weights)
    large = replace(make(), weights=make().weights * 5)
    once = trace.load(trace.save(large, tmp_path / "c"))
    assert same(once.weights, trace.load(trace.save(once, tmp_path / "d")).weights)


def test_four_decimals_are_kept_exactly_and_negative_weights_as_halves(tmp_path: Path) -> None:
    decimals = replace(make(), weights=(np.rint(make().weights * 1e4) / 1e4).astype(np.float32))
    after = trace.load(trace.save(decimals, tmp_path / "a", weight_scale=10000))
    assert same(after.weights, decimals.weights)
    signed = replace(make(), weights=(make().weights - 0.5).astype(np.float16).astype(np.float32))
    assert same(trace.load(trace.save(signed, tmp_path / "b")).weights, signed.weights)
    with pytest.raises(ConfigError, match="weight_scale: got 1000000"):
        trace.save(make(), tmp_path / "c", weight_scale=1e6)


def test_optional_arrays_may_be_absent(tmp_path: Path) -> None:
    bare = replace(make(ids=False, hidden=False), weights=None, steps=None, own_text=None)
    after = trace.load(trace.save(bare, tmp_path / "x"))
    assert [after.weights, after.token_ids, after.steps, after.hidden, after.own_text] == [None] * 5


def test_files_are_private_and_appear_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = trace.save(make(), tmp_path / "x")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        trace.save(make(lengths=(9,)), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_trace_above_the_cap_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected at most 100 B; raise max_bytes"):
        trace.save(make(), tmp_path / "x", max_bytes=100)
    with pytest.raises(ConfigError, match="max_bytes: got '25%'"):
        trace.save(make(), tmp_path / "x", max_bytes="25%")
    assert not list(tmp_path.iterdir())


def test_a_hash_of_other_content_is_not_written(tmp_path: Path) -> None:
    saved = trace.load(trace.save(make(), tmp_path / "x"))
    without_ids = replace(saved, token_ids=None)
    with pytest.raises(ConfigError, match="token ids were taken out needs new hashes"):
        trace.save(without_ids, tmp_path / "y")


def tensors_of(path: Path) -> dict[str, Any]:
    with safe_open(str(path), framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def header_of(path: Path) -> dict[str, Any]:
    with safe_open(str(path), framework="numpy") as file:
        return json.loads(file.metadata()["header"])


Change = Callable[[dict[str, Any], dict[str, Any]], object]
LIES: dict[str, tuple[Change, str]] = {
    "schema": (lambda t, h: h.update(schema=2), "got schema 2, expected 1; a newer sluice"),
    "no schema": (lambda t, h: h.pop("schema"), "got schema None"),
    "few experts": (lambda t, h: h.update(num_experts=3), "got expert 7"),
    "experts of true": (lambda t, h: h.update(num_experts=True), "got num_experts = True"),
    "many experts": (lambda t, h: h.update(num_experts=300), "uint8 and 300 of them"),
    "no model": (lambda t, h: h.pop("model"), "got model = None in the header"),
    "own text": (lambda t, h: h.update(own_text="yes"), "got own_text = 'yes'"),
    "no sequences": (lambda t, h: h.update(sequences={}), "got sequences = {}"),
    "short": (lambda t, h: h["sequences"].pop(), "got sequences of 5 tokens, expected 8"),
    "empty": (lambda t, h: h["sequences"].append([0, 0, "", "", ""]), "is not empty"),
    "prompt": (lambda t, h: h["sequences"][0].__setitem__(1, 6), "with 6 of 5 tokens"),
    "row": (lambda t, h: h["sequences"][0].pop(), "got sequence 0 as"),
    "content": (
        lambda t, h: h["sequences"][1].__setitem__(4, "ab" * 32),
        "sequence 1: got content",
    ),
    "no content": (lambda t, h: h["sequences"][1].__setitem__(4, ""), "sequence 1: got content"),
    "ids": (lambda t, h: t["token_ids"].__setitem__(0, 101), "sequence 0: got content"),
    "scale": (lambda t, h: h.update(weight_scale=0), "got weight_scale 0"),
    "endless scale": (lambda t, h: h.update(weight_scale=10**400), "int too large"),
    "endless experts": (lambda t, h: h.update(num_experts=2**40), "1099511627776 of them"),
    "no scale": (lambda t, h: h.pop("weight_scale"), "got weight_scale None"),
    "no experts": (lambda t, h: t.pop("experts"), "got no experts"),
    "extra": (lambda t, h: t.update(more=np.zeros(1)), "got a tensor 'more'"),
    "type": (lambda t, h: t.update(steps=t["steps"].astype(np.int32)), "got steps as int32"),
    "rank": (
        lambda t, h: t.update(token_ids=t["token_ids"][:, None]),
        r"token_ids as int32\[8",
    ),
    "rows": (lambda t, h: t.update(token_ids=t["token_ids"][:7]), r"got token_ids of shape \[7\]"),
    "weights": (lambda t, h: t.update(weights=t["weights"][:, :2]), "got weights of shape"),
    "hidden": (lambda t, h: t.update(hidden=t["hidden"][:, :2]), "got hidden states of shape"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_refused_by_name(tmp_path: Path, lie: str) -> None:
    path = trace.save(make(), tmp_path / "x")
    tensors, header = tensors_of(path), header_of(path)
    change, message = LIES[lie]
    change(tensors, header)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(tensors, str(path), {"format": "sluice.trace", "header": json.dumps(header)})
    with pytest.raises(CheckpointError, match=message) as caught:
        trace.load(path)
    assert str(path) in str(caught.value)


def test_what_is_no_trace_is_refused_by_name(tmp_path: Path) -> None:
    path = trace.save(make(), tmp_path / "x")
    whole = path.read_bytes()
    for cut in (0, 5, 60, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="cut short or is none"):
            trace.load(path)
    save_file({"a": np.zeros(1)}, str(path))
    with pytest.raises(CheckpointError, match="got format None"):
        trace.load(path)
    for header in ("{", "[]"):
        save_file({"a": np.zeros(1)}, str(path), {"format": "sluice.trace", "header": header})
        with pytest.raises(CheckpointError, match="got a header"):
            trace.load(path)
    with pytest.raises(CheckpointError, match="got no such file"):
        trace.load(tmp_path / "absent")
    with pytest.raises(ConfigError, match="folder that is not there"):
        trace.save(make(), tmp_path / "absent" / "x")


@pytest.mark.parametrize(
    ("task", "tokens", "sequences"),
    [("intent", 8222, 127), ("summary", 8479, 13), ("translation", 8251, 40)],
)
def test_the_shipped_traces_are_what_their_readme_says(
    task: str, tokens: int, sequences: int
) -> None:
    shipped = trace.load(DATA / f"deepseek_v2_lite_{task}.trace.safetensors")
    assert shipped.experts.shape == (tokens, 26, 6) and shipped.num_experts == 64
    assert len(shipped.sequences) == sequences and shipped.tasks == (task,)
    assert shipped.weights is not None and (np.diff(shipped.weights, axis=-1) <= 0).all()
    assert np.abs(shipped.weights * 1e4 - np.rint(shipped.weights * 1e4)).max() < 1e-3
