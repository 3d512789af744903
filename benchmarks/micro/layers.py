"""A stack of MoE layers, token after token, on replayed routes: what the experts alone take.

One sample is some tokens of one recorded or sticky synthetic sequence through every layer; its
figure is seconds per layer. Arms of one budget alternate and share one block of weights. Beside
each stands the limit of what it moved, by rates that doctor read before the first sample.
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from baselines.layers import Block, LayerArm, make_layer_arm
from baselines.layers.gpu import kind_of_cuda, place
from checkpoints import DTYPES
from end_to_end.generation import routes_of
from harness import alternate, logits_tolerance, row, verdict
from sluice import _core, doctor
from sluice.folders import PACK_SUFFIX, bench_folder, cache_folder
from sluice.limit import Rates, device_limit, device_rates, host_limit, host_rates
from sluice.stats import Stats

_COUNTERS = {entry.name for entry in fields(Stats)} - {"degradations"}


def arms_of(scenario: dict[str, Any], share: float) -> list[str]:
    """The modes that have something to say at a share: with all resident only one."""
    modes = list(scenario["workload"]["modes"])
    if kind_of_cuda() == "none":  # the others' kernels are a GPU's
        modes = [mode for mode in modes if not mode.startswith("lru-")]
    return modes[:1] if share == 1.0 else modes


def run(scenario: dict[str, Any]) -> list[dict[str, Any]]:
    block = Block(scenario["model"])
    pack = pack_of(scenario, block) if scenario["workload"].get("backing") == "disk" else None
    rates = rates_of_machine()
    rows: list[dict[str, Any]] = []
    for share in scenario["budget"]["expert_bytes"]:
        rows += run_share(scenario, block, pack, rates, share)
    return rows


@functools.cache
def rates_of_machine() -> Rates:
    """Read once, before anything is timed."""
    constants = doctor.measure(doctor.look(cache_folder()))
    return device_rates(constants) or host_rates(constants)


def pack_of(scenario: dict[str, Any], block: Block) -> Path:
    """A pack of the block's layers, made once. Errors: OSError where the disk has no room."""
    path = bench_folder() / f"{scenario['name']}{PACK_SUFFIX}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        store = block.store()
        layers = [store.layer(layer) for layer in range(block.layers)]
        writer = _core.PackWriter(str(path), layers, model_id=scenario["name"])
        for layer in range(block.layers):
            for expert in range(block.experts):
                writer.append_from(store, layer, expert)
        writer.finish()
    return path


def device_bytes() -> int:
    """What the driver says is taken of the device; 0 without one."""
    if place() == "cpu":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def run_share(
    scenario: dict[str, Any], block: Block, pack: Path | None, rates: Rates, share: float
) -> list[dict[str, Any]]:
    arms: dict[str, LayerArm] = {}
    grown: dict[str, int] = {}
    stack = Stack(scenario, block)
    try:
        for mode in arms_of(scenario, share):
            name = mode if mode == "accelerate-v5" else f"{mode}@{share * 100:g}%"
            before = device_bytes()
            arms[name] = make_layer_arm(mode, block, scenario, share, pack)
            arms[name].setup()
            stack.outputs(arms[name], 0)
            # Torch's own tensors are freed by then: what is left is the arm's, and on the first
            # arm also what the driver keeps for kernels.
            grown[name] = device_bytes() - before
        return measure(scenario, stack, arms, rates, grown)
    finally:
        for arm in arms.values():
            arm.close()
        arms.clear()
        gc.collect()


class Stack:
    """The inputs of every layer and token, on the device before anything is timed."""

    def __init__(self, scenario: dict[str, Any], block: Block) -> None:
        self.block = block
        self.work = scenario["workload"]
        self.routes = routes_of(scenario)
        assert self.routes is not None
        dtype = DTYPES[scenario["model"]["dtype"]]
        generator = torch.Generator().manual_seed(scenario["model"]["seed"])
        hidden = torch.randn(block.layers, 1, block.hidden, generator=generator)
        self.hidden = hidden.to(dtype).to(place())
        top_k = scenario["model"]["top_k"]
        self.weights = torch.full((1, top_k), 1.0 / top_k, dtype=dtype, device=place())
        self.ids = [torch.from_numpy(s).to(place()) for s in self.routes.sequences]

    def outputs(
        self, arm: LayerArm, index: int, *, all_tokens: bool = False
    ) -> tuple[float, torch.Tensor]:
        """Seconds per layer of one sample, and outputs [tokens, layers, H]: of the last token, or
        of all of them, which costs memory and is not for timing."""
        ids = self.ids[index % len(self.ids)]
        layers = arm.sampled_layers or self.block.layers
        tokens = self.work["tokens"] if arm.bitwise else 1
        first = ids.shape[0] - tokens
        assert first >= 0, f"routes of {ids.shape[0]} tokens, {tokens} are sampled"
        synchronize()
        kept: list[list[torch.Tensor]] = []
        began = time.perf_counter()
        for token in range(first, ids.shape[0]):
            if not all_tokens:
                kept.clear()
            kept.append(
                [
                    arm.forward(
                        layer, self.hidden[layer], ids[token, layer : layer + 1], self.weights
                    )
                    for layer in range(layers)
                ]
            )
        synchronize()
        seconds = time.perf_counter() - began
        found = torch.stack([torch.cat(each) for each in kept])
        return seconds / (tokens * layers), found.float().cpu()


def synchronize() -> None:
    if place() != "cpu":
        torch.cuda.synchronize()


def check(stack: Stack, arms: dict[str, LayerArm], dtype: torch.dtype) -> dict[str, str]:
    """Equal outputs before anything is timed, on routes that were not warmed up, so that experts
    are fetched. Errors: RuntimeError naming the arm."""
    found = {name: stack.outputs(arm, 1, all_tokens=True)[1] for name, arm in arms.items()}
    judge = next(iter(found))
    verdicts: dict[str, str] = {}
    for name, out in found.items():
        other = found[judge][-out.shape[0] :, : out.shape[1]]  # of accelerate the last token
        verdicts[name] = verdict(
            name, out, other, judge=judge, what="outputs", bitwise=arms[name].bitwise,
            tolerance=logits_tolerance(dtype, stack.block.hidden),
        )  # fmt: skip
    return verdicts


def measure(
    scenario: dict[str, Any],
    stack: Stack,
    arms: dict[str, LayerArm],
    rates: Rates,
    grown: dict[str, int],
) -> list[dict[str, Any]]:
    block = stack.block
    verdicts = check(stack, arms, block.dtype)
    spent: dict[str, dict[str, float]] = {name: {} for name in arms}
    seconds = dict.fromkeys(arms, 0.0)
    calls = dict.fromkeys(arms, 0)

    def sampler(name: str) -> Callable[[int], float]:
        arm = arms[name]

        def one(index: int) -> float:
            before = arm.counters()
            value, _ = stack.outputs(arm, index)
            for key, number in arm.counters().items():
                if isinstance(number, int | float):
                    moved = number - before[key]
                    spent[name][key] = spent[name].get(key, 0) + moved
            count = (arm.sampled_layers or block.layers) * (
                scenario["workload"]["tokens"] if arm.bitwise else 1
            )
            calls[name] += count
            seconds[name] += value * count
            return value

        return one

    results = alternate(scenario, {name: sampler(name) for name in arms})
    routes = stack.routes
    assert routes is not None
    rows = []
    for name, (samples, stop) in results.items():
        memory = arms[name].memory() | ({"driver_bytes_grown": grown[name]} if grown[name] else {})
        rows.append(
            row(
                scenario,
                mode=name,
                metric="layer_s",
                unit="s",
                better="lower",
                state=arms[name].state,
                samples=samples,
                stop=stop,
                correct=verdicts[name],
                config=arms[name].config(),
                counters={
                    "per": "layer of a token",
                    **{k: v / calls[name] for k, v in spent[name].items()},
                },
                limit=limit_of(spent[name], rates, block, seconds[name], calls[name]),
                memory=memory,
                data={
                    "routes": routes.source,
                    "routes_sha256": routes.sha256,
                    "layers": block.layers,
                    "weights": f"one block of {block.bytes} bytes, windows of it",
                },
            )
        )
    return rows


def limit_of(
    spent: dict[str, float], rates: Rates, block: Block, seconds: float, calls: int
) -> dict[str, Any]:
    """The limit of what an arm moved, per layer of a token. accelerate's has no requests."""
    if "requests" not in spent:
        return {}
    stats = Stats(**{k: v for k, v in spent.items() if k in _COUNTERS})  # type: ignore[arg-type]
    compute = device_limit if rates.link_bytes_per_s else host_limit
    told = compute(stats, rates, block.expert_bytes, 0).to_dict(seconds)
    plain = {"bound", "achieved", "constants", "h2d_bytes_per_s", "hand_off_s"}
    return {
        **{k: v if k in plain else v / calls for k, v in told.items()},
        "memory_bytes_per_s": rates.memory_bytes_per_s,
        "disk_bytes_per_s": rates.disk_bytes_per_s,
    }
