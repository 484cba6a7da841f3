# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The report says what the results say, stands alone, and can be read on phone and desk, by day and by night."""

import json
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import check_rendering

from nt_transformers.report import draw_plots, load_results, render_page
from nt_transformers.report.plots import PAGE, PAPER, Artist


pytest.importorskip("matplotlib")

METHODS = {"single": (1, 1.0, 99.0), "full_ensemble": (3, 1.0, 85.0), "rigl": (3, 0.5, 90.0)}


def make_row(method: str, seed: int, layers: int = 2, budget: str = "tokens") -> dict[str, Any]:
    """A row as a study leaves it, with made-up figures."""
    heads, density, perplexity = METHODS[method]
    perplexity += seed + 3 * layers + (budget == "flops")
    curve = [
        {"step": step, "tokens": 1000 * step, "eval_loss": 5.0, "eval_perplexity": perplexity * 10 / step}
        | {"eval_disagreement": 0.3 + 0.01 * step, "mask_overlap": 0.4, "explored": 0.6, "density": density}
        for step in (5, 10)
    ]
    return {
        "run": f"{method}-{layers}-{budget}-{seed}",
        "method": method,
        "budget": budget,
        "seed": seed,
        "status": "finished",
        "density": density,
        "num_ensemble_heads": heads,
        "num_head_layers": layers,
        "learning_rate": 1e-3,
        "parameters": 1_000_000 * heads,
        "active_parameters": int(1_000_000 * heads * density),
        "forward_flops_per_token": 2e6 * heads * density,
        "training_flops": 6e12 * heads * density,
        "tokens": 10_000,
        "test_loss": 4.5,
        "test_perplexity": perplexity,
        "test_perplexity_heads": [1.1 * perplexity] * heads,
        "test_disagreement": 0.3 * (heads > 1),
        "test_ece": 0.02,
        "test_brier": 0.7,
        "test_reliability": [{"confidence": c, "accuracy": 0.9 * c, "share": 0.5} for c in (0.2, 0.8)],
        "layer_density": {
            "model.embed_tokens.weight": 0.2,
            "model.layers.0.mlp.up_proj.weight": 0.5,
            **{f"model.heads.{m}.layers.0.mlp.up_proj.weight": 0.4 + 0.1 * m for m in range(heads)},
            **{f"lm_heads.{m}.weight": 0.25 for m in range(heads)},
        },
        "curve": curve,
    }


@pytest.fixture
def study(tmp_path: Path) -> Path:
    rows = [make_row(method, seed) for method in METHODS for seed in range(3)]
    rows += [
        make_row("rigl", 0, layers=1),
        make_row("rigl", 0, budget="flops"),
        {**make_row("rigl", 0), "length": 2.0},
    ]
    rows.append({**make_row("single", 0), "budget": "tuning", "test_perplexity": 12345.0})
    rows.append(
        {"run": "set-0", "method": "set", "budget": "tokens", "status": "failed", "exit_code": 9, "error": "a < b"}
    )
    folder = tmp_path / "my_study"
    folder.mkdir()
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "study.json").write_text(json.dumps({"setting": "Two documents & no epoch."}))
    return folder


def test_the_table_holds_means_and_spreads(study: Path) -> None:
    page = render_page(load_results(study))
    values = [make_row("rigl", seed)["test_perplexity"] for seed in range(3)]
    assert f"<td>{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}</td>" in page
    rows = [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    rows = [row for row in rows if row[0] in METHODS]
    assert [(row[0], *row[-6:]) for row in rows[:3]] == [
        ("single", "1", "1", "2", "tokens", "1", "3"),
        ("full_ensemble", "1", "3", "2", "tokens", "1", "3"),
        ("rigl", "0.5", "3", "2", "tokens", "1", "3"),
    ]
    assert [tuple(row[:7]) for row in rows[3:]] == [
        ("rigl", "0.5", "3", "1", "tokens", "1", "1"),
        ("rigl", "0.5", "3", "2", "flops", "1", "1"),
        ("rigl", "0.5", "3", "2", "tokens", "2", "1"),
    ], "points of a grid are told apart at the left"
    assert "12345" not in page  # runs that tuned a learning rate
    assert "Two documents &amp; no epoch." in page
    assert "a &lt; b" in page
    assert "12 finished runs, 1 failed" in page


def test_the_page_needs_no_network(study: Path) -> None:
    page = render_page(load_results(study))
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert "http" not in without_namespaces
    assert not re.search(r"<script|<link|<img|@import", page)
    assert all(target.startswith("#") for target in re.findall(r'(?:href|src)="([^"]*)"', page))


def test_plots_of_a_study(study: Path) -> None:
    results = load_results(study)
    page = render_page(results)
    expected = ["perplexity", "disagreement", "goldilocks", "inference_cost", "training_cost", "head_length"]
    expected += ["calibration", "layer_density", "mask_overlap"]
    assert re.findall(r'<figure id="(\w+)">', page) == expected
    # Colours come from the page's variables alone, so that they follow the theme.
    drawn = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", drawn)) <= {"#000000"}
    assert {f"var(--series-{number})" for number in range(3)} <= set(re.findall(r"var\(--series-\d\)", drawn))


def test_many_methods_look_different(study: Path) -> None:
    results = load_results(study)
    names = [f"method {number}" for number in range(20)]
    artist = Artist(replace(results, rows=[{**results.rows[0], "method": name} for name in names]), PAPER)
    assert len({(artist.colour(name), artist.marker(name)) for name in names}) == 20
    assert len({(artist.colour(name), artist.line(name)) for name in names[:16]}) == 16


def test_a_single_run(tmp_path: Path) -> None:
    row = make_row("rigl", 0)
    row = {name.replace("test_", "eval_"): value for name, value in row.items()}
    config = {"sparsity.method": "rigl", "model.num_head_layers": 2, "model.num_hidden_layers": 3, "seed": 0}
    summary = {**row, "eval_loss_heads": [1.0, 1.0, 1.0], "config": config}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    training = {"step": 1, "loss": 7.0}
    lines = [training, *row["curve"]]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    results = load_results(tmp_path)
    page = render_page(results)
    assert "on validation data" in page
    assert "<td>96.00</td>" in page
    assert {"perplexity", "calibration", "layer_density", "mask_overlap"} <= {
        p.name for p in draw_plots(results, PAGE)
    }


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a run"):
        load_results(tmp_path)
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(ValueError, match="no run has finished"):
        load_results(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_renders_on_phone_and_desk(study: Path, tmp_path: Path, dark: bool) -> None:
    check_rendering(study, tmp_path, dark, plots=9)
