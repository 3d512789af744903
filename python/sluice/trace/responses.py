"""Traces out of what vLLM and SGLang answer: each request's routed experts.

**vLLM** (`--enable-return-routed-experts`) answers per choice with `routed_experts`, a base64
`.npy` of prompt + generated - 1 tokens: the last generated token never entered a forward. Releases
before 0.22 answer `prompt_routed_experts` beside the choices and `routed_experts` of generated
tokens within them, nested lists, where a prompt's tokens that came from the prefix cache are -1.
**SGLang** (`return_routed_experts`) answers `meta_info.routed_experts`, or `sgl_ext` of a choice:
base64 of int32, flat, of tokens x layers x top-k, seqlen - 1 tokens from
`routed_experts_start_len` on. Either may count dense layers, as the same id throughout: those are
left out. Neither says weights. Sources: docs/training/routed_experts_replay.md of vLLM 0.21 and
its pull requests 28284 and 51906; SGLang's pull requests 12162 and 24851.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from sluice.errors import CheckpointError, ConfigError
from sluice.trace.imports import check_shape, from_arrays
from sluice.trace.trace import Array, Trace


def import_vllm(
    responses: Iterable[Mapping[str, Any]],
    *,
    num_experts: int,
    num_layers: int | None = None,
    top_k: int | None = None,
    task: str = "",
) -> Trace:
    """Completions or chat completions of a vLLM server, or their fields from its Python API.

    Args:
        responses: JSON objects, each with `choices`; `usage`, `prompt_token_ids` and a choice's
            `token_ids` are used where they are there. Arrays may be NumPy's own.
        num_experts: Experts of a layer.
        num_layers: Layers that the arrays must have, dense ones included.
        top_k: The same of experts a token.
        task: Label of all requests.

    Raises:
        ConfigError: No routed experts, or what `from_arrays` refuses; the message names the
            response.
    """
    choices: list[_Choice] = []
    for i, response in enumerate(responses):
        choices += _vllm_choices(response, f"vLLM response {response.get('id') or i}")
    for choice in choices:  # before dense layers go
        check_shape(choice.name, choice.experts, num_layers, top_k)
    return _of_choices(choices, "vLLM", num_experts, task)


def import_sglang(
    responses: Iterable[Mapping[str, Any]],
    *,
    num_experts: int,
    num_layers: int,
    top_k: int,
    task: str = "",
) -> Trace:
    """Answers of an SGLang server's `/generate`, or its completions with `sgl_ext`.

    Args: as `import_vllm`; SGLang's arrays are flat, so layers and top-k are required.

    Raises:
        ConfigError: As `import_vllm`; an answer that begins after the prompt's first token
            (`routed_experts_start_len`) is refused.
    """
    choices: list[_Choice] = []
    for i, response in enumerate(responses):
        name = f"SGLang response {response.get('id') or i}"
        choices += _sglang_choices(response, name, num_layers, top_k)
    return _of_choices(choices, "SGLang", num_experts, task)


def read_responses(path: str | Path) -> list[dict[str, Any]]:
    """Responses from a file: one JSON object, a list of them, or one a line.

    Raises:
        CheckpointError: It is none of these.
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"{file}: got no such file, expected responses as JSON")
    text = file.read_text(encoding="utf-8")
    try:
        found: Any = json.loads(text)
    except ValueError:
        try:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise CheckpointError(f"{file}: got neither JSON nor JSON lines: {error}") from None
    rows = found if isinstance(found, list) else [found]
    if not all(isinstance(row, dict) for row in rows):
        raise CheckpointError(f"{file}: got responses that are no objects, expected JSON objects")
    return cast("list[dict[str, Any]]", rows)


@dataclass(frozen=True, slots=True)
class _Choice:
    experts: Array  # [tokens, layers, K]
    prompt_tokens: int
    token_ids: Array | None
    name: str


def _of_choices(choices: list[_Choice], engine: str, num_experts: int, task: str) -> Trace:
    experts, dropped = _without_dense_layers([choice.experts for choice in choices])
    ids = [choice.token_ids for choice in choices]
    known = [each for each in ids if each is not None]
    return from_arrays(
        experts,
        num_experts=num_experts,
        token_ids=known if len(known) == len(ids) else None,
        prompt_tokens=[choice.prompt_tokens for choice in choices],
        tasks=task,
        requests=[choice.name for choice in choices],
        source=f"{engine} routed experts"
        + (f", dense layers {', '.join(map(str, dropped))} left out" if dropped else ""),
        own_text=True,
    )


def _vllm_choices(response: Mapping[str, Any], name: str) -> list[_Choice]:
    prompt = response.get("prompt_routed_experts")
    prompt_ids = response.get("prompt_token_ids")
    usage = response.get("usage") or {}
    asked = usage.get("prompt_tokens", None if prompt_ids is None else len(prompt_ids))
    several = len(response.get("choices") or []) > 1
    choices: list[_Choice] = []
    for i, choice in enumerate(response.get("choices") or []):
        label = f"{name}.{i}" if several else name
        if choice.get("routed_experts") is None:
            raise ConfigError(
                f"{label}: got no routed_experts, expected an answer of a server that was started "
                "with --enable-return-routed-experts"
            )
        experts = _ids(label, choice["routed_experts"])
        written = choice.get("token_ids")
        # Of one choice `usage` counts its tokens, of several all of theirs.
        generated = usage.get("completion_tokens") if not several else None
        generated = generated if written is None else len(written)
        if prompt is not None:
            head = _ids(label, prompt)
            if asked is not None and len(head) != asked:
                raise ConfigError(
                    f"{label}: got prompt_routed_experts of {len(head)} tokens, expected {asked}"
                )
            _check_generated(label, len(experts), generated)
            experts = np.concatenate([head, experts])
            asked_here = len(head)
        else:
            if asked is None:
                raise ConfigError(
                    f"{label}: got no usage and no prompt_token_ids, expected one of them: where "
                    "the prompt ends is said nowhere else"
                )
            asked_here = int(asked)
            _check_generated(label, len(experts) - asked_here, generated)
        tokens = None
        if prompt_ids is not None and written is not None:
            tokens = np.asarray([*prompt_ids, *written], dtype=np.int32)[: len(experts)]
        cached = _leading_unknown(label, experts)
        choices.append(
            _Choice(
                experts[cached:],
                max(0, asked_here - cached),
                None if tokens is None else tokens[cached:],
                label,
            )
        )
    if not choices:
        raise ConfigError(f"{name}: got no choices, expected at least one")
    return choices


def _sglang_choices(
    response: Mapping[str, Any], name: str, num_layers: int, top_k: int
) -> list[_Choice]:
    if "meta_info" in response:
        metas = [cast("Mapping[str, Any]", response["meta_info"])]
    else:
        usage = response.get("usage") or {}
        metas = [usage | (choice.get("sgl_ext") or {}) for choice in response.get("choices") or []]
    choices: list[_Choice] = []
    for i, meta in enumerate(metas):
        label = f"{name}.{i}" if len(metas) > 1 else name
        if meta.get("routed_experts") is None:
            raise ConfigError(
                f"{label}: got no routed_experts, expected an answer to return_routed_experts"
            )
        if meta.get("routed_experts_start_len", 0):
            raise ConfigError(
                f"{label}: got routes from token {meta['routed_experts_start_len']} on, expected "
                "all; ask with routed_experts_start_len = 0"
            )
        raw = _decoded(label, meta["routed_experts"])
        if not raw or len(raw) % (4 * num_layers * top_k):
            raise ConfigError(
                f"{label}: got {len(raw)} bytes of routed_experts, expected a multiple of int32 x "
                f"{num_layers} layers x {top_k} experts"
            )
        experts = np.frombuffer(raw, dtype="<i4").reshape(-1, num_layers, top_k)
        prompt = meta.get("prompt_tokens")
        if not isinstance(prompt, int):
            raise ConfigError(f"{label}: got prompt_tokens {prompt!r}, expected their number")
        written = meta.get("completion_tokens") if len(metas) == 1 else None
        _check_generated(label, len(experts) - prompt, written)
        choices.append(_Choice(experts, min(prompt, len(experts)), None, label))
    if not choices:
        raise ConfigError(f"{name}: got neither meta_info nor choices, expected one of them")
    return choices


def _check_generated(name: str, rows: int, generated: int | None) -> None:
    """The last token that was generated may have routes or not."""
    low = -1 if generated is None else generated - 1
    if rows < low or (generated is not None and rows > generated):
        raise ConfigError(
            f"{name}: got routes of {rows} tokens behind the prompt, expected "
            f"{max(low, 0)}" + ("" if generated is None else f" or {generated}")
        )


def _ids(name: str, value: Any) -> Array:
    """Expert ids `[tokens, layers, K]` of a base64 `.npy`, nested lists or an array."""
    if isinstance(value, str):
        try:
            value = np.load(io.BytesIO(_decoded(name, value)), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ConfigError(f"{name}: got routed_experts that are no .npy: {error}") from None
    try:
        array = np.asarray(value)
    except ValueError as error:  # rows of unequal lengths
        raise ConfigError(f"{name}: got routed_experts of uneven lists: {error}") from None
    if array.ndim != 3 or array.dtype.kind not in "iu":
        raise ConfigError(
            f"{name}: got routed_experts as {array.dtype}{list(array.shape)}, expected whole "
            "numbers [tokens, layers, top-k]"
        )
    return array.astype(np.int64)


def _decoded(name: str, text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise ConfigError(f"{name}: got routed_experts that are no base64: {error}") from None


def _leading_unknown(name: str, experts: Array) -> int:
    """How many rows at the front are -1 throughout: tokens that came from a prefix cache."""
    known: Array = np.asarray((experts >= 0).any(axis=(1, 2)))
    first = int(np.argmax(known)) if known.any() else len(experts)
    if first == len(experts) or not known[first:].all():
        raise ConfigError(
            f"{name}: got tokens without routes behind tokens with them, or none with; expected "
            "routes of every token that was not cached"
        )
    return first


def _without_dense_layers(experts: list[Array]) -> tuple[list[Array], list[int]]:
    """Leaves layers out in which every token has one id K times: placeholders of dense layers."""
    if not experts or experts[0].shape[2] < 2:
        return experts, []
    layers = range(experts[0].shape[1])
    dense = [s for s in layers if all((a[:, s] == a[:, s, :1]).all() for a in experts)]
    routed = [s for s in layers if s not in dense]
    return [array[:, routed] for array in experts], dense
