"""Runs one scenario: outputs first, then time, arms in alternation, then rows."""

import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from machine import canonical, commit, machine, resident_set_bytes, versions
from stop import StopRule, quantiles

SCHEMA = 1


def load_scenario(path: Path) -> dict[str, Any]:
    """The TOML with its hash. Errors: ValueError on an unknown table or key."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    text = path.read_bytes()
    scenario = tomllib.loads(text.decode())
    known = {
        "name",
        "kind",
        "phase",
        "threads",
        "device",
        "model",
        "routing",
        "budget",
        "disk",
        "predictors",
        "workload",
        "stop",
        "smoke",
    }
    unknown = set(scenario) - known
    if unknown or "name" not in scenario or "kind" not in scenario:
        raise ValueError(f"{path}: unknown keys {sorted(unknown)}; name and kind are required")
    scenario["sha256"] = hashlib.sha256(text).hexdigest()
    return scenario


def smoke(scenario: dict[str, Any]) -> dict[str, Any]:
    """The same question on a model of kilobytes, two samples an arm."""
    small = {k: dict(v) if isinstance(v, dict) else v for k, v in scenario.items()}
    override = small.pop("smoke", {})
    for table, values in override.items():
        # A table that names its own source replaces the scenario's; else it overrides keys.
        merged = dict(values) if "source" in values else {**small.get(table, {}), **values}
        if table == "model" and "config" in scenario["model"]:
            merged["config"] = {**scenario["model"]["config"], **values.get("config", {})}
        small[table] = merged
    small["threads"] = 1  # nobody is timed, and threads wait for each other on a busy machine
    small["stop"] = {"warmup": 0, "min_samples": 2, "max_samples": 2, "timeout_s": 3600}
    return small


def stop_rule(scenario: dict[str, Any]) -> StopRule:
    fields = {k: v for k, v in scenario.get("stop", {}).items() if k != "warmup"}
    return StopRule(**fields)


def alternate(
    scenario: dict[str, Any], samplers: dict[str, Callable[[int], float]]
) -> dict[str, tuple[list[float], str]]:
    """Samples every arm in turn (A B C A B C …) until the slowest to settle has settled.

    Each sampler takes the round's number, so all arms of a round see the same prompt.
    """
    warmup = scenario.get("stop", {}).get("warmup", 1)
    for index in range(warmup):
        for sampler in samplers.values():
            sampler(index)
    rules = {name: stop_rule(scenario) for name in samplers}
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    reasons: dict[str, str | None] = dict.fromkeys(samplers)
    index = warmup  # the warm-up's own prompts would be in the caches
    while not all(reasons.values()):
        for name, sampler in samplers.items():
            samples[name].append(sampler(index))
        reasons = {name: rules[name].reason(samples[name]) for name in samplers}
        if any(reason in {"max", "timeout"} for reason in reasons.values()):
            reasons = {name: reason or "max" for name, reason in reasons.items()}
        index += 1
    return {name: (samples[name], str(reasons[name])) for name in samplers}


def row(
    scenario: dict[str, Any],
    *,
    mode: str,
    metric: str,
    unit: str,
    better: str,
    state: str,
    samples: list[float],
    stop: str,
    correct: str,
    config: dict[str, Any],
    data: dict[str, Any],
    counters: dict[str, Any] | None = None,
    limit: dict[str, Any] | None = None,
    memory: dict[str, int] | None = None,
    derived: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """One result with its passport (measuring rules: README.md of this folder).

    Errors: ValueError on a NaN in it; what is not known is None.
    """
    revision, dirty = commit()
    p20, p50, p80 = quantiles(samples)
    body: dict[str, Any] = {
        "schema": SCHEMA,
        "scenario": scenario["name"],
        "scenario_sha256": scenario["sha256"],
        "mode": mode,
        "config": config,
        "metric": metric,
        "unit": unit,
        "better": better,
        "phase": scenario.get("phase", ""),
        "state": state,
        "n": len(samples),
        "p20": p20,
        "p50": p50,
        "p80": p80,
        "samples": [round(s, 7) for s in samples],
        "stop": stop,
        "discarded": 0,
        "correct": correct,
        "counters": counters or {},
        "limit": limit or {},
        "memory": {**resident_set_bytes(), **(memory or {})},
        "data": data,
        "commit": revision,
        "dirty": dirty,
        "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    if derived:
        body["derived"] = derived
    body["id"] = hashlib.sha256(canonical(body).encode()).hexdigest()[:12]
    return body


def logits_tolerance(dtype: torch.dtype, length: int) -> float:
    """How far two exact evaluations in `dtype` may lie apart, relative to the largest logit: the
    dtype's epsilon times the square root of the reduction length."""
    return float(torch.finfo(dtype).eps) * length**0.5


def verdict(
    name: str,
    out: torch.Tensor,
    other: torch.Tensor,
    *,
    judge: str,
    what: str,
    bitwise: bool,
    tolerance: float,
) -> str:
    """What a row's `correct` says of an arm whose outputs were held against those of `judge`.

    Errors: RuntimeError naming the arm; nothing is timed then.
    """
    if bitwise:
        if not torch.equal(out, other):
            raise RuntimeError(f"{name}: {what} differ from {judge}'s; nothing is timed")
        return "bitwise"
    error = float((out - other).abs().max() / other.abs().max())
    if error > tolerance:
        raise RuntimeError(f"{name}: {what} are {error:.3g} from {judge}'s, above {tolerance:.3g}")
    return f"tolerance ({error:.2e} of {tolerance:.2e})"
