"""What a host tier is given beside a GPU, and what is said of it."""

from __future__ import annotations

import logging

import pytest

from sluice import _core, host_memory
from sluice.config import OffloadOptions
from sluice.host_memory import host_settings, unused_options

GIB = 1 << 30


def is_gpu(device: str) -> bool:
    return device != "cpu"


@pytest.fixture
def beside_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "has_slots_apart", is_gpu)
    monkeypatch.setattr(host_memory, "available_bytes", lambda: 100 * GIB)
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)


@pytest.mark.usefixtures("beside_gpu")
def test_a_size_that_nobody_gave_is_said_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    settings = host_settings(OffloadOptions(device_memory=1), 500 * GIB, "cuda:0")
    assert settings["host_memory"] == 80 * GIB
    assert capsys.readouterr().err == (
        "sluice: host tier: 80.0 GiB of RAM (80 % of the 100.0 GiB that are free, at most all "
        "experts); host_memory= sets it\n"
    )


@pytest.mark.usefixtures("beside_gpu")
def test_it_goes_to_logging_where_that_is_heard_and_nowhere_without_bars(
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = OffloadOptions(device_memory=1)
    with caplog.at_level(logging.INFO, "sluice"):
        host_settings(options, 500 * GIB, "cuda:0")
    assert [record.getMessage()[:19] for record in caplog.records] == ["host tier: 80.0 GiB"]
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    host_settings(options, 500 * GIB, "cuda:0")
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("beside_gpu")
@pytest.mark.parametrize("fields", [{"host_memory": "1GiB"}, {"host_tier": "none"}])
def test_nothing_is_said_of_what_was_asked_for(
    fields: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = OffloadOptions(device_memory=1, **fields)  # type: ignore[arg-type]
    host_settings(options, 500 * GIB, "cuda:0")
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("beside_gpu")
def test_what_the_session_gives_back_is_free_for_its_next_tier() -> None:
    options = OffloadOptions(device_memory=1)
    settings = host_settings(options, 500 * GIB, "cuda:0", leaving_bytes=50 * GIB)
    assert settings["host_memory"] == 120 * GIB
    settings = host_settings(options, 90 * GIB, "cuda:0", leaving_bytes=50 * GIB)
    assert settings["host_memory"] == 90 * GIB


@pytest.mark.usefixtures("beside_gpu")
@pytest.mark.parametrize("name", ["host_memory", "pinned_cap"])
def test_what_waits_for_a_gpu_is_told(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = OffloadOptions(device_memory=1, **{name: "1GiB"})  # type: ignore[arg-type]
    assert host_settings(options, 500 * GIB, "cpu") == {}
    assert capsys.readouterr().err == (
        f"sluice: {name}: '1GiB' takes no effect for experts on the cpu, whose slots are RAM; it "
        "is for a GPU\n"
    )
    assert unused_options(options, "cpu") == [name] and not unused_options(options, "cuda:0")
