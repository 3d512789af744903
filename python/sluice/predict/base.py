"""What predictors share: settings, fitting, the live protocol by request, offline scores.

A predictor of sluice's own implements `_fit`, `_predict` and `_finish` and, so that evaluation is
quick, `scores` for all tokens of a trace at once; a test holds both paths equal.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from sluice.errors import ConfigError
from sluice.predict.live import LiveRequests, Request
from sluice.predict.offline import Horizon, drive, drive_keep_scores
from sluice.predict.protocol import Guess, RoutingEvent, union_probability
from sluice.trace import Trace, content_hash

Array = NDArray[Any]
Settings = TypeVar("Settings")
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Shape:
    """What a predictor predicts for.

    Args:
        num_layers: S, MoE layers alone.
        num_experts: E of a layer (of the largest).
        top_k: K, experts of a token.
    """

    num_layers: int
    num_experts: int
    top_k: int

    @classmethod
    def of(cls, trace: Trace) -> Shape:
        """The shape of a trace."""
        return cls(trace.num_layers, trace.num_experts, trace.top_k)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitting:
    """What a fit read and what it took; it goes into the card.

    Args:
        model: Name and fingerprint of the model that was traced; "" unknown.
        source: Where the traces come from, for people.
        fit: Content hashes of the sequences that were fitted on.
        choose: Of those that early stop or calibration read.
        tokens: Tokens that were fitted on.
        seed: Of whatever was drawn.
        duration_s: Wall time.
        notes: What the predictor says of its own fit (losses, thresholds), JSON values.
    """

    model: str = ""
    source: str = ""
    fit: tuple[str, ...] = ()
    choose: tuple[str, ...] = ()
    tokens: int = 0
    seed: int = 0
    duration_s: float = 0.0
    notes: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def read(self) -> frozenset[str]:
        """Everything that was read: what nobody may score on."""
        return frozenset(self.fit) | frozenset(self.choose)


class BasePredictor(Generic[Settings]):
    """The common half of sluice's predictors; satisfies `Predictor`.

    A subclass sets `name` and `settings_type`, and implements `_fit`, `_predict`, `_finish`,
    `state` and `load_state`; it overrides `scores` to be quick and `forecast` and `keep_scores` if
    it ranks residents.

    Args:
        settings: An instance of `settings_type`, a frozen dataclass of JSON values whose defaults
            work; None for the defaults.
    """

    name: str = ""
    settings_type: ClassVar[type[Any]]
    needs_hidden: bool = False
    """Whether it reads the states that enter the experts."""
    prompt_tokens: int | None = None
    """How many of a prompt's last tokens it is shown beside a running model; None: all."""
    needs_fit: ClassVar[bool] = True
    """Whether it guesses nothing before `fit`; False for what follows the running sequence."""
    sequences_apart: bool = True
    """Whether the scores of one sequence are the same without the sequences before it."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.settings: Settings = settings if settings is not None else self.settings_type()
        self.shape: Shape | None = None
        self.fitting = Fitting()
        self._live: LiveRequests | None = None

    # Fitting

    def fit(
        self,
        trace: Trace,
        choose: Trace | None = None,
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        """Learns from whole sequences, from nothing again.

        Args:
            trace: What to learn from.
            choose: Other sequences, for early stop and calibration; None: neither, or on a part of
                `trace` that the predictor sets aside.
            seed: Of whatever is drawn; same seed and trace, same predictor.
            progress: Called as `progress(done, total)`.

        Raises:
            ConfigError: The trace lacks what this predictor reads, or both are of different shapes.
        """
        self.bind(Shape.of(trace))
        if choose is not None and Shape.of(choose) != self.shape:
            raise ConfigError(
                f"{self.name}: got {Shape.of(choose)} to choose on, expected {self.shape} as in "
                "the trace that is fitted"
            )
        for each in (trace, choose):
            if each is not None:
                self.check(each)
        begin_s = time.perf_counter()
        notes = self._fit(trace, choose, seed, progress or _no_progress)
        self.fitting = Fitting(
            model=trace.model,
            source=trace.source,
            fit=_contents(trace),
            choose=() if choose is None else _contents(choose),
            tokens=trace.num_tokens,
            seed=seed,
            duration_s=time.perf_counter() - begin_s,
            notes=notes or {},
        )

    def bind(self, shape: Shape) -> None:
        """Says what will be predicted for; `fit` and `load` do. Forgets all live requests."""
        self.shape = shape
        self.reset()

    def check(self, trace: Trace) -> None:
        """Refuses a trace that this predictor cannot read.

        Raises:
            ConfigError: It is of another shape, or without states that are needed.
        """
        if self.shape is not None and Shape.of(trace) != self.shape:
            raise ConfigError(
                f"{self.name}: got a trace of {Shape.of(trace)}, expected {self.shape}"
            )
        if self.needs_hidden and trace.hidden is None:
            raise ConfigError(
                f"{self.name}: got a trace without hidden states, expected them; record it with "
                "`sluice trace record --hidden` or `session.record(hidden=True)`"
            )

    def state(self) -> dict[str, Array]:
        """What was learnt, as named arrays: all that `load_state` needs beside settings."""
        return {}

    def load_state(self, arrays: Mapping[str, Array]) -> None:
        """Takes what `state` gave; `shape` is set.

        Raises:
            CheckpointError: Arrays are missing or of other shapes.
        """

    # Offline

    def scores(self, trace: Trace, horizon: Horizon) -> Array:
        """Estimated probability that a token uses an expert, from what is known beforehand.

        The row of token n may read all rows before n of the trace (in a sequence of its own where
        `sequences_apart`), token ids up to n, and of token n itself what `horizon` says.

        Args:
            trace: Sequences in the order in which they run, one token a step. Live requests may be
                forgotten over it.
            horizon: "token": before layer 0 of the token runs. An int h ≥ 1: its routes (and
                states) of layers ≤ s - h too, for layer s.

        Returns:
            float32 `[N, S, E]`.
        """
        self.check(trace)
        return drive(self, trace, horizon)

    def keep_scores(self, trace: Trace) -> Array | None:
        """Who should stay: `forecast` for layer s, as of after layer s of token n was routed.

        Returns:
            float32 `[N, S, E]`, larger stays; None: it ranks nobody.
        """
        self.check(trace)
        return drive_keep_scores(self, trace)

    def keep_scores_of(self, trace: Trace, capacities: Sequence[int]) -> list[Array] | None:
        """`keep_scores` for caches of so many experts a layer: most rank the same for all."""
        kept = self.keep_scores(trace)
        return None if kept is None else [kept] * len(capacities)

    # The live protocol

    def reset(self) -> None:
        """Forgets all live requests and what they taught; what was fitted stays."""
        self._live = None

    def begin_step(
        self, step: int, requests: Array, token_ids: Array | None, tasks: Sequence[str]
    ) -> None:
        """A forward begins with these rows."""
        if self.shape is None:
            return
        self._requests().begin_step(requests, token_ids, tasks)

    def observe(self, event: RoutingEvent) -> None:
        """What one layer's router chose."""
        if self.shape is None:
            return
        self._requests().observe(event)

    def upcoming(self, horizon: int) -> Array:
        """Probabilities of the next `horizon` layer visits, joined over the batch by noisy-or.

        Visits go on with layer 0 of the next step after the last layer; what a step's later layers
        need in a prompt (many tokens of one request at once) is nearly everything, and left out.

        Returns:
            float32 `[horizon, E]`; `plan` lists the same.
        """
        if self.shape is None or horizon <= 0:
            experts = 0 if self.shape is None else self.shape.num_experts
            return np.zeros((max(horizon, 0), experts), np.float32)
        live = self._requests()
        layers = self.shape.num_layers
        joined = np.zeros((horizon, self.shape.num_experts), np.float32)
        first = live.layer
        done = 0
        while done < horizon:
            ahead, layer = divmod(first + done, layers)
            stop = min(layers, layer + horizon - done)
            rows = [
                self._predict(request if ahead == 0 else request.idle(), layer, stop)
                for request in live.running
                if ahead > 0 or request.decoding
            ]
            if rows:
                joined[done : done + stop - layer] = (
                    rows[0] if len(rows) == 1 else union_probability(np.stack(rows))
                )
            done += stop - layer
        return joined

    def plan(self, horizon: int) -> list[Guess]:
        """Best first, for the next `horizon` layer visits, which may be of the next step."""
        if self.shape is None:
            return []
        first = self._requests().layer
        probabilities = self.upcoming(horizon)
        visits, experts = np.nonzero(probabilities > 0)
        found = probabilities[visits, experts]
        order = np.lexsort((experts, visits, -found))
        guesses: list[Guess] = []
        for i in order:
            ahead, layer = divmod(first + int(visits[i]), self.shape.num_layers)
            guesses.append(Guess(layer, int(experts[i]), float(found[i]), ahead))
        return guesses

    def forecast(self) -> Array | None:
        """Keep-scores float32 `[S, E]`, larger stays; None: it ranks nobody."""
        return None

    # For subclasses

    def _fit(
        self, trace: Trace, choose: Trace | None, seed: int, progress: Progress
    ) -> Mapping[str, Any] | None:
        """Learns; returns notes for the card (JSON values)."""
        return None

    def _begin(self, request: Request) -> None:
        """A request is seen for the first time; `request.memory` is the predictor's own."""

    def _predict(self, request: Request, first: int, stop: int) -> Array:
        """Probabilities of layers `first` to `stop` for the request's running token.

        `request.routes[:request.layer]` are known, `request.previous` are the routes of the token
        before (-1 throughout at a sequence's start), `request.token_id` is -1 where it is unknown.

        Returns:
            float32 `[stop - first, E]`.
        """
        raise NotImplementedError

    def _finish(self, request: Request) -> None:
        """All layers of the request's running token have routed, as `request.routes` says."""

    def _leave(self, request: Request) -> None:
        """The request has no row in the step that begins: it has ended, or waits."""

    def _give_up(self, request: Request) -> None:
        """The request's running token ends here: what was found on its way is of no more use."""

    def _requests(self) -> LiveRequests:
        if self._live is None:
            assert self.shape is not None
            self._live = LiveRequests(
                self.shape.num_layers,
                self.shape.top_k,
                begin=self._begin,
                finish=self._finish,
                leave=self._leave,
                give_up=self._give_up,
            )
        return self._live


def _contents(trace: Trace) -> tuple[str, ...]:
    """Content hashes of all sequences, those of a trace that was never saved made here."""
    ids = trace.token_ids
    return tuple(
        s.content or content_hash(None if ids is None else ids[s.rows], trace.experts[s.rows])
        for s in trace.sequences
    )


def _no_progress(done: int, total: int) -> None:
    """Nobody watches."""
