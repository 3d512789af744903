"""The predictors that a scenario names, fitted before anything is timed and kept by hash.

A scenario's `[predictors.<kind>]` says what each was fitted on:

    [predictors.forecaster]
    fit = { trace = "reference_train", every = 3 }        # every third sequence
    choose = { trace = "reference_valid" }                # early stop and calibration
    settings = { epochs = 10 }                            # none: the defaults

`hidden = true` beside a trace of the reference model: recorded once more here, with states. A
predictor that reads the model's own gates gets them from the scenario's checkpoint.

A fit lies in `$SLUICE_BENCH_DIR/predictors` by the hash of its table and of the traces behind it.
"""

import hashlib
import sys
from pathlib import Path
from typing import Any

from machine import canonical
from reference_traces import recorded
from routing import load_trace, trace_path
from sluice import predict, trace
from sluice.folders import bench_folder
from sluice.hf.auto import load_causal_lm
from sluice.predict.card import ARRAYS, is_saved
from sluice.predict.training_free.next_gate import NextGate


def fitted(
    kind: str, table: dict[str, Any], checkpoint: Path | None = None
) -> predict.BasePredictor[Any]:
    """A predictor of its own, with nothing observed yet. Errors: of `sluice.predict.train`."""
    return predict.load(folder_of(kind, table, checkpoint))


def folder_of(kind: str, table: dict[str, Any], checkpoint: Path | None = None) -> Path:
    """Where it is saved, fitted now unless it is there."""
    folder = bench_folder() / "predictors" / f"{kind}-{_key(kind, table)}"
    if not is_saved(folder):
        sys.stderr.write(f"fitting {kind} on {table['fit']}\n")
        fit, choose = _part(table["fit"]), _part(table.get("choose"))
        parts = [part for part in (fit, choose) if part is not None]
        contents = tuple(dict.fromkeys(s.content for s in parts[0]))
        others = tuple(dict.fromkeys(s.content for s in parts[-1])) if choose is not None else ()
        split = trace.Split(fit=contents, choose=tuple(c for c in others if c not in contents))
        predictor = unfitted(kind, table.get("settings"), parts[0].top_k, checkpoint)
        whole = trace.concatenate(parts)
        predict.train(predictor, whole, split, seed=table.get("seed", 0)).save(folder)
    return folder


def unfitted(
    kind: str, settings: dict[str, Any] | None, top_k: int, checkpoint: Path | None
) -> Any:
    """A predictor by name; one that reads the model's own gates has those of the checkpoint."""
    made: Any = predict.make(kind, settings)
    if not isinstance(made, NextGate):
        return made
    if checkpoint is None:
        raise ValueError(f"{kind}: got no checkpoint, expected the one whose gates it reads")
    return NextGate.from_model(load_causal_lm(checkpoint), top_k=top_k, settings=made.settings)


def passport(kind: str, table: dict[str, Any], predictor: Any) -> dict[str, Any]:
    """What a row says of a predictor: which, fitted on what, and the hash of its numbers."""
    arrays = (folder_of(kind, table) / ARRAYS).read_bytes()
    return {
        "kind": kind,
        **table,
        "fit_sequences": len(predictor.fitting.fit),
        "fit_tokens": predictor.fitting.tokens,
        "choose_sequences": len(predictor.fitting.choose),
        "sha256": hashlib.sha256(arrays).hexdigest()[:16],
    }


def _part(table: dict[str, Any] | None) -> trace.Trace | None:
    """`{trace, sequences = [first, last], every = n}`; without the last two all of the trace."""
    if table is None:
        return None
    if table.get("hidden"):
        role = table["trace"].removeprefix("reference_")
        return trace.load(recorded(role, hidden=True, every=table.get("every", 1)))
    loaded = load_trace(table["trace"])
    first, last = table.get("sequences", [0, len(loaded.sequences) - 1])
    return loaded.select(range(first, last + 1, table.get("every", 1)))


def _key(kind: str, table: dict[str, Any]) -> str:
    parts = [table["fit"], table.get("choose")]
    files = [trace_path(part["trace"]).read_bytes() for part in parts if part is not None]
    digests = [hashlib.sha256(data).hexdigest() for data in files]
    return hashlib.sha256(canonical([kind, table, digests]).encode()).hexdigest()[:16]
