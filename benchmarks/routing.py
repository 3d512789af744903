"""Routes that replace a random router's choice: recorded, or a sticky synthetic process."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sluice import trace

DATA = Path(__file__).parent / "data"
# What scenarios name: a trace, and positions among its MoE layers. The names count the model's
# layers, of which the first is dense.
CUTS = {"dsv2lite_translation_l1_9_17_25": ("deepseek_v2_lite_translation", (0, 8, 16, 24))}


@dataclass(frozen=True)
class Routes:
    """Expert ids per sequence: each `[tokens, layers, top_k]`, int64.

    `weights`, float32 of the same shapes, are the recorded router's where they are replayed too.
    `contents` are the sequences' hashes, by which it is known who was fitted on them.
    """

    sequences: list[np.ndarray]
    source: str
    sha256: str
    weights: list[np.ndarray] | None = None
    contents: tuple[str, ...] = ()


def trace_path(name: str) -> Path:
    """The file behind a trace of `data/`, or behind a cut of one."""
    return DATA / f"{CUTS[name][0] if name in CUTS else name}{trace.SUFFIX}"


def load_trace(name: str) -> trace.Trace:
    """A trace of `data/` by its name, or the layers of one that a cut names."""
    loaded = trace.load(trace_path(name))
    if name not in CUTS:
        return loaded
    layers = list(CUTS[name][1])
    weights = None if loaded.weights is None else loaded.weights[:, layers]
    return replace(loaded, experts=loaded.experts[:, layers], weights=weights)


def recorded(
    name: str, first: int, last: int, *, weights: bool = False, skip_tokens: int = 0
) -> Routes:
    """Sequences `first` … `last` of a cut, with the recorded router's weights if asked for, each
    from token `skip_tokens` on: a task's sequences begin with the same tokens."""
    loaded = load_trace(name)
    chosen = loaded.sequences[first : last + 1]
    experts = loaded.experts.astype(np.int64)
    digest = hashlib.sha256(trace_path(name).read_bytes()).hexdigest()
    beside = None
    if weights:
        if loaded.weights is None:
            raise ValueError(f"{name}: weights = true, but the trace has none")
        beside = [loaded.weights[s.rows][skip_tokens:].astype(np.float32) for s in chosen]
    skipped = f" from token {skip_tokens}" if skip_tokens else ""
    return Routes(
        [experts[s.rows][skip_tokens:] for s in chosen],
        f"recorded {name} sequences {first}-{last}{skipped}",
        digest,
        beside,
        tuple(s.content for s in chosen),
    )


def sticky(
    *,
    experts: int,
    layers: int,
    top_k: int,
    tokens: int,
    sequences: int,
    stickiness: float,
    seed: int,
) -> Routes:
    """A synthetic process: each of a token's experts is kept from the previous token with
    probability `stickiness`, else drawn from a Zipf-like popularity of its layer."""
    rng = np.random.default_rng(seed)
    rank = np.arange(1, experts + 1) ** -0.6
    popularity = np.stack([rng.permutation(rank) for _ in range(layers)])
    popularity /= popularity.sum(1, keepdims=True)
    out = []
    for _ in range(sequences):
        routes = np.empty((tokens, layers, top_k), dtype=np.int64)
        for layer in range(layers):
            previous = np.array([], dtype=np.int64)
            for token in range(tokens):
                kept = previous[rng.random(len(previous)) < stickiness]
                p = popularity[layer].copy()
                p[kept] = 0
                fresh = rng.choice(experts, top_k - len(kept), replace=False, p=p / p.sum())
                previous = np.concatenate([kept, fresh])
                routes[token, layer] = previous
        out.append(routes)
    text = f"sticky synthetic router, stickiness {stickiness}, seed {seed}"
    digest = hashlib.sha256(b"".join(r.tobytes() for r in out)).hexdigest()
    return Routes(out, text, digest)


class Replay:
    """Feeds one sequence of routes to a model's experts modules, by forward pre-hooks.

    A hook counts the tokens that its layer has seen, so prefill and decode take consecutive rows.
    Without recorded weights they stay the router's own (finite, positive), which is all that timing
    needs; a predictor that reads them needs the recorded ones.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.sites = [m for n, m in model.named_modules() if n.endswith(".experts")]
        self._routes: torch.Tensor | None = None
        self._weights: torch.Tensor | None = None
        self._seen = [0] * len(self.sites)

    def start(self, routes: np.ndarray, weights: np.ndarray | None = None) -> None:
        if routes.shape[1] != len(self.sites):
            raise ValueError(
                f"routes: got {routes.shape[1]} layers, the model has {len(self.sites)}"
            )
        self._routes = torch.from_numpy(routes)
        self._weights = None if weights is None else torch.from_numpy(weights)
        self._seen = [0] * len(self.sites)

    def _hook(self, layer: int) -> Any:
        def replace(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            assert self._routes is not None
            hidden = args[0]
            count = hidden.shape[0]
            begin = self._seen[layer]
            ids = self._routes[begin : begin + count, layer]
            if ids.shape[0] != count:
                raise ValueError(
                    f"routes end at token {self._routes.shape[0]}, asked for {count} more"
                )
            self._seen[layer] = begin + count
            if self._weights is None:
                return (hidden, ids.to(hidden.device), *args[2:]), kwargs
            weights = self._weights[begin : begin + count, layer].to(args[2])
            return (hidden, ids.to(hidden.device), weights, *args[3:]), kwargs

        return replace

    @contextmanager
    def installed(self) -> Iterator["Replay"]:
        handles = [
            site.register_forward_pre_hook(self._hook(i), with_kwargs=True, prepend=True)
            for i, site in enumerate(self.sites)
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
