"""Every family is built once per session; the battery prints what it covered and what it cost."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

from .cells import Bench
from .families import Built, build_family, causal_families
from .tally import COUNTS, NOTES, SECONDS


@pytest.fixture(scope="session", autouse=True)
def quiet_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models run faster on one thread; a test that wants more says so, and only for itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def family_model() -> Callable[[str], Built]:
    """`family_model("mixtral")`: that family's tiny model, the same object all session long."""
    entries = {entry.family: entry for entry in causal_families()}
    models: dict[str, Built | Exception] = {}

    def get(family: str) -> Built:
        if family not in models:
            try:
                models[family] = build_family(entries[family])
            except Exception as error:
                models[family] = error
        built = models[family]
        if isinstance(built, Exception):
            raise built
        return built

    return get


@pytest.fixture(scope="session")
def bench_of(
    family_model: Callable[[str], Built], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Bench]:
    """`bench_of("mixtral")`: that family's stock models, checkpoints and packs."""
    benches: dict[str, Bench] = {}

    def get(family: str) -> Bench:
        if family not in benches:
            benches[family] = Bench(family_model(family), tmp_path_factory.mktemp(family))
        return benches[family]

    return get


@pytest.fixture(autouse=True)
def seconds_per_family(request: pytest.FixtureRequest) -> Iterator[None]:
    start = time.monotonic()
    yield
    entry = getattr(request.node, "callspec", None) and request.node.callspec.params.get("family")
    SECONDS[entry or request.node.path.stem] += time.monotonic() - start


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("battery")
    for name, count in sorted(COUNTS.items()):
        terminalreporter.write_line(f"{name}: {count}")
    for note in NOTES:
        terminalreporter.write_line(note)
    slowest = sorted(SECONDS.items(), key=lambda item: -item[1])
    terminalreporter.write_line(f"seconds: {sum(SECONDS.values()):.1f} in all")
    for name, seconds in slowest:
        terminalreporter.write_line(f"  {seconds:6.2f}  {name}")
