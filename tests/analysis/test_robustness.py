# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Robustness of a small classifier, from Python and as a command."""

import json
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification

from nt_transformers import NeuroTrailsWideResNetConfig, NeuroTrailsWideResNetForImageClassification
from nt_transformers.analysis.robustness import RobustnessTest, mean_figures, plot_severity
from nt_transformers.data.corruptions import write_corrupted
from nt_transformers.data.image_batches import image_processor, preparation_of
from nt_transformers.data.images import ImageDataConfig, LabelledImages, load_images


SCRIPT = Path(__file__).parents[2] / "eval" / "robustness.py"
PREPARATION = ImageDataConfig(image_size=32, crop="none")


@pytest.fixture(scope="module")
def model() -> NeuroTrailsWideResNetForImageClassification:
    torch.manual_seed(0)
    labels = {"id2label": {0: "n01", 1: "n02", 2: "n03"}, "label2id": {"n01": 0, "n02": 1, "n03": 2}}
    config = NeuroTrailsWideResNetConfig(depth=10, widen_factor=1, num_head_blocks=1, num_ensemble_heads=2, **labels)
    return NeuroTrailsWideResNetForImageClassification(config).eval()


@pytest.fixture(scope="module")
def images(image_folder: Path) -> LabelledImages:
    return load_images(str(image_folder), "val")


def test_figures_are_those_of_the_corrupted_pictures(
    model: NeuroTrailsWideResNetForImageClassification, images: LabelledImages, tmp_path: Path
) -> None:
    test = RobustnessTest(model, PREPARATION, batch_size=5)
    names, severities = ["gaussian_noise", "contrast"], [1, 5]
    made = test.on_corrupted(images, names, severities)
    write_corrupted(images, PREPARATION, tmp_path, names)
    assert test.on_corrupted(tmp_path, names, severities) == made
    flat = [made["by_corruption"][name][severity] for name in names for severity in severities]
    for name in ("accuracy", "nll", "ece", "brier", "disagreement"):
        assert made["mean"][name] == pytest.approx(np.mean([figures[name] for figures in flat]))
    by_severity = [made["by_corruption"][name][5]["nll_heads"] for name in names]
    assert made["by_severity"][5]["nll_heads"] == pytest.approx(np.mean(by_severity, axis=0).tolist())
    assert test.on(images)["nll"] != made["mean"]["nll"]


def test_a_corruption_that_does_not_exist_is_named_before_any_is_measured(
    images: LabelledImages, tmp_path: Path
) -> None:
    test = RobustnessTest(None, PREPARATION)
    with pytest.raises(ValueError, match="corruption 'rain' does not exist"):
        test.on_corrupted(images, ["fog", "rain"])


def test_measuring_changes_nothing(model: NeuroTrailsWideResNetForImageClassification, images: LabelledImages) -> None:
    test = RobustnessTest(model, PREPARATION)
    expected, before = test.on(images), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        assert test.on(images) == expected
        model.train()
        assert test.on(images) == expected
        assert model.training
    finally:
        model.eval()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_processors_that_prepare_in_another_way_are_refused() -> None:
    for step in ("do_normalize", "do_rescale", "do_resize"):
        processor = image_processor(PREPARATION)
        setattr(processor, step, False)
        with pytest.raises(ValueError, match=f"'{step}': False.*expected all three steps"):
            preparation_of(processor)


def test_means_are_taken_head_by_head() -> None:
    one = {"accuracy": 0.5, "accuracy_heads": [0.2, 0.4], "images": 10}
    other = {"accuracy": 0.7, "accuracy_heads": [0.4, 0.8], "images": 10}
    means = mean_figures([one, other])
    assert set(means) == {"accuracy", "accuracy_heads"}
    assert means["accuracy"] == pytest.approx(0.6)
    assert means["accuracy_heads"] == pytest.approx([0.3, 0.6])


def test_plot(tmp_path: Path) -> None:
    figures: dict[str, Any] = {"accuracy": 0.9, "accuracy_heads": [0.8, 0.7]}
    result = {"clean": figures, "corrupted": {"by_severity": dict.fromkeys(range(1, 6), figures)}}
    plot_severity({"a": result, "b": result}, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as plot:
        assert plot.size == (900, 600)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--shifted {}/none", "no images at"),
        ("--model {}/none", "none"),
        ("--corruptions rain", "corruption 'rain' does not exist"),
        ("--severities 9", "severity 9 does not exist"),
        ("--corrupted {}", "corruption 'gaussian_noise' of severity 1 does not exist in"),
        ("--output {}", "name a file, in a folder that is there"),
        ("--plot {}/none/plot.png", "name a file, in a folder that is there"),
        ("--plot {}/plot.docx", "name a file that ends in one of .*png"),
        ("--plot {}/plot.png --corruptions", "draws accuracy over severity; name --corruptions"),
        ("--batch_size 0", "--batch_size 0"),
        ("--device nothing", "--device nothing"),
        ("--model {}/stock", "--model .*stock: ResNetForImageClassification has no heads"),
        ("--model {}/larger --write_corrupted {}/c", "--write_corrupted: the models differ in size"),
    ],
)
def test_a_mistake_ends_the_command_before_anything_is_measured(
    model: NeuroTrailsWideResNetForImageClassification,
    image_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: str,
    message: str,
) -> None:
    model.save_pretrained(tmp_path / "model")
    image_processor(PREPARATION).save_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "larger")
    image_processor(replace(PREPARATION, image_size=40)).save_pretrained(tmp_path / "larger")
    ResNetForImageClassification(ResNetConfig(hidden_sizes=[8], depths=[1], embedding_size=8)).save_pretrained(
        tmp_path / "stock"
    )
    given = f"--model {tmp_path}/model --data {image_folder} --split val --num_workers 0 "
    given += options.replace("{}", str(tmp_path))
    monkeypatch.setattr("sys.argv", [str(SCRIPT), *given.split()])
    monkeypatch.setattr(RobustnessTest, "_score", lambda *_: pytest.fail("something was measured"))
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stop.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.slow
def test_the_command_writes_figures_a_table_and_a_plot(
    model: NeuroTrailsWideResNetForImageClassification, image_folder: Path, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path / "model")
    image_processor(PREPARATION).save_pretrained(tmp_path / "model")
    options = f"--model {tmp_path}/model --data {image_folder} --split val --num_workers 1 --batch_size 4"
    corrupted = f"--corruptions fog pixelate --write_corrupted {tmp_path}/c --shifted {image_folder}/train"
    outputs = f"--output {tmp_path}/robustness.json --plot {tmp_path}/robustness.png"
    command = [sys.executable, str(SCRIPT), *f"{options} {corrupted} {outputs}".split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "robustness.json").read_text()).values()
    assert result["clean"]["images"] == 12
    assert result["shifted"][f"{image_folder}/train"]["images"] == 36
    assert set(result["corrupted"]["by_corruption"]) == {"fog", "pixelate"}
    assert f"{result['corrupted']['mean']['nll_probs_vote']:.4f}" in done.stdout
    assert "head 1" in done.stdout
    assert (tmp_path / "robustness.png").stat().st_size > 5000
