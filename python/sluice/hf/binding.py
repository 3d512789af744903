"""One session over a store for the sites of a model: gates found, parity proven."""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sluice import _core
from sluice.errors import CapacityError, InternalError
from sluice.hf import layout
from sluice.hf.compat import run_eager_body
from sluice.hf.gates import Gate, fingerprint, gate_function, native_callback, post_norm_function
from sluice.hf.site import ExpertSite
from sluice.torch_memory import beside_torch, empty_cache

_PARITY_TOKENS = 2
_PARITY_EXPERTS = 2
_SECTIONS = ("w13", "w2", "b13", "b2")


def open_session(store: Any, options: Any, sites: Sequence[ExpertSite], device: str = "cpu") -> Any:
    """A `sluice.session.Session` on `device` whose layers are the sites, in their order.

    Raises:
        CapacityError: The budget is below one slot per size class.
        InternalError: A CPU kernel disagrees with the class's own forward. A GPU's are not run.
    """
    from sluice.session import Session

    gates = [fingerprint(site) for site in sites]
    made: list[weakref.ref[Any]] = []  # the session, for callbacks that it outlives

    def place() -> str:
        session = made[0]() if made else None
        return device if session is None else session.device

    layers = [layer_spec(s, g, place) for s, g in zip(sites, gates, strict=True)]
    empty_cache(device)  # before anyone sizes a KV cache by what is free
    try:
        session = Session(store, options, layers, device)
    except CapacityError as error:
        raise beside_torch(error, device) from None
    made.append(weakref.ref(session))
    try:
        _prove_parity(store, sites, gates)
    except BaseException:
        session.close()
        raise
    return session


def layer_spec(
    site: ExpertSite, gate: Gate, device: Callable[[], str] = lambda: "cpu"
) -> dict[str, Any]:
    """What the session must know of a layer beyond its bytes; `device`: where it is now."""
    norm = post_norm_function(site.module) if site.has_post_norm else None
    return {
        "name": site.name,
        "kind": gate.kind,
        "interleaved": gate.interleaved,
        "alpha": gate.alpha,
        "limit": gate.limit,
        "gate_callback": native_callback(gate_function(site), device) if gate.is_generic else None,
        "post_callback": native_callback(norm, device) if norm is not None else None,
    }


def _prove_parity(store: Any, sites: Sequence[ExpertSite], gates: Sequence[Gate]) -> None:
    """Two experts and two tokens of every kind of site: the class's eager forward against ours."""
    proven: set[Any] = set()
    for layer, (site, gate) in enumerate(zip(sites, gates, strict=True)):
        kind = (type(site.module), site.hidden, site.intermediate, site.transposed, gate)
        if kind not in proven:
            proven.add(kind)
            prove_site(store, layer, site, gate)


@torch.no_grad()
def prove_site(store: Any, layer: int, site: ExpertSite, gate: Gate) -> None:
    """Compares one site in fp32 over its stored weights.

    Raises:
        InternalError: The two differ by more than rounding explains.
    """
    if site.has_post_norm:
        return  # the norm's weights are the model's; tests compare those sites as whole models
    stored = store.layer(layer)["dtype"]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(_PARITY_TOKENS, site.hidden, generator=generator)
    allowed = 64 * torch.finfo(torch.float32).eps * math.sqrt(site.hidden + site.intermediate)
    for expert in range(min(_PARITY_EXPERTS, site.num_experts)):  # one at a time: they may be large
        raw = _aligned_expert(store, layer, expert)
        expected = _eager(site, stored, raw, hidden)
        got = _ours(site, stored, gate, raw, hidden)
        error = (got - expected).abs().max().item() / (expected.abs().max().item() or 1.0)
        if not error <= allowed:
            raise InternalError(
                f"{site.label}: the {gate.kind} kernel differs from the class's own forward by "
                f"{error:.1e}, expected at most {allowed:.1e}; report this with the model's name, "
                f"and name the layer in exclude= until then"
            )


def _eager(site: ExpertSite, stored: str, raw: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """`[tokens, H]` of the class's own forward on a stub whose one expert is `raw`."""
    stub = copy.copy(site.module)
    views = layout.unpack(site, stored, raw)
    stub.__dict__["_parameters"] = {
        name: views[section].float()[None] for section, name in site.parameters.items()
    }
    stub.__dict__["num_experts"] = 1
    tokens = hidden.shape[0]
    ids = torch.zeros(tokens, 1, dtype=torch.int64)
    return run_eager_body(stub, hidden.clone(), ids, torch.ones(tokens, 1))


def _ours(
    site: ExpertSite, stored: str, gate: Gate, raw: torch.Tensor, hidden: torch.Tensor
) -> torch.Tensor:
    """`[tokens, H]` of the few-token kernel; of the same sums in torch for a generic gate."""
    if gate.is_generic:
        views = layout.unpack(site, stored, raw)
        w13, w2 = (
            views[name].float() if site.transposed else views[name].float().T
            for name in ("w13", "w2")
        )
        inner = hidden @ w13 + views.get("b13", 0)
        return gate_function(site)(inner) @ w2 + views.get("b2", 0)
    ranges = layout.section_ranges(site, stored)
    base = raw.data_ptr()
    address = {name: base + ranges[name][0] if name in ranges else 0 for name in _SECTIONS}
    out = torch.empty_like(hidden)
    _core.expert_decode(
        _core.Parallel(),
        "",
        stored,
        "F32",
        site.hidden,
        site.intermediate,
        {
            "kind": gate.kind,
            "interleaved": gate.interleaved,
            "alpha": gate.alpha,
            "limit": gate.limit,
        },
        [(address["w13"], address["w2"], address["b13"], address["b2"])],
        hidden.data_ptr(),
        out.data_ptr(),
        hidden.shape[0],
    )
    return out


def _aligned_expert(store: Any, layer: int, expert: int) -> torch.Tensor:
    """An expert's canonical bytes at an address that kernels accept (64-byte aligned)."""
    nbytes = store.layer(layer)["expert_bytes"]
    memory = torch.empty(nbytes + layout.SLOT_ALIGNMENT, dtype=torch.uint8)
    skip = -memory.data_ptr() % layout.SLOT_ALIGNMENT
    aligned = memory[skip : skip + nbytes]
    store.read_expert_into(layer, expert, aligned.data_ptr(), nbytes)
    return aligned
