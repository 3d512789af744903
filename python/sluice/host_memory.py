"""What a session's options say of the host tier, for the device that its experts lie on."""

from __future__ import annotations

from typing import Any

from sluice import _core, log
from sluice.config import HOST_SHARE_PERCENT, OffloadOptions
from sluice.errors import ConfigError
from sluice.memory import available_bytes
from sluice.text import format_bytes


def host_settings(
    options: OffloadOptions, total_slot_bytes: int, device: str, leaving_bytes: int = 0
) -> dict[str, Any]:
    """Of `_core.Session`; empty where slots are RAM. Says a size that nobody gave, on stderr.

    Args:
        options: As the session has them.
        total_slot_bytes: What all experts take.
        device: Where the experts will lie.
        leaving_bytes: RAM that the same session gives back next: free, for a size nobody gave.

    Raises:
        ConfigError: A host tier asked for where slots are RAM.
    """
    if not _core.has_host_tier(device):
        for name in ("host_memory", "pinned_cap"):
            if getattr(options, name) is not None:
                raise ConfigError(
                    f"{name}: got {getattr(options, name)!r} for experts on the {device}, "
                    "whose slots are RAM; leave it out, or load the model on a GPU"
                )
        return {}
    free = available_bytes() + leaving_bytes
    host = options.host_bytes(total_slot_bytes, free)
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
