"""A disk that is slower than the machine's: the store's own token bucket, for scenarios alone."""

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

from sluice import _core


def read_rate(scenario: dict[str, Any]) -> int:
    """Bytes/s of the scenario's `[disk] read_rate = "50MB/s"`; 0: as fast as the disk is."""
    text = scenario.get("disk", {}).get("read_rate")
    if text is None:
        return 0
    size, _, per = text.partition("/")
    kind, amount = _core.parse_size(size)
    if kind != "bytes" or per != "s":
        raise ValueError(f'read_rate: got {text!r}, expected a size a second such as "50MB/s"')
    return int(amount)


@contextmanager
def throttled(bytes_per_s: int) -> Generator[None]:
    """Packs that are opened meanwhile read at most so fast, for as long as they are open; 0: as
    they would. No option of sluice's sets it, so it is set where packs are opened."""
    if not bytes_per_s:
        yield
        return
    slow = partial(_core.open_pack, read_rate=bytes_per_s)
    with mock.patch.object(_core, "open_pack", slow):
        yield
