"""`sluice doctor`: measures the machine, names problems, verifies packs, removes what was left."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from sluice.cli.common import Outcome
from sluice.errors import ConfigError
from sluice.folders import cache_folder
from sluice.progress import Progress
from sluice.text import format_bytes, table


def add_parser(verbs: Any) -> argparse.ArgumentParser:
    """Registers the verb."""
    parser: argparse.ArgumentParser = verbs.add_parser(
        "doctor",
        help="measure this machine, name each problem with a line of advice",
        description="Measures memory, disk and the first GPU (link both ways, memory, launches, "
        "pinning) in a few seconds (--full: at most a minute), looks at what is installed, and "
        "names each problem with a line of advice. With PACK it reads "
        "a pack and compares every checksum. With --clean it lists what sluice wrote and removes "
        "it once you agree.",
    )
    parser.add_argument("pack", nargs="?", metavar="PACK", help="verify this pack instead")
    parser.add_argument("--full", action="store_true", help="larger probes, more threads")
    parser.add_argument("--clean", action="store_true", help="list and remove what sluice wrote")
    parser.add_argument("--yes", action="store_true", help="with --clean: do not ask")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> Outcome:
    """Examines, verifies or cleans."""
    if args.pack is not None and (args.clean or args.full):
        raise ConfigError("sluice doctor PACK: got --clean or --full too, expected the pack alone")
    if args.pack is not None:
        return _verify(Path(args.pack))
    if args.clean:
        return _clean(yes=args.yes, ask=not args.json and sys.stdin.isatty())
    return _examine(full=args.full)


def _verify(path: Path) -> Outcome:
    from sluice.pack import verify

    if not path.is_file():
        raise ConfigError(f"sluice doctor PACK: got {str(path)!r}, which is no file")
    with Progress("verifying") as progress:
        verify(path, progress)
    size = path.stat().st_size
    return Outcome(
        {"pack": str(path), "bytes": size, "verified": True},
        f"{path}: every checksum agrees ({format_bytes(size)})",
    )


def _examine(*, full: bool) -> Outcome:
    from sluice import doctor

    machine = doctor.look(cache_folder())
    with Progress("measuring", unit="probes") as progress:
        constants = doctor.measure(machine, full=full, progress=progress)
    stored = doctor.store_constants(cache_folder(), constants)
    findings = doctor.examine(machine)
    payload = {
        "machine": machine.to_dict(),
        "constants": constants.to_dict(),
        "constants_file": str(stored),
        "findings": [finding.to_dict() for finding in findings],
    }
    return Outcome(payload, text_of(machine, constants, findings))


def text_of(machine: Any, constants: Any, findings: list[Any]) -> str:
    """What was found, for people."""
    limit = machine.cgroup_limit_bytes
    facts = [
        ("CPU", f"{machine.cpu}, {machine.cores} cores, {machine.isa} kernels"),
        (
            "RAM",
            f"{format_bytes(machine.ram_free_bytes)} of {format_bytes(machine.ram_bytes)} free",
        ),
        ("memory limit", format_bytes(limit) if limit is not None else "none"),
        ("huge pages", machine.huge_pages),
        ("memory read", _rate(constants.memory_bytes_per_s)),
        (
            "cache folder",
            f"{machine.folder} ({machine.file_system}), "
            f"{format_bytes(machine.disk_free_bytes)} free, "
            f"O_DIRECT {'works' if machine.direct_reads else 'refused'}",
        ),
        *(
            (f"disk read {name}", f"{rate / 1e9:.2f} GB/s (threads x bytes of a read)")
            for name, rate in constants.disk_bytes_per_s.items()
        ),
        *_gpu_facts(machine, constants.device),
        ("installed", ", ".join(f"{name} {text}" for name, text in machine.versions.items())),
        ("torch op", "built in" if machine.ops else "in Python"),
    ]
    width = max(len(name) for name, _ in facts)
    lines = [f"{name.ljust(width)}  {value}" for name, value in facts]
    lines.append("")
    for finding in findings:
        lines.append(f"{finding.severity}: {finding.found}")
        lines.append(f"  do: {finding.advice}")
    problems = sum(finding.severity == "problem" for finding in findings)
    lines.append(f"problems: {problems}, notes: {len(findings) - problems}; measured in "
                 f"{constants.seconds:.1f} s")  # fmt: skip
    return "\n".join(lines)


def _gpu_facts(machine: Any, device: Any) -> list[tuple[str, str]]:
    """What was read and measured of the first GPU, or why there is none."""
    gpu = machine.gpu
    if gpu is None:
        why = "sluice was built without CUDA" if machine.cuda == "none" else "the driver shows none"
        return [("GPU", f"no CUDA device ({why})")]
    lanes = "PCIe lanes not readable"
    if gpu.link_width is not None:
        lanes = f"PCIe x{gpu.link_width} of x{gpu.link_width_max or '?'}"
        lanes += f" at up to {gpu.link_speed_max}" if gpu.link_speed_max else ""
    facts = [
        ("GPU", f"{gpu.name} ({gpu.device} of {gpu.count}), driver {gpu.driver}, {lanes}"),
    ]
    if device is None:
        return facts
    facts += [
        ("GPU memory read", _rate(device.memory_bytes_per_s)),
        (
            "link to device",
            f"{_rate(device.link_bytes_per_s)} by 4 MiB from pinned memory; a copy takes "
            f"{device.link_latency_s * 1e6:.1f} us more alone, "
            f"{device.link_queued_latency_s * 1e6:.1f} us queued",
        ),
        ("link to host", _rate(device.back_bytes_per_s)),
        ("link, pageable", _rate(device.pageable_bytes_per_s)),
        (
            "launch, round trip",
            f"{device.launch_s * 1e6:.1f} us, {device.round_trip_s * 1e6:.1f} us",
        ),
        ("pinning", _rate(device.pin_bytes_per_s)),
        ("staging", f"{_rate(device.staging_bytes_per_s)} a thread"),
        (
            "RAM beside copies",
            f"{_rate(device.host_beside_copies_bytes_per_s)} read and "
            f"{_rate(device.link_beside_reads_bytes_per_s)} copied at once; "
            f"{_rate(device.host_bytes_per_s)} read alone",
        ),
    ]
    for name, rates in device.copies_bytes_per_s.items():
        sizes = ", ".join(f"{size} {rate / 1e9:.1f}" for size, rate in rates.items())
        facts.append(("copies, GB/s", f"{name}: {sizes}"))
    return facts


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.1f} GB/s"


def _clean(*, yes: bool, ask: bool) -> Outcome:
    from sluice import doctor

    files = doctor.written_files()
    total = sum(file.num_bytes for file in files)
    listing = table(
        ("file", "what", "size"),
        [(str(file.path), file.kind, format_bytes(file.num_bytes)) for file in files],
    )
    payload: dict[str, Any] = {
        "folders": [str(folder) for folder in doctor.folders()],
        "files": [file.to_dict() for file in files],
        "bytes": total,
        "removed": [],
    }
    if not files:
        return Outcome(payload, "sluice wrote nothing that is still here")
    if not yes and ask:
        sys.stdout.write(listing + "\n")
        yes = input(
            f"remove {len(files)} files, {format_bytes(total)}? [y/N] "
        ).strip().lower() in {
            "y",
            "yes",
        }
        listing = ""
    if not yes:
        return Outcome(payload, f"{listing}\nnothing removed; --yes removes them".lstrip("\n"))
    removed = doctor.remove(files)
    payload["removed"] = [str(file.path) for file in removed]
    kept = len(files) - len(removed)
    tail = f"; {kept} in use were kept" if kept else ""
    text = f"removed {len(removed)} files, {format_bytes(sum(f.num_bytes for f in removed))}{tail}"
    return Outcome(payload, f"{listing}\n{text}".lstrip("\n"))
