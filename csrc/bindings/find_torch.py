"""Prints the folder of a torch package that has the stable ABI's headers, or nothing.

Never imports torch (seconds). sysconfig's purelib is the target's even inside pip's build
isolation, where `find_spec` sees the overlay alone.
"""

import importlib.util
import re
import sys
import sysconfig
from pathlib import Path

LEAST = (2, 10)


def candidates(given):
    """Package folders in the order in which they are asked."""
    if given:
        yield Path(given)
        return
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.origin:
        yield Path(spec.origin).parent
    yield Path(sysconfig.get_path("purelib")) / "torch"


def has_stable_abi(root):
    """Whether the headers are there and young enough."""
    if not (root / "include/torch/csrc/stable/ops.h").is_file():
        return False
    try:
        text = (root / "version.py").read_text()
    except OSError:
        return False
    found = re.search(r"__version__ = '(\d+)\.(\d+)", text)
    return found is not None and (int(found[1]), int(found[2])) >= LEAST


if __name__ == "__main__":
    for folder in candidates(sys.argv[1] if len(sys.argv) > 1 else ""):
        if has_stable_abi(folder):
            sys.stdout.write(str(folder))
            break
