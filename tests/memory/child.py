"""Runs one offloaded model in a process of its own and prints what the kernel saw, as JSON.

    child.py CHECKPOINT DEVICE_MEMORY NEW_TOKENS [HEADROOM_BYTES]

With a headroom the process limits itself, after its imports, to what it uses then plus the
headroom: by a memory cgroup where it may make one, else by RLIMIT_DATA. It says which.
"""

import json
import math
import os
import resource
import sys
import threading
import time
from pathlib import Path

import torch
import transformers

import sluice


def status(field: str) -> int:
    text = Path("/proc/self/status").read_text()
    return next(int(x.split()[1]) << 10 for x in text.splitlines() if x.startswith(field + ":"))


def read_bytes() -> int:
    text = Path("/proc/self/io").read_text()
    return next(int(x.split()[1]) for x in text.splitlines() if x.startswith("read_bytes"))


class PeakAnon(threading.Thread):
    """Samples RssAnon: the kernel keeps a high-water mark of the whole resident set only."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.stopping = threading.Event()

    def run(self) -> None:
        while not self.stopping.wait(0.002):
            self.peak = max(self.peak, status("RssAnon"))


def own_group() -> tuple[Path, str, str] | None:
    """A memory cgroup with this process in it: its folder, limit file and usage file."""
    for root, limit, usage in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max", "memory.current"),
    ):
        group = root / f"sluice-test-{os.getpid()}"
        try:
            group.mkdir()
            if not (group / limit).exists():
                group.rmdir()
                continue
            (group / "cgroup.procs").write_text(str(os.getpid()))
        except OSError:
            continue
        return group, limit, usage
    return None


def restrict(group: tuple[Path, str, str] | None, headroom: int) -> dict[str, object]:
    if group is not None:
        folder, limit, usage = group
        base = int((folder / usage).read_text())
        (folder / limit).write_text(str(base + headroom))
        return {"limit": "cgroup", "base": base}
    base = status("VmData")
    resource.setrlimit(resource.RLIMIT_DATA, (base + headroom, base + headroom))
    return {"limit": "RLIMIT_DATA", "base": base}


def fill(session: sluice.Session) -> None:
    """Brings an expert into every slot."""
    layers = range(session.store.num_layers)
    every = [(a, b) for a in layers for b in range(session.store.layer(a)["num_experts"])]
    deadline = time.monotonic() + 120
    while any(slot[0] != "ready" for pool in session.residency() for slot in pool):
        if time.monotonic() > deadline:
            raise TimeoutError("not every slot was filled in two minutes")
        held = {slot[1:3] for pool in session.residency() for slot in pool if slot[0] == "ready"}
        # Some at a time: more guesses than the session keeps are dropped.
        session.hint([(*key, 1.0, math.inf) for key in every if key not in held][:64])
        time.sleep(0.02)


def main() -> None:
    checkpoint, device_memory, new_tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
    headroom = int(sys.argv[4]) if len(sys.argv) > 4 else 0
    group = own_group() if headroom else None
    torch.set_num_threads(2)
    model_class = transformers.AutoModelForCausalLM
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    with torch.device("meta"):
        model_class.from_config(config)  # imports what loading imports
    found = restrict(group, headroom) if headroom else {}
    peak = PeakAnon()
    peak.start()
    before = read_bytes()
    model = model_class.from_pretrained(
        checkpoint,
        dtype=torch.bfloat16,
        quantization_config=sluice.OffloadConfig(device_memory=device_memory),
    )
    loaded = read_bytes()
    first = model.sluice.stats()
    if device_memory == "100%":
        fill(model.sluice)
    ids = torch.randint(4, 256, (1, 256), generator=torch.Generator().manual_seed(0))
    start = time.monotonic()
    out = model.generate(
        ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    model.sluice.drain()
    peak.stopping.set()
    peak.join()
    stats = model.sluice.stats() - first
    found |= {
        "peak_rss_anon": peak.peak,
        "load_read_bytes": loaded - before,
        "read_bytes": read_bytes() - loaded,
        "bytes_read": stats.bytes_read,
        "budget_bytes": model.sluice.stats().budget_bytes,
        "peak_resident_bytes": model.sluice.stats().peak_resident_bytes,
        "tokens": out[0].tolist(),
        "seconds": time.monotonic() - start,
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
