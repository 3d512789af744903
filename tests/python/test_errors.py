from __future__ import annotations

import errno
import pickle
from pathlib import Path

import pytest

import sluice
from sluice import _core, errors


@pytest.mark.parametrize(
    ("name", "parent"),
    [
        ("ConfigError", ValueError),
        ("CheckpointError", ValueError),
        ("IoError", OSError),
        ("CapacityError", MemoryError),
        ("DeviceError", RuntimeError),
        ("InternalError", AssertionError),
        ("UnsupportedModelError", NotImplementedError),
    ],
)
def test_every_error_is_a_sluice_error_and_its_builtin(name: str, parent: type) -> None:
    error = getattr(errors, name)
    assert issubclass(error, errors.SluiceError)
    assert issubclass(error, parent)
    assert getattr(sluice, name) is error
    assert error.__module__ == "sluice.errors"
    assert error.__doc__


def test_a_missing_file_carries_path_offset_and_errno(tmp_path: Path) -> None:
    missing = tmp_path / "none.pack"
    with pytest.raises(errors.IoError) as caught:
        _core.open_pack(str(missing))
    assert caught.value.errno == errno.ENOENT
    assert caught.value.path == str(missing)
    assert caught.value.offset == 0
    assert str(missing) in str(caught.value)


def test_a_setting_that_cannot_work_says_what_would() -> None:
    with pytest.raises(errors.ConfigError, match=r'got "6 parsecs", expected .*"6GiB"'):
        _core.parse_size("6 parsecs")


def test_a_budget_below_one_slot_names_budgets_that_work() -> None:
    with pytest.raises(errors.CapacityError, match="8192"):
        _core.plan_memory(100, [(8192, 4)])


def test_errors_survive_pickling() -> None:
    again = pickle.loads(pickle.dumps(errors.CapacityError("too little")))
    assert type(again) is errors.CapacityError
    assert str(again) == "too little"
