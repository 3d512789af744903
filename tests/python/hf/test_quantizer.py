"""Path Q: from files to a model that generates, without transformers reading an expert."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

import sluice
from sluice.errors import CapacityError, CheckpointError, ConfigError, UnsupportedModelError
from sluice.pack import make_pack, verify

from . import tiny


def stock(folder: Path, family: str, **kwargs: Any) -> Any:
    if family == "gpt_oss":
        kwargs["attn_implementation"] = "eager"
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs).eval()


@pytest.mark.parametrize("per_expert", [True, False])
@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_generates_what_the_stock_model_generates(
    saved: Callable[..., Path], family: str, per_expert: bool
) -> None:
    folder = saved(family, per_expert=per_expert)
    plain, model = stock(folder, family), tiny.load(folder, family)
    assert torch.equal(tiny.greedy(plain), tiny.greedy(model))
    with torch.no_grad():
        expected, got = plain(tiny.PROMPT).logits, model(tiny.PROMPT).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    stats = model.sluice.stats()
    assert stats.peak_resident_bytes <= stats.budget_bytes
    assert stats.requests == stats.hits + stats.late + stats.misses > 0


def test_the_reference_model_says_the_same() -> None:
    from sluice.reference import reference_model

    folder = reference_model()
    ids = torch.tensor([[1, 17, 250, 999, 12, 2]])
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = tiny.load(folder, device_memory="12.5%", dtype=torch.float32)
    assert torch.equal(tiny.greedy(plain, ids), tiny.greedy(model, ids))


def test_no_expert_byte_is_read_through_safetensors(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.core_model_loading as loading

    read: list[Any] = []
    original = loading._materialize_copy
    monkeypatch.setattr(
        loading,
        "_materialize_copy",
        lambda tensor, *args, **kwargs: read.append(tensor) or original(tensor, *args, **kwargs),
    )
    for per_expert in (True, False):
        read.clear()
        tiny.load(saved("mixtral", per_expert=per_expert))
        shapes = [tuple(tensor.get_shape()) for tensor in read]
        assert shapes, "the dense part goes through transformers"
        assert not [s for s in shapes if len(s) == 3 or 48 in s]  # 48: the experts' width


def test_loading_reports_no_key_and_leaves_shared_experts_alone(
    saved: Callable[..., Path],
) -> None:
    for per_expert in (True, False):
        _, info = AutoModelForCausalLM.from_pretrained(
            saved("qwen2_moe", per_expert=per_expert),
            quantization_config=sluice.OffloadConfig(device_memory="25%"),
            output_loading_info=True,
        )
        assert not info["unexpected_keys"]
        assert not info["missing_keys"]


def test_a_missing_dense_key_is_still_reported(saved: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = tmp_path / "copy"
    folder.mkdir()
    shutil.copy(saved("mixtral") / "config.json", folder)
    tensors: dict[str, Any] = {}
    for file in saved("mixtral").glob("*.safetensors"):
        tensors |= load_file(file)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.stray"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _, info = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=sluice.OffloadConfig(device_memory="25%"),
        output_loading_info=True,
    )
    assert info["missing_keys"] == {"model.norm.weight"}
    assert info["unexpected_keys"] == {"model.layers.0.mlp.stray"}


def test_the_base_model_loads_from_the_same_files(saved: Callable[..., Path]) -> None:
    config = sluice.OffloadConfig(device_memory="25%")
    model, info = AutoModel.from_pretrained(
        saved("mixtral"), quantization_config=config, output_loading_info=True
    )
    assert info["unexpected_keys"] <= {"lm_head.weight"}
    plain = AutoModel.from_pretrained(saved("mixtral")).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            model(tiny.PROMPT).last_hidden_state, plain(tiny.PROMPT).last_hidden_state
        )


def test_the_loaded_model_is_an_ordinary_one(saved: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny.load(saved("mixtral"))
    assert not hasattr(model, "hf_quantizer")
    assert not model.is_quantized
    assert "quantization_config" not in model.config.to_dict()
    assert not hasattr(model.config, "_is_quantized")
    assert model._weight_conversions, "save_pretrained needs them after restore"
    model.config.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "sluice" not in text
    assert "quant" not in text


def test_decode_is_never_compiled_and_the_lock_is_not_saved(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny.load(saved("mixtral"))
    assert model.generation_config.disable_compile is True
    sluice.restore(model)
    assert model.generation_config.disable_compile is None
    model.save_pretrained(tmp_path)
    assert "disable_compile" not in (tmp_path / "generation_config.json").read_text()


def test_a_wider_dtype_changes_activations_only(saved: Callable[..., Path]) -> None:
    folder = saved("mixtral", dtype=torch.bfloat16)
    plain = stock(folder, "mixtral", dtype=torch.float32)
    model = tiny.load(folder, dtype=torch.float32)
    assert model.sluice.store.layer(0)["dtype"] == "BF16"
    assert torch.equal(tiny.greedy(plain), tiny.greedy(model))


def test_a_narrower_dtype_is_ingested_once_and_reused(
    saved: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="sluice")
    folder = saved("mixtral")
    plain = stock(folder, "mixtral", dtype=torch.bfloat16)
    model = tiny.load(folder, dtype=torch.bfloat16, offload_dir=str(tmp_path))
    (pack,) = tmp_path.glob("*.sluice.safetensors")
    assert len([r for r in caplog.records if "converting experts once" in r.message]) == 1
    with torch.no_grad():
        expected, got = plain(tiny.PROMPT).logits, model(tiny.PROMPT).logits
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()
    made = pack.stat()
    tiny.load(folder, dtype=torch.bfloat16, offload_dir=str(tmp_path))
    assert len([r for r in caplog.records if "converting experts once" in r.message]) == 1
    assert pack.stat().st_mtime_ns == made.st_mtime_ns
    sluice.restore(model)
    key = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(model.state_dict()[key], plain.state_dict()[key])


def test_a_pack_beside_the_checkpoint_is_taken_and_gives_the_same_bits(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved("gpt_oss"), tmp_path / "copy"))
    before = tiny.load(folder, "gpt_oss")
    pack = make_pack(folder)
    verify(pack)
    after = tiny.load(folder, "gpt_oss")
    assert "shards" in before.sluice.store.description
    assert pack.name in after.sluice.store.description
    named = tiny.load(folder, "gpt_oss", pack=str(pack))
    left_aside = tiny.load(folder, "gpt_oss", pack="none")
    assert "shards" in left_aside.sluice.store.description
    with torch.no_grad():
        outputs = [m(tiny.PROMPT).logits for m in (before, after, named, left_aside)]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_a_pack_of_another_fine_tune_is_refused(saved: Callable[..., Path], tmp_path: Path) -> None:
    tuned = tiny.build("mixtral")
    with torch.no_grad():
        tuned.model.layers[0].mlp.experts.down_proj.add_(0.01)
    other = tiny.save(tuned, tmp_path / "tuned")
    pack = make_pack(other, tmp_path / "tuned.sluice.safetensors")
    with pytest.raises(CheckpointError, match=r"pack of another checkpoint.*sluice pack"):
        tiny.load(saved("mixtral"), pack=str(pack))
    folder = Path(shutil.copytree(saved("mixtral"), tmp_path / "copy"))
    shutil.copy(pack, folder)
    assert "shards" in tiny.load(folder).sluice.store.description


def test_packing_again_gives_the_same_bytes_and_reports(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    first = make_pack(saved("mixtral"), tmp_path / "a", progress=lambda *x: seen.append(x))
    second = make_pack(saved("mixtral", per_expert=True), tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    assert seen == [(i + 1, 24) for i in range(24)]


def test_a_flipped_bit_in_a_pack_is_found(saved: Callable[..., Path], tmp_path: Path) -> None:
    pack = make_pack(saved("mixtral"), tmp_path / "x.sluice.safetensors")
    data = bytearray(pack.read_bytes())
    data[len(data) // 2] ^= 1
    pack.write_bytes(data)
    with pytest.raises(CheckpointError):
        verify(pack)


def test_without_a_budget_the_error_has_a_table_for_this_model(
    saved: Callable[..., Path],
) -> None:
    with pytest.raises(ConfigError) as error:
        AutoModelForCausalLM.from_pretrained(
            saved("mixtral"), quantization_config=sluice.OffloadConfig()
        )
    for part in ("device_memory", "MixtralForCausalLM", "25%", "least", "slots"):
        assert part in str(error.value)


def test_a_budget_below_one_slot_names_those_that_work(saved: Callable[..., Path]) -> None:
    with pytest.raises(CapacityError, match=r"\d+"):
        tiny.load(saved("mixtral"), device_memory=100)


def test_a_missing_expert_fails_the_load_by_name(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved("mixtral"), tmp_path / "copy"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    key = "model.layers.2.block_sparse_moe.experts.7.w3.weight"
    shard = folder / index["weight_map"][key]
    kept = {k: v for k, v in load_file(shard).items() if k != key}
    from safetensors.torch import save_file

    save_file(kept, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.experts: expert 7"):
        tiny.load(folder)


def test_pickled_checkpoints_are_refused_with_advice(tmp_path: Path) -> None:
    model = tiny.build("mixtral")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no safetensors file.*save_pretrained"):
        tiny.load(tmp_path)


def test_quantised_checkpoints_are_refused_by_name(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved("gpt_oss"), tmp_path / "copy"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match="quantised with mxfp4"):
        sluice.from_pretrained(AutoModelForCausalLM, folder, offload={"device_memory": "25%"})


def test_from_pretrained_takes_every_form_of_settings(saved: Callable[..., Path]) -> None:
    for offload in (
        {"device_memory": "25%"},
        sluice.OffloadOptions(device_memory="25%"),
        sluice.OffloadConfig(device_memory="25%"),
    ):
        model = sluice.from_pretrained(AutoModelForCausalLM, saved("mixtral"), offload=offload)
        assert model.sluice.budget_bytes == model.sluice.store.total_slot_bytes // 4
    with pytest.raises(ConfigError, match="device_memory"):
        sluice.from_pretrained(AutoModelForCausalLM, saved("mixtral"))


@pytest.mark.parametrize("device_map", ["cuda", "cuda:0", {"": 0}, {"model": "cpu", "lm_head": 0}])
def test_accelerators_are_refused_before_anything_is_loaded(
    saved: Callable[..., Path], device_map: Any
) -> None:
    from sluice.hf.devices import check_device_map

    with pytest.raises(UnsupportedModelError, match="device_map='cpu'"):
        check_device_map(device_map)


@pytest.mark.parametrize("device_map", [None, "cpu", "auto", {"": "cpu"}])
def test_device_maps_of_the_cpu_work(saved: Callable[..., Path], device_map: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        saved("mixtral"),
        device_map=device_map,
        quantization_config=sluice.OffloadConfig(device_memory="25%"),
    )
    assert tiny.greedy(model).shape[0] == 2


def test_excluded_layers_stay_and_run_their_own_body(saved: Callable[..., Path]) -> None:
    folder = saved("mixtral")
    model = tiny.load(folder, exclude=[r"layers\.1\."])
    assert type(model.model.layers[1].mlp.experts).__name__ == "MixtralExperts"
    assert model.sluice.store.num_layers == 2
    assert torch.equal(tiny.greedy(stock(folder, "mixtral")), tiny.greedy(model))


@pytest.mark.emulated
def test_restore_rebuilds_the_stock_model(saved: Callable[..., Path]) -> None:
    folder = saved("gpt_oss")
    plain, model = stock(folder, "gpt_oss"), tiny.load(folder, "gpt_oss")
    implementation = plain.config._experts_implementation
    tiny.greedy(model)
    sluice.restore(model)
    assert not hasattr(model, "sluice")
    assert model.config._experts_implementation == implementation
    state = model.state_dict()
    assert state.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items())
    assert torch.equal(tiny.greedy(plain), tiny.greedy(model))
    with pytest.raises(ConfigError, match="does not offload"):
        sluice.restore(model)


def test_saving_is_refused_before_a_file_is_written(
    saved: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny.load(saved("mixtral"))
    with pytest.raises(UnsupportedModelError, match=r"without experts; sluice\.restore"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UnsupportedModelError, match="without experts"):
        model.state_dict()


def test_loading_experts_into_it_is_refused(saved: Callable[..., Path]) -> None:
    model = tiny.load(saved("mixtral"))
    with pytest.raises(UnsupportedModelError, match="got down_proj, gate_up_proj to load"):
        model.load_state_dict(tiny.build("mixtral").state_dict())


@pytest.mark.emulated
def test_a_failed_load_leaves_no_session_and_the_next_one_works(
    saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sluice.hf import quantizer

    def fail(*args: Any) -> Any:
        raise OSError("no disk")

    with monkeypatch.context() as patch:
        patch.setattr(quantizer, "open_session", fail)
        with pytest.raises(OSError, match="no disk"):
            tiny.load(saved("mixtral"))
    assert tiny.greedy(tiny.load(saved("mixtral"))).shape[0] == 2


class TestOffloadConfig:
    """The settings as transformers passes them around."""

    FIELDS: ClassVar[Any] = {"device_memory": "25%", "policy": "lru", "exclude": (r"layers\.1\.",)}

    def test_mirrors_the_options_field_by_field(self) -> None:
        import dataclasses

        config = sluice.OffloadConfig(**self.FIELDS)
        options = sluice.OffloadOptions(**self.FIELDS)
        names = {field.name for field in dataclasses.fields(sluice.OffloadOptions)}
        assert config.to_dict().keys() == names | {"quant_method"}
        assert config.options == options
        for name in names:
            assert getattr(config, name) == getattr(options, name)

    def test_goes_through_json_and_back(self, tmp_path: Path) -> None:
        config = sluice.OffloadConfig(**self.FIELDS)
        config.to_json_file(tmp_path / "c.json")
        read = sluice.OffloadConfig.from_dict(json.loads((tmp_path / "c.json").read_text()))
        assert read == config
        assert read.options == config.options

    def test_survives_deepcopy(self) -> None:
        config = sluice.OffloadConfig(**self.FIELDS)
        assert copy.deepcopy(config) == config
        assert dict(copy.deepcopy(config)) == config.to_dict()

    def test_refuses_what_it_does_not_know_and_names_the_nearest(self) -> None:
        with pytest.raises(ConfigError, match="device_memory"):
            sluice.OffloadConfig(device_memroy="25%")

    def test_a_newer_field_in_a_file_only_warns(self, caplog: pytest.LogCaptureFixture) -> None:
        config = sluice.OffloadConfig.from_dict(
            {"quant_method": "sluice_offload", "device_memory": "25%", "precision": "int4"}
        )
        assert config.device_memory == "25%"
        assert "precision" in caplog.text

    def test_update_is_checked_and_all_or_nothing(self) -> None:
        config = sluice.OffloadConfig(**self.FIELDS)
        assert config.update(policy="static", torch_dtype="x") == {"torch_dtype": "x"}
        assert config.options.policy == "static"
        with pytest.raises(ConfigError):
            config.update(policy="nonsense")
        assert config.options.policy == "static"

    def test_a_dict_does_as_quantization_config(self, saved: Callable[..., Path]) -> None:
        fields = sluice.OffloadConfig(device_memory="25%").to_dict()
        model = AutoModelForCausalLM.from_pretrained(saved("mixtral"), quantization_config=fields)
        assert model.sluice.budget_bytes > 0


def test_registration_is_once_and_only_on_first_use() -> None:
    code = (
        "import sys, sluice; assert 'transformers' not in sys.modules\n"
        "import threading\n"
        "ts = [threading.Thread(target=lambda: sluice.OffloadConfig) for _ in range(4)]\n"
        "[t.start() for t in ts]; [t.join() for t in ts]\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m\n"
        "assert 'sluice_offload' in m\n"
        "import sluice.hf.quantizer, sluice.hf\n"
        "print('once')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "once", done.stderr


def test_compat_tells_the_version_that_is_installed() -> None:
    assert sluice.hf.compat.version() == transformers.__version__
