"""The physical limit of an arm beside a GPU: bytes over its link, by rates read in the same run."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from baselines import Arm, Sample
from sluice import _core, doctor
from sluice.folders import cache_folder
from sluice.hf.auto import dense_bytes_of
from sluice.limit import limit_of
from sluice.stats import Stats

_COUNTERS = {entry.name for entry in fields(Stats)} - {"degradations"}
# Figures of Limit.to_dict that are no sums over tokens.
_PLAIN = {"bound", "achieved", "constants", "h2d_bytes_per_s", "hand_off_s"}


def beside_gpu(arm: Arm) -> bool:
    """Whether the arm's experts lie in memory apart from the host's."""
    session = getattr(arm.model, "sluice", None)
    return session is not None and _core.has_slots_apart(session.device)


def probe() -> doctor.Constants:
    """This machine's rates now. Errors: RuntimeError without a GPU to measure."""
    constants = doctor.measure(doctor.look(cache_folder()))
    if constants.device is None:
        raise RuntimeError("link limit: got no CUDA device to measure, expected the arm's")
    return constants


class LinkLimit:
    """What the timed tokens of one arm needed, against what the machine gives.

    `after` is called with every sample, `limit` at the end. A row's `limit` holds, per token
    (decode) or per prompt (prefill): `limit_s`, its terms `h2d_s`, `disk_s`, `experts_s`,
    `dense_s`, `bound`, `achieved` = limit / measured; what is known beside the limit,
    `wasted_hints_s`, `hand_offs`, `hand_off_s` (one) and `overhead_s` (all of them);
    `unexplained_s`; the probe's rates `h2d_bytes_per_s`, `memory_bytes_per_s`,
    `disk_bytes_per_s`, and `constants`, whose they are.
    """

    def __init__(self, arm: Arm, constants: doctor.Constants) -> None:
        self.arm = arm
        self.constants = constants
        self.seconds = 0.0
        self.units = 0
        self.totals: dict[str, float] = {}

    def after(self, sample: Sample) -> None:
        """Adds a sample's counters, which concern the tokens behind the prompt, or the prompt."""
        self.seconds += sum(sample.token_s) if sample.token_s else sample.prefill_s
        self.units += len(sample.token_s) or 1
        for name in _COUNTERS & sample.counters.keys():
            self.totals[name] = self.totals.get(name, 0) + sample.counters[name]

    def limit(self) -> dict[str, Any]:
        """The row's fields as above; none without a sample."""
        if not self.units:
            return {}
        spent = Stats(**self.totals)  # pyright: ignore[reportArgumentType]
        dense_bytes = dense_bytes_of(self.arm.model)
        found = limit_of(self.arm.model.sluice, spent, self.constants, dense_bytes)
        device = self.constants.device
        assert found is not None and device is not None
        told = found.to_dict(self.seconds)
        return {
            **{k: v if k in _PLAIN else v / self.units for k, v in told.items()},
            "memory_bytes_per_s": device.memory_bytes_per_s,
            "disk_bytes_per_s": self.constants.best_disk_bytes_per_s,
        }
