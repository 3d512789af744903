"""Recorded routing: which experts each token of each layer was sent to, and what else was kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sluice.errors import ConfigError

Array = NDArray[Any]

UNKNOWN = -1
"""`TraceSequence.prompt_tokens` where nobody recorded the end of the prompt."""

PHASES = ("all", "decode", "prefill")

MAX_EXPERTS = 32767
"""Of a layer: ids are int16."""


@dataclass(frozen=True, slots=True)
class TraceSequence:
    """One request's tokens, consecutive in the trace.

    Args:
        start: Its first token's row.
        length: Its tokens.
        prompt_tokens: How many of them, the first, were the prompt (phase prefill; the others are
            decode); `UNKNOWN` where that was not recorded.
        task: What the user calls its kind of work; "" for none.
        request: A name that the recorder or importer gave it.
        content: SHA-256 of its token ids, or of its experts where ids were not kept: what `Split`
            names it by.
    """

    start: int
    length: int
    prompt_tokens: int = UNKNOWN
    task: str = ""
    request: str = ""
    content: str = ""

    @property
    def rows(self) -> slice:
        """Its rows in the trace's arrays."""
        return slice(self.start, self.start + self.length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Routes of whole sequences; read it, cut it, replay it. Arrays are not copied, do not write.

    Args:
        experts: int16 `[N, S, K]`: experts of token n at MoE layer s, the heaviest first; -1 for
            none (a router that chose fewer).
        num_experts: Experts of a layer (of the largest).
        sequences: In the order of their rows; together they cover all N.
        weights: float32 `[N, S, K]`, the router's weights as the model used them, or None.
        token_ids: int32 `[N]`, the token that entered, or None.
        steps: int64 `[N]`, the forward in which a token ran; None: each alone. Tokens of one step
            were one batch (or one prompt).
        hidden: float16 `[N, S, H]`, the states that entered each layer's experts, or None.
        model: Name and fingerprint of the model, as `fingerprint` of a session says it; "" unknown.
        source: Where it comes from, for people.
        own_text: Whether the model wrote what follows the prompts; None where that is unknown.

    Raises:
        ConfigError: Arrays that do not fit each other, or an expert outside of the layer.
    """

    experts: Array
    num_experts: int
    sequences: tuple[TraceSequence, ...]
    weights: Array | None = None
    token_ids: Array | None = None
    steps: Array | None = None
    hidden: Array | None = None
    model: str = ""
    source: str = ""
    own_text: bool | None = None

    def __post_init__(self) -> None:
        _check_experts(self.experts, self.num_experts)
        tokens, layers, top_k = self.experts.shape
        shapes: dict[str, tuple[Array | None, tuple[int, ...]]] = {
            "weights": (self.weights, (tokens, layers, top_k)),
            "token_ids": (self.token_ids, (tokens,)),
            "steps": (self.steps, (tokens,)),
        }
        for name, (array, shape) in shapes.items():
            if array is not None and array.shape != shape:
                raise ConfigError(
                    f"trace: got {name} of shape {list(array.shape)}, expected {list(shape)}"
                )
        if self.hidden is not None and self.hidden.shape[:2] != (tokens, layers):
            raise ConfigError(
                f"trace: got hidden states of shape {list(self.hidden.shape)}, expected "
                f"[{tokens}, {layers}, H]"
            )
        end = 0
        for sequence in self.sequences:
            if sequence.start != end or sequence.length <= 0:
                raise ConfigError(
                    f"trace: got a sequence of {sequence.length} tokens at row {sequence.start}, "
                    f"expected one that begins at row {end} and is not empty"
                )
            end += sequence.length
        if end != tokens:
            raise ConfigError(f"trace: got sequences of {end} tokens, expected {tokens}")

    @property
    def num_tokens(self) -> int:
        """N."""
        return int(self.experts.shape[0])

    @property
    def num_layers(self) -> int:
        """S, MoE layers alone."""
        return int(self.experts.shape[1])

    @property
    def top_k(self) -> int:
        """K."""
        return int(self.experts.shape[2])

    @property
    def tasks(self) -> tuple[str, ...]:
        """Its tasks, in order of appearance."""
        return tuple(dict.fromkeys(sequence.task for sequence in self.sequences))

    def select(self, indices: Iterable[int]) -> Trace:
        """The sequences at these positions, in this order, as a trace of their own (copied)."""
        chosen = [self.sequences[i] for i in indices]
        rows = np.concatenate(
            [np.arange(s.start, s.start + s.length) for s in chosen] or [np.arange(0)]
        )
        moved = _in_a_row(chosen)

        def take(array: Array | None) -> Array | None:
            return None if array is None else array[rows]

        return replace(
            self,
            experts=self.experts[rows],
            sequences=moved,
            weights=take(self.weights),
            token_ids=take(self.token_ids),
            steps=take(self.steps),
            hidden=take(self.hidden),
        )

    def phase_rows(self, index: int, phase: str) -> range:
        """Rows of a sequence that it read ("prefill") or wrote ("decode"), or "all" of them.

        Raises:
            ConfigError: No such phase, or nobody recorded where its prompt ends.
        """
        if phase not in PHASES:
            raise ConfigError(f"phase: got {phase!r}, expected one of {', '.join(PHASES)}")
        sequence = self.sequences[index]
        begin, end = sequence.start, sequence.start + sequence.length
        if phase == "all":
            return range(begin, end)
        if sequence.prompt_tokens == UNKNOWN:
            raise ConfigError(
                f"phase: got {phase!r}, but sequence {index} of {self.source or 'the trace'} does "
                'not say where its prompt ends; use phase="all"'
            )
        cut = begin + sequence.prompt_tokens
        return range(cut, end) if phase == "decode" else range(begin, cut)

    def of_task(self, task: str) -> Trace:
        """The sequences of one task."""
        return self.select(i for i, s in enumerate(self.sequences) if s.task == task)

    def by_content(self, contents: Iterable[str]) -> Trace:
        """The sequences whose content hash is among these, in the trace's order."""
        wanted = set(contents)
        return self.select(i for i, s in enumerate(self.sequences) if s.content in wanted)

    def __iter__(self) -> Iterator[TraceSequence]:
        return iter(self.sequences)


def _in_a_row(sequences: Iterable[TraceSequence]) -> tuple[TraceSequence, ...]:
    """The same, each beginning where the one before it ends."""
    moved: list[TraceSequence] = []
    start = 0
    for sequence in sequences:
        moved.append(replace(sequence, start=start))
        start += sequence.length
    return tuple(moved)


def concatenate(traces: Sequence[Trace]) -> Trace:
    """Several traces of one model as one; what only some of them kept is left out.

    Raises:
        ConfigError: They are of different models or shapes, or there are none.
    """
    if not traces:
        raise ConfigError("trace: got nothing to concatenate, expected at least one trace")
    first = traces[0]
    for each in traces[1:]:
        if (each.num_layers, each.top_k, each.num_experts, each.model) != (
            first.num_layers,
            first.top_k,
            first.num_experts,
            first.model,
        ):
            raise ConfigError(
                f"trace: got {each.source or 'a trace'} of {each.num_layers} layers, "
                f"{each.num_experts} experts, top {each.top_k}, model {each.model!r}; expected "
                f"{first.num_layers}, {first.num_experts}, {first.top_k}, {first.model!r}"
            )
    sequences: list[TraceSequence] = []
    start = 0
    for each in traces:
        sequences += [replace(s, start=s.start + start) for s in each.sequences]
        start += each.num_tokens

    def join(arrays: list[Array | None]) -> Array | None:
        there = [array for array in arrays if array is not None]
        return np.concatenate(there) if len(there) == len(arrays) else None

    steps = None
    if all(each.steps is not None for each in traces):
        shifted: list[Array] = []
        base = 0
        for each in traces:
            assert each.steps is not None
            shifted.append(each.steps - (each.steps.min() if each.steps.size else 0) + base)
            base = int(shifted[-1].max()) + 1 if shifted[-1].size else base
        steps = np.concatenate(shifted)
    return replace(
        first,
        experts=np.concatenate([each.experts for each in traces]),
        sequences=tuple(sequences),
        weights=join([each.weights for each in traces]),
        token_ids=join([each.token_ids for each in traces]),
        steps=steps,
        hidden=join([each.hidden for each in traces]),
        source=" + ".join(dict.fromkeys(each.source for each in traces if each.source)),
        own_text=first.own_text if len({each.own_text for each in traces}) == 1 else None,
    )


def content_hash(token_ids: Array | None, experts: Array) -> str:
    """What names a sequence: SHA-256 of its token ids, or of its experts where ids are unknown."""
    if token_ids is not None:
        return hashlib.sha256(b"ids" + token_ids.astype("<i4").tobytes()).hexdigest()
    return hashlib.sha256(b"experts" + experts.astype("<i2").tobytes()).hexdigest()


def _check_experts(experts: Array, num_experts: int) -> None:
    if experts.ndim != 3 or experts.dtype != np.int16:
        raise ConfigError(
            f"trace: got experts {experts.dtype}{list(experts.shape)}, expected int16 [N, S, K]"
        )
    if not 0 < num_experts <= MAX_EXPERTS:
        raise ConfigError(f"trace: got {num_experts} experts, expected 1 to {MAX_EXPERTS}")
    if experts.size and (experts.min() < -1 or experts.max() >= num_experts):
        worst = experts.max() if experts.max() >= num_experts else experts.min()
        raise ConfigError(
            f"trace: got expert {worst}, expected -1 (none) or one below {num_experts}"
        )
