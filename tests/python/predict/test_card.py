"""Predictors on disk: what is refused, by name, and that nothing in a folder is executed."""

from __future__ import annotations

import json
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from predict.battery import fitted
from predict.small_traces import random_trace
from sluice.errors import CheckpointError, ConfigError
from sluice.predict import BasePredictor, load, make, names, save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    predictor, _ = fitted("path-table by sets")
    return save(predictor, tmp_path / "path", evaluation={"recall": 0.5})


def test_a_card_says_what_was_read_and_how(folder: Path) -> None:
    card = json.loads((folder / "card.json").read_text())
    trace = random_trace(1, sequences=(40, 30, 35, 25))
    assert card["kind"] == "path-table" and card["settings"]["back_off"] == 4.0
    assert card["shape"] == {"num_layers": 4, "num_experts": 8, "top_k": 2}
    assert card["fitting"]["model"] == "model-a" and card["fitting"]["tokens"] == 130
    assert card["fitting"]["fit"] == [s.content for s in trace.sequences]
    assert card["evaluation"] == {"recall": 0.5}


def test_what_chose_is_in_the_card_beside_what_was_fitted(tmp_path: Path) -> None:
    trace = random_trace(2, sequences=(10, 10))
    predictor = make("popularity")
    assert isinstance(predictor, BasePredictor)
    predictor.fit(trace.select([0]), trace.select([1]))
    again = load(save(predictor, tmp_path / "x"))
    assert again.fitting.fit == (trace.sequences[0].content,)
    assert again.fitting.choose == (trace.sequences[1].content,)


def test_files_are_the_owners_alone_and_nothing_is_left_beside_them(folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["card.json", "predictor.safetensors"]
    for path in (folder, *folder.iterdir()):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_another_models_predictor_is_refused_by_name(folder: Path) -> None:
    assert load(folder, "model-a").fitting.model == "model-a"
    with pytest.raises(CheckpointError, match="predictor of 'model-a', expected one of 'model-b'"):
        load(folder, "model-b")
    with pytest.raises(CheckpointError, match="model-b"):
        make(folder, model_fingerprint="model-b")


def test_a_predictor_of_an_unknown_model_is_refused_where_a_model_is_named(tmp_path: Path) -> None:
    predictor = make("popularity")
    assert isinstance(predictor, BasePredictor)
    predictor.fit(random_trace(1, model=""))
    place = save(predictor, tmp_path / "x")
    assert load(place).fitting.model == ""
    with pytest.raises(CheckpointError, match="unknown model"):
        load(place, "model-a")


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def lie(folder: Path) -> None:
        card = json.loads((folder / "card.json").read_text())
        change(card)
        (folder / "card.json").write_text(json.dumps(card))

    return lie


def arrays(**changes: Any) -> Callable[[Path], None]:
    def lie(folder: Path) -> None:
        from safetensors.numpy import load_file

        held = load_file(folder / "predictor.safetensors")
        for name, change in changes.items():
            key = name.replace("__", ".")
            if change is None:
                del held[key]
            else:
                held[key] = np.ascontiguousarray(change(held[key]))
        save_file(held, folder / "predictor.safetensors")

    return lie


def write(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content) and None


LIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no card": (lambda f: (f / "card.json").unlink(), "got no card.json"),
    "no json": (write("card.json", b"{"), "no JSON"),
    "deep json": (write("card.json", b"[" * 100_000), "no JSON|expected a JSON object"),
    "a list": (write("card.json", b"[1]"), "expected a JSON object"),
    "another version": (edit(lambda c: c.update(sluice_predictor=99)), "version 99"),
    "no fitting": (edit(lambda c: c.pop("fitting")), "fitting"),
    "unknown kind": (edit(lambda c: c.update(kind="os.system")), "os.system"),
    "kind is a path": (edit(lambda c: c.update(kind="../x")), "expected one of popularity"),
    "unknown setting": (edit(lambda c: c["settings"].update(evil=1)), "no setting 'evil'"),
    "setting of another type": (edit(lambda c: c["settings"].update(back_off="x")), "back_off|>"),
    "shape of another type": (edit(lambda c: c["shape"].update(num_layers="4")), "num_layers"),
    "shape that would fill memory": (
        edit(lambda c: c["shape"].update(num_experts=1 << 40)),
        "num_experts",
    ),
    "top k of more experts": (edit(lambda c: c["shape"].update(top_k=9)), "top_k 9"),
    "another shape": (edit(lambda c: c["shape"].update(num_layers=5)), r"rates float32\[4, 8\]"),
    "hashes that are none": (edit(lambda c: c["fitting"].update(fit=[1])), "no hashes"),
    "tokens of another type": (edit(lambda c: c["fitting"].update(tokens="x")), "fitting.tokens"),
    "no arrays": (lambda f: (f / "predictor.safetensors").unlink(), "got no file"),
    "pickled arrays": (
        write("predictor.safetensors", pickle.dumps({"rates": [1]})),
        "no safetensors",
    ),
    "cut short": (
        lambda f: os.truncate(f / "predictor.safetensors", 100),
        "no safetensors",
    ),
    "an array missing": (arrays(rates=None), "no array 'rates'"),
    "another type": (arrays(rates=lambda a: a.astype(np.float64)), "float64"),
    "not finite": (arrays(rates=lambda a: a * np.nan), "not finite"),
    "no probabilities": (arrays(pairs=lambda a: a + 1), "outside of 0 to 1"),
    "keys of another width": (arrays(two__keys=lambda a: a[:, 1:]), r"two\.keys"),
    "a key twice": (arrays(one__keys=lambda a: np.repeat(a[:1], len(a), 0)), "key twice"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused_by_name(lie: str, folder: Path) -> None:
    tell, says = LIES[lie]
    tell(folder)
    with pytest.raises(CheckpointError, match=says):
        load(folder)


def test_what_has_no_shape_cannot_be_saved(tmp_path: Path) -> None:
    predictor = make("popularity")
    assert isinstance(predictor, BasePredictor)
    with pytest.raises(ConfigError, match="not fitted"):
        save(predictor, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_users_subclass_is_not_saved_under_a_name_of_sluices(tmp_path: Path) -> None:
    from sluice.predict.training_free.popularity import Popularity

    class Mine(Popularity):
        """Would be loaded as something else."""

    predictor = Mine()
    predictor.fit(random_trace(1))
    with pytest.raises(ConfigError, match="Mine"):
        save(predictor, tmp_path / "x")


def test_make_takes_names_folders_classes_and_objects(folder: Path) -> None:
    from sluice.predict.training_free.path_table import PathTable

    assert {make(name).name for name in names()} == set(names())
    assert make(str(folder)).name == make(folder).name == "path-table"
    assert isinstance(make(PathTable), PathTable)
    made = PathTable()
    assert make(made) is made


@pytest.mark.parametrize(
    ("what", "settings", "says"),
    [
        ("path-tabel", None, "did you mean 'path-table'"),
        ("/no/such/folder", None, "folder that `sluice train` wrote"),
        (object(), None, "expected a name, a folder, or an object"),
        (int, None, "got int"),
    ],
)
def test_make_refuses_what_is_no_predictor(what: Any, settings: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make(what, settings)


def test_settings_belong_beside_a_name(folder: Path) -> None:
    with pytest.raises(ConfigError, match="beside"):
        make(folder, {"back_off": 1.0})
