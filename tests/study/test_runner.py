# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""A study goes on after a kill, repeats nothing, and survives a broken run."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nt_transformers.study import StudyConfig, run_study, runner


MakeStudy = Callable[..., StudyConfig]
KillStudy = Callable[[StudyConfig, str], None]

# Stands for a training run: notes when it was at work; breaks if its method is called so.
WORKER = """
import json, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
run = json.loads((folder / "run.json").read_text())
start = time.time()
if run["row"]["method"] == "broken" and not (folder.parent.parent / "repaired").exists():
    sys.exit("the disk is full")
time.sleep(0.3)
rate = run["training"]["learning_rate"]
row = {**run["row"], "status": "finished", "eval_loss": (rate - 0.01) ** 2, "eval_perplexity": 1.0, "seconds": 0}
(folder / "result.json").write_text(json.dumps({**row, "times": [start, time.time()], "test": run["test"]}))
"""


@pytest.fixture
def quick_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(runner, "WORKER", [sys.executable, str(tmp_path / "worker.py")])


def read_results(config: StudyConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.output_dir) / "results.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("quick_worker")
def test_two_runs_at_a_time_and_none_twice(study_config: MakeStudy) -> None:
    config = study_config(grids=[{"method": ["single", "set"], "seed": [0, 1, 2]}])
    rows = run_study(config)
    assert rows == read_results(config)
    assert [(row["method"], row["seed"]) for row in rows] == [(m, s) for m in ("single", "set") for s in (0, 1, 2)]
    for row in rows:
        instant = row["times"][1] - 0.01
        assert sum(start <= instant <= end for start, end in (other["times"] for other in rows)) <= 2

    more = study_config(grids=[{"method": ["single", "set"], "seed": [0, 1, 2, 3]}])
    again = {row["run"]: row["times"] for row in run_study(more)}
    assert len(again) == 8
    assert {row["run"]: row["times"] for row in rows}.items() <= again.items()


@pytest.mark.usefixtures("quick_worker")
def test_results_alone_continue_a_study(study_config: MakeStudy, tmp_path: Path) -> None:
    rows = run_study(study_config())
    kept = "".join(json.dumps(row) + "\n" for row in rows[:2])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "results.jsonl").write_text(kept)

    again = run_study(study_config(output_dir=str(elsewhere)))
    assert again[:2] == rows[:2]
    assert again[2]["times"][0] > rows[2]["times"][1]


@pytest.mark.usefixtures("quick_worker")
@pytest.mark.parametrize("line", ["{'run'", '"run"', '{"status": "finished"}', '{"run": "../../elsewhere"}'])
def test_results_that_are_none_are_refused(study_config: MakeStudy, line: str) -> None:
    config = study_config()
    Path(config.output_dir).mkdir()
    (Path(config.output_dir) / "results.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"results\.jsonl, line 1: .* not a study's row; restore or delete the file"):
        run_study(config)


@pytest.mark.usefixtures("quick_worker")
def test_a_broken_run_is_reported_and_tried_again(study_config: MakeStudy, capsys: pytest.CaptureFixture[str]) -> None:
    methods = {"broken": {"sparsity": {"method": "set"}}, "single": {"model": {"num_ensemble_heads": 1}}}
    config = study_config(methods=methods, grids=[{"method": ["broken", "single"]}], flops_reference="single")
    broken, single = run_study(config)
    assert (broken["status"], broken["exit_code"], single["status"]) == ("failed", 1, "finished")
    assert "the disk is full" in broken["error"]
    assert "FAILED broken" in capsys.readouterr().out

    (Path(config.output_dir) / "repaired").touch()
    repaired, same = run_study(config)
    assert repaired["status"] == "finished"
    assert same == single


@pytest.mark.usefixtures("quick_worker")
def test_each_method_takes_its_best_learning_rate(study_config: MakeStudy) -> None:
    config = study_config(learning_rates=[0.002, 0.009, 0.1], tuning_steps=2)
    rows = run_study(config)
    tuning = [row for row in rows if row["budget"] == "tuning"]
    assert len(tuning) == 9
    assert {row["test"] for row in tuning} == {None}  # nothing is chosen by test documents
    main = [row for row in rows if row["budget"] == "tokens"]
    assert [row["learning_rate"] for row in main] == [0.009] * 3
    assert {row["test"] for row in main} == {config.test}


@pytest.mark.usefixtures("quick_worker")
def test_what_is_finished_stays_on_file_while_a_new_method_is_tuned(
    study_config: MakeStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {"learning_rates": [0.01, 0.1], "tuning_steps": 2}
    rows = run_study(study_config(**rates, grids=[{"method": ["single"]}]))

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "_choose_learning_rates", stop)
    more = study_config(**rates, grids=[{"method": ["single", "set"]}])
    with pytest.raises(KeyboardInterrupt):
        run_study(more)
    left = read_results(more)
    assert {row["run"] for row in rows} < {row["run"] for row in left}
    assert len(left) == 5  # two methods with two rates, and the run that was finished


def test_two_studies_cannot_share_a_folder(study_config: MakeStudy) -> None:
    config = study_config()
    Path(config.output_dir).mkdir()
    with runner._locked(Path(config.output_dir)), pytest.raises(ValueError, match="another process runs this study"):
        run_study(config)


@pytest.mark.slow
def test_a_killed_study_goes_on(study_config: MakeStudy, kill_at_work: KillStudy) -> None:
    config = study_config(grids=[{"method": ["single", "set"]}], processes=1)
    config.training["max_steps"] = 60  # long enough to be killed at work
    kill_at_work(config, "set")
    folder = Path(config.output_dir) / "runs"
    (single,) = read_results(config)
    assert single["method"] == "single"

    rows = run_study(config)
    assert rows[0] == single
    assert [row["status"] for row in rows] == ["finished", "finished"]
    log = next(folder.glob("set-*/log.txt")).read_text()
    assert "resuming" in log
    assert rows[1]["test_tokens"] > rows[1]["eval_tokens"] == 300
    assert [point["step"] for point in rows[1]["curve"]] == list(range(3, 61, 3))
