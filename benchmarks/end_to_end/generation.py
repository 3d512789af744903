"""Prefill or decode of a causal LM, arm against arm."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from baselines import Arm, Sample, SluiceArm, make_arm
from checkpoints import checkpoint
from harness import alternate, logits_tolerance, row
from routing import Routes, recorded, sticky


def routes_of(scenario: dict[str, Any]) -> Routes | None:
    """The routes that the scenario times."""
    table = scenario.get("routing", {"source": "router"})
    if table["source"] == "recorded":
        return recorded(table["trace"], *table["test"])
    if table["source"] == "synthetic":
        return sticky(**{k: v for k, v in table.items() if k != "source"})
    return None


def run(scenario: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of every arm of the scenario."""
    folder = model_folder(scenario)
    work = scenario["workload"]
    shares = scenario.get("budget", {}).get("expert_bytes", [0.25])
    arms: dict[str, Arm] = {}
    for mode in work["modes"]:
        kind, _, share = mode.partition("@")
        swept = kind.split(":")[0] in {"sluice", "lru-demand"}
        for each in [float(share.rstrip("%")) / 100] if share else shares if swept else [1.0]:
            name = f"{kind}@{each * 100:g}%" if swept else kind
            arms[name] = make_arm(kind, folder, scenario, each)
    for arm in arms.values():
        arm.setup()
    try:
        return measure(scenario, arms, routes_of(scenario))
    finally:
        for arm in arms.values():
            arm.close()


def model_folder(scenario: dict[str, Any]) -> Path:
    model = scenario["model"]
    if model.get("weights") == "trained":
        import sluice

        return Path(sluice.reference_model())
    return checkpoint(model)


def reference_prompts() -> list[torch.Tensor]:
    """The shipped model's prompts, one a task, as token ids [1, P]."""
    from transformers import AutoTokenizer

    import sluice
    from sluice.reference import reference_prompts as shipped

    tokenizer = AutoTokenizer.from_pretrained(sluice.reference_model())
    return [
        tokenizer(p.text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        for p in shipped()
    ]


def measure(
    scenario: dict[str, Any], arms: dict[str, Arm], routes: Routes | None
) -> list[dict[str, Any]]:
    work = scenario["workload"]
    prompt_tokens, new_tokens = work["prompt_tokens"], work["new_tokens"]
    phase = scenario["phase"]
    vocab = next(iter(arms.values())).model.config.vocab_size
    last: dict[str, Sample] = {}

    prompts = reference_prompts() if scenario["model"].get("weights") == "trained" else None

    def sample(name: str, index: int, *, forced: bool = False) -> float:
        """One generation. Random weights are fed random text on the timed routes; the trained model
        gets a shipped prompt and writes its own text, unless `forced`."""
        generator = torch.Generator().manual_seed(1000 + index)
        random_text = torch.randint(4, vocab, (1, prompt_tokens + new_tokens), generator=generator)
        text, prompt = random_text, prompt_tokens
        if prompts is not None and not forced:
            text = prompts[index % len(prompts)]
            prompt = text.shape[1]
        sequence: np.ndarray | None = None
        if routes is not None:
            sequence = routes.sequences[index % len(routes.sequences)]
            repeats = 1 + (prompt_tokens + new_tokens) // len(sequence)
            sequence = np.concatenate([sequence] * repeats)
        last[name] = arms[name].generate(text, prompt, new_tokens, sequence)
        return last[name].prefill_s if phase == "prefill" else last[name].decode_s

    verdicts = check(arms, sample, last)
    totals: dict[str, dict[str, float]] = {name: {} for name in arms}

    def timed(name: str) -> Any:
        def one(index: int) -> float:
            value = sample(name, index)
            for key, number in last[name].counters.items():
                totals[name][key] = totals[name].get(key, 0) + number
            return value

        return one

    results = alternate(scenario, {name: timed(name) for name in arms})
    resident = results.get("resident-sluice")
    resident_s = statistics.median(resident[0]) if resident else None
    data = {
        "routes": routes.source if routes else "the model's own router",
        "routes_sha256": routes.sha256 if routes else "",
        "prompts": "shipped, one a task" if prompts else f"{prompt_tokens} random tokens",
        "text": "own" if prompts else "teacher-forced random tokens",
        "new_tokens": new_tokens,
    }
    rows = []
    for name, (samples, stop) in results.items():
        calls = len(samples) + scenario.get("stop", {}).get("warmup", 1)
        per_token = 1.0 / calls / max(1, new_tokens - 1)
        counters = {k: v * per_token for k, v in totals[name].items()}
        rows.append(
            row(
                scenario,
                mode=name,
                metric="prefill_s" if phase == "prefill" else "decode_s_per_token",
                unit="s",
                better="lower",
                state=arms[name].state,
                samples=samples,
                stop=stop,
                correct=verdicts[name],
                config=arms[name].config(),
                counters={"per": "decoded token" if phase == "decode" else "prompt", **counters},
                limit=disk_limit(arms[name], last[name], statistics.median(samples), resident_s),
                data=data,
            )
        )
    return rows


def disk_limit(
    arm: Arm, sample: Sample, token_s: float, resident_s: float | None
) -> dict[str, float]:
    """What the disk allows a sluice arm that reads directly from a pack.

    A read loop over the very extents that the last generation demanded, at the same depth and
    chunk, gives the rate that bytes could have had; `achieved` is the rate that demands had while
    any was in flight over it, and `token_bound_s` is demanded bytes over that rate plus the token's
    time with everything resident.
    """
    if not isinstance(arm, SluiceArm) or arm.variant != "pack" or resident_s is None:
        return {}
    from sluice import _core

    pack, extents = arm.demand_extents(sample.began_s)
    if not extents or not sample.counters.get("demand_s"):
        return {}
    threads = arm.settings["io_threads"]
    loop = statistics.median(
        _core.disk_bandwidth_extents(pack, extents, 1 << 20, threads) for _ in range(3)
    )
    demand = sample.counters["bytes_read_demand"]
    rate = demand / sample.counters["demand_s"]
    per_token = demand / max(1, len(sample.token_s))
    bound = per_token / loop + resident_s
    return {
        "read_loop_bytes_s": loop,
        "demand_bytes_s": rate,
        "achieved": rate / loop,
        "token_bound_s": bound,
        "token_over_bound": token_s / bound,
    }


def check(arms: dict[str, Arm], sample: Any, last: dict[str, Sample]) -> dict[str, str]:
    """Equal outputs before anything is timed. Errors: RuntimeError naming the arm."""
    for name in arms:
        sample(name, 0, forced=True)
    exact = [name for name, arm in arms.items() if arm.bitwise]
    judge = exact[0] if exact else next(iter(arms))
    verdicts: dict[str, str] = {}
    for name, arm in arms.items():
        mine, other = last[name].logits, last[judge].logits
        if arm.bitwise:
            if not torch.equal(mine, other):
                raise RuntimeError(f"{name}: logits differ from {judge}'s; nothing is timed")
            verdicts[name] = "bitwise"
            continue
        config = arm.model.config
        length = config.hidden_size * config.num_hidden_layers
        tolerance = logits_tolerance(arm.dtype, length)
        error = float((mine - other).abs().max() / other.abs().max())
        if error > tolerance:
            raise RuntimeError(
                f"{name}: logits are {error:.3g} from {judge}'s, above {tolerance:.3g}"
            )
        verdicts[name] = f"tolerance ({error:.2e} of {tolerance:.2e})"
    return verdicts
