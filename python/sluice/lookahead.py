"""A predictor whose tables lie in the core: it says what comes inside of a model's forwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sluice import log
from sluice.errors import ConfigError
from sluice.hf.steps import Observer, Step

if TYPE_CHECKING:
    from sluice.session import Session

_NO_IDS = np.zeros(0, np.int64)


class Lookahead(Observer):
    """A predictor's tables in the core: it guesses and ranks inside of each forward.

    No Python runs for it but, once a step, to say whose rows come. Keep-scores are there before a
    layer's demands take their slots, guesses once they are on their way.

    Args:
        session: Whose forwards.
        name: Of the predictor.
        kind: Of its tables.
        tables: See `core_tables` of the predictor.

    Raises:
        ConfigError: Tables of another model; or states or weights are read beside a GPU, where they
            do not lie in RAM.

    Thread safety: an `Observer`, called on the caller's thread; `close` from anywhere.
    """

    sees_layers = False  # the core is there

    def __init__(self, session: Session, name: str, kind: str, tables: Mapping[str, Any]) -> None:
        self.name = name
        self._session = session
        self._closed = False
        needs_rows = kind == "forecast" or len(tables.get("ids", ())) > 0
        if needs_rows and session.tap is None:
            raise ConfigError("predictor: got a session without a model, expected one of a model")
        self._number = session.add_scorer(kind, tables)
        if needs_rows and session.tap is not None:
            session.tap.add(self)

    def begin_step(self, step: Step) -> None:
        """A forward begins: the core is told of its rows, where rows are texts."""
        if self._closed or not step.traceable:
            return
        ids = _NO_IDS
        if step.token_ids is not None and step.tokens == 1:
            ids = step.token_ids.detach().reshape(-1).cpu().numpy()
        try:
            self._session.begin_step(step.requests, step.tokens, ids)
        except Exception as error:
            self._closed = True  # taken off by whoever closes it, not in the middle of a forward
            tell_failed(self._session, self.name, error)

    def close(self) -> None:
        """It says nothing from the next forward on. Idempotent."""
        self._closed = True
        if self._session.tap is not None:
            self._session.tap.remove(self)
        self._session.remove_scorer(self._number)


def tell_failed(session: Session, name: str, error: Exception) -> None:
    """A predictor raised: counted and logged; the model goes on without it."""
    session.note("predictor_failed")
    log.LOGGER.warning(
        "predictor %s: %s: %s; the model goes on without it",
        name, type(error).__name__, error, exc_info=error,
    )  # fmt: skip
