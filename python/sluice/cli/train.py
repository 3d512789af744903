"""`sluice train`: a predictor from traces, with a held-out evaluation, saved with its card."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from sluice.cli.common import Outcome, model_folder
from sluice.errors import ConfigError


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Registers the verb."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "train",
        help="a predictor of experts from traces, evaluated on held-out sequences",
        description="Fits a predictor on a part of the sequences of traces, chooses (early stop, "
        "calibration) on another, and scores it on the rest. The folder it writes holds the "
        "predictor, a card that says what was read, and the split.",
    )
    parser.add_argument("predictor", metavar="PREDICTOR", help="a name; `list` prints all")
    parser.add_argument(
        "--trace", metavar="FILE", nargs="+", default=[], help="traces of one model"
    )
    parser.add_argument("--out", metavar="FOLDER", help="where to save it; made if missing")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--split", metavar="FILE", help="who is fitted, chosen on and scored, by hash")
    how.add_argument(
        "--shares",
        metavar="F,C,S",
        default="0.4,0.1,0.5",
        help="shares of each task's sequences to fit, choose and score (default %(default)s)",
    )
    how.add_argument("--leave-out", metavar="TASK", help="score this task, fit on all others")
    parser.add_argument("--seed", type=int, default=0, help="of the split and the fit (default 0)")
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        dest="settings",
        help="a setting of the predictor, as JSON; may be repeated",
    )
    parser.add_argument(
        "--horizons",
        metavar="H",
        nargs="+",
        default=["token", "1"],
        help="to score at: token (before layer 0 runs) or layers ahead (default token 1)",
    )
    parser.add_argument(
        "--first-layer",
        metavar="L",
        type=int,
        default=0,
        help="layers before it are not scored (default 0)",
    )
    parser.add_argument(
        "--model", metavar="DIR", help="checkpoint whose gates next-gate runs; no other needs it"
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> Outcome:
    """Trains, scores and saves."""
    from sluice.predict import names

    if args.predictor == "list":
        return Outcome({"predictors": list(names())}, "\n".join(names()))
    if not args.trace or not args.out:
        raise ConfigError(
            f"sluice train {args.predictor}: got no --trace or no --out, expected both"
        )
    from sluice.predict.train import train
    from sluice.progress import Progress

    horizons = [_horizon(text) for text in args.horizons]
    predictor = _predictor(args)
    trace = _trace(args.trace)
    split = _split(args, trace)
    if args.model is not None:
        predictor = _with_gates(predictor, args.model, trace.top_k)
    with Progress(f"training {predictor.name}", unit="steps") as progress:
        training = train(
            predictor,
            trace,
            split,
            seed=args.seed,
            horizons=horizons,
            first_layer=args.first_layer,
            progress=progress,
        )
    folder = training.save(args.out)
    fitting, evaluation = predictor.fitting, training.evaluation
    payload = {
        "predictor": predictor.name,
        "folder": str(folder),
        "settings": dataclasses.asdict(predictor.settings),
        "fitting": dataclasses.asdict(fitting),
        "evaluation": None if evaluation is None else evaluation.to_dict(),
    }
    notes = ", ".join(f"{name} {value}" for name, value in fitting.notes.items())
    lines = [
        f"{predictor.name}: fitted on {fitting.tokens} tokens of {len(fitting.fit)} sequences, "
        f"chosen on {len(fitting.choose)}, in {fitting.duration_s:.1f} s"
        + (f" ({notes})" if notes else ""),
        f"saved to {folder}",
    ]
    lines += ["", evaluation.to_text()] if evaluation else ["the split leaves nothing to score"]
    return Outcome(payload, "\n".join(lines))


def _trace(files: list[str]) -> Any:
    from sluice.trace import concatenate, load

    return concatenate([load(Path(file).expanduser()) for file in files])


def _split(args: argparse.Namespace, trace: Any) -> Any:
    from sluice.trace import Split, leave_out, split_by_sequence

    if args.split:
        return Split.load(Path(args.split).expanduser())
    if args.leave_out:
        return leave_out(trace, args.leave_out, seed=args.seed)
    try:
        fit, choose, score = (float(share) for share in args.shares.split(","))
    except ValueError:
        raise ConfigError(
            f"--shares: got {args.shares!r}, expected three numbers that sum to 1, as 0.4,0.1,0.5"
        ) from None
    return split_by_sequence(trace, (fit, choose, score), seed=args.seed)


def _predictor(args: argparse.Namespace) -> Any:
    from sluice.predict.registry import predictor_class, settings_of

    kind = predictor_class(args.predictor)
    return kind(settings_of(kind, _settings(args.settings)))


def _with_gates(predictor: Any, model: str, top_k: int) -> Any:
    from sluice.hf.auto import load_causal_lm
    from sluice.predict.training_free.next_gate import NextGate

    if not isinstance(predictor, NextGate):
        raise ConfigError(f"--model: got it beside {predictor.name}, expected it beside next-gate")
    loaded = load_causal_lm(model_folder(model))
    return NextGate.from_model(loaded, top_k=top_k, settings=predictor.settings)


def _settings(pairs: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set: got {pair!r}, expected NAME=VALUE")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text  # a word needs no quotes
    return found


def _horizon(text: str) -> Any:
    if text == "token" or (text.isdigit() and int(text) > 0):
        return text if text == "token" else int(text)
    raise ConfigError(f"--horizons: got {text!r}, expected token or a number of layers from 1 on")
