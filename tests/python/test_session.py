"""The session's life: results, errors, callbacks, threads, close."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_store import SmallStore

from sluice import _core
from sluice.errors import CapacityError, CheckpointError, ConfigError, IoError, SluiceError
from sluice.session import Session

Run = Callable[..., subprocess.CompletedProcess[str]]


def tensor_at(address: int, rows: int, columns: int) -> torch.Tensor:
    memory = (ctypes.c_char * (rows * columns * 4)).from_address(address)
    return torch.frombuffer(memory, dtype=torch.float32).view(rows, columns)


def silu_callback(  # noqa: PLR0917
    layer: int, dtype: str, rows: int, columns: int, wide: int, a: int, b: int
) -> None:
    gate, up = tensor_at(a, rows, columns).chunk(2, dim=-1)
    assert dtype == "F32"
    tensor_at(b, rows, wide).copy_(F.silu(gate) * up)


# Budgets and sources


def test_every_budget_and_source_gives_the_same_bits(small: SmallStore, tmp_path: Path) -> None:
    sources = [small.memory_store(), small.pack(tmp_path / "s.pack")]
    calls = [small.call(num_tokens) for num_tokens in (1, 3, 20, 200)]
    slot_bytes = sources[1].layer(0)["slot_bytes"]
    results = []
    for store in sources:
        for budget in (slot_bytes, "25%", "100%"):
            for policy in _core.policy_names():
                with small.session(store, budget, policy=policy) as session:
                    results.append([session.experts_forward(1, *call) for call in calls])
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_hints_change_nothing_but_what_is_counted(small: SmallStore, tmp_path: Path) -> None:
    call = small.call(4)
    store = small.pack(tmp_path / "s.pack")
    with small.session(store, "50%") as session:
        expected = session.experts_forward(0, *call)
    with small.session(store, "50%") as session:
        hints = [(0, expert, 0.5, float("inf")) for expert in range(8)]
        session.hint([*hints, (1, 0, 1.0, -1.0), (1, 1, 0.0, 1e300)])
        assert torch.equal(session.experts_forward(0, *call), expected)
        session.drain()
        stats = session.stats()
    assert stats.hints == 10
    assert stats.bytes_read == sum(
        getattr(stats, f"bytes_read_{why}")
        for why in ("demand", "hint_used", "hint_wasted", "hint_pending")
    )


def test_hints_that_name_nothing_are_refused_or_dropped(small: SmallStore) -> None:
    with small.session(small.memory_store()) as session:
        with pytest.raises(ConfigError, match="expected numbers"):
            session.hint([(0, 0, float("nan"), 1.0)])
        session.hint([(99, 0, 1.0, 1.0), (0, 99, 1.0, 1.0), (-1, -1, 1.0, 1.0)])
        session.drain()
        assert torch.isfinite(session.experts_forward(0, *small.call(2))).all()


def test_a_budget_below_one_slot_is_refused_with_budgets_that_work(small: SmallStore) -> None:
    with pytest.raises(CapacityError, match=str(small.memory_store().layer(0)["slot_bytes"])):
        small.session(small.memory_store(), 1000)


def test_settings_of_a_host_tier_wait_for_a_gpu_and_are_counted(small: SmallStore) -> None:
    with small.session(small.memory_store(), "100%", host_memory="1GiB") as session:
        assert session.stats().degradations["host_memory_unused"] == 1


@pytest.mark.parametrize("refusals", [1, 2])
def test_scratch_that_is_refused_is_asked_for_once_more_without_what_torch_holds(
    small: SmallStore, monkeypatch: pytest.MonkeyPatch, refusals: int
) -> None:
    emptied: list[str] = []
    monkeypatch.setattr("sluice.torch_memory.empty_cache", emptied.append)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 4096)
    with small.session(small.memory_store(), "100%") as session:
        call = small.call(3)
        expected = session.experts_forward(0, *call)
        answers: list[Any] = [*[CapacityError("no room")] * refusals, expected, expected]

        def answer(*_: Any) -> torch.Tensor:
            found = answers.pop(0)
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(session, "_operator", answer)
        with pytest.raises(CapacityError, match=r"^no room$"):
            session.experts_forward(0, *call)  # on the CPU there is nobody to ask
        assert not emptied
        answers.insert(0, CapacityError("no room"))
        session.device = "cuda:0"
        if refusals == 1:
            assert session.experts_forward(0, *call) is expected
        else:
            with pytest.raises(CapacityError, match="no room; torch holds 4096 bytes of cuda:0"):
                session.experts_forward(0, *call)
        session.device = "cpu"
        assert emptied == ["cuda:0"]
        assert session.stats().degradations["emptied_torch_cache"] == 1


def test_layers_must_fit_the_store(small: SmallStore) -> None:
    with pytest.raises(ConfigError, match="got 1, expected 2"):
        small.session(small.memory_store(), layers=small.layers()[:1])
    with pytest.raises(ConfigError, match="gate_callback: missing"):
        small.session(small.memory_store(), layers=small.layers(kind="generic"))
    with pytest.raises(ConfigError, match="swiglu"):
        small.session(small.memory_store(), layers=small.layers(kind="swiglu"))
    with pytest.raises(ConfigError, match="gate_callback: got 3, expected a function"):
        small.session(small.memory_store(), layers=small.layers(gate_callback=3))


def test_experts_come_back_as_they_were(small: SmallStore, tmp_path: Path) -> None:
    with small.session(small.pack(tmp_path / "s.pack")) as session:
        nbytes = session.store.layer(1)["expert_bytes"]
        copy = torch.empty(nbytes, dtype=torch.uint8)
        session.store.read_expert_into(1, 5, copy.data_ptr(), nbytes)
        with pytest.raises(ConfigError, match="expected 0 to 7"):
            session.store.read_expert_into(1, 8, copy.data_ptr(), nbytes)
    w13 = small.w13[1][5]
    w2 = small.w2[1][5]
    assert w13.nbytes % 64 == 0 and nbytes == w13.nbytes + w2.nbytes  # the whole expert, no gap
    assert torch.equal(copy[: w13.nbytes].view(torch.float32).view(w13.shape), w13)
    assert torch.equal(copy[w13.nbytes :].view(torch.float32).view(w2.shape), w2)


def test_residency_shows_who_is_where(small: SmallStore) -> None:
    with small.session(small.memory_store(), "25%") as session:
        session.experts_forward(0, *small.call(1))
        (slots,) = session.residency()
        ready = {(layer, expert) for state, layer, expert, _ in slots if state == "ready"}
        assert len(slots) == session.plan()["classes"][0]["num_slots"] == 4
        assert ready == {(0, int(expert)) for expert in small.call(1)[1].flatten()}
        assert all(leases == 0 for *_, leases in slots)


# Callbacks


def test_a_gate_in_python_is_called_between_the_products(small: SmallStore) -> None:
    layers = small.layers(kind="generic", gate_callback=silu_callback)
    call = small.call(9)
    with small.session(small.memory_store(), layers=layers) as session:
        out = session.experts_forward(0, *call)
        assert session.stats().generic_gate_calls > 0
    torch.testing.assert_close(out.double(), small.reference(0, *call), atol=1e-5, rtol=1e-5)


def test_a_callback_behind_the_second_product_sees_its_rows(small: SmallStore) -> None:
    def double(*arguments: Any) -> None:
        _, _, rows, columns, wide, a, b = arguments
        assert columns == wide == small.hidden
        tensor_at(b, rows, wide).copy_(tensor_at(a, rows, columns) * 2)

    call = small.call(9)
    with small.session(small.memory_store(), layers=small.layers(post_callback=double)) as session:
        out = session.experts_forward(0, *call)
    torch.testing.assert_close(out.double(), 2 * small.reference(0, *call), atol=1e-5, rtol=1e-5)


class OddError(Exception):
    pass


@pytest.mark.emulated
def test_what_a_callback_raises_comes_out_with_its_traceback(small: SmallStore) -> None:
    calls = []

    def fail(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            raise OddError("as it was")
        silu_callback(*arguments)  # type: ignore[arg-type]

    layers = small.layers(kind="generic", gate_callback=fail)
    with small.session(small.memory_store(), layers=layers) as session:
        with pytest.raises(OddError, match="as it was") as caught:
            session.experts_forward(0, *small.call(9))
        assert "fail" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
        (slots,) = session.residency()
        assert all(leases == 0 for *_, leases in slots)
        again = session.experts_forward(0, *small.call(9))  # usable afterwards
    torch.testing.assert_close(
        again.double(), small.reference(0, *small.call(9)), atol=1e-5, rtol=1e-5
    )


@pytest.mark.emulated
def test_errors_belong_to_the_thread_whose_call_failed(small: SmallStore) -> None:
    seen: dict[str, BaseException] = {}
    both = threading.Barrier(2)

    def fail(*_: object) -> None:
        raise OddError(threading.current_thread().name)

    layers = small.layers(kind="generic", gate_callback=fail)
    session = small.session(small.memory_store(), layers=layers)

    def run() -> None:
        for _ in range(20):
            both.wait()
            try:
                session.experts_forward(0, *small.call(6))
            except OddError as error:
                seen[threading.current_thread().name] = error
                assert str(error) == threading.current_thread().name

    threads = [threading.Thread(target=run, name=name) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    session.close()
    assert seen.keys() == {"one", "two"}
    assert _core.take_error(session.handle) is not None  # closed, and says so


@pytest.mark.emulated
def test_a_callback_may_refer_to_the_session_and_all_are_freed(small: SmallStore) -> None:
    class Model:
        def gate(self, *arguments: object) -> None:
            silu_callback(*arguments)  # type: ignore[arg-type]

    model = Model()
    layers = small.layers(kind="generic", gate_callback=model.gate)
    model.session = small.session(small.memory_store(), layers=layers)  # type: ignore[attr-defined]
    handle = model.session.handle  # type: ignore[attr-defined]
    gone = weakref.ref(model)
    del model, layers
    gc.collect()
    assert gone() is None
    assert "session closed" in str(_core.take_error(handle))


# Threads, closing


def test_forwards_from_many_threads_give_each_its_own_result(
    small: SmallStore, tmp_path: Path
) -> None:
    calls = [small.call(num_tokens, seed=num_tokens) for num_tokens in (1, 2, 5, 17)]
    with small.session(small.pack(tmp_path / "s.pack"), "25%") as session:
        expected = [session.experts_forward(0, *call) for call in calls]
        wrong: list[int] = []

        def run(index: int) -> None:
            for _ in range(30):
                if not torch.equal(session.experts_forward(0, *calls[index]), expected[index]):
                    wrong.append(index)

        threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        stats = session.stats()
    assert stats.requests == stats.hits + stats.late + stats.misses


@pytest.mark.emulated
def test_closing_while_calls_run_lets_them_finish(small: SmallStore, tmp_path: Path) -> None:
    session = small.session(small.pack(tmp_path / "s.pack"), "25%")
    expected = session.experts_forward(0, *small.call(3))
    started = threading.Barrier(4)
    outcomes: list[object] = []

    def run() -> None:
        started.wait()
        try:
            for _ in range(10_000):
                assert torch.equal(session.experts_forward(0, *small.call(3)), expected)
        except SluiceError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    started.wait()
    session.close()
    for thread in threads:
        thread.join()
    assert len(outcomes) == 3
    assert all("session closed" in str(outcome) for outcome in outcomes)


@pytest.mark.emulated
def test_a_closed_session_says_so_and_keeps_its_numbers(small: SmallStore, tmp_path: Path) -> None:
    with small.session(small.memory_store()) as session:
        session.experts_forward(0, *small.call(2))
    session.close()
    assert session.closed
    with pytest.raises(SluiceError, match="session closed"):
        session.experts_forward(0, *small.call(2))
    assert session.stats().forwards == 1
    assert session.stats().resident_bytes == 0
    assert "closed" in repr(session)
    session.timeline(tmp_path / "after.json")
    assert "requests" in session.report()


@pytest.mark.emulated
def test_dropping_the_last_reference_closes(small: SmallStore) -> None:
    session = small.session(small.memory_store())
    handle = session.handle
    del session
    gc.collect()
    with pytest.raises((RuntimeError, SluiceError)):
        torch.ops.sluice.experts_forward(handle, 0, *small.call(1))


@pytest.mark.emulated
def test_hooks_run_once_last_first_and_may_close(small: SmallStore) -> None:
    session = small.session(small.memory_store())
    order: list[str] = []
    session.add_close_hook(lambda: order.append("first"))
    session.add_close_hook(lambda: (order.append("second"), session.close()))
    session.add_close_hook(lambda: order.append(str(session.closed)))
    session.close()
    session.close()
    assert order == ["False", "second", "first"]
    assert session.closed


@pytest.mark.emulated
def test_a_hook_that_fails_keeps_the_session_open(small: SmallStore) -> None:
    session = small.session(small.memory_store())
    failures = [MemoryError("not enough to restore")]

    def hook() -> None:
        if failures:
            raise failures.pop()

    session.add_close_hook(hook)
    with pytest.raises(MemoryError):
        session.close()
    assert not session.closed
    session.experts_forward(0, *small.call(1))
    session.close()
    assert session.closed


def test_a_move_whose_old_device_does_not_close_leaves_the_session_as_it_was(
    small: SmallStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = small.call(2)
    session = small.session(small.memory_store())
    expected = session.experts_forward(0, *call)
    resident = session.stats().resident_bytes
    opened: list[tuple[_core.Session, int]] = []
    open_core = session._open_core  # pyright: ignore[reportPrivateUsage]

    def open_here(device: str, leaving_bytes: int = 0) -> _core.Session:
        assert device == "cuda:0"
        opened.append((open_core("cpu"), leaving_bytes))
        return opened[-1][0]

    def fail() -> None:
        raise SluiceError("close: planted failure")

    monkeypatch.setattr(session, "_open_core", open_here)
    session._end = weakref.finalize(session, fail)  # type: ignore[arg-type]
    with pytest.raises(SluiceError, match="planted failure"):
        session.move_to("cuda:0")
    assert session.device == "cpu"
    assert opened[0][0].closed, "nobody would close it"
    assert opened[0][1] == resident > 0, "slots in RAM that are about to go"
    assert torch.equal(session.experts_forward(0, *call), expected)
    handle = session.handle
    session.move_to("cuda:0")
    assert (session.device, session.closed) == ("cuda:0", False)
    assert session.handle != handle
    assert torch.equal(session.experts_forward(0, *call), expected)
    session.close()
    assert session.closed and opened[1][0].closed


def test_who_guesses_inside_of_forwards_moves_along(
    small: SmallStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = np.full((2, 8, 8), 0.9, np.float32)
    tables = {"num_layers": 2, "num_experts": 8, "pairs": pairs}
    session = small.session(small.memory_store())
    number = session.add_scorer("pairs", tables)
    open_core = session._open_core  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(session, "_open_core", lambda device, leaving_bytes=0: open_core("cpu"))
    session.move_to("cuda:0")
    session.experts_forward(0, *small.call(1))
    assert session.stats().hints > 0
    session.remove_scorer(number)
    session.move_to("cpu")
    session.experts_forward(0, *small.call(1))
    assert session.stats().hints == 0


def refusal_to_close(session: Session) -> str:
    with pytest.raises(SluiceError) as caught:
        session.close()
    return str(caught.value)


def test_moving_inside_of_a_forward_is_refused(small: SmallStore) -> None:
    def move_inside(*arguments: Any) -> None:
        with pytest.raises(SluiceError, match="move_to: called from inside a forward"):
            session.move_to("cuda:0")
        silu_callback(*arguments)

    layers = small.layers(kind="generic", gate_callback=move_inside)
    with small.session(small.memory_store(), layers=layers) as session:
        session.experts_forward(0, *small.call(1))


@pytest.mark.emulated
def test_closing_inside_of_a_forward_is_refused_and_possible_afterwards(small: SmallStore) -> None:
    refused: list[str] = []

    def close_inside(*arguments: Any) -> None:
        refused.append(refusal_to_close(session))
        silu_callback(*arguments)

    layers = small.layers(kind="generic", gate_callback=close_inside)
    session = small.session(small.memory_store(), layers=layers)
    first = session.experts_forward(0, *small.call(1))
    assert refused
    assert all("inside a forward" in text for text in refused)
    assert not session.closed
    assert torch.equal(session.experts_forward(0, *small.call(1)), first)
    session.close()
    assert session.closed
    assert session.stats().slab_bytes == 0
    assert "session closed" in str(_core.take_error(session.handle))


@pytest.mark.emulated
def test_closing_in_a_callback_while_another_thread_closes_does_not_hang(
    small: SmallStore,
) -> None:
    closing = threading.Event()
    refused: list[str] = []

    def close_inside(*arguments: Any) -> None:
        closing.wait(10)
        time.sleep(0.05)  # the other thread is in `close` by now, waiting for this forward
        refused.append(refusal_to_close(session))
        silu_callback(*arguments)

    layers = small.layers(kind="generic", gate_callback=close_inside)
    session = small.session(small.memory_store(), layers=layers)

    def close_outside() -> None:
        closing.set()
        session.close()

    def forward() -> None:
        session.experts_forward(0, *small.call(1))

    threads = [threading.Thread(target=each, daemon=True) for each in (forward, close_outside)]
    threads[0].start()
    time.sleep(0.05)
    threads[1].start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert refused and session.closed


@pytest.mark.emulated
def test_a_forward_that_fails_while_another_thread_closes_raises_its_own_error(
    small: SmallStore,
) -> None:
    threads: list[threading.Thread] = []

    def fail(*_: Any) -> None:
        threads.append(threading.Thread(target=session.close))
        threads[0].start()
        while not is_closing():
            time.sleep(0.001)
        raise ZeroDivisionError("the gate's own")

    def is_closing() -> bool:  # its handle is given back first
        return "not open" in str(_core.take_error(session.handle))

    layers = small.layers(kind="generic", gate_callback=fail)
    session = small.session(small.memory_store(), layers=layers)
    with pytest.raises(ZeroDivisionError, match="the gate's own"):
        session.experts_forward(0, *small.call(1))
    threads[0].join(20)
    assert session.closed


def resident_anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


@pytest.mark.usefixtures("no_leftovers")
def test_ten_rounds_return_every_thread_and_every_byte(tmp_path: Path) -> None:
    large = SmallStore(num_experts=16, hidden=512, intermediate=512)
    store = large.pack(tmp_path / "s.pack")
    call = large.call(8)

    def one_round() -> None:
        with large.session(store, "100%") as session:
            session.experts_forward(0, *call)
            session.experts_forward(1, *call)
            assert session.stats().resident_bytes > 16 << 20
        del session
        gc.collect()

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    for _ in range(3):
        one_round()
    before = (threads(), descriptors(), resident_anonymous_bytes())
    for _ in range(10):
        one_round()
    after = (threads(), descriptors(), resident_anonymous_bytes())
    assert after[:2] == before[:2]
    slack = 1 << 20  # malloc's own; a slab that stays is 16 times that, each round
    assert after[2] <= before[2] + slack


# Faults


@pytest.mark.emulated
def test_a_failed_read_is_raised_and_the_session_goes_on(small: SmallStore, tmp_path: Path) -> None:
    path = tmp_path / "s.pack"
    call = small.call(1)
    with small.session(small.pack(path, verify="always"), "100%") as session:
        whole = path.read_bytes()
        os.truncate(path, 8192)
        with pytest.raises((IoError, CheckpointError)) as caught:
            session.experts_forward(1, *call)
        assert str(path) in str(caught.value)
        path.write_bytes(whole)  # the same file, whole again
        out = session.experts_forward(1, *call)
    torch.testing.assert_close(out.double(), small.reference(1, *call), atol=1e-5, rtol=1e-5)
