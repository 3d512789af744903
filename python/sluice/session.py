"""A session: experts of one store in one budget of memory, and everything a caller asks of them."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from sluice import _core, log
from sluice.config import OffloadOptions
from sluice.errors import CapacityError, ConfigError, SluiceError
from sluice.host_memory import host_settings, unused_options
from sluice.report import report_text
from sluice.scorers import Scorers
from sluice.session_end import end_core, inside, open_sessions
from sluice.stats import HostTierProgress, Stats
from sluice.timeline import Span, nvtx_wanted, write_chrome_trace

if TYPE_CHECKING:
    import torch

    from sluice.foresight import Foresight
    from sluice.hf.tap import Tap
    from sluice.lookahead import Lookahead
    from sluice.trace.recorder import Recorder

_CALLBACKS = ("gate_callback", "post_callback")
OPERATOR_FAILED = "sluice::experts_forward failed"
"""Begins the text of the RuntimeError behind which `_core.take_error` has the real one."""

_LOOK_S = 0.1


class Session:
    """Runs MoE layers over the experts of a store, within `options.device_memory`.

    Knows no model: a layer is its position in the store, its gate and its tensors. Also a context
    manager, whose end closes it.

    Args:
        store: Where the experts lie.
        options: How much memory to spend, and on what.
        layers: One dict per layer of the store: name, kind, interleaved, alpha, limit,
            gate_callback and post_callback (functions on raw addresses as `_core.Session` calls
            them, or None). The session holds callbacks, the core holds them weakly: a callback may
            refer to a model that refers to the session.
        device: Where the tensors of its calls lie and the slots are: "cpu" or "cuda:N".

    Attributes:
        handle: What `torch.ops.sluice.experts_forward` takes.
        store: As given.
        options: As given.
        budget_bytes: `device_memory` in bytes.
        device: As given.
        tap: Who may watch the model that the session serves; None for a session without one.
        routed: Called behind each layer's experts with (layer, hidden, ids, weights), while set:
            the tap sets it while somebody watches.

    Raises:
        CapacityError: The budget is below one slot per size class; the message names budgets that
            work.
        ConfigError: Layers that do not fit the store.
        DeviceError: No such device, or a build without CUDA.

    Thread safety: every member; forwards are serialised.
    """

    def __init__(
        self,
        store: _core.Store,
        options: OffloadOptions,
        layers: Sequence[Mapping[str, Any]],
        device: str = "cpu",
    ) -> None:
        import torch  # needed from here on, and not before

        from sluice import ops

        log.configure()
        self.store = store
        self.options = options
        self.budget_bytes = options.budget_bytes(store.total_slot_bytes)
        self._layer_names = [str(layer.get("name", "")) for layer in layers]
        self._callbacks = {
            (index, key): layer[key]
            for index, layer in enumerate(layers)
            for key in _CALLBACKS
            if layer.get(key) is not None
        }
        self._notes: Counter[str] = Counter()
        self.tap: Tap | None = None
        self.routed: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None] | None = None
        self._hooks: list[Callable[[], object]] = []
        self._close_lock = threading.RLock()
        self._closing = False
        self._pid = os.getpid()
        if ops.load() == "python":
            self.note("python_operator")
        self._torch = torch
        self._operator = torch.ops.sluice.experts_forward.default
        self._without_gradient = ops.NoGradient.apply
        self._layers = [dict(layer) for layer in layers]
        self.device = device
        self._core = self._open_core(device)
        self._scorers = Scorers(self._core)
        self.handle = self._core.handle
        self._end = self._finalizer()
        open_sessions.add(self)

    def experts_forward(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of each token's experts.

        Ids outside of the layer's experts contribute zero. Where autograd is on and would record
        the call, the output carries a node whose backward raises.

        Raises:
            SluiceError: The session is closed, or was opened by the process this one was forked
                from.
            IoError: A read failed; the session stays usable.
            CapacityError: A GPU has no room for the scratch of so many tokens.
            Exception: Whatever a gate's callback, or Ctrl-C, raised meanwhile.

        Shapes: hidden `[T, H]`, ids `[T, K]` int64, weights `[T, K]` → `[T, H]`.
        """
        torch = self._torch
        if torch.compiler.is_compiling():
            return self._operator(self.handle, layer, hidden, ids, weights)
        if torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad):
            out = self._without_gradient(self._forward, layer, hidden, ids, weights)
        else:
            out = self._forward(layer, hidden, ids, weights)
        routed = self.routed  # once: the last observer may leave meanwhile
        if routed is not None:
            routed(layer, hidden, ids, weights)
        return out

    def stats(self) -> Stats:
        """The session's counters now; subtract two snapshots for what happened between them."""
        stats = Stats.from_core(self._core.stats())
        log.pull()
        for name, count in self._notes.items():
            stats.degradations[name] = stats.degradations.get(name, 0) + count
        return stats

    def report(self) -> str:
        """The same for a person: budget, slots, hits, bytes by reason, waiting, degradations."""
        classes = cast("list[dict[str, Any]]", self.plan()["classes"])
        return report_text(
            self.stats(),
            classes,
            self.store.description,
            self.options.policy,
            link_bytes_per_s=self._link_rate(),
        )

    def plan(self) -> dict[str, Any]:
        """What the budget bought: budget_bytes, slab_bytes, classes, class_of_layer."""
        return self._core.plan()

    def host_tier(self) -> HostTierProgress:
        """How far the host tier beside a GPU is filled and pinned; zeros without one."""
        return HostTierProgress(*self._core.host_tier())

    def wait_for_host_tier(self) -> HostTierProgress:
        """Shows the filling of the host tier until it is done; forwards may run meanwhile.

        Raises:
            KeyboardInterrupt: Ctrl-C: filling goes on; `close` ends it and gives all memory back.
        """
        from sluice.progress import Progress

        with Progress("filling the host tier", unit="bytes") as bar:
            while not (tier := self.host_tier()).is_settled and not self.closed:
                bar(tier.filled_bytes, tier.capacity_bytes)
                time.sleep(_LOOK_S)
        return tier

    def timeline(self, path: str | os.PathLike[str]) -> None:
        """Writes the newest spans as a Chrome trace, for Perfetto or chrome://tracing."""
        write_chrome_trace(path, self._core.timeline(), self._layer_names)

    def spans(self) -> list[Span]:
        """The newest spans, oldest first: (kind, begin_s, end_s, layer, expert, bytes, tokens)."""
        return self._core.timeline()

    def residency(self) -> list[list[tuple[str, int, int, int]]]:
        """Per size class, per slot: ("empty" | "loading" | "ready", layer, expert, leases)."""
        return self._core.residency()

    def hint(self, hints: Iterable[tuple[int, int, float, float]]) -> None:
        """Guesses what comes next: (layer, expert, probability, seconds until worthless).

        What is due first is loaded first; of more than can begin in time the least probable are
        dropped. May be late or wrong: results never depend on it.
        """
        self._core.hint(list(hints))

    @property
    def fingerprint(self) -> str:
        """Names the model by class, shape and weights of its routers; "" without a model."""
        return "" if self.tap is None else self.tap.fingerprint()

    def record(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        token_ids: bool = False,
        hidden: bool = False,
        task: str = "",
        max_bytes: int | str = "1GiB",
    ) -> Recorder:
        """Records the routing of every forward until the block ends.

        Args:
            path: Where the trace is saved when the block ends; None: `trace()` has it.
            token_ids: Keep the tokens that entered. They are the text.
            hidden: Keep the states that entered each layer's experts: 2 bytes a number.
            task: What requests that begin are called; `recorder.task` changes it between calls.
            max_bytes: What may be kept, bytes or a size; recording stops there, which is counted.

        Raises:
            ConfigError: The session serves no model, or `max_bytes` is no size.

        Example:
            with session.record(task="chat") as recorder:
                model.generate(**inputs)
            trace = recorder.trace()
        """
        from sluice.trace.recorder import Recorder

        return Recorder(
            self, path, token_ids=token_ids, hidden=hidden, task=task, max_bytes=max_bytes
        )

    def predict(self, predictor: Any, *, kind: str | None = None) -> Foresight | Lookahead:
        """Has a predictor follow the model from its next forward on, beside those that do already.

        One whose tables the core can read runs inside of forwards; beside a GPU only where it reads
        nothing but routes. Any other runs beside the model on a thread, for the next token.

        Args:
            predictor: A folder that `sluice train` wrote, a name, a class or an object: anything
                that `sluice.predict.make` takes.
            kind: The name that it must have; a preset's.

        Returns:
            What follows; its `close` ends it, as does the session's.

        Raises:
            ConfigError: No such predictor, one of another kind, one that is not fitted, or a
                session without a model.
            CheckpointError: The folder is damaged, or of another model.
        """
        from sluice.foresight import follow

        return follow(self, predictor, kind=kind)

    def add_scorer(self, kind: str, tables: Mapping[str, Any]) -> int:
        """Has somebody guess and rank inside of forwards, from what `core_tables` gave.

        Moves with the session.

        Returns:
            The number to remove it by.

        Raises:
            ConfigError: Tables of another model; or states or weights are read beside a GPU, where
                they do not lie in RAM.
        """
        self._refuse_inside("add_scorer")
        with self._close_lock:
            return self._scorers.add(kind, tables)

    def remove_scorer(self, number: int) -> None:
        """It says nothing from the next forward on. Nothing where there is none."""
        self._refuse_inside("remove_scorer")
        with self._close_lock:
            self._scorers.remove(number)

    def begin_step(self, requests: Any, tokens: int, token_ids: Any) -> None:
        """Tells scorers that the next layers are of these rows: B requests, `tokens` of each.

        Shapes: requests int64 `[B]`; token_ids int64 `[B * tokens]`, or none of them.
        """
        self._core.begin_step(requests, tokens, token_ids)

    def forecast(self, scores: Any, *, first_layer: int = 0, age_steps: int = 0) -> None:
        """Says who should stay: the policies "forecast" and "plec" read it.

        Args:
            scores: float32 `[layers, E]`, larger stays; whole rows, E of the largest layer.
            first_layer: Whose row comes first.
            age_steps: Forwards of the model since they were made.

        Raises:
            ConfigError: Rows outside of the model.
        """
        import numpy as np

        self._core.forecast(first_layer, np.ascontiguousarray(scores, dtype=np.float32), age_steps)

    def note(self, name: str, count: int = 1) -> None:
        """Counts a degradation that the core cannot see."""
        self._notes[name] += count

    def drain(self) -> None:
        """Waits until nothing is in flight; hints are cancelled."""
        here = (threading.get_ident(), self.handle)
        try:
            inside.add(here)
            self._core.drain()
        finally:
            inside.discard(here)

    def move_to(self, device: str) -> None:
        """Serves calls of another device from now on: new slots there, the old ones given back.

        What was resident is read again. Counters begin anew, and `handle` changes.

        Opened before the old one is closed, so that an error loses nothing. For that moment both
        exist, in RAM as well; but RAM is taken as experts are read into it, and a `host_memory`
        that nobody gave is sized as if the old one were gone.

        Raises:
            CapacityError: The budget does not fit there. This and any other error leaves the
                session as it was.
            ConfigError: Guesses inside of forwards read states, which would not lie in RAM there.
            SluiceError: From inside of its own forward.
        """
        if device == self.device:
            return
        self._refuse_inside("move_to")
        with self._close_lock:
            core = self._open_core(device, leaving_bytes=self._bytes_in_ram())
            try:
                scorers = self._scorers.moved_to(core)
            except BaseException:
                core.close()
                raise
            try:
                self._end()  # running calls finish first
            except BaseException:
                self._end = self._finalizer()  # one runs once, also when it raises
                core.close()
                raise
            self._core, self.handle, self.device = core, core.handle, device
            self._scorers = scorers
            self._end = self._finalizer()

    def add_close_hook(self, hook: Callable[[], object]) -> None:
        """Has `hook` called once, before the session closes; the last one added goes first."""
        self._hooks.append(hook)

    def close(self) -> None:
        """Runs the hooks, lets running calls finish, joins threads and returns every byte.

        Idempotent. A hook that raises keeps the session open, so that nothing is lost: mend the
        cause and close again. In a forked child it does nothing.

        Raises:
            SluiceError: From inside of its own forward; the session stays open.
        """
        if os.getpid() != self._pid:
            return
        self._refuse_inside("close")
        here = (threading.get_ident(), self.handle)
        with self._close_lock:
            if self._closing:  # a hook that closes: its caller does
                return
            self._closing = True
            try:
                inside.add(here)
                while self._hooks:
                    hook = self._hooks.pop()
                    try:
                        hook()
                    except BaseException:
                        self._hooks.append(hook)
                        raise
                try:
                    self._end()
                except BaseException:
                    self._end = self._finalizer()  # one runs once, also when it raises
                    raise
            finally:
                self._closing = False
                inside.discard(here)

    @property
    def closed(self) -> bool:
        """Whether `close` has run."""
        return self._core.closed

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self.budget_bytes} bytes, {self.options.policy}"
        return f"<sluice.Session {self.handle} over {self.store.description}: {state}>"

    def _forward(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        if os.getpid() != self._pid:  # before torch, whose own threads did not survive the fork
            raise self._inherited()
        try:
            return self._call(layer, hidden, ids, weights)
        except CapacityError:
            if self.device == "cpu":
                raise
        # The scratch of a longer prompt wants memory that torch may hold unused.
        from sluice.torch_memory import beside_torch, empty_cache

        empty_cache(self.device)
        self.note("emptied_torch_cache")
        try:
            return self._call(layer, hidden, ids, weights)
        except CapacityError as error:
            raise beside_torch(error, self.device) from None

    def _call(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        here = (threading.get_ident(), self.handle)
        try:
            inside.add(here)
            return self._operator(self.handle, layer, hidden, ids, weights)
        except RuntimeError as error:
            # By object first: its error is its own, also where another thread closed it meanwhile.
            told = OPERATOR_FAILED in str(error)
            cause = self._core.take_error() or _core.take_error(self.handle) if told else None
            if cause is None:
                raise
        finally:
            inside.discard(here)
        log.pull()
        raise cause

    def _refuse_inside(self, caller: str) -> None:
        # Before the lock: who holds it may wait for this very forward.
        if self._core.inside:
            raise SluiceError(
                f"{caller}: called from inside a forward of the same session, expected a call "
                "outside of its callbacks"
            )

    def _bytes_in_ram(self) -> int:
        """RAM that holds experts as long as the core is open."""
        stats = self._core.stats()
        beside_gpu = _core.has_slots_apart(self.device)
        return stats["host_filled_bytes" if beside_gpu else "peak_resident_bytes"]

    def _finalizer(self) -> weakref.finalize[..., Session]:
        return weakref.finalize(self, end_core, self._core, self._layer_names, self._pid)

    def _inherited(self) -> BaseException:
        return _core.take_error(self.handle) or SluiceError(
            f"session opened in process {self._pid}; make a new one here"
        )

    def _link_rate(self) -> float:
        """What doctor measured of the link to this session's GPU; 0 where it has not."""
        if not _core.has_slots_apart(self.device):
            return 0.0
        from sluice.doctor import load_constants
        from sluice.folders import cache_folder

        constants = load_constants(cache_folder())
        gpu = None if constants is None else constants.device
        return gpu.link_bytes_per_s if gpu is not None and gpu.device == self.device else 0.0

    def _open_core(self, device: str, leaving_bytes: int = 0) -> _core.Session:
        options = self.options
        for name in unused_options(options, device):
            self.note(f"{name}_unused")
        return _core.Session(
            self.store,
            device=device,
            device_memory=self.budget_bytes,
            **host_settings(options, self.store.total_slot_bytes, device, leaving_bytes),
            prefill=options.prefill,
            policy=options.policy,
            io_threads=options.io_threads,
            timeline=options.timeline,
            nvtx=nvtx_wanted(),
            gates=[self._gate(index, layer) for index, layer in enumerate(self._layers)],
        )

    def _gate(self, index: int, layer: Mapping[str, Any]) -> dict[str, Any]:
        gate = {key: layer[key] for key in ("kind", "interleaved", "alpha", "limit")}
        owner: weakref.ref[Session] = weakref.ref(self)
        for key in _CALLBACKS:
            function = self._callbacks.get((index, key))
            if function is not None and not callable(function):
                raise ConfigError(f"{key}: got {function!r}, expected a function or None")
            gate[key] = None if function is None else _weakly(owner, (index, key))
        return gate


def _weakly(owner: weakref.ref[Session], key: tuple[int, str]) -> Callable[..., None]:
    def call(*args: Any) -> None:
        session = owner()
        if session is None:
            raise SluiceError("session closed: nobody holds it any more")
        session._callbacks[key](*args)  # pyright: ignore[reportPrivateUsage]

    return call
