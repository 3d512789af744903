"""What a session takes of a GPU, and that it gives all of it back, to the byte, whatever ends it.

With `-p emulation.plugin`; the tests of the package that are marked `emulated` run beside these.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests" / "python"))

from hf import tiny  # noqa: E402
from small_store import SmallStore  # noqa: E402

import sluice  # noqa: E402
from sluice import DeviceError, SluiceError, _core  # noqa: E402
from sluice.config import OffloadOptions  # noqa: E402
from sluice.session import Session  # noqa: E402

pytestmark = pytest.mark.skipif(
    "SLUICE_EMULATED_CORE" not in os.environ,
    reason="SLUICE_EMULATED_CORE names no _core*.so built with SLUICE_EMULATION",
)

core: Any = _core
BYTES = ("device_bytes", "pinned_bytes", "registered_bytes")
NOTHING = dict.fromkeys(BYTES, 0)
HOSTS = ({}, {"host_memory": "25%"}, {"pinned_cap": 1}, {"host_tier": "none"})


def held() -> dict[str, int]:
    """What is taken of the device, and pinned, by the fake runtime's count."""
    stats = core.emulation_stats()
    return {name: stats[name] for name in BYTES}


def assert_nothing_is_left() -> None:
    """Neither bytes nor anything else, once the last reference is gone."""
    gc.collect()
    stats = core.emulation_stats()
    assert held() == NOTHING
    assert [stats[name] for name in ("streams", "events", "queued")] == [0, 0, 0]


@pytest.fixture(autouse=True)
def one_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("SLUICE_CACHE", str(tmp_path / "cache"))
    yield
    torch.set_num_threads(before)


# Ten rounds


def by_restore(model: Any) -> None:
    session = model.sluice
    sluice.restore(model)
    assert held() == NOTHING, "also while somebody holds the session"
    assert session.closed


def by_close(model: Any) -> None:
    session = model.sluice
    session.close()
    assert held() == NOTHING, "also while somebody holds the session"
    assert session.stats().slab_bytes == 0


def by_an_error_in_its_block(model: Any) -> None:
    with pytest.raises(KeyError), model.sluice:
        raise KeyError("the user's own")
    assert held() == NOTHING


def by_del(model: Any) -> None:
    """Whoever calls this holds the last reference, and drops it."""


@pytest.mark.parametrize(
    ("source", "end"),
    [
        ("built", by_restore),
        ("built", by_del),
        ("checkpoint", by_restore),
        ("checkpoint", by_close),
        ("checkpoint", by_an_error_in_its_block),
    ],
)
def test_ten_rounds_give_every_byte_back(
    source: str, end: Callable[[Any], None], tmp_path: Path
) -> None:
    folder = tiny.save(tiny.build("mixtral", torch.bfloat16), tmp_path / "model")
    for number in range(10):
        options: dict[str, Any] = {"device_memory": "25%", **HOSTS[number % len(HOSTS)]}
        if source == "built":
            model = tiny.build("mixtral", torch.bfloat16)
            sluice.offload(model, **options)
        else:
            model = tiny.load(folder, dtype=torch.bfloat16, **options)
        with torch.no_grad():
            model(tiny.PROMPT[:1, :2])
        stats = model.sluice.stats()
        assert held()["device_bytes"] > stats.slab_bytes > 0, "slots, and scratch beside them"
        end(model)
        del model
        assert_nothing_is_left()


# While the host tier fills


def slow_store(path: Path) -> tuple[_core.Store, list[dict[str, Any]], SmallStore]:
    """Two layers of different widths, so two arenas to fill and pin: after 0.5 and 1.5 seconds."""
    parts = (SmallStore(num_layers=1), SmallStore(num_layers=1, intermediate=192, seed=1))
    builder = _core.StoreBuilder()
    for layer, part in enumerate(parts):
        experts, hidden = part.num_experts, part.hidden
        builder.add_layer(
            f"layers.{layer}.experts", experts, "F32", hidden, part.intermediate,
            gated=True, has_bias=False,
        )  # fmt: skip
        for section, weights in (("w13", part.w13[0]), ("w2", part.w2[0])):
            for expert in range(experts):
                address, nbytes = weights[expert].data_ptr(), weights[expert].nbytes
                builder.add_piece(layer, expert, section, offset=address, nbytes=nbytes)
    store = builder.build()
    writer = _core.PackWriter(str(path), [store.layer(layer) for layer in (0, 1)], model_id="two")
    for layer, part in enumerate(parts):
        for expert in range(part.num_experts):
            writer.append_from(store, layer, expert)
    writer.finish()
    gates = [gate for part in parts for gate in part.layers()]
    return _core.open_pack(str(path), read_rate=1_200_000)[0], gates, parts[0]


@contextmanager
def half_filled(folder: Path) -> Iterator[tuple[Session, SmallStore]]:
    """A session whose first arena is pinned while the second one fills."""
    store, gates, first = slow_store(folder / "two.pack")
    session = Session(store, OffloadOptions(device_memory="50%"), gates)
    deadline = time.monotonic() + 60
    while not session.host_tier().pinned_bytes:
        assert time.monotonic() < deadline, session.host_tier()
        time.sleep(0.005)
    tier = session.host_tier()
    assert 0 < tier.filled_bytes < tier.capacity_bytes and not tier.is_settled
    assert held()["registered_bytes"] == tier.pinned_bytes
    with session:
        yield session, first


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C raises also where a shell has started these tests behind it, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_the_host_tier_fills_and_pins_gives_everything_back(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), half_filled(tmp_path) as (session, _):
        threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
        session.wait_for_host_tier()
    assert session.closed
    assert held() == NOTHING, "pages are unpinned"
    assert session.host_tier().capacity_bytes == 0


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_that_is_caught_leaves_the_host_tier_filling(tmp_path: Path) -> None:
    with half_filled(tmp_path) as (session, first):
        with pytest.raises(KeyboardInterrupt):
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
            session.wait_for_host_tier()
        assert_goes_on(session, first)
    assert held() == NOTHING


def test_a_child_forked_meanwhile_is_told_and_the_parent_goes_on(tmp_path: Path) -> None:
    with half_filled(tmp_path) as (session, first):
        child = os.fork()
        if child == 0:
            os._exit(what_a_child_is_told(session, first))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 42
        assert_goes_on(session, first)
    assert held() == NOTHING


def assert_goes_on(session: Session, first: SmallStore) -> None:
    """Calls while the tier fills, and fills it."""
    call = first.call(3)
    out = session.experts_forward(0, *call)
    torch.testing.assert_close(out.double(), first.reference(0, *call), atol=1e-5, rtol=1e-5)
    tier = session.wait_for_host_tier()
    assert tier.filled_bytes == tier.pinned_bytes == tier.capacity_bytes


def what_a_child_is_told(session: Session, first: SmallStore) -> int:
    """42: of the session that it inherited, and of one that it tries to open."""
    code = 0
    try:
        session.experts_forward(0, *first.call(3))
    except SluiceError as error:
        code = 2 if "make a new one here" in str(error) else 3
    try:
        Session(session.store, session.options, first.layers() * 2)
    except DeviceError as error:
        code += 40 if "not forked from one that had used CUDA" in str(error) else 80
    return code
