"""The figures show what the recording holds; the recorder changes nothing."""

import io
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

import sluice
from sluice.hf.auto import load_causal_lm, load_tokenizer
from sluice.plot import (
    Recorder,
    Recording,
    Step,
    bytes_by_reason,
    generation_figure,
    hits_over_tokens,
    residency_map,
    timeline_figure,
)
from sluice.reference import reference_model, reference_prompts

MIB = 1 << 20


def step(
    hits: int,
    misses: int,
    resident: set[tuple[int, int]],
    *,
    label: str = "",
    prefill: bool = False,
) -> Step:
    reasons = {"demand": misses * MIB, "hint used": 0, "hint wasted": 0, "hint pending": 0}
    return Step(0.0, label, prefill, hits, 0, misses, reasons, 0.0, MIB, frozenset(resident))


@pytest.fixture
def recording() -> Recording:
    steps = (
        step(0, 4, {(0, 0), (1, 2)}, label="intent", prefill=True),
        step(1, 1, {(0, 0), (1, 1)}, label="intent"),
        step(2, 0, {(0, 0), (1, 1)}, label="math", prefill=True),
        step(0, 2, {(0, 1), (1, 1)}, label="math"),
    )
    return Recording((2, 3), 2 * MIB, steps)


def png_of(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def test_the_map_shows_the_share_of_tokens_that_an_expert_was_in_a_slot(
    recording: Recording,
) -> None:
    image = residency_map(recording).axes[0].images[0].get_array()
    assert image.shape == (2, 3)
    assert image[0].tolist()[:2] == [0.75, 0.25]
    assert image.mask[0, 2], "layer 0 has two experts: the third square stays empty"
    assert image[1].tolist() == [0.0, 0.75, 0.25]


def test_decoded_tokens_are_bars_and_prompts_are_lines(recording: Recording) -> None:
    axes = hits_over_tokens(recording).axes[0]
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}
    assert heights == {"hits": [1, 0], "misses": [1, 2]}
    labels = [text.get_text() for text in axes.texts]
    assert labels == ["intent", "math"]


def test_bytes_are_summed_over_tokens_and_named_with_their_total(recording: Recording) -> None:
    legend = bytes_by_reason(recording).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["demand: 7.0 MiB"]


def test_every_axis_of_the_page_has_a_label_with_its_unit(recording: Recording) -> None:
    figure = generation_figure(recording)
    labels = [axes.get_xlabel() + axes.get_ylabel() for axes in figure.axes]
    assert all(labels), labels
    assert len(png_of(figure)) > 10_000


def test_reads_at_the_same_time_are_drawn_in_rows_of_their_own() -> None:
    spans = [
        ("load_demand", 0.0, 2.0, 0, 1, MIB, 0),
        ("load_demand", 1.0, 3.0, 0, 2, MIB, 0),
        ("load_demand", 2.0, 3.0, 0, 3, MIB, 0),
        ("forward", 0.0, 4.0, 0, -1, 0, 1),
    ]
    axes = timeline_figure(spans).axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == [
        "layer's forward",
        "read on demand",
    ]
    loads = axes.collections[1:]
    assert [len(rows.get_paths()) for rows in loads] == [2, 1]


def test_a_timeline_without_a_forward_is_an_empty_figure() -> None:
    assert len(png_of(timeline_figure([]))) > 1000


@pytest.fixture(scope="module")
def model() -> object:
    options = sluice.OffloadOptions(device_memory="25%")
    model = load_causal_lm(reference_model(), dtype=torch.float32, offload=options)
    yield model
    model.sluice.close()


def test_the_recorder_sees_every_token_and_changes_none(model: object, tmp_path: Path) -> None:
    prompt = next(p for p in reference_prompts() if p.task == "choice_qa")
    inputs = load_tokenizer(reference_model())(
        prompt.text, return_tensors="pt", add_special_tokens=False
    )
    plain = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    before = model.sluice.stats()
    recorder = Recorder(model.sluice, label="choice_qa")
    watched = model.generate(**inputs, max_new_tokens=6, do_sample=False, streamer=recorder)
    spent = model.sluice.stats() - before
    assert torch.equal(plain, watched)
    seen = recorder.recording()
    assert seen.experts == (32,) * 8
    assert len(seen.steps) == watched.shape[1] - inputs["input_ids"].shape[1]
    assert [step.prefill for step in seen.steps[:2]] == [True, False]
    assert sum(step.hits for step in seen.steps) == spent.hits
    assert sum(step.misses for step in seen.steps) == spent.misses
    assert sum(step.bytes_read["demand"] for step in seen.steps) == spent.bytes_read_demand
    slots = sum(len(slots) for slots in model.sluice.residency())
    assert all(len(step.resident) <= slots for step in seen.steps)
    assert all(step.resident_bytes <= seen.budget_bytes for step in seen.steps)


def test_figures_are_drawn_from_a_live_session(model: object) -> None:
    image = residency_map(model.sluice).axes[0].images[0].get_array()
    held = {tuple(at) for at in zip(*image.nonzero(), strict=True)}
    slots = {
        (layer, expert)
        for size_class in model.sluice.residency()
        for state, layer, expert, _ in size_class
        if state == "ready"
    }
    assert held == slots and held
    widths = [bar.get_width() for bar in bytes_by_reason(model.sluice).axes[0].patches]
    assert sum(widths) * MIB == pytest.approx(model.sluice.stats().bytes_read)
    lanes = [tick.get_text() for tick in timeline_figure(model.sluice).axes[0].get_yticklabels()]
    assert "layer's forward" in lanes and "expert computed" in lanes
