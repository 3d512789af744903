"""The operator: `_ops` here, and once more its twin in Python (the last test)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_store import SmallStore

from sluice import _core, ops
from sluice.errors import ConfigError, SluiceError, UnsupportedModelError
from sluice.session import Session


@pytest.fixture
def session(small: SmallStore) -> Iterator[Session]:
    with small.session(small.memory_store(), "50%") as session:
        yield session


def operator(*arguments: object) -> torch.Tensor:
    return torch.ops.sluice.experts_forward(*arguments)


def test_the_build_under_test_is_the_one_that_was_asked_for() -> None:
    assert ops.load() == ("python" if os.environ.get("SLUICE_NO_OPS") == "1" else "native")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 40])
def test_results_are_right(dtype: torch.dtype, num_tokens: int) -> None:
    small = SmallStore(dtype=dtype)
    with small.session(small.memory_store()) as session:
        for layer in range(2):
            call = small.call(num_tokens)
            out = operator(session.handle, layer, *call)
            assert out.dtype == dtype
            expected = small.reference(layer, *call)
            torch.testing.assert_close(
                out.double(), expected, atol=small.tolerance(), rtol=small.tolerance()
            )


def test_wider_activations_and_routing_weights_are_taken() -> None:
    small = SmallStore(dtype=torch.bfloat16)
    hidden, ids, weights = small.call(7)
    with small.session(small.memory_store()) as session:
        out = operator(session.handle, 0, hidden.float(), ids, weights.float())
        mixed = operator(session.handle, 0, hidden, ids, weights.float())
    expected = small.reference(0, hidden, ids, weights)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, atol=1e-2, rtol=1e-2)
    assert mixed.dtype == torch.bfloat16


def test_ids_outside_of_the_layer_contribute_zero(small: SmallStore, session: Session) -> None:
    hidden, ids, weights = small.call(6)
    ids[1, 0], ids[2, 1], ids[3] = small.num_experts, -1, 1 << 40
    out = operator(session.handle, 0, hidden, ids, weights)
    assert (out[3] == 0).all()
    expected = small.reference(0, hidden, ids, weights)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)


def test_inputs_need_not_be_contiguous(small: SmallStore, session: Session) -> None:
    hidden, ids, weights = small.call(6)
    expected = operator(session.handle, 0, hidden, ids, weights)
    spread = torch.stack([hidden, hidden], dim=-1)[..., 1]
    turned = ids.t().contiguous().t()
    sliced = torch.cat([weights, weights], dim=1)[:, : weights.shape[1]]
    assert not (spread.is_contiguous() or turned.is_contiguous() or sliced.is_contiguous())
    assert torch.equal(operator(session.handle, 0, spread, turned, sliced), expected)


def test_inputs_may_begin_anywhere(small: SmallStore, session: Session) -> None:
    tensors = small.call(6)
    expected = operator(session.handle, 0, *tensors)
    moved: list[torch.Tensor] = []
    for tensor in tensors:
        room = tensor.new_empty(tensor.numel() + 1)
        moved.append(room[1:].view_as(tensor).copy_(tensor))
    assert all(each.is_contiguous() and each.data_ptr() % 16 for each in moved)
    assert torch.equal(operator(session.handle, 0, *moved), expected)


def test_no_tokens_give_no_rows(small: SmallStore, session: Session) -> None:
    hidden, ids, weights = small.call(3)
    out = operator(session.handle, 0, hidden[:0], ids[:0], weights[:0])
    assert out.shape == (0, small.hidden)


def test_no_experts_give_zeros(small: SmallStore, session: Session) -> None:
    hidden, ids, weights = small.call(3)
    out = operator(session.handle, 0, hidden, ids[:, :0], weights[:, :0])
    assert torch.equal(out, torch.zeros_like(hidden))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, i, w: (h[0], i, w), r"hidden.*\[T, H\]"),
        (lambda h, i, w: (h, i[:2], w[:2]), "ids"),
        (lambda h, i, w: (h, i, w[:, :1]), "weights"),
        (lambda h, i, w: (h.double(), i, w), "hidden.*float32, bfloat16 or float16"),
        (lambda h, i, w: (h, i, w.double()), "weights.*float32, bfloat16 or float16"),
        (lambda h, i, w: (h, i.int(), w), "ids.*int64"),
    ],
)
def test_wrong_tensors_are_refused(
    small: SmallStore, session: Session, change: object, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        operator(session.handle, 0, *change(*small.call(4)))  # type: ignore[operator]


def test_rows_of_another_width_are_refused_by_name(small: SmallStore, session: Session) -> None:
    hidden, ids, weights = small.call(4)
    with pytest.raises(ConfigError, match="got 63 columns, expected 64"):
        session.experts_forward(0, hidden[:, :63], ids, weights)


@pytest.mark.parametrize("layer", [-1, 2, 1 << 40])
def test_a_layer_that_is_not_there_is_refused(
    small: SmallStore, session: Session, layer: int
) -> None:
    with pytest.raises(ConfigError, match="expected 0 to 1"):
        session.experts_forward(layer, *small.call(1))


def test_a_handle_that_never_was_is_refused(small: SmallStore) -> None:
    ops.load()
    with pytest.raises((RuntimeError, SluiceError)):
        operator(1 << 40, 0, *small.call(1))
    assert isinstance(_core.take_error(1 << 40), SluiceError)


def test_the_operator_passes_torchs_own_checks(small: SmallStore, session: Session) -> None:
    results = torch.library.opcheck(
        torch.ops.sluice.experts_forward.default, (session.handle, 0, *small.call(4))
    )
    assert set(results.values()) == {"SUCCESS"}


def test_the_fake_kernel_has_the_shape_of_the_real_one(small: SmallStore, session: Session) -> None:
    meta = [tensor.to("meta") for tensor in small.call(5)]
    out = operator(session.handle, 0, *meta)
    assert (out.shape, out.dtype) == ((5, small.hidden), torch.float32)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_every_gradient_mode_gives_the_same_bits(
    small: SmallStore, session: Session, mode: type
) -> None:
    call = small.call(12)
    expected = session.experts_forward(0, *call)
    with mode():
        assert torch.equal(session.experts_forward(0, *call), expected)
    hidden = call[0].clone().requires_grad_()
    assert torch.equal(session.experts_forward(0, hidden, *call[1:]).detach(), expected)


def test_a_backward_raises_by_name(small: SmallStore, session: Session) -> None:
    hidden, ids, weights = small.call(3)
    out = session.experts_forward(0, hidden.requires_grad_(), ids, weights)
    assert out.requires_grad
    with pytest.raises(UnsupportedModelError, match=r"no gradient.*sluice\.restore\(model\)"):
        out.sum().backward()
    with torch.no_grad():
        assert not session.experts_forward(0, hidden, ids, weights).requires_grad


def test_bits_do_not_depend_on_the_number_of_threads(small: SmallStore, session: Session) -> None:
    call = small.call(3)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(session.experts_forward(0, *call))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_the_twin_beside_the_operator_gives_its_bits(small: SmallStore, session: Session) -> None:
    for num_tokens in (1, 4, 30):
        call = small.call(num_tokens)
        expected = operator(session.handle, 1, *call)
        assert torch.equal(ops.experts_forward(session.handle, 1, *call), expected)


@pytest.mark.skipif(os.environ.get("SLUICE_NO_OPS") == "1", reason="this is the run without _ops")
def test_all_of_this_passes_without_ops() -> None:
    files = [str(Path(__file__).with_name(name)) for name in ("test_ops.py", "test_session.py")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        env={**os.environ, "SLUICE_NO_OPS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-4000:]
