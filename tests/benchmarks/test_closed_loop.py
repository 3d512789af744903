"""The closed loop's arms: their future, their predictors, their slow disk, and what rows derive."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import disk
import fitted
import harness
import run
from baselines import Generation, Sample, is_swept
from baselines.belady import TrueRoutes, turns_of
from baselines.foresight import Discarded
from end_to_end.closed_loop import SameText, derived_of, require_unread
from end_to_end.generation import reference_prompts
from routing import Replay, load_trace, recorded
from sluice import _core

SCENARIOS = Path(__file__).resolve().parents[2] / "benchmarks" / "scenarios"
CUT = "dsv2lite_translation_l1_9_17_25"
TABLE = {
    "fit": {"trace": CUT, "sequences": [0, 3]},
    "choose": {"trace": CUT, "sequences": [4, 5]},
}


@pytest.fixture(autouse=True)
def bench_dir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLUICE_BENCH_DIR", str(tmp_path_factory.getbasetemp() / "closed-loop"))


def test_a_prompt_is_one_step_and_each_later_token_another() -> None:
    experts = np.array([[[0, 1]], [[1, 2]], [[3, 0]], [[2, 1]]])
    steps = Generation(experts, prompt_tokens=2).steps()
    assert [[layer.tolist() for layer in step] for step in steps] == [
        [[0, 1, 2]],
        [[0, 3]],
        [[1, 2]],
    ]


def test_keep_scores_are_minus_the_turn_of_the_next_use() -> None:
    two_layers = [[np.array([0]), np.array([1])], [np.array([2]), np.array([1])]]
    again = [[np.array([0]), np.array([2])]]
    scores = turns_of(two_layers + again, num_experts=3)
    far = -14.0  # twice the six visits, and two more
    assert scores.shape == (3, 2, 3)
    # As of visit 0: expert 0 comes back at visit 4, expert 2 at visit 2, expert 1 never.
    assert scores[0, 0].tolist() == [-4.0, far, -2.0]
    assert scores[0, 1].tolist() == [far, -3.0, -5.0]
    assert scores[2].tolist() == [[far] * 3, [far] * 3]
    assert turns_of([], 3).shape == (0, 0, 3)


def test_true_routes_are_those_of_the_step_that_begins_and_none_beyond_what_was_told() -> None:
    oracle = TrueRoutes()
    oracle.expect(5, [[np.array([1, 3]), np.array([2])], [np.array([0]), np.array([4])]])
    for step, expected in ((4, []), (5, [(0, 1), (0, 3), (1, 2)]), (6, [(0, 0), (1, 4)]), (7, [])):
        oracle.begin_step(step, None, None, ())
        assert [(g.layer, g.expert) for g in oracle.plan(2)] == expected
        assert all(g.probability == 1.0 and g.steps_ahead == 0 for g in oracle.plan(2))


class Inner:
    name = "inner"
    shape = None
    needs_hidden = False

    def __init__(self) -> None:
        self.asked: list[str] = []

    def begin_step(self, *_: Any) -> None:
        self.asked.append("begin_step")

    def observe(self, event: Any) -> None:
        self.asked.append("observe")

    def upcoming(self, horizon: int) -> np.ndarray:
        self.asked.append("upcoming")
        return np.ones((horizon, 2), np.float32)

    def plan(self, horizon: int) -> Sequence[Any]:
        self.asked.append("plan")
        return [1]

    def forecast(self) -> np.ndarray:
        self.asked.append("forecast")
        return np.ones((1, 2), np.float32)


def test_discarded_plans_are_made_and_not_said() -> None:
    inner = Inner()
    discarded = Discarded(inner)
    discarded.begin_step(0, None, None, ())
    discarded.observe(None)
    assert discarded.upcoming(3).tolist() == [[0.0, 0.0]] * 3
    assert discarded.plan(3) == [] and discarded.forecast() is None
    assert inner.asked == ["begin_step", "observe", "upcoming", "plan", "forecast"]
    assert not hasattr(discarded, "core_tables")


def test_a_disk_is_slowed_only_while_packs_are_opened_under_it() -> None:
    assert disk.read_rate({}) == 0
    assert disk.read_rate({"disk": {"read_rate": "50MB/s"}}) == 50_000_000
    for wrong in ("50MB", "25%/s", "50MB/h"):
        with pytest.raises(ValueError, match="read_rate"):
            disk.read_rate({"disk": {"read_rate": wrong}})
    before = _core.open_pack
    with disk.throttled(7):
        assert _core.open_pack.keywords == {"read_rate": 7}  # type: ignore[attr-defined]
    with disk.throttled(0):
        assert _core.open_pack is before
    assert _core.open_pack is before


def test_a_predictor_is_fitted_once_on_what_the_table_says() -> None:
    first = fitted.fitted("popularity", TABLE)
    card = fitted.folder_of("popularity", TABLE) / "card.json"
    made = card.stat().st_mtime_ns
    assert fitted.fitted("popularity", TABLE) is not first
    assert card.stat().st_mtime_ns == made
    whole = load_trace(CUT)
    assert first.fitting.fit == tuple(s.content for s in whole.sequences[:4])
    assert first.fitting.choose == tuple(s.content for s in whole.sequences[4:6])
    passport = fitted.passport("popularity", TABLE, first)
    assert (passport["kind"], passport["fit_sequences"], passport["choose_sequences"]) == (
        "popularity",
        4,
        2,
    )
    other = {**TABLE, "fit": {"trace": CUT, "sequences": [0, 3], "every": 2}}
    assert fitted.folder_of("popularity", other) != fitted.folder_of("popularity", TABLE)
    assert len(fitted.fitted("popularity", other).fitting.fit) == 2


def test_nobody_is_timed_on_what_it_was_fitted_on() -> None:
    arms: dict[str, Any] = {
        "foresight": SimpleNamespace(predictors=[fitted.fitted("popularity", TABLE)]),
        "lru-overlap": SimpleNamespace(),
    }
    require_unread(arms, recorded(CUT, 20, 22))
    require_unread(arms, None)
    with pytest.raises(RuntimeError, match="foresight: its popularity has read 1 of the timed"):
        require_unread(arms, recorded(CUT, 5, 9))


def test_replayed_weights_are_the_recorded_ones_of_the_same_tokens() -> None:
    whole = load_trace(CUT)
    routes = recorded(CUT, 20, 20, weights=True, skip_tokens=16)
    assert routes.weights is not None and whole.weights is not None
    rows = whole.sequences[20].rows
    assert np.array_equal(routes.sequences[0], whole.experts[rows][16:])
    assert np.array_equal(routes.weights[0], whole.weights[rows][16:].astype(np.float32))

    class Layer(torch.nn.Module):
        def forward(self, hidden: Any, ids: torch.Tensor, weights: torch.Tensor) -> Any:
            return ids, weights

    model = torch.nn.ModuleDict({str(i): torch.nn.Module() for i in range(4)})
    for part in model.values():
        part.experts = Layer()
    replay = Replay(model)
    replay.start(routes.sequences[0], routes.weights[0])
    with replay.installed():
        hidden = torch.zeros(2, 3, dtype=torch.bfloat16)
        drawn = torch.zeros(2, 6, dtype=torch.int64), torch.ones(2, 6)
        model["0"].experts(hidden, *drawn)
        ids, weights = model["0"].experts(hidden, *drawn)
    assert np.array_equal(ids.numpy(), routes.sequences[0][2:4, 0])
    assert np.array_equal(weights.numpy(), routes.weights[0][2:4, 0])


def test_another_token_ends_a_run_that_demands_the_same_text() -> None:
    said = [Sample(0.0, [], tokens, torch.empty(0), 0.0) for tokens in ([1, 2], [1, 2], [1, 3])]
    strict, lenient = SameText(True), SameText(False)
    for same in (strict, lenient):
        same.check("resident-sluice", 0, said[0])
        same.check("lru-overlap", 0, said[1])
    with pytest.raises(RuntimeError, match="foresight: round 0: got other tokens than resident"):
        strict.check("foresight", 0, said[2])
    strict.check("foresight", 1, said[2])
    assert (strict.fed(0), strict.fed(1), strict.fed(2)) == ([1, 2], [1, 3], [])
    assert lenient.fed(0) == []
    lenient.check("foresight", 0, said[2])


def test_rows_say_what_share_of_the_bounds_saving_an_arm_has() -> None:
    samples = {
        "resident-sluice": [0.5, 0.5],
        "resident-foresight:path-table": [0.5, 0.75],
        "lru-demand@25%": [6.0, 6.0],
        "lru-overlap@25%": [4.0, 4.0],
        "decayed-overlap@25%": [3.0, 4.0],
        "foresight@25%": [3.0, 3.0],
        "foresight-discarded:forecaster@25%": [4.0, 4.0],
        "belady-victims+token@25%": [2.0, 2.0],
        "lru-overlap@50%": [1.0, 1.0],
    }
    demanded = {"lru-overlap@25%": 100.0, "foresight@25%": 70.0}
    foresight = derived_of("foresight@25%", samples, demanded)
    assert foresight == pytest.approx(
        {
            "over_demand": 2.0,
            "over_lru_overlap": 4 / 3,
            "saves": 0.25,
            "bound_saves": 0.5,
            "of_bound": 0.5,
            "demand_bytes_over_lru": 0.7,
        }
    )
    discarded = derived_of("foresight-discarded:forecaster@25%", samples, demanded)
    assert discarded["over_undisturbed"] == pytest.approx(7 / 8)
    inline = derived_of("resident-foresight:path-table", samples, demanded)
    assert inline == {"over_undisturbed": 0.8}
    assert derived_of("resident-sluice", samples, demanded) == {}
    alone = derived_of("lru-overlap@50%", samples, demanded)
    assert alone == {"over_lru_overlap": 1.0, "saves": 0.0}


def test_arms_that_hold_everything_run_once_whatever_the_budgets() -> None:
    assert [is_swept(m) for m in ("resident-foresight:path-table", "accelerate-v5:cold")] == [
        False
    ] * 2
    assert all(is_swept(m) for m in ("sluice:pack", "lru-demand", "foresight", "belady-victims"))


def test_own_text_comes_from_prompts_whose_answers_are_long() -> None:
    scenario = harness.load_scenario(SCENARIOS / "closed-loop-reference.toml")
    prompts = reference_prompts(scenario)
    assert len(prompts) == 32
    answers = load_trace("reference_test")
    starts = {
        tuple(answers.token_ids[s.start : s.start + s.prompt_tokens].tolist()): s.length
        for s in answers.sequences
    }
    for prompt in prompts:
        ids = tuple(prompt[0].tolist())
        assert starts[ids] - len(ids) >= scenario["workload"]["new_tokens"] - 1


@pytest.mark.parametrize("name", ["closed-loop-dsv2lite-cut-550", "closed-loop-reference-50"])
def test_who_knows_the_future_misses_least_and_all_say_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replayed and own routes; the tokens are held against each other by the run itself."""
    rates: list[int] = []
    open_pack = _core.open_pack

    def opened(path: str, *, read_rate: int = 0, **fields: Any) -> Any:
        rates.append(read_rate)
        return open_pack(path, read_rate=read_rate, **fields)

    monkeypatch.setattr(_core, "open_pack", opened)
    scenario = harness.smoke(harness.load_scenario(SCENARIOS / f"{name}.toml"))
    scenario["threads"] = 1
    scenario["workload"] |= {"new_tokens": 14}
    scenario["workload"]["modes"] = [
        "resident-sluice", "lru-overlap", "decayed-overlap", "belady-victims",
        "belady-victims+token",
    ]  # fmt: skip
    rows = {row["mode"].partition("@")[0]: row for row in run.run_scenario(scenario)}
    misses = {mode: row["counters"]["misses"] for mode, row in rows.items()}
    assert misses["resident-sluice"] == 0
    causal = min(misses["lru-overlap"], misses["decayed-overlap"])
    assert misses["belady-victims"] < 0.9 * causal
    told = rows["belady-victims+token"]
    assert told["counters"]["hints"] > 0 and misses["belady-victims+token"] < 0.9 * causal
    assert all(row["correct"] == "bitwise" for row in rows.values())
    assert rows["resident-sluice"]["state"] == "direct"
    assert told["state"] == "throttled"
    assert rates == [told["config"]["read_rate_bytes_s"]] * 4  # all but the resident's
    assert told["config"]["read_rate_bytes_s"] == told["limit"]["read_loop_bytes_s"]
    assert told["derived"]["demand_bytes_over_lru"] < 0.9
