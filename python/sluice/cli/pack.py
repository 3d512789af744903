"""`sluice pack`: writes a checkpoint's experts into one aligned file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sluice.cli.common import Outcome, model_folder
from sluice.progress import Progress
from sluice.text import format_bytes


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Registers the verb."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "pack",
        help="write a checkpoint's experts into one aligned file: one read per expert",
        description="Writes every expert of a local checkpoint into a pack, beside the checkpoint "
        "unless -o says otherwise. A run that was stopped goes on where it stopped. Loading the "
        "checkpoint finds a pack that lies beside it.",
    )
    parser.add_argument("model", metavar="MODEL_DIR", help="a local checkpoint folder")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where the pack goes")
    parser.add_argument("--verify", action="store_true", help="read it back, compare checksums")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> Outcome:
    """Packs."""
    folder = model_folder(args.model)
    from sluice import _core
    from sluice.pack import make_pack, verify

    with Progress("packing", unit="experts") as progress:
        path = Path(make_pack(folder, args.output, progress=progress))
    if args.verify:
        with Progress("verifying") as progress:
            verify(path, progress)
    _, manifest = _core.open_pack(str(path))
    experts = sum(layer["num_experts"] for layer in manifest["layers"])
    size = path.stat().st_size
    payload = {
        "pack": str(path),
        "bytes": size,
        "experts": experts,
        "layers": len(manifest["layers"]),
        "source_fingerprint": manifest["source_fingerprint"],
        "verified": bool(args.verify),
    }
    tail = "; every checksum agrees" if args.verify else ""
    return Outcome(payload, f"{path}: {experts} experts, {format_bytes(size)}{tail}")
