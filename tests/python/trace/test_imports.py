"""Imports: the real layouts of others, and each of their lies refused by name."""

from __future__ import annotations

import base64
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sluice.errors import CheckpointError, ConfigError
from sluice.trace import from_arrays, import_esft_folder, import_sglang, import_vllm
from sluice.trace.responses import read_responses
from sluice.trace.trace import Array, content_hash

E, L, K = 16, 4, 2


def routes(tokens: int, seed: int = 0, layers: int = L) -> Array:
    rng = np.random.default_rng(seed)
    return np.argsort(rng.random((tokens, layers, E)), axis=-1)[..., :K].astype(np.int16)


def npy(array: Array) -> str:
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def test_arrays_become_a_trace_with_hashes() -> None:
    arrays = [routes(5), routes(3, 1)]
    trace = from_arrays(arrays, num_experts=E, prompt_tokens=[2, 3], tasks=["a", "b"])
    assert [(s.start, s.length, s.prompt_tokens, s.task) for s in trace] == [
        (0, 5, 2, "a"),
        (5, 3, 3, "b"),
    ]
    assert trace.sequences[1].content == content_hash(None, arrays[1])
    ids = [np.arange(5), np.arange(3)]
    named = from_arrays(arrays, num_experts=E, token_ids=ids)
    assert named.sequences[1].content == content_hash(np.arange(3, dtype=np.int32), arrays[1])


def planted(token: int, layer: int, ids: list[int]) -> Array:
    array = routes(5)
    array[token, layer] = ids
    return array


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ([], {}, "got no requests"),
        ([routes(5), routes(5, layers=3)], {}, "request 1: got 3 layers, expected 4"),
        ([routes(5)], {"num_layers": 26}, "request 0: got 4 layers, expected 26"),
        ([routes(5)], {"top_k": 6}, "request 0: got 2 experts a token, expected 6"),
        ([planted(3, 1, [2, 16])], {}, "got expert 16 in token 3, expected one below 16"),
        ([planted(3, 1, [2, -2])], {}, "got expert -2 in token 3"),
        ([planted(4, 2, [5, 5])], {}, r"got \[5, 5\] in token 4, layer 2, expected each expert on"),
        ([routes(5)[0]], {}, "expected whole numbers"),
        ([routes(5).astype(float)], {}, "got experts float64"),
        ([routes(5)[:0]], {}, "at least one token"),
        ([routes(5)], {"weights": [np.ones((4, L, K))]}, "got weights"),
        ([routes(5)], {"weights": []}, "weights: got 0, expected 1"),
        ([routes(5)], {"token_ids": [np.arange(6)]}, "token ids for 5 tokens"),
        ([routes(5)], {"prompt_tokens": [6]}, "got 6 of 5 tokens as its prompt"),
        ([routes(5)], {"tasks": ["a", "b"]}, "tasks: got 2, expected 1"),
    ],
)
def test_arrays_that_lie_are_refused_by_name(
    arrays: list[Array], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        from_arrays(arrays, **{"num_experts": E, **options})
    missing = planted(4, 2, [-1, -1])  # none twice is no expert twice
    assert from_arrays([missing], num_experts=E).num_tokens == 5


def vllm(tokens: Array, prompt: int, **choice: Any) -> dict[str, Any]:
    """What a vLLM server answers from 0.22 on; the last generated token has no routes."""
    return {
        "id": "cmpl-1",
        "choices": [{"index": 0, "routed_experts": npy(tokens.astype(np.uint8)), **choice}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": len(tokens) - prompt + 1},
    }


def vllm_split(tokens: Array, prompt: int) -> dict[str, Any]:
    """What vLLM 0.21 answers."""
    return {
        "choices": [{"index": 0, "routed_experts": tokens[prompt:].tolist()}],
        "prompt_routed_experts": tokens[:prompt].tolist(),
        "usage": {"prompt_tokens": prompt, "completion_tokens": len(tokens) - prompt + 1},
    }


def test_both_layouts_of_vllm_are_read() -> None:
    tokens = routes(9)
    for response in (vllm(tokens, 6), vllm_split(tokens, 6)):
        trace = import_vllm([response, response], num_experts=E, task="chat")
        assert (trace.experts[:9] == tokens).all() and trace.num_tokens == 18
        assert {(s.length, s.prompt_tokens, s.task) for s in trace} == {(9, 6, "chat")}
        assert trace.own_text is True and trace.weights is None
    known = vllm(tokens, 6, token_ids=[1, 2, 3, 4]) | {"prompt_token_ids": list(range(6))}
    trace = import_vllm([known], num_experts=E)
    assert trace.token_ids is not None and trace.token_ids.tolist() == [0, 1, 2, 3, 4, 5, 1, 2, 3]


def test_dense_layers_are_left_out_and_named() -> None:
    tokens = routes(9)
    tokens[:, 0] = 0
    trace = import_vllm([vllm(tokens, 6)], num_experts=E, num_layers=L)
    assert trace.num_layers == L - 1 and (trace.experts == tokens[:, 1:]).all()
    assert "dense layers 0 left out" in trace.source


def test_tokens_of_a_prefix_cache_are_left_out() -> None:
    tokens = routes(9)
    tokens[:4] = -1
    trace = import_vllm([vllm_split(tokens, 6)], num_experts=E)
    assert (trace.experts == tokens[4:]).all() and trace.sequences[0].prompt_tokens == 2
    tokens[7] = -1
    with pytest.raises(ConfigError, match="got tokens without routes behind tokens with them"):
        import_vllm([vllm_split(tokens, 6)], num_experts=E)


Change = Callable[[dict[str, Any]], object]


def first(response: dict[str, Any]) -> dict[str, Any]:
    return response["choices"][0]


VLLM_LIES: list[tuple[Change, str]] = [
    (lambda r: first(r).pop("routed_experts"), "got no routed_experts, expected an answer of"),
    (lambda r: r.update(choices=[]), "got no choices"),
    (lambda r: r.pop("usage"), "got no usage and no prompt_token_ids"),
    (lambda r: r["usage"].update(completion_tokens=3), "got routes of 3|got routes of 4 tokens be"),
    (lambda r: r["usage"].update(completion_tokens=9), "got routes of 3 tokens behind the prompt"),
    (lambda r: first(r).update(routed_experts="%"), "no base64"),
    (lambda r: first(r).update(routed_experts="QUJD"), "no .npy"),
    (lambda r: first(r).update(routed_experts=[[[1, 2], [3]]]), "uneven lists"),
    (lambda r: first(r).update(routed_experts=npy(np.array([{}]))), "no .npy"),
    (lambda r: first(r).update(routed_experts=npy(routes(9) + 9)), "expected one below 16"),
]


@pytest.mark.parametrize("position", range(len(VLLM_LIES)))
def test_what_vllm_would_not_say_is_refused_by_name(position: int) -> None:
    response = vllm(routes(9), 6)
    change, message = VLLM_LIES[position]
    if "got routes of 3|" in message:  # one more than was generated
        first(response).update(routed_experts=npy(routes(10)))
    change(response)
    with pytest.raises(ConfigError, match=message) as caught:
        import_vllm([response], num_experts=E)
    assert "vLLM response cmpl-1" in str(caught.value)


def test_the_layers_that_were_asked_for_are_what_must_come() -> None:
    with pytest.raises(ConfigError, match="got 4 layers, expected 27"):
        import_vllm([vllm(routes(9), 6)], num_experts=E, num_layers=27)
    short = vllm_split(routes(9), 6)
    short["usage"]["prompt_tokens"] = 7
    with pytest.raises(ConfigError, match="prompt_routed_experts of 6 tokens, expected 7"):
        import_vllm([short], num_experts=E)


def sglang(tokens: Array, prompt: int) -> dict[str, Any]:
    flat = base64.b64encode(tokens.astype("<i4").tobytes()).decode()
    return {
        "text": "",
        "meta_info": {
            "id": "r1",
            "routed_experts": flat,
            "prompt_tokens": prompt,
            "completion_tokens": len(tokens) - prompt + 1,
        },
    }


def test_sglang_is_read_flat_as_generate_and_as_completions() -> None:
    tokens = routes(9)
    whole = sglang(tokens, 6)
    meta = whole["meta_info"]
    completions = {
        "id": "c",
        "choices": [{"sgl_ext": {"routed_experts": meta["routed_experts"]}}],
        "usage": {"prompt_tokens": 6, "completion_tokens": 4},
    }
    for response in (whole, completions):
        trace = import_sglang([response], num_experts=E, num_layers=L, top_k=K)
        assert (trace.experts == tokens).all()
        assert [(s.length, s.prompt_tokens) for s in trace] == [(9, 6)]


SGLANG_LIES: list[tuple[Change, str]] = [
    (lambda r: r["meta_info"].pop("routed_experts"), "expected an answer to return_routed_experts"),
    (lambda r: r["meta_info"].update(routed_experts_start_len=3), "got routes from token 3 on"),
    (lambda r: r["meta_info"].update(routed_experts="AAAA" * 3), "got 9 bytes of routed_experts"),
    (lambda r: r["meta_info"].update(prompt_tokens=None), "got prompt_tokens None"),
    (lambda r: r["meta_info"].update(completion_tokens=9), "got routes of 3 tokens behind"),
    (lambda r: r["meta_info"].update(routed_experts=""), "got 0 bytes of"),
    (lambda r: r.pop("meta_info"), "got neither meta_info nor choices"),
]


@pytest.mark.parametrize("position", range(len(SGLANG_LIES)))
def test_what_sglang_would_not_say_is_refused_by_name(position: int) -> None:
    response = sglang(routes(9), 6)
    change, message = SGLANG_LIES[position]
    change(response)
    with pytest.raises(ConfigError, match=message):
        import_sglang([response], num_experts=E, num_layers=L, top_k=K)


def test_responses_are_read_from_json_and_json_lines(tmp_path: Path) -> None:
    one = vllm(routes(9), 6)
    for i, text in enumerate(
        (json.dumps(one), json.dumps([one, one]), f"{json.dumps(one)}\n{json.dumps(one)}\n")
    ):
        (tmp_path / "r").write_text(text)
        assert read_responses(tmp_path / "r") == [one] * (1 if i == 0 else 2)
    for text, message in (("[1]", "no objects"), ("nonsense", "neither JSON nor JSON lines")):
        (tmp_path / "r").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_responses(tmp_path / "r")
    with pytest.raises(CheckpointError, match="no such file"):
        read_responses(tmp_path / "absent")


def esft(folder: Path, **changes: Any) -> Path:
    experts = routes(9).astype(np.uint8)
    weights = np.linspace(9000, 10, 9 * L * K).reshape(9, L, K).astype(np.uint16)
    for name, array in (("experts", experts), ("weights", weights)):
        file = io.BytesIO()
        np.save(file, array)
        (folder / f"{name}.npy.gz").write_bytes(gzip.compress(file.getvalue()))
    meta = {
        "model": "m",
        "task": "t",
        "source": "s",
        "tokens": 9,
        "layers": L,
        "top_k": K,
        "experts_per_layer": E,
        "weight_scale": 10000,
        "sequences": [{"start": 0, "length": 4}, {"start": 4, "length": 5}],
    }
    (folder / "meta.json").write_text(json.dumps(meta | changes))
    return folder


def test_an_esft_folder_is_read_with_its_weights(tmp_path: Path) -> None:
    trace = import_esft_folder(esft(tmp_path))
    assert (trace.experts == routes(9)).all()
    assert trace.weights is not None and trace.weights[0, 0, 0] == np.float32(0.9)
    assert [(s.start, s.length, s.prompt_tokens, s.task, s.request) for s in trace] == [
        (0, 4, -1, "t", "t/0"),
        (4, 5, -1, "t", "t/1"),
    ]
    assert (trace.model, trace.source, trace.own_text) == ("m", "s", False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 8}, r"experts.npy.gz: got uint8\[9, 4, 2\], expected uint8\[8, 4, 2\]"),
        ({"layers": 26}, "expected uint8"),
        ({"experts_per_layer": 8}, "expected one below 8"),
        ({"tokens": None}, "meta.json: got no usable"),
        ({"sequences": [{"start": 0, "length": 4}]}, "do not cover 9 tokens"),
        ({"sequences": [{"start": 1, "length": 8}, {"start": 0, "length": 1}]}, "do not cover"),
        ({"sequences": []}, "do not cover"),
    ],
)
def test_an_esft_folder_that_lies_is_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        import_esft_folder(esft(tmp_path, **changes))


def test_an_esft_folder_that_is_cut_short_or_swells_is_refused(tmp_path: Path) -> None:
    file = esft(tmp_path) / "experts.npy.gz"
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])
    with pytest.raises(CheckpointError, match="no whole gzipped"):
        import_esft_folder(tmp_path)
    file.write_bytes(gzip.compress(gzip.decompress(whole) + bytes(1 << 20)))
    with pytest.raises(CheckpointError, match="json says"):
        import_esft_folder(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match="no whole gzipped"):
        import_esft_folder(tmp_path)
