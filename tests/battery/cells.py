"""What a family is run through: the factors, the runs, and what is compared.

One `Bench` per family holds the stock models, the checkpoints in both styles and the packs; cells
share them. Weights are moved to fresh allocations after loading: a checkpoint mapped at odd
addresses changes the last bits of torch's own GEMMs, in stock models too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .families import Built, prompt_ids
from .pairwise import Row
from .tolerance import model_tolerance

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
POLICIES = ("lru", "decayed-lfu", "static", "edge", "edge:printed")
STORAGE = {
    "slots": ("one", "quarter", "all"),
    "policy": POLICIES,
    "hints": ("none", "random", "wrong"),
    "backing": ("pack", "shards", "ram", "spilled"),
}
FACTORS = STORAGE | {"dtype": tuple(DTYPES), "style": ("per-expert", "fused")}
SHARD = "20KB"
NEW_TOKENS = 3


Route = tuple[torch.Tensor, torch.Tensor]
Watch = Callable[[str, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run: a forward over the prompt, then greedy decoding from it.

    Shapes: logits `[B, T, V]`; steps `[N, B, V]` (the logits each new token came from); tokens
    `[B, T + N]`; routes: expert ids and weights `[tokens, K]` of each experts call, in order.
    """

    logits: torch.Tensor
    steps: torch.Tensor
    tokens: torch.Tensor
    routes: tuple[Route, ...]
    calls_per_forward: int

    def same_bits(self, other: Outcome) -> bool:
        return all(
            torch.equal(mine, theirs)
            for mine, theirs in (
                (self.logits, other.logits),
                (self.steps, other.steps),
                (self.tokens, other.tokens),
            )
        )


class Bench:
    """A family's models and files, each made once."""

    def __init__(self, built: Built, root: Path) -> None:
        self.built = built
        self.root = root
        self.ids = prompt_ids(built)
        self.bits: dict[tuple[str, int], tuple[Row, Outcome]] = {}
        self._stock: dict[str, nn.Module | Exception] = {}
        self._packs: dict[tuple[str, str], Path] = {}

    @cached_property
    def dtypes(self) -> tuple[str, ...]:
        """Those in which the stock model itself runs (DeepSeek-V4 has no fp16)."""
        return tuple(dtype for dtype in DTYPES if self._runs(dtype))

    def stock(self, dtype: str) -> nn.Module:
        """The stock model on HF's eager experts. Whoever offloads it restores it."""
        if dtype not in self._stock:
            try:
                model = self.load(self._source(), dtype, experts_implementation="eager")
                run(model, self.built.sites, self.ids)
                self._stock[dtype] = model
            except RuntimeError as error:
                self._stock[dtype] = error
        model = self._stock[dtype]
        if isinstance(model, Exception):
            raise model
        return model

    @cache  # noqa: B019  (a bench lives as long as the session)
    def reference(self, dtype: str) -> Outcome:
        return run(self.stock(dtype), self.built.sites, self.ids)

    @cache  # noqa: B019
    def state(self, dtype: str) -> dict[str, torch.Tensor]:
        return {k: v.detach().clone() for k, v in self.stock(dtype).state_dict().items()}

    @cache  # noqa: B019
    def checkpoint(self, dtype: str, style: str) -> Path:
        folder = self.root / f"{dtype}-{style}"
        self.stock(dtype).save_pretrained(
            folder, max_shard_size=SHARD, save_original_format=style == "per-expert"
        )
        return folder

    def pack(self, dtype: str, style: str) -> Path:
        from sluice.pack import make_pack

        key = (dtype, style)
        if key not in self._packs:
            path = self.root / f"{dtype}-{style}.sluice.safetensors"
            make_pack(self.checkpoint(dtype, style), path)
            self._packs[key] = path
        return self._packs[key]

    def load(self, folder: Path, dtype: str, **kwargs: Any) -> nn.Module:
        model = type(self.built.model).from_pretrained(
            folder, dtype=DTYPES[dtype], attn_implementation="eager", **kwargs
        )
        return realigned(model.eval())

    def device_memory(self, slots: str) -> str:
        """A budget for that many slots, as a share of all experts of the model."""
        model = self.built.model
        experts = sum(model.get_submodule(s).down_proj.shape[0] for s in self.built.sites)
        return {"one": f"{150 / experts:.4f}%", "quarter": "25%", "all": "100%"}[slots]

    def tolerance(self, dtype: str, magnitude: float) -> float:
        site = self.built.model.get_submodule(self.built.sites[0])
        stock = self.reference(dtype)
        return model_tolerance(
            DTYPES[dtype],
            layers=max(
                getattr(self.built.model.config, "num_hidden_layers", 0), stock.calls_per_forward
            ),
            hidden=max(site.down_proj.shape[1:]),
            inter=max(site.down_proj.shape[1:]),
            top_k=stock.routes[0][0].shape[1],
            magnitude=magnitude,
        )

    @contextmanager
    def offloaded(self, cell: Row) -> Iterator[nn.Module]:
        """The family's model as a cell wants it; a stock model is restored, bit for bit, after.

        `cell["options"]`, where it is there: further fields of `OffloadOptions`.
        """
        import sluice

        options = {
            "device_memory": self.device_memory(cell["slots"]),
            "policy": cell["policy"],
            **cell.get("options", {}),
        }
        dtype = cell["dtype"]
        if cell["backing"] in ("ram", "spilled"):
            backing = "disk" if cell["backing"] == "spilled" else "ram"
            model = self.stock(dtype)
            self.state(dtype)
            sluice.offload(model, backing=backing, offload_dir=self.root, **options)
            try:
                yield model
            finally:
                sluice.restore(model)
            return
        style = cell["style"]
        source = self.pack(dtype, style) if cell["backing"] == "pack" else "auto"
        config = sluice.OffloadConfig(pack=str(source), offload_dir=self.root, **options)
        model = self.load(self.checkpoint(dtype, style), dtype, quantization_config=config)
        with model.sluice:
            yield model

    def _runs(self, dtype: str) -> bool:
        try:
            self.stock(dtype)
        except RuntimeError:
            return False
        return True

    @cache  # noqa: B019
    def _source(self) -> Path:
        folder = self.root / "source"
        self.built.model.save_pretrained(folder)
        return folder


def realigned(model: nn.Module) -> nn.Module:
    """The same model with each tensor in an allocation of its own."""
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model


def run(
    model: nn.Module, sites: tuple[str, ...], ids: torch.Tensor, watch: Watch | None = None
) -> Outcome:
    """One outcome; `watch(site, expert ids)` is called before each experts call."""
    routes: list[Route] = []

    def before(site: str, ids: torch.Tensor, weights: torch.Tensor) -> None:
        routes.append((ids.detach().clone(), weights.detach().clone()))
        if watch is not None:
            watch(site, ids)

    with torch.no_grad(), _hooked(model, sites, before):
        logits = model(ids).logits
        calls = len(routes)
        generated = model.generate(
            ids,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
    steps = torch.stack(generated.logits)
    return Outcome(logits, steps, generated.sequences, tuple(routes), calls)


def run_on_routes(
    model: nn.Module, sites: tuple[str, ...], ids: torch.Tensor, routes: Sequence[Route]
) -> torch.Tensor:
    """Logits of the prompt when every experts call gets another run's ids and weights.

    Rounding may tip a router whose choice was nearly tied; this compares the experts all the same.
    """
    given = iter(routes)
    with torch.no_grad(), _hooked(model, sites, lambda *_: next(given)):
        return model(ids).logits


@contextmanager
def _hooked(
    model: nn.Module, sites: tuple[str, ...], before: Callable[..., Route | None]
) -> Iterator[None]:
    """`before(site, ids, weights)` ahead of each experts call; what it returns replaces both."""

    def hook_of(site: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            hidden, ids, weights = args  # positional in every family
            route = before(site, ids, weights)
            return None if route is None else (hidden, *route)

        return hook

    hooks = [model.get_submodule(site).register_forward_pre_hook(hook_of(site)) for site in sites]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def hinting(model: nn.Module, mode: str, seed: int = 0) -> Watch | None:
    """Hints given before each experts call: anything at all, or only what it will not need."""
    if mode == "none":
        return None
    session = model.sluice
    rng = random.Random(seed)
    layers = {session.store.layer(i)["name"]: i for i in range(session.store.num_layers)}
    experts = [session.store.layer(i)["num_experts"] for i in range(len(layers))]

    def at_random(site: str, chosen: torch.Tensor) -> None:
        del site, chosen
        layer = rng.randrange(len(experts))
        session.hint(
            [
                (layer, rng.randrange(experts[layer]), rng.random(), rng.choice((0.0, 0.01, 10.0)))
                for _ in range(3)
            ]
        )

    def always_wrong(site: str, chosen: torch.Tensor) -> None:
        layer = layers[site]
        useless = set(range(experts[layer])) - set(chosen.flatten().tolist())
        session.hint([(layer, expert, 1.0, 10.0) for expert in sorted(useless)])

    return at_random if mode == "random" else always_wrong


@dataclass(frozen=True, slots=True)
class Comparison:
    """How a run lies to stock's.

    Attributes:
        error: Largest difference of logits where both went through the same experts: anywhere in
            the prompt (on stock's routes), and along the new tokens.
        allowed: The tolerance there.
        rerouted: Positions where rounding chose other experts, and all that depend on them.
        near_ties: Rows whose tokens are compared only up to a margin below the tolerance.
        tokens: New tokens that were compared.
        tokens_equal: They agree.
        positions: All positions, prompt and new tokens.
    """

    error: float
    allowed: float
    rerouted: int
    near_ties: int
    tokens: int
    tokens_equal: bool
    positions: int


def compare(bench: Bench, dtype: str, ours: Outcome, on_stocks_routes: torch.Tensor) -> Comparison:
    """`ours` against stock's own run of the same prompt."""
    stock = bench.reference(dtype)
    allowed = bench.tolerance(dtype, stock.logits.abs().max().item())
    batch, length = bench.ids.shape
    moved = _rerouted(ours, stock, batch)
    prompt = moved[0].cumsum(1) > 0
    assert prompt.shape == (batch, length)
    error = (on_stocks_routes.float() - stock.logits.float()).abs().max().item()
    difference = (ours.logits.float() - stock.logits.float()).abs().amax(-1)
    error = max(error, difference.masked_fill(prompt, 0).max().item())
    margins = stock.steps.float().topk(2, dim=-1).values
    margins = margins[..., 0] - margins[..., 1]
    rerouted, near_ties, tokens, equal = int(prompt.sum()), 0, 0, True
    for row in range(batch):
        stable = not bool(prompt[row].any())
        for step in range(stock.steps.shape[0]):
            stable = stable and not (step > 0 and bool(moved[1 + step][row].any()))
            if not stable:
                rerouted += 1
                continue
            if margins[step, row].item() <= allowed and dtype != "fp32":
                near_ties += 1
                break
            tokens += 1
            at = length + step
            equal = equal and bool(ours.tokens[row, at] == stock.tokens[row, at])
            difference = (ours.steps[step, row].float() - stock.steps[step, row].float()).abs()
            error = max(error, difference.max().item())
    positions = batch * (length + stock.steps.shape[0])
    return Comparison(error, allowed, rerouted, near_ties, tokens, equal, positions)


def _rerouted(ours: Outcome, stock: Outcome, batch: int) -> list[torch.Tensor]:
    """Per forward `[B, positions]`: whether any layer chose other experts for the position."""
    calls = stock.calls_per_forward
    assert ours.calls_per_forward == calls
    forwards: list[torch.Tensor] = []
    for start in range(0, min(len(ours.routes), len(stock.routes)), calls):
        moved = torch.zeros(0)
        for mine, theirs in zip(
            ours.routes[start : start + calls], stock.routes[start : start + calls], strict=True
        ):
            differs = mine[0].sort(-1).values != theirs[0].sort(-1).values
            differs = differs.any(-1).view(batch, -1)
            moved = differs if moved.numel() == 0 else moved | differs
        forwards.append(moved)
    return forwards
