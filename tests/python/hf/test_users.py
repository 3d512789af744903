"""What people do with models, on an offloaded one, beside a stock one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    TextStreamer,
    pipeline,
)

import sluice

from . import tiny


@pytest.fixture(scope="module")
def stock() -> Any:
    return tiny.build("mixtral")


@pytest.fixture
def model(saved: Callable[..., Path]) -> Any:
    model = tiny.load(saved("mixtral"))
    session = model.sluice
    yield model
    session.close()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{i}": i for i in range(4, 128)}}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
    )


def test_a_pipeline_takes_it(stock: Any, model: Any, tokenizer: Any) -> None:
    texts = []
    for candidate in (stock, model):
        pipe = pipeline("text-generation", model=candidate, tokenizer=tokenizer)
        fields = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
        texts.append(pipe("w5 w9 w77", generation_config=fields))
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"use_cache": False},
        {"repetition_penalty": 1.3},
        {"prefill_chunk_size": 2},
    ],
    ids=["beams", "beams-returned", "no-cache", "penalty", "chunked-prefill"],
)
def test_every_way_of_decoding_agrees(stock: Any, model: Any, fields: Any) -> None:
    assert torch.equal(tiny.greedy(stock, **fields), tiny.greedy(model, **fields))


def test_sampling_with_a_seed_agrees(stock: Any, model: Any) -> None:
    outputs = []
    for candidate in (stock, model):
        torch.manual_seed(7)
        outputs.append(tiny.greedy(candidate, do_sample=True, top_k=20, temperature=0.8))
    assert torch.equal(outputs[0], outputs[1])


def test_left_padding_agrees(stock: Any, model: Any) -> None:
    ids = torch.tensor([[0, 0, 1, 5, 9], [1, 33, 4, 100, 6]])
    mask = (ids != 0).long()
    outputs = [
        candidate.generate(
            ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0
        )
        for candidate in (stock, model)
    ]
    assert torch.equal(outputs[0], outputs[1])


def test_assisted_decoding_agrees(stock: Any, model: Any) -> None:
    draft = tiny.build("mixtral", num_hidden_layers=1)
    row = tiny.PROMPT[:1]
    expected = tiny.greedy(stock, row)
    assert torch.equal(tiny.greedy(model, row, assistant_model=draft), expected)
    assert torch.equal(tiny.greedy(model, row, prompt_lookup_num_tokens=2), expected)


def test_an_offloaded_draft_agrees(stock: Any) -> None:
    draft = tiny.build("mixtral", num_hidden_layers=1)
    row = tiny.PROMPT[:1]
    expected = tiny.greedy(stock, row)
    with sluice.offload(draft, device_memory="25%"):
        assert torch.equal(tiny.greedy(stock, row, assistant_model=draft), expected)


def test_a_streamer_streams(model: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    tiny.greedy(model, tiny.PROMPT[:1], streamer=streamer)
    assert len(capsys.readouterr().out.split()) > 0


def test_calls_agree_in_and_out_of_no_grad_and_inference_mode(stock: Any, model: Any) -> None:
    plain = model(tiny.PROMPT, labels=tiny.PROMPT)
    with torch.no_grad():
        quiet = model(tiny.PROMPT, labels=tiny.PROMPT)
    with torch.inference_mode():
        inference = model(tiny.PROMPT)
    assert torch.equal(plain.logits, quiet.logits)
    assert torch.equal(plain.logits, inference.logits)
    with torch.no_grad():
        torch.testing.assert_close(quiet.logits, stock(tiny.PROMPT).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(sluice.UnsupportedModelError, match="no gradient"):
        plain.loss.backward()


def test_router_logits_are_still_recorded(stock: Any, model: Any) -> None:
    with torch.no_grad():
        ours = model(tiny.PROMPT, output_router_logits=True).router_logits
        theirs = stock(tiny.PROMPT, output_router_logits=True).router_logits
    assert len(ours) == len(theirs) == 3
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_autocast_gives_the_types_of_the_stock_model(stock: Any, model: Any) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = model(tiny.PROMPT).logits, stock(tiny.PROMPT).logits
    assert ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max() < 0.1 * theirs.abs().max()


def test_the_footprint_counts_what_is_resident(stock: Any, model: Any) -> None:
    dense = sum(p.numel() * p.element_size() for p in model.parameters())
    tiny.greedy(model)
    stats = model.sluice.stats()
    buffers = model.get_memory_footprint() - model.get_memory_footprint(return_buffers=False)
    assert model.get_memory_footprint() == dense + buffers + stats.resident_bytes
    assert stats.resident_bytes > 0
    assert model.num_parameters() == stock.num_parameters()
    total = stock.get_memory_footprint()
    sluice.restore(model)
    assert model.get_memory_footprint() == total


def test_configs_copy_and_go_through_json(model: Any, tmp_path: Path) -> None:
    twin = copy.deepcopy(model.config)
    assert twin.to_dict() == model.config.to_dict()
    assert copy.deepcopy(model.generation_config).max_length == model.generation_config.max_length
    model.config.to_json_file(tmp_path / "config.json")
    assert "sluice" not in json.loads((tmp_path / "config.json").read_text())


def test_two_models_have_two_sessions(saved: Callable[..., Path], stock: Any) -> None:
    first, second = tiny.load(saved("mixtral")), tiny.load(saved("mixtral"), device_memory="5%")
    expected = tiny.greedy(stock)
    assert torch.equal(tiny.greedy(first), expected)
    assert torch.equal(tiny.greedy(second), expected)
    first.sluice.close()
    assert torch.equal(tiny.greedy(second), expected)


def test_threads_may_share_a_model(model: Any, stock: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    expected = tiny.greedy(stock)
    with ThreadPoolExecutor(4) as pool:
        for tokens in pool.map(lambda _: tiny.greedy(model), range(8)):
            assert torch.equal(tokens, expected)


def test_multi_token_prediction_is_refused_by_name(model: Any) -> None:
    ids = torch.tensor([[1, 5, 9]])
    with pytest.raises(sluice.UnsupportedModelError, match="use_mtp"):
        model.generate(ids, use_mtp=True)
    with pytest.raises(sluice.UnsupportedModelError, match="use_mtp"):
        model.generate(ids, generation_config=GenerationConfig(use_mtp=True, max_new_tokens=1))
    model.generation_config.use_mtp = True
    with pytest.raises(sluice.UnsupportedModelError, match="use_mtp"):
        model.generate(ids, generation_config=GenerationConfig(max_new_tokens=1))
    model.generation_config.use_mtp = None


def test_an_automatic_device_map_is_told_of_the_slots(saved: Callable[..., Path]) -> None:
    from sluice.hf.quantizer import OffloadConfig, OffloadHfQuantizer

    seen: list[tuple[float, float]] = []
    adjust = OffloadHfQuantizer.adjust_max_memory

    def watch(self: Any, max_memory: dict[str, Any]) -> dict[str, Any]:
        left = adjust(self, max_memory)
        seen.append((max_memory["cpu"], left["cpu"]))
        return left

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OffloadHfQuantizer, "adjust_max_memory", watch)
        model = AutoModelForCausalLM.from_pretrained(
            saved("mixtral"),
            quantization_config=OffloadConfig(device_memory="50%"),
            device_map="auto",
        )
    assert seen
    for before, after in seen:
        assert before - after == pytest.approx(model.sluice.budget_bytes, abs=64)
    model.sluice.close()


@pytest.mark.emulated
def test_deleting_the_model_returns_its_slots(saved: Callable[..., Path]) -> None:
    import gc

    model = tiny.load(saved("mixtral"))
    session = model.sluice
    tiny.greedy(model)
    del model
    gc.collect()
    assert session.closed


def test_auto_classes_are_the_front_door(saved: Callable[..., Path]) -> None:
    config = sluice.OffloadConfig(device_memory="25%")
    model = AutoModelForCausalLM.from_pretrained(saved("qwen2_moe"), quantization_config=config)
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    assert "offloaded" in repr(model)
