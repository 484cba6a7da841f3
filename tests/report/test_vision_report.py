# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The report on image classifiers: accuracy, corruption, and no word of perplexity."""

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from browser import check_rendering

from nt_transformers.report import draw_plots, load_results, render_page
from nt_transformers.report.plots import PAGE


pytest.importorskip("matplotlib")

METHODS = {"single": (1, 1.0, 0.60), "full_ensemble": (3, 1.0, 0.70), "neurotrails": (3, 0.2, 0.65)}


def make_row(method: str, seed: int, layers: int = 2, budget: str = "epochs") -> dict[str, Any]:
    """A row as a study leaves it, with made-up figures."""
    heads, density, accuracy = METHODS[method]
    accuracy += 0.01 * seed + 0.02 * layers + 0.05 * (budget == "flops")
    curve = [
        {"step": step, "images": 1000 * step, "eval_nll": 1.0, "eval_accuracy": accuracy * step / 10}
        | {"eval_disagreement": 0.3, "mask_overlap": 0.4, "explored": 0.6, "density": density}
        for step in (5, 10)
    ]
    figures = {"accuracy": accuracy, "nll": 1.1, "ece": 0.02, "brier": 0.5, "disagreement": 0.2 * (heads > 1)}
    lists = {"accuracy_heads": [accuracy - 0.03 * (heads > 1)] * heads, "nll_heads": [1.3] * heads}
    severities = [{"severity": level, **figures, "accuracy": accuracy - 0.1 * level} for level in (0, 1, 5)]
    return {
        "run": f"{method}-{layers}-{budget}-{seed}",
        "method": method,
        "budget": budget,
        "seed": seed,
        "status": "finished",
        "density": density,
        "num_ensemble_heads": heads,
        "num_head_layers": layers,
        "parameters": 80_000 * heads,
        "active_parameters": int(80_000 * heads * density),
        "forward_flops_per_image": 25e6 * heads * density,
        "training_flops": 7e12 * heads * density * (2 if budget == "flops" else 1),
        "images": 100_000,
        **{f"test_{name}": value for name, value in (figures | lists).items()},
        **{f"test_corrupted_{name}": 0.7 * value for name, value in figures.items()},
        "test_severities": severities,
        "test_reliability": [{"confidence": c, "accuracy": 0.9 * c, "share": 0.5} for c in (0.2, 0.8)],
        "layer_density": {
            "wide_resnet.backbone.stem.weight": 1.0,
            "wide_resnet.backbone.blocks.0.conv1.weight": 0.5,
            **{f"wide_resnet.heads.{m}.blocks.1.conv1.weight": 0.1 + 0.1 * m for m in range(heads)},
            **{f"classifiers.{m}.weight": 0.3 for m in range(heads)},
        },
        "curve": curve,
    }


@pytest.fixture
def study(tmp_path: Path) -> Path:
    rows = [make_row(method, seed) for method in METHODS for seed in range(3)]
    rows += [make_row("neurotrails", 0, layers=1), make_row("single", 0, budget="flops")]
    rows.append({**make_row("single", 0), "budget": "tuning"})
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_table_holds_clean_and_corrupted_figures(study: Path) -> None:
    page = render_page(load_results(study))
    cells = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    table = {row[0]: dict(zip(cells[0], row, strict=True)) for row in reversed(cells)}
    sparse = table["neurotrails"]
    accuracies = [100 * make_row("neurotrails", seed)["test_accuracy"] for seed in range(3)]
    mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
    assert sparse["accuracy, %"] == f"{mean:.2f} ± {deviation:.2f}"
    assert sparse["of the heads"] == f"{mean - 3:.2f} ± {deviation:.2f}"
    assert sparse["vote gain, points"] == "3.00"
    assert sparse["corrupted: accuracy, %"] == f"{0.7 * mean:.2f} ± {0.7 * deviation:.2f}"
    assert sparse["corrupted: NLL"] == "0.7700"
    assert (sparse["head blocks"], sparse["budget"], sparse["seeds"]) == ("2", "epochs", "3")
    assert "Equal training epochs" in page
    assert not re.search("perplexity|token|document", page, flags=re.IGNORECASE)


def test_plots_of_a_study(study: Path) -> None:
    page = render_page(load_results(study))
    expected = ["accuracy", "disagreement", "goldilocks", "severity", "inference_cost", "training_cost"]
    expected += ["head_length", "calibration", "layer_density", "mask_overlap"]
    assert re.findall(r'<figure id="(\w+)">', page) == expected


def test_the_front_joins_what_is_accurate_for_its_cost(study: Path) -> None:
    results = load_results(study)
    plot = next(plot for plot in draw_plots(results, PAGE) if plot.name == "inference_cost")
    (front,) = (line for line in plot.figure.axes[0].lines if line.get_linestyle() == ":")
    points = [(float(x), round(float(y), 6)) for x, y in zip(front.get_xdata(), front.get_ydata(), strict=True)]
    assert points == [(15.0, 70.0), (75.0, 75.0)]


def test_classifiers_are_heads_in_the_plot_of_densities(study: Path) -> None:
    plot = next(plot for plot in draw_plots(load_results(study), PAGE) if plot.name == "layer_density")
    labels = [label.get_text() for label in plot.figure.axes[0].get_xticklabels()]
    assert labels == ["base", "base 0", "head 1", "head"]


def test_a_single_run(tmp_path: Path) -> None:
    row = make_row("neurotrails", 0)
    config = {"sparsity.method": "neurotrails_vision", "model.num_head_blocks": None, "seed": 0}
    (tmp_path / "summary.json").write_text(json.dumps({**row, "config": config}))
    lines = [{"step": 1, "loss": 7.0}, *row["curve"]]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = render_page(load_results(tmp_path))
    assert "on test data" in page
    assert "<td>69.00</td>" in page
    assert "<td>all</td>" in page


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"test_bleu": 0.3, "config": {}}))
    with pytest.raises(ValueError, match="neither perplexities nor accuracies"):
        load_results(tmp_path)


@pytest.mark.slow
def test_it_renders_on_phone_and_desk(study: Path, tmp_path: Path) -> None:
    check_rendering(study, tmp_path, dark=True, plots=10)
