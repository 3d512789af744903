"""Every family's tiny model on the device, by the battery's own check, in bf16 first of all.

SLUICE_GPU_SHARD=i/n: every n-th family from the i-th on, so that several processes share the work.
SLUICE_GPU_CELLS: how many cells a family has (4); three families run a covering array besides.
"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from battery.cells import DTYPES, FACTORS, Bench, Row, realigned
from battery.families import build_family, causal_families
from battery.pairwise import covering_rows
from battery.test_models import OFFLOADED, check_cell

from .device import emulated
from .test_sessions import HOST, PLACE

SHARD, SHARDS = (int(part) for part in os.environ.get("SLUICE_GPU_SHARD", "0/1").split("/"))
CELLS = int(os.environ.get("SLUICE_GPU_CELLS", "4"))
# Gated; biased, interleaved and transposed; no gate.
COVERED = ("mixtral", "gpt_oss", "nemotron_h")
DEVICE_FACTORS = FACTORS | {"dtype": ("bf16",), "host": tuple(HOST), "prefill": ("stream", "cache")}


class DeviceBench(Bench):
    """A family's models where the experts' slots are."""

    def __init__(self, built: Any, root: Path) -> None:
        super().__init__(built, root)
        self.ids = self.ids.to(PLACE)

    def load(self, folder: Path, dtype: str, **kwargs: Any) -> nn.Module:
        if "quantization_config" in kwargs and PLACE != "cpu":
            kwargs["device_map"] = PLACE
        model = type(self.built.model).from_pretrained(
            folder, dtype=DTYPES[dtype], attn_implementation="eager", **kwargs
        )
        return realigned(model.eval().to(PLACE))

    @contextmanager
    def offloaded(self, cell: Row) -> Iterator[nn.Module]:
        with super().offloaded(cell) as model:
            yield model
        if PLACE != "cpu":
            torch.cuda.synchronize()


def rows_of(family: str) -> list[Row]:
    """Seeded cells; slots take turns, and the last one is in fp32."""
    rng = random.Random(zlib.crc32(family.encode()))
    rows: list[Row] = []
    for number in range(CELLS):
        cell = {name: rng.choice(values) for name, values in DEVICE_FACTORS.items()}
        rows.append(cell | {"slots": FACTORS["slots"][number % 3]})
    if CELLS > 1:
        rows[-1]["dtype"] = "fp32"
    return rows + (list(covering_rows(DEVICE_FACTORS, 0)) if covered(family) else [])


def covered(family: str) -> bool:
    return family in COVERED and not emulated()


@pytest.fixture(autouse=True, scope="module")
def quiet_transformers() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", OFFLOADED[SHARD::SHARDS])
def test_a_family_gives_the_same_bits_and_stocks_within_rounding(
    family: str, tmp_path: Path
) -> None:
    entry = next(entry for entry in causal_families() if entry.family == family)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    bench = DeviceBench(build_family(entry), tmp_path)
    try:
        for row in rows_of(family):
            options = HOST[row["host"]] | {"prefill": row["prefill"]}
            try:
                check_cell(bench, row | {"options": options})
            except BaseException as error:
                raise AssertionError(f"{family}, {row}: {error}") from error
    finally:
        torch.set_num_threads(before)
