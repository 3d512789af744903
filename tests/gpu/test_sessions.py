"""Sessions on a device: the same bits whatever holds the experts, every byte back at the end."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_store import SmallStore

from sluice import _core
from sluice.config import OffloadOptions
from sluice.errors import ConfigError
from sluice.session import Session

from .device import emulated

# The emulation's cuda:0 answers to torch's CPU.
PLACE = "cpu" if emulated() else "cuda:0"
HOST = {
    "inclusive": {},
    "tight": {"host_memory": "25%"},
    "unpinned": {"pinned_cap": 1},
    "none": {"host_tier": "none"},
}
HINTS = ("none", "random", "wrong")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
real_only = pytest.mark.skipif("emulated()", reason="of torch and the driver")


@pytest.fixture(autouse=True)
def fresh_device() -> Iterator[None]:
    """On the emulation each test has a schedule, and leaves nothing behind."""
    if emulated():
        _core.emulation_schedule("random", "random", 1, "default")  # type: ignore[attr-defined]
    yield
    if emulated():
        gc.collect()
        _core.emulation_schedule("forward", "eager", 0, "default")  # type: ignore[attr-defined]


def small(dtype: torch.dtype = torch.bfloat16) -> SmallStore:
    return SmallStore(dtype=dtype, hidden=64, intermediate=96)


def open_session(given: SmallStore, store: Any, slots: int | str, **options: Any) -> Session:
    settings = OffloadOptions(device_memory=slots, **options)
    return Session(store, settings, given.layers(), PLACE)


def on_device(call: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.to(PLACE) for tensor in call)


def give_hints(session: Session, kind: str, layer: int, ids: torch.Tensor) -> None:
    used = set(ids.flatten().tolist())
    if kind == "random":
        session.hint([(layer, (3 * n) % 8, 0.5, (0.0, 10.0)[n % 2]) for n in range(3)])
    elif kind == "wrong":
        session.hint([(layer, e, 1.0, 10.0) for e in range(8) if e not in used])


def outputs(given: SmallStore, session: Session, hints: str, stream: Any = None) -> list[Any]:
    """One token, a few, and more than the decode pair takes, through both layers."""
    found = []
    context = torch.cuda.stream(stream) if stream is not None else torch.no_grad()
    with context:
        for index, tokens in enumerate((1, 3, 40, 2)):
            hidden, ids, weights = on_device(given.call(tokens, seed=index))
            for layer in (0, 1):
                give_hints(session, hints, layer, ids)
                hidden = session.experts_forward(layer, hidden, ids, weights)
            found.append(hidden)
    if stream is not None:
        stream.synchronize()
    return [tensor.cpu() for tensor in found]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_do_not_depend_on_where_experts_are(dtype: torch.dtype, tmp_path: Path) -> None:
    given = small(dtype)
    sources = [given.memory_store(), given.pack(tmp_path / "s.pack")]
    slot_bytes = int(sources[1].layer(0)["slot_bytes"])
    budgets = (slot_bytes, "25%", "100%")
    policies = ("lru", "decayed-lfu", "static")
    cells = list(itertools.product(range(2), budgets, policies, HOST, HINTS))
    if emulated():  # every fifth, of which the steps meet every value
        cells = cells[::5]
    expected: list[torch.Tensor] | None = None
    for number, (source, budget, policy, host, hints) in enumerate(cells):
        stream = torch.cuda.Stream() if number % 2 == 1 and not emulated() else None
        options = {"policy": policy, **HOST[host]}
        with open_session(given, sources[source], budget, **options) as session:
            got = outputs(given, session, hints, stream)
            stats = session.stats()
        where = f"source {source}, {budget}, {policy}, host tier {host}, hints {hints}"
        expected = expected or got
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), where
        assert stats.peak_resident_bytes <= stats.slab_bytes <= stats.budget_bytes, where
        assert stats.requests == stats.hits + stats.late + stats.misses, where


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_are_within_rounding_of_fp64(dtype: torch.dtype) -> None:
    given = small(dtype)
    with open_session(given, given.memory_store(), "50%") as session:
        for tokens in (1, 5, 60):
            call = given.call(tokens, seed=tokens)
            got = session.experts_forward(1, *on_device(call)).cpu().double()
            exact = given.reference(1, *call)
            error = float((got - exact).abs().max())
            allowed = given.tolerance() * max(1.0, float(exact.abs().max()))
            assert error <= allowed, f"{tokens} tokens of {dtype}: {error:.3g} of {allowed:.3g}"


@real_only
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cpu_computes_the_same_within_rounding(dtype: torch.dtype) -> None:
    given = small(dtype)
    store = given.memory_store()
    settings = OffloadOptions(device_memory="50%")
    host = Session(store, settings, given.layers(), "cpu")
    with host, open_session(given, store, "50%") as device:
        for tokens in (1, 5, 60):
            call = given.call(tokens, seed=tokens)
            ours = device.experts_forward(0, *on_device(call)).cpu().double()
            theirs = host.experts_forward(0, *call).double()
            allowed = 2 * given.tolerance() * max(1.0, float(theirs.abs().max()))
            assert float((ours - theirs).abs().max()) <= allowed, f"{tokens} tokens, {dtype}"


def bytes_taken() -> int:
    if emulated():
        stats = _core.emulation_stats()  # type: ignore[attr-defined]
        return sum(stats[name] for name in ("device_bytes", "pinned_bytes", "registered_bytes"))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def test_ten_rounds_give_every_byte_back(tmp_path: Path) -> None:
    given = small()
    store = given.pack(tmp_path / "s.pack")
    taken: list[int] = []
    for _ in range(11):
        with open_session(given, store, "50%") as session:
            outputs(given, session, "random")
        del session
        gc.collect()
        if emulated():
            _core.emulation_schedule("random", "lazy", 1, "default")  # type: ignore[attr-defined]
        taken.append(bytes_taken())
    # The first round loads kernels, which stay for the life of the process.
    assert set(taken[1:]) == {taken[1]}, f"bytes after each round: {taken}"


@real_only
def test_the_driver_sees_the_budget_and_at_most_a_hundredth_more() -> None:
    given = SmallStore(dtype=torch.bfloat16, hidden=2048, intermediate=768, num_experts=64)
    store = given.memory_store()
    settings = {"host_tier": "none"}
    call = on_device(given.call(1, top_k=8))
    with open_session(given, store, store.layer(0)["slot_bytes"], **settings) as session:
        session.experts_forward(0, *call)  # kernels are loaded, and pools have their size
    del session
    gc.collect()
    before = bytes_taken()
    with open_session(given, store, "100%", **settings) as session:
        for layer in (0, 1):
            session.experts_forward(layer, *call)
        taken, budget = bytes_taken() - before, session.budget_bytes
        stats = session.stats()
    assert taken >= stats.slab_bytes, f"the driver says {taken} bytes, {stats.slab_bytes} are used"
    assert taken <= 1.01 * budget + stats.workspace_bytes, (
        f"the driver says {taken} bytes for a budget of {budget}"
    )


@real_only
def test_a_layer_cannot_be_captured_and_the_session_goes_on() -> None:
    given = small()
    with open_session(given, given.memory_store(), "100%") as session:
        call = on_device(given.call(2))
        before = session.experts_forward(0, *call).cpu()
        graph = torch.cuda.CUDAGraph()
        captured = pytest.raises(ConfigError, match="got a stream that is being captured")
        with captured, torch.cuda.graph(graph):
            session.experts_forward(0, *call)
        torch.cuda.synchronize()
        assert torch.equal(session.experts_forward(0, *call).cpu(), before)


@real_only
def test_work_is_ordered_with_torchs_current_stream() -> None:
    """Inputs are written late on a stream of the caller's, and the output is read there at once."""
    given = small()
    with open_session(given, given.memory_store(), "100%") as session:
        call = on_device(given.call(4))
        expected = session.experts_forward(0, *call).cpu()
        for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                late = [torch.zeros_like(tensor) for tensor in call]
                torch.cuda._sleep(20_000_000)  # about 10 ms
                for target, source in zip(late, call, strict=True):
                    target.copy_(source)
                got = session.experts_forward(0, *late).cpu()
            assert torch.equal(got, expected), f"{stream}: the layer read before its stream wrote"


@real_only
def test_tensors_of_another_device_are_refused_by_name() -> None:
    given = small()
    refused = pytest.raises(ConfigError, match="got tensors on cpu, expected cuda:0")
    with open_session(given, given.memory_store(), "50%") as session, refused:
        session.experts_forward(0, *given.call(2))


@real_only
def test_several_threads_with_streams_of_their_own_get_their_own_results() -> None:
    from concurrent.futures import ThreadPoolExecutor

    given = small()
    with open_session(given, given.memory_store(), "25%") as session:
        calls = [on_device(given.call(1 + n, seed=n)) for n in range(4)]
        expected = [session.experts_forward(0, *call).cpu() for call in calls]

        def work(index: int) -> bool:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                got = [session.experts_forward(0, *calls[index]).cpu() for _ in range(25)]
            return all(torch.equal(each, expected[index]) for each in got)

        torch.cuda.synchronize()
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))
