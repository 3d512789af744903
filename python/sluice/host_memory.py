"""What a session's options say of the host tier, for the device that its experts lie on."""

from __future__ import annotations

from typing import Any

from sluice import _core, log
from sluice.config import HOST_SHARE_PERCENT, OffloadOptions
from sluice.memory import available_bytes
from sluice.text import format_bytes


def unused_options(options: OffloadOptions, device: str) -> list[str]:
    """What was set for a host tier, where there is none."""
    if _core.has_slots_apart(device):
        return []
    return [name for name in ("host_memory", "pinned_cap") if getattr(options, name) is not None]


def host_settings(
    options: OffloadOptions, total_slot_bytes: int, device: str, leaving_bytes: int = 0
) -> dict[str, Any]:
    """Of `_core.Session`; empty where slots are RAM.

    Says on stderr a size that nobody gave, and options that wait for a GPU: the session may move
    to one.

    Args:
        options: As the session has them.
        total_slot_bytes: What all experts take.
        device: Where the experts will lie.
        leaving_bytes: RAM that the same session gives back next: free, for a size nobody gave.
    """
    if not _core.has_slots_apart(device):
        for name in unused_options(options, device):
            log.tell(
                f"{name}: {getattr(options, name)!r} takes no effect for experts on the {device}, "
                "whose slots are RAM; it is for a GPU"
            )
        return {}
    free = available_bytes() + leaving_bytes
    host = options.host_tier_bytes(total_slot_bytes, free)
    if options.host_memory is None and options.host_tier != "none":
        log.tell(
            f"host tier: {format_bytes(host)} of RAM ({HOST_SHARE_PERCENT} % of the "
            f"{format_bytes(free)} that are free, at most all experts); host_memory= sets it"
        )
    return {
        "host_memory": host,
        "host_tier": options.host_tier,
        "pinned_cap": options.pinned_cap_bytes(),
    }
