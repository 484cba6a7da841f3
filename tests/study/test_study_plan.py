# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Which runs a study consists of, and that its budgets are equal."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from nt_transformers.study import RunSpec, StudyConfig, StudyPlan
from nt_transformers.training import parse_arguments


MakeStudy = Callable[..., StudyConfig]
RATES = {"single": 1e-2, "ensemble": 1e-2, "set": 1e-2}


def test_every_combination_once_and_in_order(study_config: MakeStudy) -> None:
    grids = [
        {"method": ["single", "set"], "seed": [0, 1]},
        {"method": ["set"], "density": [0.5, 0.8], "num_head_layers": [1, 2]},
    ]
    plan = StudyPlan(study_config(grids=grids))
    runs = [(run.spec.method, run.training.sparsity.density, run.spec.seed) for run in plan.main_runs(RATES)]
    # `set` at density 0.8 with one head layer is what `set` is by itself.
    assert runs == [
        ("single", 1, 0),
        ("single", 1, 1),
        ("set", 0.8, 0),
        ("set", 0.8, 1),
        ("set", 0.5, 0),
        ("set", 0.5, 0),
        ("set", 0.8, 0),
    ]
    assert [run.training.model.num_head_layers for run in plan.main_runs(RATES)[4:]] == [1, 2, 2]


def test_equal_flops(study_config: MakeStudy) -> None:
    config = study_config(grids=[{"method": ["single", "ensemble", "set"], "budget": ["tokens", "flops"]}])
    config.training["max_steps"] = 1000
    runs = {(run.spec.method, run.spec.budget): run for run in StudyPlan(config).main_runs(RATES)}
    for method in RATES:
        assert runs[method, "tokens"].training.max_steps == 1000
        assert runs[method, "flops"].total_flops == pytest.approx(runs["ensemble", "tokens"].total_flops, rel=1e-3)
    assert runs["single", "flops"].training.max_steps == 2000
    assert 1000 < runs["set", "flops"].training.max_steps < 2000


def test_longer_training(study_config: MakeStudy) -> None:
    grid = {"method": ["set"], "budget": ["tokens", "flops"], "length": [1, 1.5]}
    config = study_config(grids=[grid])
    config.training["max_steps"] = 1000
    runs = StudyPlan(config).main_runs(RATES)
    steps = [run.training.max_steps for run in runs]
    assert steps[0] == 1000
    assert (steps[1], steps[3]) == (1500, pytest.approx(1.5 * steps[2], abs=1))
    assert len({run.name for run in runs}) == 4


def test_a_run_is_another_run_when_anything_that_counts_changes(study_config: MakeStudy) -> None:
    config = study_config()
    name = StudyPlan(config).run(RunSpec("set")).name
    config.processes = 1
    assert StudyPlan(config).run(RunSpec("set")).name == name
    config.training["adam_beta2"] = 0.99
    assert StudyPlan(config).run(RunSpec("set")).name != name


def test_every_method_tries_every_learning_rate(study_config: MakeStudy) -> None:
    plan = StudyPlan(study_config(learning_rates=[1e-3, 1e-2], tuning_steps=2))
    tried = {(run.spec.method, run.training.learning_rate) for run in plan.tuning_runs()}
    assert tried == {(method, rate) for method in RATES for rate in (1e-3, 1e-2)}
    assert {run.training.max_steps for run in plan.tuning_runs()} == {2}
    assert StudyPlan(study_config()).tuning_runs() == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grids": [{"method": ["rigl"]}]}, r"grids\[0\].method='rigl': choose from .*single, ensemble, set"),
        ({"flops_reference": "rigl"}, "flops_reference='rigl'"),
        ({"learning_rates": [1e-3, 1e-2]}, "tuning_steps=None"),
        ({"training": {"seed": 3}}, "training.seed=3: leave it to the study"),
        ({"processes": 3}, "processes=3"),
        ({"grids": [{"method": ["set"], "length": [1, 0]}]}, r"grids\[0\].length=0.0: give a multiple"),
        (
            {"methods": {"single": {}, "set": {}, "ensemble": {"max_steps": 9}}},
            "methods.ensemble.max_steps=9: leave it out",
        ),
    ],
)
def test_mistakes_are_named(study_config: MakeStudy, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study_config(**fields)


def test_a_method_that_makes_no_run_is_named(study_config: MakeStudy) -> None:
    config = study_config()
    config.methods["single"]["sparsity"] = {"method": "sparse"}
    with pytest.raises(ValueError, match=r"(?s)methods.single: .*sparse"):
        StudyPlan(config).run(RunSpec("single"))


def test_no_value_is_lost_when_another_is_given_again(capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(__file__).parents[2] / "recipes" / "configs" / "study_text.yaml"
    arguments = ["--config", str(file), "--training.max_steps=7"]
    config = parse_arguments(StudyConfig, "test", arguments)
    assert config.training == yaml.safe_load(file.read_text())["training"] | {"max_steps": 7}
    with pytest.raises(SystemExit):
        parse_arguments(StudyConfig, "test", [*arguments, "--training.data.train", "elsewhere"])
    assert "training.data.train: training.data cannot be changed in part" in capsys.readouterr().err
