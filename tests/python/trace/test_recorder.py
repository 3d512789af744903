"""The recorder beside the routers themselves, and everything it must not record."""

from __future__ import annotations

import gc
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf import tiny
from small_store import SmallStore
from transformers import DynamicCache

import sluice
from sluice import trace
from sluice.errors import ConfigError
from sluice.hf.cache_rows import Known, is_empty
from sluice.predict import RoutingEvent

PROMPT = tiny.PROMPT


@pytest.fixture
def model() -> Iterator[Any]:
    model = tiny.build("mixtral")
    with sluice.offload(model, device_memory="25%"):
        yield model


def routers_of(model: Any, run: Any) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Per site, what each call of a stock model's experts was given: ids and weights."""
    calls: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    handles = []
    for site in tiny.sites_of(model).values():
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        calls.append(seen)

        def hook(_: Any, args: Any, kwargs: Any, seen: Any = seen) -> None:
            given = [*args, *kwargs.values()]
            seen.append((given[1].clone(), given[2].clone()))

        handles.append(site.register_forward_pre_hook(hook, with_kwargs=True))
    run(model)
    for handle in handles:
        handle.remove()
    return calls


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
def test_what_is_recorded_is_what_the_routers_chose(family: str) -> None:
    one = PROMPT[:1]
    expected = routers_of(tiny.build(family), lambda m: tiny.greedy(m, one))
    model = tiny.build(family)
    with sluice.offload(model, device_memory="25%") as session, session.record() as recorder:
        tiny.greedy(model, one)
        found = recorder.trace()
    assert found.weights is not None and found.num_tokens == 5 + 7
    assert found.num_layers == len(expected)
    for layer, calls in enumerate(expected):
        ids = torch.cat([i for i, _ in calls]).numpy()
        weights = torch.cat([w for _, w in calls]).float().numpy()
        order = np.argsort(-weights, axis=-1, kind="stable")
        assert (found.experts[:, layer] == np.take_along_axis(ids, order, -1)).all()
        ranked = np.take_along_axis(weights, order, -1)
        np.testing.assert_allclose(found.weights[:, layer], ranked, rtol=1e-4, atol=1e-6)


def test_all_three_ways_in_record_the_same_under_the_same_name(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny.save(tiny.build("mixtral"), tmp_path / "m")
    built = tiny.build("mixtral")
    sluice.offload(built, device_memory="25%")
    config = sluice.OffloadConfig(device_memory="50%")
    ways = [
        built,
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=config),
        sluice.from_pretrained(AutoModelForCausalLM, folder, offload={"device_memory": "25%"}),
        sluice.from_pretrained(
            AutoModelForCausalLM, folder, offload={"device_memory": "25%"}, dtype=torch.bfloat16
        ),
    ]
    found = []
    for model in ways:
        with trace.record(model, token_ids=True) as recorder:
            tiny.greedy(model)
            found.append(recorder.trace())
        model.sluice.close()
    assert {each.model for each in found} == {found[0].model}
    assert found[0].model.startswith("MixtralForCausalLM 3x8 ")
    for each in found[1:3]:
        assert (each.experts == found[0].experts).all()
        assert [s.content for s in each] == [s.content for s in found[0]]
    other = tiny.build("mixtral")
    with torch.no_grad():
        other.model.layers[2].mlp.gate.weight[0, 0] += 1
    with sluice.offload(other, device_memory="25%") as session:
        assert session.fingerprint != found[0].model


def test_a_request_is_a_row_its_prompt_then_what_it_wrote(model: Any) -> None:
    with model.sluice.record(token_ids=True, task="chat") as recorder:
        text = tiny.greedy(model)
        recorder.task = ["a", "b"]
        again = tiny.greedy(model)
        found = recorder.trace()
    assert torch.equal(text, again)
    assert found.token_ids is not None and found.steps is not None
    assert [(s.length, s.prompt_tokens, s.task) for s in found] == [
        (12, 5, "chat"),
        (12, 5, "chat"),
        (12, 5, "a"),
        (12, 5, "b"),
    ]
    for row, sequence in zip([*text, *text], found, strict=True):
        assert found.token_ids[sequence.rows].tolist() == row[:-1].tolist()
        steps = found.steps[sequence.rows]
        assert (steps[:5] == steps[0]).all() and (np.diff(steps[4:]) == 1).all()
    assert found.sequences[0].content == found.sequences[2].content
    assert found.own_text is True
    assert model.sluice.tap.task == ""


def test_padding_is_no_token(model: Any) -> None:
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.int64), PROMPT], dim=1)
    padded[0, 3:5] = 0
    mask = (padded != 0).long()
    with model.sluice.record(token_ids=True) as recorder:
        text = model.generate(padded, attention_mask=mask, max_new_tokens=4, do_sample=False)
        batch = recorder.trace()
    assert batch.token_ids is not None
    for row, (sequence, prompt) in enumerate(zip(batch, (3, 5), strict=True)):
        assert (sequence.prompt_tokens, sequence.length) == (prompt, prompt + 3)
        kept = text[row, 3:][mask[row, 3:].bool().tolist() + [True] * 4]
        assert batch.token_ids[sequence.rows].tolist() == kept[:-1].tolist()
    seen = torch.ones(8, 8, dtype=torch.bool).tril()[None, None] & mask[:, None, None].bool()
    for four in (seen, torch.zeros(seen.shape).masked_fill(~seen, -1e9)):
        with model.sluice.record(token_ids=True) as recorder, torch.no_grad():
            model(input_ids=padded, attention_mask=four)
            assert [s.length for s in recorder.trace()] == [3, 5]


def test_what_a_batch_runs_of_a_row_that_ended_is_left_out(model: Any) -> None:
    whole = tiny.greedy(model, max_new_tokens=12)
    end = int(whole[0, 7])  # the third token that the first row writes
    stop = whole[1].tolist().index(end) if end in whole[1].tolist() else None
    with model.sluice.record(token_ids=True) as recorder:
        tiny.greedy(model, max_new_tokens=12, eos_token_id=end)
        found = recorder.trace()
    assert found.token_ids is not None
    first, second = (found.token_ids[s.rows].tolist() for s in found)
    assert first == whole[0, :7].tolist()
    assert second == whole[1, : stop or -1].tolist()


def test_forwards_of_ones_own_are_requests_by_their_cache(model: Any) -> None:
    with torch.no_grad(), model.sluice.record(token_ids=True) as recorder:
        out = model(PROMPT[:1], use_cache=True)
        cache = next(v for k, v in out.items() if k in ("cache", "past_key_values"))
        name = "cache" if "cache" in out else "past_key_values"
        for token in (7, 8):
            model(input_ids=torch.tensor([[token]]), **{name: cache})
        model(PROMPT[:1], None, None, cache)  # a second turn, by position
        model.model(input_ids=PROMPT, use_cache=False)
        found = recorder.trace()
    assert found.token_ids is not None
    assert [(s.length, s.prompt_tokens) for s in found] == [(12, 5), (5, 5), (5, 5)]
    first = PROMPT[0].tolist()
    assert found.token_ids[:12].tolist() == [*first, 7, 8, *first]
    assert found.own_text is None
    assert "forwards_of_unknown_input" not in model.sluice.stats().degradations


def test_a_cache_that_was_reset_begins_anew(model: Any) -> None:
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), model.sluice.record() as recorder:
        for prompt in (PROMPT[:1], PROMPT[1:]):
            model(prompt, None, None, cache)
            cache.reset()
        assert [s.length for s in recorder.trace()] == [5, 5]


@pytest.mark.parametrize("fields", [{"prefill_chunk_size": 2}, {"use_cache": False}])
def test_other_ways_through_a_prompt(model: Any, fields: dict[str, Any]) -> None:
    with model.sluice.record(token_ids=True) as recorder:
        tiny.greedy(model, PROMPT[:1], max_new_tokens=3, **fields)
        found = recorder.trace()
    if "use_cache" in fields:  # each forward runs all of it again
        assert [s.length for s in found] == [5, 6, 7]
    else:
        assert [s.length for s in found] == [7]


def dropped(model: Any, recorder: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"no tokens recorded .*{reason}"):
        recorder.trace()
    assert model.sluice.stats().degradations[reason] > 0


def test_beams_are_refused_and_counted(model: Any) -> None:
    expected = tiny.greedy(model, num_beams=3)
    with model.sluice.record() as recorder:
        assert torch.equal(tiny.greedy(model, num_beams=3), expected)
        dropped(model, recorder, "untraceable_forwards")
        # From the first forward on, not only once their rows have moved.
        assert "requests_with_moved_rows" not in model.sluice.stats().degradations
        tiny.greedy(model, PROMPT[:1])
        assert [s.length for s in recorder.trace()] == [12]


@pytest.mark.parametrize(
    "touch",
    [
        lambda c: c.reorder_cache(torch.tensor([1, 0])),
        lambda c: c.batch_repeat_interleave(2),
        lambda c: c.batch_select_indices(torch.tensor([1])),
        lambda c: c.crop(-2),
    ],
    ids=["reorder", "repeat", "select", "crop"],
)
@pytest.mark.parametrize("goes_on", [True, False])
def test_a_cache_that_was_reworked_gives_its_requests_back(
    model: Any, touch: Any, goes_on: bool
) -> None:
    with torch.no_grad(), model.sluice.record() as recorder:
        out = model(PROMPT, use_cache=True)
        name = "cache" if "cache" in out else "past_key_values"
        cache = out[name]
        model(input_ids=torch.tensor([[7], [8]]), **{name: cache})
        assert recorder.trace().num_tokens == 12
        touch(cache)
        if goes_on:
            rows = cache.layers[0].keys.shape[0]
            model(input_ids=torch.full((rows, 1), 9), **{name: cache})
        dropped(model, recorder, "requests_with_moved_rows")


def test_a_cache_that_keeps_its_tensors_is_told_by_its_length() -> None:
    class InPlace:
        layers = ()
        length = 5

        def get_seq_length(self) -> int:
            return self.length

    cache, known = InPlace(), Known(np.arange(1), ("",), length=5)
    assert known.untouched(cache) and not is_empty(cache, known)
    cache.length = 3
    assert not known.untouched(cache)
    cache.length = 0
    assert is_empty(cache, known)
    known.tells_length = False  # a cache of states, without a length
    assert known.untouched(cache) and not is_empty(cache, known)


def test_a_past_that_nobody_saw_is_no_beginning(model: Any) -> None:
    with torch.no_grad():
        out = model(PROMPT, use_cache=True)
        name = "cache" if "cache" in out else "past_key_values"
        with model.sluice.record() as recorder:
            model(input_ids=torch.tensor([[7], [8]]), **{name: out[name]})
            dropped(model, recorder, "untraceable_forwards")


def test_several_texts_in_one_row_are_no_request(model: Any) -> None:
    with torch.no_grad(), model.sluice.record() as recorder:
        model(input_ids=PROMPT[:1], cu_seq_lens_q=torch.tensor([0, 2, 5]))
        dropped(model, recorder, "untraceable_forwards")


def test_assisted_decoding_is_recorded_only_where_nothing_was_taken_back(model: Any) -> None:
    text = tiny.greedy(model, PROMPT[:1], max_new_tokens=16)
    looping = torch.cat([text, text], dim=1)
    with model.sluice.record(token_ids=True) as recorder:
        out = tiny.greedy(model, looping, max_new_tokens=16, prompt_lookup_num_tokens=3)
        try:
            found = recorder.trace()
        except ConfigError:
            assert model.sluice.stats().degradations["requests_with_moved_rows"] == 1
        else:
            assert found.token_ids is not None
            assert found.token_ids.tolist() == out[0, : found.num_tokens].tolist()


def test_the_heaviest_comes_first_and_what_is_no_expert_last(model: Any) -> None:
    def shuffle(_: Any, args: Any) -> Any:
        hidden, ids, weights = args
        ids, weights = ids.flip(1).clone(), weights.flip(1)  # as a router that does not sort
        ids[0, 1] = 8  # of eight: no expert, however heavy
        return hidden, ids, weights

    site = tiny.sites_of(model)["model.layers.1.mlp.experts"]
    handle = site.register_forward_pre_hook(shuffle)
    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    seen = site.register_forward_pre_hook(lambda _, args: given.append(args[1:]))
    with torch.no_grad(), model.sluice.record() as recorder:
        model(PROMPT[:1])
    handle.remove()
    seen.remove()
    found = recorder.trace()
    ids, weights = (tensor.numpy() for tensor in given[0])
    assert found.weights is not None
    assert (found.experts[1:, 1] == ids[1:, ::-1]).all()
    np.testing.assert_allclose(found.weights[1:, 1], weights[1:, ::-1], rtol=1e-6)
    assert found.experts[0, 1].tolist() == [ids[0, 0], -1]
    np.testing.assert_allclose(found.weights[0, 1], [weights[0, 0], 0.0], rtol=1e-6)


def test_ids_and_states_are_kept_when_asked_for(model: Any) -> None:
    entered: list[torch.Tensor] = []
    site = tiny.sites_of(model)["model.layers.1.mlp.experts"]
    handle = site.register_forward_pre_hook(lambda _, args: entered.append(args[0].clone()))
    with model.sluice.record() as plain, model.sluice.record(hidden=True, token_ids=True) as full:
        tiny.greedy(model, PROMPT[:1])
    handle.remove()
    assert plain.trace().token_ids is None and plain.trace().hidden is None
    states = full.trace().hidden
    assert states is not None and states.shape == (12, 3, 32) and states.dtype == np.float16
    np.testing.assert_array_equal(states[:, 1], torch.cat(entered).half().numpy())
    by_experts, by_ids = plain.trace().sequences[0].content, full.trace().sequences[0].content
    assert by_experts == trace.content_hash(None, plain.trace().experts) != by_ids


def test_embeddings_have_no_ids_and_no_half_of_a_text_is_named(model: Any) -> None:
    embeds = model.get_input_embeddings()(PROMPT[:1])
    with model.sluice.record(token_ids=True) as recorder:
        model.generate(inputs_embeds=embeds, max_new_tokens=3, do_sample=False)
        found = recorder.trace()
    assert found.token_ids is None and [s.length for s in found] == [7]


def test_recording_stops_at_its_cap_and_the_text_goes_on(model: Any, tmp_path: Path) -> None:
    expected = tiny.greedy(model, PROMPT[:1])
    cap = 256 + 7 * (21 + 3 * 2 * 6)
    path = tmp_path / "short"
    with model.sluice.record(path, token_ids=True, max_bytes=cap) as recorder:
        assert torch.equal(tiny.greedy(model, PROMPT[:1]), expected)
        tiny.greedy(model, PROMPT[1:])
        # Five of the first text and all eight of the second.
        assert model.sluice.stats().degradations["trace_truncated"] == 5 + 8
    found = recorder.trace()
    assert recorder.bytes_kept == cap
    assert trace.load(tmp_path / "short.trace.safetensors").num_tokens == 7
    assert found.token_ids is not None
    assert found.token_ids.tolist() == expected[0, :7].tolist()


def test_a_file_is_saved_when_the_block_ends(model: Any, tmp_path: Path) -> None:
    with model.sluice.record(tmp_path / "x", task="t", max_bytes="1MiB"):
        tiny.greedy(model)
    file = tmp_path / "x.trace.safetensors"
    found = trace.load(file)
    assert found.tasks == ("t",) and found.model == model.sluice.fingerprint
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with (
        pytest.raises(ConfigError, match="got no tokens recorded \\(no forward ran\\)"),
        model.sluice.record(tmp_path / "y"),
    ):
        pass
    with pytest.raises(KeyError, match="the user's"), model.sluice.record(tmp_path / "y"):
        raise KeyError("the user's")
    assert not (tmp_path / "y.trace.safetensors").exists()


def test_a_forward_that_fails_takes_its_request_with_it(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = model.sluice
    with session.record(token_ids=True) as recorder:
        tiny.greedy(model, PROMPT[:1])
        calls = []

        def failing(layer: int, *tensors: Any) -> Any:
            calls.append(layer)
            if len(calls) == 8:  # the third forward's second layer
                raise OSError("a read failed")
            return type(session)._forward(session, layer, *tensors)

        with monkeypatch.context() as patch:
            patch.setattr(session, "_forward", failing)
            with pytest.raises(OSError, match="a read failed"):
                tiny.greedy(model, PROMPT[1:])
        tiny.greedy(model, PROMPT[1:])
        found = recorder.trace()
    assert [s.length for s in found] == [12, 12]
    assert session.stats().degradations["incomplete_forwards"] == 1


def drop_a_row(site: torch.nn.Module) -> list[Any]:
    """Has a layer run all rows but the last, as a block that leaves some out would."""

    def shorter(_: Any, args: Any) -> Any:
        return tuple(tensor[:-1] for tensor in args)

    def longer(_: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.cat([output, output[-1:]])

    return [site.register_forward_pre_hook(shorter), site.register_forward_hook(longer)]


def skip_a_layer(site: torch.nn.Module) -> list[Any]:
    forward = site.forward
    site.forward = lambda hidden, *_: hidden  # type: ignore[method-assign]

    class Restore:
        def remove(self) -> None:
            site.forward = forward  # type: ignore[method-assign]

    return [Restore()]


@pytest.mark.parametrize("change", [drop_a_row, skip_a_layer])
def test_a_forward_that_leaves_something_out_is_not_recorded(model: Any, change: Any) -> None:
    handles = change(tiny.sites_of(model)["model.layers.1.mlp.experts"])
    with torch.no_grad(), model.sluice.record() as recorder:
        model(PROMPT)
        dropped(model, recorder, "incomplete_forwards")
    for handle in handles:
        handle.remove()


def test_a_forward_that_fails_behind_its_layers_is_not_recorded(model: Any) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("behind the layers")

    handle = model.lm_head.register_forward_pre_hook(fail)
    with torch.no_grad(), model.sluice.record() as recorder:
        with pytest.raises(ValueError, match="behind the layers"):
            model(PROMPT)
        dropped(model, recorder, "incomplete_forwards")
    handle.remove()


def test_an_interrupted_forward_does_not_swallow_the_next(model: Any) -> None:
    site = tiny.sites_of(model)["model.layers.1.mlp.experts"]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt  # which torch's hooks do not see

    with model.sluice.record() as recorder:
        handle = site.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            tiny.greedy(model, PROMPT[:1])
        handle.remove()
        tiny.greedy(model, PROMPT[:1])
        assert [s.length for s in recorder.trace()] == [12]
    assert model.sluice.stats().degradations["incomplete_forwards"] == 1


def test_recording_changes_nothing_and_leaves_nothing(model: Any) -> None:
    def hooks() -> int:
        parts = model.modules()
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in parts)

    expected = tiny.greedy(model)
    before = hooks()
    cache = DynamicCache(config=model.config)
    alive = weakref.ref(cache)
    fields = set(vars(cache))
    with model.sluice.record() as outer, model.sluice.record() as inner:
        assert torch.equal(tiny.greedy(model), expected)
        with torch.no_grad():
            model(PROMPT, None, None, cache)
        assert set(vars(cache)) == fields
        del cache
        gc.collect()
        assert alive() is None  # a recorder keeps nobody's memory
    assert hooks() == before and model.sluice.routed is None
    assert (outer.trace().experts == inner.trace().experts).all()
    with outer._session.record():
        sluice.restore(model)
    assert hooks() == before and torch.equal(tiny.greedy(model), expected)


def test_who_cannot_be_recorded_is_told_so(small: SmallStore, model: Any) -> None:
    with (
        small.session(small.memory_store()) as session,
        pytest.raises(ConfigError, match="a session without a model"),
    ):
        session.record()
    with pytest.raises(ConfigError, match="MixtralForCausalLM, which is not offloaded"):
        trace.record(tiny.build("mixtral"))
    with pytest.raises(ConfigError, match="max_bytes: got '50%'"):
        model.sluice.record(max_bytes="50%")


class Watching:
    """A predictor that only remembers."""

    name = "watching"
    needs_hidden = True

    def __init__(self) -> None:
        self.begun: list[tuple[int, list[int], list[int] | None, tuple[str, ...]]] = []
        self.events: list[RoutingEvent] = []

    def begin_step(self, step: int, requests: Any, token_ids: Any, tasks: Any) -> None:
        self.begun.append((step, requests.tolist(), token_ids.tolist(), tuple(tasks)))

    def observe(self, event: RoutingEvent) -> None:
        self.events.append(event)

    def plan(self, horizon: int) -> list[Any]:
        return []

    def forecast(self) -> None:
        return None


def test_a_predictor_sees_what_the_recorder_records(model: Any) -> None:
    watching = Watching()
    with model.sluice.record(token_ids=True, hidden=True, task="t") as recorder:
        following = model.sluice.predict(watching)
        tiny.greedy(model, PROMPT[:1])
        tiny.greedy(model, PROMPT[:1])  # what has ended is shown when the next step begins
        following.close()
        found = recorder.trace()
    assert watching.begun[0] == (0, [0] * 5, PROMPT[0].tolist(), ("t",) * 5)
    first = watching.events[:24]
    assert [event.decode for event in first] == [False] * 3 + [True] * 21
    assert [len(event.experts) for event in first] == [5] * 3 + [1] * 21
    assert [event.layer for event in first] == [0, 1, 2] * 8
    shown = found.sequences[0].length
    assert found.hidden is not None
    for layer in range(3):
        events = [event for event in watching.events if event.layer == layer]
        routes = np.concatenate([event.experts for event in events])[:shown]
        weights = np.concatenate([event.weights for event in events])[:shown]
        order = np.argsort(-weights, axis=-1, kind="stable")
        assert (np.take_along_axis(routes, order, -1) == found.experts[:shown, layer]).all()
        states = np.concatenate([event.hidden for event in events])[:shown]
        np.testing.assert_array_equal(states.astype(np.float16), found.hidden[:shown, layer])
