# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Studies of image classifiers: what they measure, that they survive a kill, and which mistakes they name."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoModelForImageClassification

from nt_transformers.analysis.robustness import RobustnessTest
from nt_transformers.data.images import load_images
from nt_transformers.report import load_results, render_page
from nt_transformers.study import StudyConfig, StudyPlan, run_study
from nt_transformers.training import build_config


MakeStudy = Callable[..., StudyConfig]
KillStudy = Callable[[StudyConfig, str], None]
ROOT = Path(__file__).parents[2]


def test_equal_epochs_and_equal_flops(vision_study_config: MakeStudy) -> None:
    config = vision_study_config(grids=[{"method": ["single", "ensemble", "set"], "budget": ["epochs", "flops"]}])
    config.training["max_steps"] = 1000
    runs = {
        (run.spec.method, run.spec.budget): run
        for run in StudyPlan(config).main_runs(dict.fromkeys(config.methods, 0.1))
    }
    for method in config.methods:
        assert runs[method, "epochs"].training.max_steps == 1000
        assert runs[method, "flops"].total_flops == pytest.approx(runs["ensemble", "epochs"].total_flops, rel=1e-3)
    assert runs["single", "flops"].training.max_steps == 2000
    assert runs["single", "flops"].name.startswith("single-1-1x1-flops-seed0-")
    assert runs["ensemble", "epochs"].name.startswith("ensemble-1-2x3-epochs-seed0-")


def test_length_and_number_of_the_heads(vision_study_config: MakeStudy) -> None:
    grid = {"method": ["set"], "num_head_layers": [0, 2], "num_ensemble_heads": [3]}
    plan = StudyPlan(vision_study_config(grids=[grid]))
    models = [run.training.model for run in plan.main_runs({"set": 0.1})]
    assert [(model.num_ensemble_heads, model.num_head_blocks) for model in models] == [(3, 0), (3, 2)]


def test_the_study_of_the_recipes_keeps_to_its_goals_of_size(image_folder: Path, tmp_path: Path) -> None:
    fields = yaml.safe_load((ROOT / "recipes" / "configs" / "study_vision.yaml").read_text(encoding="utf-8"))
    data = {**fields["training"]["data"], "train": str(image_folder), "train_split": "train", "test_split": "val"}
    fields |= {"training": {**fields["training"], "data": data}, "output_dir": str(tmp_path)}
    config = build_config(StudyConfig, fields)
    runs = StudyPlan(config).main_runs(dict.fromkeys(config.methods, 0.1))
    costs = {run.spec.method: run.outline.cost for run in runs if run.spec.density is None}
    ensemble, sparse = costs["full_ensemble"], costs["neurotrails"]
    assert sparse.active_parameters <= 0.3 * ensemble.active_parameters
    assert sparse.forward < 0.5 * ensemble.forward
    assert not {run.spec.seed for run in runs} & {0}, "learning rates are chosen with seed 0"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"test": {"corruptions": ["fog", "rain"]}}, "rain.*choose from gaussian_noise"),
        ({"test": {"severities": [0, 1]}}, r"test.severities=\[0, 1\]"),
        ({"test": {"images": 0}}, "test.images=0"),
        ({"test": "some/documents"}, "test='some/documents': give its fields"),
        (
            {"grids": [{"method": ["set"], "budget": ["tokens"]}]},
            r"grids\[0\].budget='tokens': choose epochs or flops",
        ),
        ({"kind": "sound"}, "kind"),
    ],
)
def test_mistakes_are_named(vision_study_config: MakeStudy, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
        vision_study_config(**fields)


def test_data_that_do_not_serve_are_named_before_any_run(vision_study_config: MakeStudy, tmp_path: Path) -> None:
    config = vision_study_config()
    config.training["data"]["test"] = str(tmp_path / "nothing.parquet")
    with pytest.raises(ValueError, match=r"no images at .*nothing.parquet"):
        run_study(config)

    config = vision_study_config(learning_rates=[0.1, 0.2], tuning_steps=2)
    config.training["data"]["validation_size"] = 0
    config.training["eval_steps"] = None
    with pytest.raises(ValueError, match="training.data.validation_size=0: hold images out"):
        run_study(config)
    assert not list((tmp_path / "study").glob("runs/*"))


@pytest.mark.slow
def test_from_tuning_to_the_report(vision_study_config: MakeStudy, image_folder: Path, tmp_path: Path) -> None:
    config = vision_study_config(
        learning_rates=[0.05, 0.1],
        tuning_steps=2,
        methods={
            "single": {"model": {"num_ensemble_heads": 1}, "sparsity": {"method": "dense"}},
            "set": {"sparsity": {"method": "set"}},
            "broken": {"data": {"train": str(tmp_path / "broken")}},
        },
        flops_reference="single",
        grids=[{"method": ["single", "set", "broken"], "seed": [1]}],
    )
    folder = tmp_path / "broken"
    for label in ("n01", "n02", "n03"):
        for split in ("train", "val"):
            (folder / split / label).mkdir(parents=True)
            for number in range(4):
                (folder / split / label / f"{number}.png").write_bytes(b"no image")
    rows = run_study(config)
    finished = [row for row in rows if row["status"] == "finished"]
    tuning = [row for row in finished if row["budget"] == "tuning"]
    single, sparse = (row for row in finished if row["budget"] == "epochs")
    assert [(row["method"], row["seed"]) for row in tuning] == [(m, 0) for m in ("single", "set") for _ in range(2)]
    assert not any(name.startswith("test_") for row in tuning for name in row)
    for row, attempts in ((single, tuning[:2]), (sparse, tuning[2:])):
        assert row["learning_rate"] == min(attempts, key=lambda attempt: attempt["eval_nll"])["learning_rate"]

    broken = [row for row in rows if row["status"] == "failed"]
    assert {row["method"] for row in broken} == {"broken"}
    assert "cannot be decoded" in broken[0]["error"]

    assert sparse["images"] == 36
    assert (sparse["num_ensemble_heads"], sparse["num_head_layers"], sparse["num_hidden_layers"]) == (2, 1, 3)
    assert sparse["training_flops"] == sparse["training_flops_per_image"] * 36
    assert sparse["test_images"] == 12
    assert [point["severity"] for point in sparse["test_severities"]] == [0, 1, 5]
    corrupted = sparse["test_severities"][1:]
    for name in ("accuracy", "nll", "ece", "brier", "disagreement"):
        mean = statistics.fmean(point[name] for point in corrupted)
        assert sparse[f"test_corrupted_{name}"] == pytest.approx(mean)
    # The same by what an evaluation of the checkpoint finds.
    run = next(run for run in StudyPlan(config).main_runs({"set": sparse["learning_rate"]}))
    model = AutoModelForImageClassification.from_pretrained(run.folder).eval()
    figures = RobustnessTest(model, run.training.data).on(load_images(str(image_folder), "val"))
    assert sparse["test_nll"] == pytest.approx(figures["nll"])

    page = render_page(load_results(config.output_dir))
    assert f"<td>{100 * sparse['test_accuracy']:.2f}</td>" in page
    assert "perplexity" not in page


@pytest.mark.slow
def test_a_killed_study_goes_on(vision_study_config: MakeStudy, kill_at_work: KillStudy) -> None:
    config = vision_study_config(grids=[{"method": ["single", "set"]}], processes=1)
    config.training["max_steps"] = 36  # long enough to be killed at work
    kill_at_work(config, "set")
    folder = Path(config.output_dir) / "runs"
    results = Path(config.output_dir) / "results.jsonl"
    (single,) = (json.loads(line) for line in results.read_text().splitlines())
    pictures = {path: path.stat().st_mtime for path in Path(config.output_dir).glob("corrupted-*/*")}
    (seconds,) = folder.glob("set-*/seconds")
    assert 0 < float(seconds.read_text()) < 1000
    seconds.write_text("1000")

    rows = run_study(config)
    assert rows[0] == single
    assert [row["status"] for row in rows] == ["finished", "finished"]
    assert "resuming" in next(folder.glob("set-*/log.txt")).read_text()
    assert rows[1]["seconds"] > 1000, "of both parts"
    assert [point["step"] for point in rows[1]["curve"]] == list(range(3, 37, 3))
    assert pictures
    assert pictures == {path: path.stat().st_mtime for path in Path(config.output_dir).glob("corrupted-*/*")}
