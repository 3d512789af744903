"""The reference model's shipped traces: of its prompts, of its routers, in roles that are apart."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

import reference_traces as reference
from sluice.hf.auto import load_tokenizer
from sluice.reference import reference_model
from sluice.trace import Split, Trace
from sluice.trace.describe import describe


@pytest.fixture(scope="module")
def traces() -> dict[str, Trace]:
    return {role: reference.shipped(role) for role in reference.ROLES}


def test_there_is_enough_text_of_every_task(traces: dict[str, Trace]) -> None:
    for role, least in (("train", 20_000), ("valid", 5_000), ("test", 20_000)):
        counts = describe(traces[role]).tasks
        assert sum(task.decode for task in counts) >= least, role
        assert len(counts) == 10 and all(task.decode and task.prompt for task in counts)
        assert traces[role].own_text is True and traces[role].weights is not None
    assert len({trace.model for trace in traces.values()}) == 1


def test_roles_share_no_sequence_and_no_prompt(traces: dict[str, Trace]) -> None:
    contents = {role: tuple({s.content for s in trace}) for role, trace in traces.items()}
    Split(fit=contents["train"], choose=contents["valid"], score=contents["test"])
    texts = Counter(prompt.text for role in reference.ROLES for prompt in reference.prompts(role))
    assert max(texts.values()) == 1


def test_every_sequence_begins_with_its_prompt(traces: dict[str, Trace]) -> None:
    tokenizer = load_tokenizer(reference_model())
    for role, trace in traces.items():
        prompts = reference.prompts(role)
        assert trace.token_ids is not None and len(prompts) == len(trace.sequences)
        ids = tokenizer([prompt.text for prompt in prompts])["input_ids"]
        for sequence, prompt, expected in zip(trace, prompts, ids, strict=True):
            assert sequence.task == prompt.task and prompt.source in sequence.request
            assert trace.token_ids[sequence.rows][: sequence.prompt_tokens].tolist() == expected
            assert sequence.length - sequence.prompt_tokens < reference.MAX_NEW_TOKENS


def test_the_model_that_ships_routes_as_the_traces_say(traces: dict[str, Trace]) -> None:
    # Prompts alone: what is sampled behind them may differ on another machine.
    again = reference.record(reference.prompts("test")[:3])
    assert again.model == traces["test"].model
    for now, then in zip(again, traces["test"], strict=False):
        rows = slice(now.start, now.start + now.prompt_tokens)
        told = slice(then.start, then.start + then.prompt_tokens)
        ours, theirs = again.experts[rows], traces["test"].experts[told]
        shared = (ours[..., :, None] == theirs[..., None, :]).any(-1).mean()
        assert (now.request, now.prompt_tokens) == (then.request, then.prompt_tokens)
        assert shared > 0.98  # another instruction set may round a near-tie otherwise
        assert np.isin(again.token_ids[rows], traces["test"].token_ids[told]).all()
