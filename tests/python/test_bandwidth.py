"""The read loops that rates are measured against."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice import _core
from sluice.errors import ConfigError, IoError


@pytest.fixture
def data(tmp_path: Path) -> str:
    path = tmp_path / "data"
    path.write_bytes(bytes(range(256)) * 400)
    try:
        _core.disk_bandwidth(str(path), 0, 4096, 4096, 1)
    except IoError as error:
        pytest.skip(f"the disk refuses O_DIRECT: {error}")
    return str(path)


def test_ranges_are_read_as_one_file_range_is(data: str) -> None:
    assert _core.disk_bandwidth(data, 0, 102_400, 8192, 2) > 0
    assert _core.disk_bandwidth_extents(data, [(0, 10_000), (90_000, 12_400)], 8192, 2) > 0


def test_ranges_outside_of_the_file_and_none_at_all_are_refused(data: str) -> None:
    with pytest.raises(ConfigError, match="within its 102400"):
        _core.disk_bandwidth_extents(data, [(0, 4096), (102_400, 1)], 4096, 1)
    with pytest.raises(ConfigError, match="no bytes to read"):
        _core.disk_bandwidth_extents(data, [], 4096, 1)
