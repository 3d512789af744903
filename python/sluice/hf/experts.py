"""The module that takes the place of an experts module: same call, no weights of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from sluice.errors import SluiceError, UnsupportedModelError
from sluice.hf import devices
from sluice.hf.site import ExpertSite
from sluice.tensors import DTYPE_NAMES

TensorFn = Callable[[torch.Tensor], torch.Tensor]


class OffloadedExperts(nn.Module):
    """Runs one layer's experts through a session.

    Keeps the original's child modules (an activation, Muse Spark's norm) and plain attributes under
    their names, so that code which reads `num_experts` or `config` goes on working. It is no
    subclass of any experts class: transformers initialises those by `isinstance`.

    Shapes: hidden_states `[T, H]`, ids and weights `[T, K]` → `[T, H]`.
    Thread safety: forwards of one session are serialised by it.
    """

    def __init__(self, site: ExpertSite) -> None:
        super().__init__()
        original = site.module
        for key, value in vars(original).items():
            if not key.startswith("_") and key not in ("training", "forward"):
                setattr(self, key, value)
        for name, child in original.named_children():
            self.add_module(name, child)
        self.train(original.training)
        self._sluice_name = site.name
        self._sluice_class = type(original).__name__
        self._sluice_shape = (site.num_experts, site.hidden, site.intermediate)
        self._sluice_parameters = frozenset(site.parameters.values())
        self._sluice_dtype = site.dtype
        self._sluice_session: Any = None
        self._sluice_layer = -1
        self._sluice_views: dict[str, nn.Parameter] = {}
        self._is_hf_initialized = True

    def bind(self, session: Any, layer: int, views: dict[str, nn.Parameter] | None = None) -> None:
        """Connects the module to its layer of a session.

        Args:
            session: A `sluice.session.Session`.
            layer: Its index there.
            views: The parameters themselves while all of them lie in RAM: `state_dict` is then
                whole.
        """
        self._sluice_session = session
        self._sluice_layer = layer
        self._sluice_views = dict(views or {})

    @torch.compiler.disable
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
        *,
        router_indices: torch.Tensor | None = None,
        routing_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weighted sum of each token's experts, in the type of `hidden_states`.

        Raises:
            UnsupportedModelError: In training mode, on odd shapes.
            ConfigError: The current stream is being captured into a graph.
            SluiceError: The session is closed, or the weights are not loaded yet.
        """
        ids = top_k_index if top_k_index is not None else router_indices
        weights = top_k_weights if top_k_weights is not None else routing_weights
        self._check(hidden_states, ids, weights)
        assert ids is not None and weights is not None
        if hidden_states.shape[0] == 0:
            return torch.empty_like(hidden_states)
        if weights.dtype not in DTYPE_NAMES:
            weights = weights.float()
        out = self._sluice_session.experts_forward(
            self._sluice_layer,
            hidden_states.to(self._sluice_dtype).contiguous(),  # autocast hands a narrower type
            ids.to(torch.int64).contiguous(),
            weights.contiguous(),
        )
        return out.to(hidden_states.dtype)

    def check_move(self, fn: TensorFn) -> str | None:
        """Where `.to()` and its kin would put the experts: their slots move with the model.

        Raises:
            UnsupportedModelError: `fn` changes the type, or the device is of no use.
        """
        if self._sluice_session is None:
            return None
        probe = fn(torch.empty(0, dtype=self._sluice_dtype, device=self._sluice_session.device))
        if probe.dtype != self._sluice_dtype:
            raise UnsupportedModelError(
                f"{self._label}: got a change of dtype to {probe.dtype}, but offloaded experts "
                f"stay {self._sluice_dtype}; load the model with dtype={probe.dtype}, or "
                "sluice.restore(model) first"
            )
        place = devices.name_of(probe.device)
        if place == "meta":
            raise UnsupportedModelError(
                f"{self._label}: got a move to meta, expected a device that has memory; "
                "sluice.restore(model) first"
            )
        devices.check_device(place, f"{self._label} moved")
        return place

    def extra_repr(self) -> str:
        """What `print(model)` shows of it."""
        experts, hidden, intermediate = self._sluice_shape
        held = (self._sluice_session is not None and "offloaded") or "not loaded"
        return (
            f"{self._sluice_class}, num_experts={experts}, hidden={hidden}, "
            f"intermediate={intermediate}, dtype={self._sluice_dtype}, {held}"
        )

    @property
    def _label(self) -> str:
        return f"{self._sluice_name} ({self._sluice_class})"

    def _check(
        self,
        hidden: torch.Tensor,
        ids: torch.Tensor | None,
        weights: torch.Tensor | None,
    ) -> None:
        if self.training:
            raise UnsupportedModelError(
                f"{self._label}: got training mode, but experts offloaded by sluice have no "
                "gradient; call model.eval(), or sluice.restore(model) to train"
            )
        if self._sluice_session is None:
            raise SluiceError(f"{self._label}: got a forward before its experts were loaded")
        if ids is None or weights is None:
            raise UnsupportedModelError(
                f"{self._label}: got no expert ids or no weights, expected both as [T, K]"
            )
        hidden_size = self._sluice_shape[1]
        if hidden.ndim != 2 or hidden.shape[1] != hidden_size:
            raise UnsupportedModelError(
                f"{self._label}: got hidden states {list(hidden.shape)}, expected "
                f"[T, {hidden_size}]"
            )
        if ids.ndim != 2 or ids.shape != weights.shape or ids.shape[0] != hidden.shape[0]:
            raise UnsupportedModelError(
                f"{self._label}: got ids {list(ids.shape)} and weights {list(weights.shape)}, "
                f"expected both [{hidden.shape[0]}, K]"
            )
        place = devices.name_of(hidden.device)
        if place != self._sluice_session.device:
            raise UnsupportedModelError(
                f"{self._label}: got hidden states on {place}, but the slots of its experts are on "
                f"{self._sluice_session.device}; move the model as a whole, with model.to()"
            )

    def _apply(self, fn: TensorFn, recurse: bool = True) -> OffloadedExperts:  # type: ignore[override]
        self.check_move(fn)
        return super()._apply(fn, recurse)  # type: ignore[return-value]

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._sluice_session is None:
            return
        if not self._sluice_views:
            raise UnsupportedModelError(
                f"{self._label}: its experts lie on disk, so this state dict would be a checkpoint "
                "without experts; sluice.restore(model) first, or copy the checkpoint's own files"
            )
        for name, parameter in self._sluice_views.items():
            destination[prefix + name] = parameter if keep_vars else parameter.detach()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        held = [name for name in self._sluice_parameters if prefix + name in state_dict]
        if held:
            raise UnsupportedModelError(
                f"{self._label}: got {', '.join(sorted(held))} to load into offloaded experts; "
                "load the checkpoint with sluice.OffloadConfig, or sluice.restore(model) first"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        held = self.__dict__.get("_sluice_parameters", ())
        if name in held:
            raise AttributeError(
                f"{self._label} has no {name}: its experts are offloaded by sluice; "
                "sluice.restore(model) gives them back, session.store reads single ones"
            )
        return super().__getattr__(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise self._copies()

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise self._copies()

    def _copies(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self._label}: offloaded experts can be neither copied nor pickled; "
            "sluice.restore(model) first"
        )
