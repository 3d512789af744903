"""Memory of a GPU that torch's allocator holds beside slots: given back, and named in refusals."""

from __future__ import annotations

import torch

from sluice.errors import CapacityError


def empty_cache(device: str) -> None:
    """Has torch's allocator give back what it holds unused."""
    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.empty_cache()


def beside_torch(refusal: CapacityError, device: str) -> CapacityError:
    """The refusal, with what torch holds there after `empty_cache`: the same on the CPU."""
    held = torch.cuda.memory_reserved(device) if device != "cpu" else 0
    if held == 0:
        return refusal
    return CapacityError(
        f"{refusal}; torch holds {held} bytes of {device} for what else is there (what it did not "
        "use was given back before)"
    )
