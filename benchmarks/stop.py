"""When enough samples have been taken."""

import statistics
import time
from dataclasses import dataclass, field


@dataclass
class StopRule:
    """Stops at a relative spread, at a maximum, or at a timeout, whichever is first.

    The spread is the half-width of the middle 60 % (p20 to p80) over the median. `reason()` says
    why sampling ended, for the row.
    """

    min_samples: int = 12
    max_samples: int = 64
    relative_spread: float = 0.03
    timeout_s: float = 300.0
    _start: float = field(default_factory=time.monotonic)

    def reason(self, samples: list[float]) -> str | None:
        """None while sampling should go on, else "spread", "max" or "timeout"."""
        if len(samples) >= self.max_samples:
            return "max"
        if time.monotonic() - self._start > self.timeout_s and samples:
            return "timeout"
        if len(samples) >= self.min_samples:
            low, middle, high = quantiles(samples)
            if (high - low) / 2 <= self.relative_spread * abs(middle):
                return "spread"
        return None


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """p20, p50, p80."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return cuts[1], statistics.median(samples), cuts[7]
