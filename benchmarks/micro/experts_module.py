"""One experts module after another, all resident: transformers' implementations against sluice.

The working set is every expert of the checkpoint, so weights come from memory, not from the cache.
"""

import time
from typing import Any

import torch

from baselines import make_arm
from end_to_end.generation import model_folder, routes_of
from harness import alternate, logits_tolerance, row, verdict


@torch.no_grad()
def run(scenario: dict[str, Any]) -> list[dict[str, Any]]:
    work = scenario["workload"]
    folder = model_folder(scenario)
    arms = {mode: make_arm(mode, folder, scenario, 1.0) for mode in work["modes"]}
    for arm in arms.values():
        arm.setup()
    routes = routes_of(scenario)
    rows: list[dict[str, Any]] = []
    try:
        for tokens in work["tokens"]:
            rows += measure(scenario, arms, routes, tokens)
    finally:
        for arm in arms.values():
            arm.close()
    return rows


def sites(model: Any) -> list[Any]:
    return [m for n, m in model.named_modules() if n.endswith(".experts")]


def measure(
    scenario: dict[str, Any], arms: dict[str, Any], routes: Any, tokens: int
) -> list[dict[str, Any]]:
    calls = scenario["workload"]["calls"]
    width = next(iter(arms.values())).model.config.hidden_size
    generator = torch.Generator().manual_seed(7)
    dtype = next(iter(arms.values())).dtype
    hidden = torch.randn(calls, tokens, width, generator=generator).to(dtype)
    outputs: dict[str, torch.Tensor] = {}

    def inputs(index: int, call: int, layers: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        sequence = routes.sequences[index % len(routes.sequences)]
        first = (call * tokens) % max(1, len(sequence) - tokens)
        layer = call % layers
        ids = torch.from_numpy(sequence[first : first + tokens, layer].copy())
        weights = torch.full(ids.shape, 1.0 / ids.shape[1], dtype=torch.float32)
        return ids, weights, layer

    def sampler(name: str) -> Any:
        modules = sites(arms[name].model)

        def one(index: int) -> float:
            implementation = getattr(arms[name], "implementation", None)
            if implementation:
                arms[name].model.set_experts_implementation(implementation)
            prepared = [inputs(index, call, len(modules)) for call in range(calls)]
            start = time.perf_counter()
            for call, (ids, weights, layer) in enumerate(prepared):
                out = modules[layer](hidden[call], ids, weights.to(dtype))
            seconds = (time.perf_counter() - start) / calls
            outputs[name] = out.float()
            return seconds

        return one

    samplers = {name: sampler(name) for name in arms}
    for one in samplers.values():
        one(0)
    judge = next(name for name, arm in arms.items() if arm.bitwise)
    verdicts = {
        name: verdict(
            name, out, outputs[judge], judge=judge, what="outputs", bitwise=False,
            tolerance=logits_tolerance(dtype, width),
        )
        for name, out in outputs.items()
    }  # fmt: skip
    results = alternate(scenario, samplers)
    return [
        row(
            scenario,
            mode=name,
            metric=f"experts_s_{tokens}_tokens",
            unit="s",
            better="lower",
            state="resident",
            samples=samples,
            stop=stop,
            correct=verdicts[name],
            config=arms[name].config(),
            data={"routes": routes.source, "tokens": tokens},
        )
        for name, (samples, stop) in results.items()
    ]
