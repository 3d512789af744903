"""What the closed loop adds to a generation: the run's own future, one text, and what was saved."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from baselines import Arm, Generation, Sample, SluiceArm
from routing import Routes

FLOOR, BOUND = "lru-overlap", "belady-victims+token"


class OwnRoutes:
    """What each generation will route, known beforehand: replayed, or recorded once from an arm
    that routes alike (results depend on no budget and no policy).

    Args:
        generate: Runs round `index` on an arm.
        arm: Which records, where nothing is replayed; None: nothing is known.
        prompt_tokens: Of each replayed generation.
        new_tokens: That each writes; the last one is never routed.
        replayed: Routes of round `index`, or None.
    """

    def __init__(
        self,
        generate: Callable[[int], Any],
        arm: SluiceArm | None,
        *,
        prompt_tokens: int,
        new_tokens: int,
        replayed: Callable[[int], np.ndarray] | None,
    ) -> None:
        self._generate = generate
        self._arm = arm
        self._prompt_tokens = prompt_tokens
        self._new_tokens = new_tokens
        self._replayed = replayed
        self._known: dict[int, Generation] = {}

    def of(self, index: int) -> list[Generation]:
        """Round `index` and the one behind it; nothing where it cannot be known."""
        return [each for i in (index, index + 1) if (each := self._one(i)) is not None]

    def _one(self, index: int) -> Generation | None:
        if index not in self._known:
            if self._replayed is not None:
                tokens = self._prompt_tokens + self._new_tokens - 1
                experts = self._replayed(index)[:tokens]
                self._known[index] = Generation(experts, self._prompt_tokens)
            elif self._arm is not None:
                self._known[index] = self._recorded(self._arm, index)
        return self._known.get(index)

    def _recorded(self, arm: SluiceArm, index: int) -> Generation:
        with arm.model.sluice.record() as recorder:
            self._generate(index)
        recorded = recorder.trace()
        if len(recorded.sequences) != 1:
            raise RuntimeError(f"{arm.mode}: recorded {len(recorded.sequences)} sequences, not one")
        return Generation(recorded.experts.astype(np.int64), recorded.sequences[0].prompt_tokens)


class SameText:
    """Holds the tokens of a round's exact arms against each other.

    An arm of other arithmetic may tie differently: it is fed what the others said.

    Args:
        demanded: False asks for nothing and feeds nobody.
    """

    def __init__(self, demanded: bool) -> None:
        self._demanded = demanded
        self._said: dict[int, tuple[str, list[int]]] = {}

    def fed(self, index: int) -> list[int]:
        """What was said in this round already, for an arm that is to follow it."""
        return self._said[index][1] if self._demanded and index in self._said else []

    def check(self, name: str, index: int, sample: Sample) -> None:
        """Errors: RuntimeError naming both arms; the run ends there, without rows."""
        judge, tokens = self._said.setdefault(index, (name, sample.tokens))
        if self._demanded and tokens != sample.tokens:
            raise RuntimeError(f"{name}: round {index}: got other tokens than {judge}")


def require_unread(arms: Mapping[str, Arm], routes: Routes | None) -> None:
    """Refuses to time a predictor on what it was fitted on.

    Errors: RuntimeError naming the arm.
    """
    timed = set() if routes is None else set(routes.contents)
    for name, arm in arms.items():
        for predictor in getattr(arm, "predictors", ()):
            both = timed & predictor.fitting.read
            if both:
                raise RuntimeError(
                    f"{name}: its {predictor.name} has read {len(both)} of the timed sequences"
                )


def derived_of(
    name: str, samples: Mapping[str, Sequence[float]], demand_bytes: Mapping[str, float]
) -> dict[str, float]:
    """What an arm's row says beside the others of its budget, by medians: one stall is no figure.

    `over_demand`, `over_lru_overlap`: tokens/s over those of the arms; `saves`: the share of
    lru-overlap's time; `bound_saves`: what the second bound saves of it; `of_bound`: the first
    over the second; `demand_bytes_over_lru`; `over_undisturbed`, of plans that move nothing:
    tokens/s over those without a predictor.
    """
    kind, _, share = name.partition("@")
    if kind.startswith("resident-foresight") and "resident-sluice" in samples:
        undisturbed = float(np.median(samples["resident-sluice"]))
        return {"over_undisturbed": undisturbed / float(np.median(samples[name]))}
    if not share:
        return {}

    def seconds(mode: str) -> float | None:
        found = samples.get(f"{mode}@{share}")
        return None if found is None else float(np.median(found))

    mine = float(np.median(samples[name]))
    demand, floor, bound = (seconds(mode) for mode in ("lru-demand", FLOOR, BOUND))
    out: dict[str, float] = {}
    if demand is not None:
        out["over_demand"] = demand / mine
    if floor is not None:
        out["over_lru_overlap"] = floor / mine
        out["saves"] = 1 - mine / floor
        read = demand_bytes.get(f"{FLOOR}@{share}", 0.0)
        if read and name in demand_bytes:
            out["demand_bytes_over_lru"] = demand_bytes[name] / read
        if bound is not None:
            out["bound_saves"] = 1 - bound / floor
            if bound < floor:
                out["of_bound"] = (floor - mine) / (floor - bound)
    undisturbed = seconds("decayed-overlap")
    if undisturbed is not None and kind.startswith("foresight-discarded"):
        out["over_undisturbed"] = undisturbed / mine
    return out
