"""eMoE's kind of predictor: every p prompts, what the next prompts of each task will use.

Source: 2503.06823 §3.2.2, §3.3. The unit is a prompt's histogram: h[l, e], the share of layer l's
routes that went to expert e, over all tokens of a request; that reading, the cold start from a
profile and `period="auto"` are this project's where the paper is silent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from sluice.errors import CheckpointError, ConfigError
from sluice.predict.arrays import multi_hot, names_as_array, names_of_array, take
from sluice.predict.base import BasePredictor, Shape
from sluice.predict.live import Request
from sluice.predict.offline import Horizon, known_layers
from sluice.trace import Trace, TraceSequence

Array = NDArray[Any]

LEAST_PROMPTS = 4
"""Prompts of a task from which on it is predicted by its own, and not by all tasks together."""
_DROP = 0.9
_SMOOTH = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSettings:
    """When to predict, and how.

    Args:
        period: p: the prediction is made anew before prompts p, 2 p, …; "auto": when the overlap
            of planned and demanded experts has fallen by a tenth since it was made.
        mode: "A": all layers in one model call; "L": a call a layer, each knowing the layers below.
        cold_start: What holds before the first prediction: "profile", the fitted histograms;
            "ondemand", nothing; "all", every expert (the paper's, over any budget).
        planned_experts: Experts a layer that count as planned for "auto"; 0: half of them.
    """

    period: int | str = 40
    mode: str = "A"
    cold_start: str = "profile"
    planned_experts: int = 0

    def __post_init__(self) -> None:
        if self.period != "auto" and (type(self.period) is not int or self.period < 1):
            raise ConfigError(f"period: got {self.period!r}, expected 'auto' or at least 1 prompt")
        if self.mode not in ("A", "L"):
            raise ConfigError(f"mode: got {self.mode!r}, expected 'A' or 'L'")
        if self.cold_start not in ("profile", "ondemand", "all"):
            raise ConfigError(
                f"cold_start: got {self.cold_start!r}, expected 'profile', 'ondemand' or 'all'"
            )
        if self.planned_experts < 0:
            raise ConfigError(f"planned_experts: got {self.planned_experts}, expected 0 or more")


SettingsT = TypeVar("SettingsT", bound=PromptSettings)


def prompt_histogram(routes: Array, num_experts: int) -> tuple[Array, Array]:
    """A request's routing log: tokens per expert, and their shares.

    Args:
        routes: int16 `[T, S, K]`.
        num_experts: E.

    Returns:
        Counts int64 `[S, E]`, which sum to T K where no route is missing, and float32 `[S, E]`
        whose rows sum to 1 (0 where nothing was routed).
    """
    counts = multi_hot(routes, num_experts).sum(0).astype(np.int64)
    return counts, shares_of(counts)


def shares_of(counts: Array) -> Array:
    """Counts `[..., E]` as shares, float32."""
    total = counts.sum(-1, keepdims=True)
    return (counts / np.maximum(total, 1)).astype(np.float32)


class PromptPredictor(BasePredictor[SettingsT]):
    """When eMoE predicts and from what; a subclass says how, by one layer or all at once.

    Attributes:
        model_calls: How often `_whole` or `_one_layer` was called since `reset`.
        refreshes: How often predictions were made anew since `reset`.
        histories: The last prompts' histograms by task, oldest first.
    """

    sequences_apart = False

    _profiles: Mapping[str, Array] = MappingProxyType(
        {}
    )  # of tasks with LEAST_PROMPTS prompts or more, and "" of all

    def predict(self, task: str) -> Array:
        """f[S, E] for the next prompts of a task, rows that sum to 1, by the model's call(s)."""
        assert self.shape is not None
        if self.settings.mode == "A":
            self.model_calls += 1
            return self._whole(task)
        found = np.zeros((self.shape.num_layers, self.shape.num_experts), np.float32)
        for layer in range(self.shape.num_layers):
            self.model_calls += 1
            found[layer] = self._one_layer(task, layer, found)
        return found

    def usage(self, task: str) -> Array:
        """What is planned now, as the probability that a token uses an expert: `[S, E]`."""
        assert self.shape is not None
        plan = self._plans.get(task, self._plans.get(""))
        if plan is None:
            return np.zeros((self.shape.num_layers, self.shape.num_experts), np.float32)
        return np.minimum(self.shape.top_k * plan, 1)

    def scores(self, trace: Trace, horizon: Horizon) -> Array:
        """As the base says; the horizon changes nothing, a sequence has one answer throughout."""
        self.check(trace)
        known_layers(horizon, trace.num_layers)
        self.reset()
        found = np.empty((trace.num_tokens, trace.num_layers, trace.num_experts), np.float32)
        for sequence in trace.sequences:
            self._prompt_begins()
            found[sequence.rows] = self.usage(sequence.task)
            counts, _ = prompt_histogram(trace.experts[sequence.rows], trace.num_experts)
            self._prompt_ended(sequence.task, counts)
        self.reset()
        return found

    def reset(self) -> None:
        """Forgets all prompts since the fit."""
        super().reset()
        self.model_calls = self.refreshes = self._prompts = 0
        self.histories: dict[str, deque[Array]] = {}
        self._counts: dict[str, int] = {}
        self._plans: dict[str, Array] = {}
        self._overlap = self._best_overlap = -1.0
        if self.shape is not None and self._profiles:
            self._cold_start(self.shape)

    # What a subclass says

    def _whole(self, task: str) -> Array:
        """f[S, E] of all layers in one call."""
        raise NotImplementedError

    def _one_layer(self, task: str, layer: int, below: Array) -> Array:
        """f[E] of one layer; `below[:layer]` are predicted."""
        raise NotImplementedError

    def _learn(self, task: str, histogram: Array) -> None:
        """A prompt of a task has ended."""

    def _history_length(self) -> int:
        return LEAST_PROMPTS

    # Shared

    def _fit_profiles(self, trace: Trace) -> None:
        """The mean histogram of all prompts, and of each task that has enough of them."""
        groups: dict[str, list[Array]] = {"": []}
        for sequence in trace.sequences:
            histogram = histogram_of(trace, sequence)
            groups[""].append(histogram)
            if sequence.task:
                groups.setdefault(sequence.task, []).append(histogram)
        self._profiles = {
            task: np.mean(np.stack(found), axis=0)
            for task, found in groups.items()
            if task == "" or len(found) >= LEAST_PROMPTS
        }
        self.reset()

    def _profile_state(self) -> dict[str, Array]:
        return {
            "profiles": np.stack([*self._profiles.values()]),
            "tasks": names_as_array([*self._profiles]),
        }

    def _load_profiles(self, arrays: Mapping[str, Array]) -> None:
        assert self.shape is not None
        tasks = names_of_array(arrays, "tasks")
        if "" not in tasks:
            raise CheckpointError(f"{self.name}: got profiles of {tasks}, expected '' (all) first")
        shape = (len(tasks), self.shape.num_layers, self.shape.num_experts)
        self._profiles = dict(zip(tasks, take(arrays, "profiles", shape), strict=True))
        self.reset()

    def _profile(self, task: str) -> Array:
        return self._profiles.get(task, self._profiles[""])

    def _task_of(self, task: str) -> str:
        """The task itself, or "" for all together while it has too few prompts."""
        known = self._counts.get(task, 0) >= LEAST_PROMPTS or task in self._profiles
        return task if known else ""

    def _cold_start(self, shape: Shape) -> None:
        if self.settings.cold_start == "profile":
            self._plans = dict(self._profiles)
        elif self.settings.cold_start == "all":
            everything = np.ones((shape.num_layers, shape.num_experts), np.float32)
            self._plans = {"": everything}

    def _begin(self, request: Request) -> None:
        self._prompt_begins()

    def _predict(self, request: Request, first: int, stop: int) -> Array:
        return self.usage(request.task)[first:stop]

    def _finish(self, request: Request) -> None:
        assert self.shape is not None
        used = multi_hot(request.routes, self.shape.num_experts)
        request.memory = used if request.memory is None else request.memory + used

    def _leave(self, request: Request) -> None:
        """What it routed so far counts as a prompt, also of a request that only waits."""
        if request.memory is not None:
            self._prompt_ended(request.task, request.memory)
        request.memory = None

    def _prompt_begins(self) -> None:
        due = self._is_due()
        self._prompts += 1
        if due and self._profiles:
            self.refreshes += 1
            tasks = dict.fromkeys(self._task_of(task) for task in ["", *self._counts])
            self._plans = {task: self.predict(task) for task in tasks}
            self._overlap = self._best_overlap = -1.0

    def _is_due(self) -> bool:
        if self.settings.period != "auto":
            return self._prompts > 0 and self._prompts % int(self.settings.period) == 0
        return 0 <= self._overlap < _DROP * self._best_overlap

    def _prompt_ended(self, task: str, counts: Array) -> None:
        histogram = shares_of(counts)
        self._watch(task, histogram)
        for name in dict.fromkeys(["", task]):
            self._counts[name] = self._counts.get(name, 0) + 1
            history = self.histories.setdefault(name, deque(maxlen=self._history_length()))
            history.append(histogram)
            self._learn(name, histogram)

    def _watch(self, task: str, histogram: Array) -> None:
        """How much of what the prompt demanded was planned, smoothed over prompts."""
        assert self.shape is not None
        most = self.settings.planned_experts or max(self.shape.num_experts // 2, 1)
        planned = np.argsort(-self.usage(task), axis=-1, kind="stable")[:, :most]
        overlap = float(np.take_along_axis(histogram, planned, -1).sum(-1).mean())
        before = self._overlap
        self._overlap = overlap if before < 0 else before + _SMOOTH * (overlap - before)
        self._best_overlap = max(self._best_overlap, self._overlap)


def histogram_of(trace: Trace, sequence: TraceSequence) -> Array:
    """The shares of one sequence of a trace: float32 `[S, E]`."""
    return prompt_histogram(trace.experts[sequence.rows], trace.num_experts)[1]
