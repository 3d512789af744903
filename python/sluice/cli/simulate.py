"""`sluice simulate`: recorded routes through the product's caches, without a model."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice.cli.common import Outcome
from sluice.errors import ConfigError
from sluice.folders import cache_folder

if TYPE_CHECKING:
    from sluice.simulate.grid import Contender
    from sluice.simulate.routes import Routes
    from sluice.trace import Trace

_POLICIES = "lru,decayed-lfu,belady"
_SLOTS = "12.5%,25%,50%"


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Registers the verb."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "simulate",
        help="replay a trace: hits of policies and predictors; what foresight can gain at most",
        description="Replays recorded routes through the product's own caches, event by event: "
        "hits in %% and how much of the way from LRU to Belady a policy or a predictor closes. "
        "With --headroom one page instead: what knowing the future would be worth on a machine, "
        "on a virtual clock.",
    )
    parser.add_argument("traces", nargs="+", metavar="TRACE", help="files of `sluice trace`")
    parser.add_argument(
        "--stream",
        default="stored",
        help='order of the sequences: "stored" (default), "mix" (tasks take turns), "balanced" '
        "(the task with the fewest tokens is next)",
    )
    parser.add_argument("--phase", default="all", help='"all" (default), "decode" or "prefill"')
    parser.add_argument("--batch", type=int, default=1, help="sequences side by side, default 1")
    parser.add_argument(
        "--slots",
        default=_SLOTS,
        help=f"of a layer (of all layers with --scope pool), numbers or shares; default {_SLOTS}",
    )
    parser.add_argument(
        "--policy", default=_POLICIES, help=f"names with commas between, default {_POLICIES}"
    )
    parser.add_argument(
        "--predictor",
        action="append",
        default=[],
        metavar="FOLDER",
        help="a trained predictor whose keep-scores are a contender of their own; may be repeated",
    )
    parser.add_argument("--scope", default="layer", help='"layer" (default) or "pool"')
    parser.add_argument(
        "--no-bypass", action="store_true", help="an expert that was loaded is kept for an event"
    )
    parser.add_argument(
        "--unscored", type=float, default=0.1, help="share that only warms the caches, default 0.1"
    )
    parser.add_argument(
        "--fit",
        action="append",
        default=[],
        metavar="TRACE",
        help='what "static" takes its set from; its sequences must be others',
    )
    parser.add_argument("--figure", metavar="FILE", help="also draw it: .png, .svg or .pdf")
    group = parser.add_argument_group("--headroom")
    group.add_argument(
        "--headroom", action="store_true", help="one page: what prediction can gain at most here"
    )
    group.add_argument(
        "--device-memory", metavar="SIZE", help='for experts: "12GiB", or a share of all: "25%%"'
    )
    group.add_argument("--expert-bytes", metavar="SIZE", help="of one expert as stored")
    group.add_argument(
        "--bandwidth",
        metavar="SIZE",
        help="bytes a second of the link that experts come over; without it the disk's, as "
        "`sluice doctor` measured it",
    )
    group.add_argument("--dense-ms", type=float, default=0.0, help="of a layer without its experts")
    group.add_argument("--expert-ms", type=float, default=0.0, help="of one expert that is there")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> Outcome:
    """Replays."""
    from sluice.simulate import order_of, routes_of
    from sluice.trace import concatenate, load

    stored = concatenate([load(path) for path in args.traces])
    trace = stored.select(order_of(stored, args.stream))
    routes = routes_of(trace, batch=args.batch, phase=args.phase)
    if args.headroom:
        return _headroom(args, routes)
    from sluice.simulate.grid import grid_text, run_grid

    slots = [_slots(text, routes, args.scope) for text in args.slots.split(",")]
    grid = run_grid(
        routes,
        _contenders(args, trace, routes, slots),
        slots,
        scope=args.scope,
        bypass=not args.no_bypass,
        unscored=args.unscored,
    )
    if args.figure:
        from sluice.plot import policy_grid

        policy_grid(grid).savefig(args.figure)
    payload = grid.to_dict() | {
        "traces": [str(path) for path in args.traces],
        "stream": args.stream,
        "phase": args.phase,
        "batch": args.batch,
    }
    text = (
        f"{routes.num_tokens:,} tokens, {routes.num_layers} layers, {routes.num_experts} experts, "
        f"stream {args.stream}, batch {args.batch}, {args.scope} slots; hits in %, event by event, "
        f"{'with' if not args.no_bypass else 'without'} bypass, no prefetching, the first "
        f"{100 * args.unscored:g} % not counted\n\n{grid_text(grid)}"
    )
    return Outcome(payload, text)


def _slots(text: str, routes: Routes, scope: str) -> int:
    experts = routes.num_experts * (1 if scope == "layer" else routes.num_layers)
    try:
        if text.strip().endswith("%"):
            return max(1, math.floor(float(text.strip()[:-1]) / 100 * experts))
        return int(text)
    except (ValueError, OverflowError):
        raise ConfigError(
            f'slots: got {text!r}, expected a number or a share such as "25%"'
        ) from None


def _contenders(
    args: argparse.Namespace, trace: Trace, routes: Routes, slots: list[int]
) -> list[Contender]:
    from sluice.simulate import gather_scores, popular_experts
    from sluice.simulate.grid import Contender

    fitted = _fit(args, trace)
    rows: list[Contender] = []
    for name in args.policy.split(","):
        if name == "static" and fitted is not None:
            rows.append(Contender(name, name, lambda slots: popular_experts(fitted, slots)))
        else:
            rows.append(Contender(name, name))
    for folder in args.predictor:
        from sluice.predict import load as load_predictor
        from sluice.trace import check_disjoint

        predictor = load_predictor(folder, trace.model or None)
        check_disjoint(predictor.fitting.read, trace)
        shared = 1 if args.scope == "layer" else routes.num_layers
        kept = predictor.keep_scores_of(trace, [max(1, count // shared) for count in slots])
        if kept is None:
            raise ConfigError(
                f"predictor: got {folder}, a {predictor.name}, which ranks nobody; expected one "
                "with keep-scores"
            )
        rows.append(
            Contender(
                Path(folder).name,
                "forecast:always",
                scores={
                    count: gather_scores(routes, each)
                    for count, each in zip(slots, kept, strict=True)
                },
            )
        )
    return rows


def _fit(args: argparse.Namespace, trace: Trace) -> Trace | None:
    from sluice.trace import check_disjoint, concatenate, load

    if not args.fit:
        return None
    fitted = concatenate([load(path) for path in args.fit])
    check_disjoint([sequence.content for sequence in fitted], trace)
    return fitted


def _headroom(args: argparse.Namespace, routes: Routes) -> Outcome:
    from sluice.simulate.headroom import headroom, headroom_text
    from sluice.simulate.timed import Machine

    if args.expert_bytes is None or args.device_memory is None:
        raise ConfigError(
            "headroom: got no --expert-bytes or no --device-memory, expected both: what one expert "
            "takes and what there is for all"
        )
    expert_bytes = int(_bytes("expert-bytes", args.expert_bytes))
    experts = routes.num_layers * routes.num_experts
    machine = Machine(
        bytes_per_second=_bandwidth(args.bandwidth),
        dense_seconds=args.dense_ms / 1e3,
        expert_seconds=args.expert_ms / 1e3,
    )
    budget = _bytes("device-memory", args.device_memory, expert_bytes * experts)
    found = headroom(routes, machine, expert_bytes=expert_bytes, slots=int(budget // expert_bytes))
    if args.figure:
        from sluice.plot import headroom_figure

        headroom_figure(found).savefig(args.figure)
    return Outcome(found.to_dict(), headroom_text(found))


def _bytes(name: str, text: str, whole: int | None = None) -> float:
    from sluice import _core

    kind, amount = _core.parse_size(text)
    if kind == "share":
        if whole is None:
            raise ConfigError(f'{name}: got {text!r}, expected bytes, as in "16MiB"')
        return amount * whole
    return amount


def _bandwidth(text: str | None) -> float:
    if text is not None:
        return _bytes("bandwidth", text.removesuffix("/s"))
    from sluice import doctor

    constants = doctor.load_constants(cache_folder())
    if constants is None or not constants.best_disk_bytes_per_s:
        raise ConfigError(
            "headroom: got no --bandwidth, and `sluice doctor` has not measured this machine's "
            "disk; give one, as in --bandwidth 2GB/s, or run doctor"
        )
    return constants.best_disk_bytes_per_s
