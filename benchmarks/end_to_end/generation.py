"""Prefill or decode of a causal LM, arm against arm."""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

import reference_traces
import sluice
from baselines import Arm, Sample, SluiceArm, is_swept, make_arm
from checkpoints import checkpoint
from end_to_end.closed_loop import OwnRoutes, SameText, derived_of, require_unread
from end_to_end.link_limit import LinkLimit, beside_gpu, probe
from harness import alternate, logits_tolerance, row, verdict
from routing import Routes, recorded, sticky
from sluice import _core, reference


def routes_of(scenario: dict[str, Any]) -> Routes | None:
    """The routes that the scenario times."""
    table = scenario.get("routing", {"source": "router"})
    if table["source"] == "recorded":
        more = {k: table[k] for k in ("weights", "skip_tokens") if k in table}
        return recorded(table["trace"], *table["test"], **more)
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
        swept = is_swept(kind)
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
        return Path(sluice.reference_model())
    return checkpoint(model)


def reference_prompts(scenario: dict[str, Any]) -> list[torch.Tensor]:
    """Prompts as token ids [1, P]: the shipped model's, one a task; or `count` of a role's, drawn
    by seed among those whose recorded answer was as long as the workload's, where the workload
    says `prompts = { role, count }`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sluice.reference_model())
    work = scenario["workload"]
    chosen = work.get("prompts")
    if chosen is None:
        texts = [p.text for p in reference.reference_prompts()]
    else:
        role = chosen["role"]
        answers = reference_traces.shipped(role).sequences
        long = [
            prompt.text
            for prompt, answer in zip(reference_traces.prompts(role), answers, strict=True)
            if answer.length - answer.prompt_tokens >= work["new_tokens"] - 1
        ]
        order = np.random.default_rng(0).permutation(len(long))
        texts = [long[i] for i in order[: chosen["count"]]]
    return [
        tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        for text in texts
    ]


def measure(
    scenario: dict[str, Any], arms: dict[str, Arm], routes: Routes | None
) -> list[dict[str, Any]]:
    work = scenario["workload"]
    prompt_tokens, new_tokens = work["prompt_tokens"], work["new_tokens"]
    phase = scenario["phase"]
    vocab = next(iter(arms.values())).model.config.vocab_size
    last: dict[str, Sample] = {}

    trained = scenario["model"].get("weights") == "trained"
    prompts = reference_prompts(scenario) if trained else None
    require_unread(arms, routes)

    def replayed(index: int, of: list[np.ndarray]) -> np.ndarray:
        sequence = of[index % len(of)]
        repeats = 1 + (prompt_tokens + new_tokens) // len(sequence)
        return np.concatenate([sequence] * repeats)

    same = SameText(work.get("same_text", False))
    recorder = arms.get("resident-sluice")
    future = OwnRoutes(
        lambda index: sample("resident-sluice", index),
        recorder if isinstance(recorder, SluiceArm) else None,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        replayed=None if routes is None else lambda index: replayed(index, routes.sequences),
    )

    def sample(name: str, index: int, *, forced: bool = False) -> float:
        """One generation. Random weights are fed random text on the timed routes; the trained model
        gets a shipped prompt and writes its own text, unless `forced`."""
        generator = torch.Generator().manual_seed(1000 + index)
        random_text = torch.randint(4, vocab, (1, prompt_tokens + new_tokens), generator=generator)
        text, prompt = random_text, prompt_tokens
        if prompts is not None and not forced:
            text = prompts[index % len(prompts)]
            prompt = text.shape[1]
            if not arms[name].bitwise:
                fed = torch.tensor([same.fed(index)], dtype=torch.int64)
                text = torch.cat([text, fed], dim=1)
        experts = weights = None
        if routes is not None:
            experts = replayed(index, routes.sequences)
            weights = None if routes.weights is None else replayed(index, routes.weights)
        if arms[name].knows_future:
            arms[name].expect([] if forced and routes is None else future.of(index))
        last[name] = arms[name].generate(text, prompt, new_tokens, experts, weights)
        return last[name].prefill_s if phase == "prefill" else last[name].decode_s

    verdicts = check(arms, sample, last)
    totals: dict[str, dict[str, float]] = {name: {} for name in arms}
    disks = {
        name: DemandReads(arm)
        for name, arm in arms.items()
        if isinstance(arm, SluiceArm)
        and arm.variant == "pack"
        and arm.tells_demands
        and not beside_gpu(arm)
    }
    on_gpu = [name for name, arm in arms.items() if beside_gpu(arm)]
    rates = probe() if on_gpu else None
    links = {name: LinkLimit(arms[name], rates) for name in on_gpu if rates is not None}

    warmup = scenario.get("stop", {}).get("warmup", 1)

    def timed(name: str) -> Any:
        def one(index: int) -> float:
            value = sample(name, index)
            if arms[name].bitwise:
                same.check(name, index, last[name])
            for key, number in last[name].counters.items() if index >= warmup else ():
                totals[name][key] = totals[name].get(key, 0) + number
            if name in disks:
                disks[name].after(last[name])
            if name in links:
                links[name].after(last[name])
            return value

        return one

    results = alternate(scenario, {name: timed(name) for name in arms})
    resident = results.get("resident-sluice")
    resident_s = statistics.median(resident[0]) if resident else None
    data = {
        "routes": routes.source if routes else "the model's own router",
        "routes_sha256": routes.sha256 if routes else "",
        "prompts": what_prompts(work) if prompts else f"{prompt_tokens} random tokens",
        "text": "own" if prompts else "teacher-forced random tokens",
        "new_tokens": new_tokens,
    }
    rows = []
    seconds = {name: samples for name, (samples, _) in results.items()}
    demanded = {name: total.get("bytes_read_demand", 0.0) for name, total in totals.items()}
    for name, (samples, stop) in results.items():
        per_token = 1.0 / len(samples) / max(1, new_tokens - 1)
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
                limit=disks[name].limit(statistics.median(samples), resident_s)
                if name in disks
                else links[name].limit()
                if name in links
                else {},
                memory=arms[name].memory(),
                data=data,
                derived=derived_of(name, seconds, demanded) if phase == "decode" else None,
            )
        )
    return rows


def what_prompts(work: dict[str, Any]) -> str:
    chosen = work.get("prompts")
    if chosen is None:
        return "shipped, one a task"
    return f"{chosen['count']} of {chosen['role']} whose answers are long"


class DemandReads:
    """How fast one arm's demanded bytes came, beside what the disk gave at that time.

    Behind each sample a read loop goes over the extents that the arm's sample *before* demanded, at
    the same depth and chunk: behind those of the sample just taken it would read what some cache
    below the file system still holds. Of a throttled arm it is the rate that it is held to.
    """

    def __init__(self, arm: SluiceArm) -> None:
        self.arm = arm
        self.extents: list[tuple[int, int]] = []
        self.loops: list[float] = []  # bytes/s
        self.ratios: list[float] = []  # demand rate of a sample over the loop behind it
        self.rates: list[float] = []
        self.bytes_per_token: list[float] = []

    def after(self, sample: Sample) -> None:
        pack, extents = self.arm.demand_extents(sample.began_s)
        demand, seconds = (sample.counters[k] for k in ("bytes_read_demand", "demand_s"))
        self.bytes_per_token.append(demand / max(1, len(sample.token_s)))
        if self.extents and seconds:
            settings = self.arm.model.sluice.options
            loop = self.arm.read_rate or _core.disk_bandwidth_extents(
                pack, self.extents, settings.chunk_bytes_as_int(), settings.io_threads
            )
            self.loops.append(loop)
            self.rates.append(demand / seconds)
            self.ratios.append(demand / seconds / loop)
        self.extents = extents

    def limit(self, token_s: float, resident_s: float | None) -> dict[str, float]:
        """`achieved` is the rate that demands had while any was in flight over the loop's;
        `token_bound_s` is demanded bytes over the loop's rate plus the token's time with everything
        resident."""
        if not self.ratios or resident_s is None:
            return {}
        loop = statistics.median(self.loops)
        bound = statistics.median(self.bytes_per_token) / loop + resident_s
        return {
            "read_loop_bytes_s": loop,
            "demand_bytes_s": statistics.median(self.rates),
            "achieved": statistics.median(self.ratios),
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
        config = arm.model.config
        length = config.hidden_size * config.num_hidden_layers
        verdicts[name] = verdict(
            name, last[name].logits, last[judge].logits, judge=judge, what="logits",
            bitwise=arm.bitwise, tolerance=logits_tolerance(arm.dtype, length),
        )  # fmt: skip
    return verdicts
