"""A predictor that runs beside a model: it is shown what happens, and says what comes."""

from __future__ import annotations

import math
import os
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sluice.errors import ConfigError
from sluice.hf.steps import Observer, Step
from sluice.lookahead import Lookahead, tell_failed
from sluice.predict.protocol import Guess, Predictor, RoutingEvent

if TYPE_CHECKING:
    import torch

    from sluice.session import Session

Array = NDArray[Any]

_READ_ROUTES_ALONE = ("pairs",)
"""Kinds of scorers that need nothing of what lies in a GPU's memory."""
_LEAST_PROBABILITY = 0.5
"""Below it a guess is not worth the link: where the link is the limit, guesses at 0.2 read a fifth
more than no guesses at all, and guesses at 0.5 nothing more."""
_EXTRA = 2
"""Guesses for a layer beyond the experts of a token."""
_MOST_GUESSES = 256
_CONTROL = 16
"""One step in so many runs without a plan, so that what plans cost is known."""
_SLOWER = 1.02
_MOST_APART = 8
"""Steps from plan to plan at most: below `_CONTROL`, whose own steps are never planned for."""
_MOST_WAITING = 64
"""Steps that may wait for the thread; when there are more, all of them are forgotten."""


def follow(session: Session, predictor: Any, *, kind: str | None = None) -> Foresight | Lookahead:
    """Has a predictor follow a session's model; see `Session.predict`."""
    from sluice.predict import make

    made: Any = make(predictor, model_fingerprint=session.fingerprint)
    if kind is not None and made.name != kind:
        raise ConfigError(
            f"predictor: got {predictor!r}, a {made.name!r}, beside preset="
            f"{session.options.preset!r}, expected a {kind!r}"
        )
    if getattr(made, "shape", ...) is None and getattr(made, "needs_fit", False):
        raise ConfigError(
            f"predictor: got {made.name!r}, which knows nothing yet; expected a folder of a "
            f"trained one: `sluice train {made.name} --trace FILE --out FOLDER`"
        )
    _tell_capacity(session, made)
    # "plec" reads a plan of the whole pass, which the core's predictors do not make.
    planned = session.options.policy == "plec"
    tables = None if planned else getattr(made, "core_tables", lambda: None)()
    if tables is None or (session.device != "cpu" and tables[0] not in _READ_ROUTES_ALONE):
        return Foresight(session, made)
    return Lookahead(session, made.name, *tables)


def _tell_capacity(session: Session, predictor: Any) -> None:
    """Tells a predictor that ranks how many experts a layer can keep: few want another ranking."""
    if hasattr(predictor, "capacity"):
        slots = sum(int(c["num_slots"]) for c in session.plan()["classes"])
        predictor.capacity = max(1, slots // int(session.store.num_layers))


@dataclass(slots=True)
class _Step:
    """One forward, as the predictor will be shown it."""

    index: int
    requests: Array
    token_ids: Array | None
    tasks: tuple[str, ...]
    decode: bool
    rows: Array | None = None
    """Which rows of the forward are shown; None: all."""
    layers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = field(
        default_factory=list["tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]"]
    )


class Foresight(Observer):
    """Shows a predictor every step of a model, and hands its plans to the session.

    One thread, woken once a step, observes the step that has ended, plans for the one that begins
    and publishes: guesses as hints, keep-scores as a forecast. A plan that is not ready when its
    step has ended is dropped; steps that the thread has not seen yet wait for it, planned for or
    not, so what the predictor knows has no gaps. While steps with plans take longer than steps
    without, plans come half as often. All of it is counted in the session's degradations:
    `plans_dropped`, `plans_apart`, `predictor_steps_lost`, `predictor_failed`.

    Results never depend on any of it. A predictor that raises is logged and left alone.

    Args:
        session: Of a model.
        predictor: See `sluice.predict`.

    Raises:
        ConfigError: The session serves no model.

    Thread safety: an `Observer`, called on the caller's thread; `close` from anywhere.
    """

    def __init__(self, session: Session, predictor: Predictor) -> None:
        if session.tap is None:
            raise ConfigError("predictor: got a session without a model, expected one of a model")
        self.predictor = predictor
        self._session = session
        self._layers = int(session.store.num_layers)
        self._experts = max(
            int(session.store.layer(layer)["num_experts"]) for layer in range(self._layers)
        )
        self._pid = os.getpid()
        self._hidden = bool(getattr(predictor, "needs_hidden", False))
        self._prompt_tokens = _prompt_tokens_of(predictor)
        self._running: _Step | None = None
        self._at: tuple[int, int] = (-1, 0)  # step, layers of it that have run
        self._step_began = 0.0
        self._step_s = 0.0
        self._pace = _Pace()
        self._wake = threading.Condition()
        self._inbox: list[_Step] = []
        self._upcoming: _Step | None = None
        self._closed = False
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sluice-foresight", daemon=True)
        self._thread.start()
        self._ready.wait()
        session.tap.add(self)
        session.add_close_hook(self.close)

    # On the caller's thread.

    def begin_step(self, step: Step) -> None:
        """A forward begins: wakes the thread."""
        if self._closed or os.getpid() != self._pid:
            return  # a forked child has no such thread, and its forward will say so
        now = time.perf_counter()
        shown, rows = step.tokens, None
        if step.prompt and self._prompt_tokens is not None and self._prompt_tokens < shown:
            rows = np.arange(step.requests.size * shown).reshape(-1, shown)
            rows = rows[:, shown - self._prompt_tokens :].reshape(-1)
            shown = self._prompt_tokens
        ids = None
        if step.token_ids is not None:
            newest = step.token_ids.detach()[:, step.tokens - shown :]
            ids = newest.reshape(-1).cpu().numpy().astype(np.int32)
        self._running = _Step(
            index=step.index,
            requests=np.repeat(step.requests, shown),
            token_ids=ids,
            tasks=tuple(task for task in step.tasks for _ in range(shown)),
            decode=not step.prompt,
            rows=rows,
        )
        self._at = (step.index, 0)
        self._step_began = now
        with self._wake:
            self._upcoming = self._running
            self._wake.notify()

    def routed(
        self,
        step: Step,
        layer: int,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        """A layer has run: kept for the thread, which is not woken."""
        self._at = (step.index, layer + 1)
        if self._running is not None:
            rows = self._running.rows
            states = _kept(hidden, rows) if self._hidden else None
            self._running.layers.append((_kept(ids, rows), _kept(weights, rows), states))

    def end_step(self, step: Step, *, complete: bool) -> None:
        """A forward has ended: it is shown when the thread wakes for the next one."""
        ended, self._running = self._running, None
        if ended is None or not complete or self._closed:
            return
        if ended.decode:
            seconds = time.perf_counter() - self._step_began
            self._step_s = seconds if self._step_s == 0 else 0.9 * self._step_s + 0.1 * seconds
            if self._pace.took(ended.index, seconds):
                self._session.note("plans_apart")
        with self._wake:
            if len(self._inbox) == _MOST_WAITING:
                self._session.note("predictor_steps_lost", _MOST_WAITING)
                self._inbox.clear()
            self._inbox.append(ended)

    def close(self) -> None:
        """Ends the thread after what it does now. Idempotent."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        if self._session.tap is not None:
            self._session.tap.remove(self)

    # On the thread.

    def _run(self) -> None:
        import torch

        try:
            _use_one_thread()  # the model has the others
        finally:
            self._ready.set()
        while True:
            with self._wake:
                while not self._closed and self._upcoming is None:
                    self._wake.wait()
                if self._closed:
                    return
                ended, self._inbox = self._inbox, []
                upcoming, self._upcoming = self._upcoming, None
            assert upcoming is not None
            try:
                with torch.no_grad():
                    self._follow(ended, upcoming)
            except Exception as error:
                self._closed = True
                tell_failed(self._session, self.predictor.name, error)
                return

    def _follow(self, ended: list[_Step], upcoming: _Step) -> None:
        if ended and getattr(self.predictor, "shape", ...) is None:
            self._introduce(ended[0])
        for step in ended:
            self._show(step)
        self.predictor.begin_step(
            upcoming.index, upcoming.requests, upcoming.token_ids, upcoming.tasks
        )
        if upcoming.decode and self._pace.plans(upcoming.index):
            self._publish(upcoming)

    def _introduce(self, step: _Step) -> None:
        """Tells a predictor that was not fitted what it predicts for."""
        from sluice.predict import Shape

        made: Any = self.predictor
        made.bind(Shape(self._layers, self._experts, int(step.layers[0][0].shape[1])))
        made.begin_step(step.index, step.requests, step.token_ids, step.tasks)

    def _show(self, step: _Step) -> None:
        for layer, (ids, weights, hidden) in enumerate(step.layers):
            self.predictor.observe(
                RoutingEvent(
                    step=step.index,
                    layer=layer,
                    experts=ids.cpu().numpy().astype(np.int16),
                    weights=weights.float().cpu().numpy(),
                    requests=step.requests,
                    decode=step.decode,
                    token_ids=step.token_ids,
                    hidden=None if hidden is None else hidden.float().cpu().numpy(),
                    tasks=step.tasks,
                )
            )

    def _publish(self, upcoming: _Step) -> None:
        layers = self._layers
        guesses = self._guesses()
        planned = self._session.options.policy == "plec"  # it reads who is expected, not how soon
        kept = self._expected(guesses) if planned else self.predictor.forecast()
        index, done = self._at
        if index != upcoming.index:
            self._session.note("plans_dropped")
            return
        if kept is not None:
            self._session.forecast(kept)
        layer_s = self._step_s / layers if self._step_s else math.inf
        self._session.hint(
            (g.layer, g.expert, g.probability, ahead * layer_s)
            for g in guesses
            if (ahead := g.steps_ahead * layers + g.layer - done) > 0
        )

    def _guesses(self) -> list[Guess]:
        """For the step's own layers, the best first."""
        upcoming = getattr(self.predictor, "upcoming", None)
        if upcoming is None:  # a predictor of the user's own
            guesses = self.predictor.plan(self._layers)
            return [g for g in guesses if g.probability >= _LEAST_PROBABILITY][:_MOST_GUESSES]
        probabilities: Array = upcoming(self._layers)
        wanted = self._top_k() + _EXTRA
        if 0 < wanted < probabilities.shape[1]:
            least = np.partition(probabilities, -wanted, axis=1)[:, -wanted, None]
            probabilities = np.where(probabilities >= least, probabilities, 0.0)
        visits, experts = np.nonzero(probabilities >= _LEAST_PROBABILITY)
        values = probabilities[visits, experts]
        best = np.argsort(-values, kind="stable")[:_MOST_GUESSES]
        return [Guess(int(visits[i]), int(experts[i]), float(values[i])) for i in best]

    def _top_k(self) -> int:
        shape = getattr(self.predictor, "shape", None)
        return 0 if shape is None else int(shape.top_k)

    def _expected(self, guesses: list[Guess]) -> Array:
        """What `plec` reads: above 0 where a use is predicted."""
        table = np.zeros((self._layers, self._experts), np.float32)
        for guess in guesses:
            if guess.steps_ahead == 0:
                table[guess.layer, guess.expert] = guess.probability
        return table


def _prompt_tokens_of(predictor: Predictor) -> int | None:
    """How many of a prompt's newest tokens a predictor wants to see; None: all."""
    wanted: Any = getattr(predictor, "prompt_tokens", None)
    if wanted is not None and (not isinstance(wanted, int) or wanted < 1):
        raise ConfigError(
            f"{predictor.name}.prompt_tokens: got {wanted!r}, expected None (all) or 1 and more"
        )
    return wanted


def _use_one_thread() -> None:
    """The calling thread alone: torch tells what it is told to every thread that begins later."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.get_num_threads()  # from here on this thread keeps it
    others = threading.Thread(target=torch.set_num_threads, args=(before,))
    others.start()
    others.join()


def _kept(tensor: torch.Tensor, rows: Array | None) -> torch.Tensor:
    """A copy of some rows, which the model does not write to any more."""
    tensor = tensor.detach()
    if rows is None or rows[-1] >= len(tensor):  # of a forward that runs other rows than its own
        return tensor.clone()
    return tensor[rows]


class _Pace:
    """How often plans are made: in every step but the controls, rarer while they slow the model.

    `took` is of the caller's thread, `plans` of both.
    """

    def __init__(self) -> None:
        self._every = 1
        self._counted = 0
        self._seconds: dict[bool, list[float]] = {True: [], False: []}

    def plans(self, step: int) -> bool:
        """Whether this step is planned for."""
        return step % _CONTROL != 0 and step % self._every == 0

    def took(self, step: int, seconds: float) -> bool:
        """A step has ended; whether plans are further apart from now on."""
        self._counted += 1
        self._seconds[self.plans(step)].append(seconds)
        if self._counted % (16 * _CONTROL):
            return False
        medians = {planned: float(np.median(s)) for planned, s in self._seconds.items() if s}
        self._seconds = {True: [], False: []}
        if len(medians) < 2:
            return False
        slower = medians[True] > _SLOWER * medians[False]
        before = self._every
        self._every = min(_MOST_APART, before * 2) if slower else max(1, before // 2)
        return self._every > before
