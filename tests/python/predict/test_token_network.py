"""What networks over tokens share: prompts that come at once, in pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from predict.small_traces import random_trace
from sluice.predict import RoutingEvent, make
from sluice.predict.networks import token_network

SMALL: dict[str, dict[str, Any]] = {
    "routing-path": {"width": 16, "heads": 2, "layers": 2, "window": 5, "epochs": 1},
    "routing-path-t5": {
        **{"width": 8, "inner": 16, "layers": 2, "heads": 2, "head_width": 4},
        **{"table_rows": 64, "source_tokens": 4, "window": 6, "epochs": 1},
    },
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("rows", [1, 7, 24, 1024])
def test_a_prompt_goes_through_in_pieces(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = make(name, SMALL[name])
    predictor.fit(random_trace(1))
    text = random_trace(2, sequences=(25,))
    assert text.token_ids is not None
    expected = predictor.scores(text, "token")
    monkeypatch.setattr(token_network, "_ROWS", rows)
    np.testing.assert_allclose(predictor.scores(text, "token"), expected, atol=1e-5)

    prompt, ids = np.zeros(24, np.int64), text.token_ids.astype(np.int64)
    predictor.begin_step(0, prompt, ids[:24], [])
    for layer in range(text.num_layers):
        experts = text.experts[:24, layer]
        predictor.observe(
            RoutingEvent(
                step=0,
                layer=layer,
                experts=experts,
                requests=prompt,
                decode=False,
                token_ids=ids[:24],
            )
        )
    sizes: list[int] = []
    run = predictor._run

    def counted(ids: Any, previous: Any, past: Any) -> Any:
        sizes.append(len(ids))
        return run(ids, previous, past)

    monkeypatch.setattr(predictor, "_run", counted)
    predictor.begin_step(1, prompt[:1], ids[24:], [])
    likely = predictor.upcoming(text.num_layers)
    np.testing.assert_allclose(likely, expected[24], atol=1e-5)
    assert max(sizes) <= rows and sum(sizes) == 25, sizes
