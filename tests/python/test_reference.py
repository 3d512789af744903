"""The reference model is the one that was shipped, or it is refused by name."""

import json
import shutil
from pathlib import Path

import pytest

from sluice.errors import CheckpointError
from sluice.reference import reference_model, reference_prompts, verify_folder


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "reference-moe"
    shutil.copytree(reference_model(), folder)
    return folder


def test_the_shipped_files_agree_with_their_sums() -> None:
    folder = reference_model()
    assert (folder / "model.safetensors").stat().st_size == 22_225_688
    named = {line.split()[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    data = {path.name for path in folder.iterdir() if path.suffix in {".json", ".safetensors"}}
    assert named == data, "every data file is hashed and every hash has its file"


def test_one_changed_bit_is_refused_with_both_hashes(copy: Path) -> None:
    weights = copy / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: got SHA-256 [0-9a-f]{64}"):
        verify_folder(copy)


def test_a_truncated_file_is_refused(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut short"):
        verify_folder(copy)


@pytest.mark.parametrize("name", ["SHA256SUMS", "tokenizer.json", "prompts.json"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        verify_folder(copy)


def test_there_is_one_prompt_for_each_of_ten_tasks() -> None:
    prompts = reference_prompts()
    assert len({prompt.task for prompt in prompts}) == len(prompts) == 10
    assert [prompt.task for prompt in prompts if not prompt.prompt] == ["general"]
    assert all(prompt.response and prompt.source for prompt in prompts)
    assert prompts[0].text == f"<|bos|>{prompts[0].prompt}<|sep|>"


def test_each_source_of_a_prompt_stands_in_the_table_of_licences() -> None:
    readme = (reference_model() / "README.md").read_text(encoding="utf-8")
    for prompt in reference_prompts():
        assert prompt.source in readme, prompt.source
    for text in sorted((reference_model() / "licences").iterdir()):
        assert f"licences/{text.name}" in readme, text.name


def test_the_config_is_what_the_readme_says() -> None:
    config = json.loads((reference_model() / "config.json").read_text())
    shape = [config[name] for name in ("num_hidden_layers", "num_local_experts")]
    assert [*shape, config["num_experts_per_tok"]] == [8, 32, 4]
