# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The plots of a report, drawn once for the page (colours by CSS) and once for paper.

Each method keeps its colour and marker in all plots.
"""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from .kinds import Row, figure
from .results import Results, grouped, main_points, points, spread


# Eleven beside eight colours: 88 methods are told apart; lines by a dash from the ninth on.
MARKERS = "osD^vp<>PXh"


@dataclass(frozen=True)
class Theme:
    """Colours: of series in their order, text, lines of the grid, and what lies behind."""

    series: tuple[str, ...]
    text: str
    grid: str
    surface: str


PAPER = Theme(
    series=("#2a78d6", "#e34948", "#1baf7a", "#eda100", "#4a3aa7", "#eb6834", "#e87ba4", "#008300"),
    text="#1a1a19",
    grid="#dddcd8",
    surface="#ffffff",
)
# Colours that nothing else has; the page replaces them by its variables.
PAGE = Theme(
    series=tuple(f"#0101{number:02x}" for number in range(8)), text="#010201", grid="#010202", surface="#010203"
)
_VARIABLES = {colour: f"var(--series-{number})" for number, colour in enumerate(PAGE.series)} | {
    PAGE.text: "var(--text)",
    PAGE.grid: "var(--grid)",
    PAGE.surface: "var(--surface)",
}


@dataclass(frozen=True)
class Plot:
    """A plot with the words that go with it."""

    name: str
    title: str
    caption: str
    figure: Figure

    def svg(self) -> str:
        """The element to put into the page, coloured by its variables."""
        buffer = io.StringIO()
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": self.name}):
            self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        _, start, rest = buffer.getvalue().partition("<svg")
        svg = re.sub(r"<metadata>.*?</metadata>", "", start + rest, flags=re.DOTALL)
        for colour, variable in _VARIABLES.items():
            svg = svg.replace(colour, variable)
        return svg


class Artist:
    """Draws one set of results in one theme."""

    def __init__(self, results: Results, theme: Theme) -> None:
        self.rows = results.rows
        self.kind = results.kind
        self.words = self.kind.words
        self.theme = theme
        self.methods = list(dict.fromkeys(row["method"] for row in results.rows))
        self.main = main_points(results.rows)

    def plots(self) -> Iterator[Plot]:
        """Those plots for which there is something to show."""
        quality = self.kind.quality
        words = {**self.words, "quality": quality, "Quality": quality.capitalize()}
        for name, (title, caption, draw) in PLOTS.items():
            with mpl.rc_context(self._settings()):
                canvas, axes = plt.subplots(figsize=(5, 3.9), layout="constrained")
                drawn = draw(self, axes)
                plt.close(canvas)
            if drawn:
                name, title, caption = (text.format_map(words) for text in (name, title, caption))
                yield Plot(name, title, caption, canvas)

    def colour(self, method: str) -> str:
        return self.theme.series[self.methods.index(method) % len(self.theme.series)]

    def marker(self, method: str) -> str:
        return MARKERS[self.methods.index(method) % len(MARKERS)]

    def line(self, method: str) -> str:
        return "-" if self.methods.index(method) < len(self.theme.series) else "--"

    def _settings(self) -> dict[Any, Any]:
        theme = self.theme
        return {
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "font.family": "sans-serif",
            "font.size": 10,
            "text.color": theme.text,
            "axes.labelcolor": theme.text,
            "axes.edgecolor": theme.grid,
            "xtick.color": theme.text,
            "ytick.color": theme.text,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": theme.grid,
            "grid.linewidth": 0.6,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "legend.frameon": False,
            "legend.fontsize": 9,
            "lines.linewidth": 1.8,
            "lines.markersize": 5.5,
        }


def draw_plots(results: Results, theme: Theme) -> list[Plot]:
    """All plots of the results for which there is something to show."""
    return list(Artist(results, theme).plots()) if results.rows else []


def _curves(
    artist: Artist, axes: Axes, name: str, label: str, keep: Callable[[Row], bool], value: Callable[[Row], float]
) -> bool:
    drawn = False
    items = artist.words["items"]
    for method, rows in artist.main.items():
        curves = [row["curve"] for row in rows if keep(row) and len(row["curve"]) > 1 and name in row["curve"][0]]
        if not curves:
            continue
        steps = min(map(len, curves))
        seen = [spread([curve[i][items] for curve in curves])[0] / 1e6 for i in range(steps)]
        values = [spread([value(curve[i]) for curve in curves])[0] for i in range(steps)]
        axes.plot(seen, values, artist.line(method), color=artist.colour(method), label=method)
        drawn = True
    axes.set_xlabel(f"training {items} (millions)")
    axes.set_ylabel(label)
    _legend(axes)
    return drawn


def quality_curves(artist: Artist, axes: Axes) -> bool:
    kind = artist.kind
    if not kind.higher_is_better:
        axes.set_yscale("log")
        _plain_ticks(axes)
    label = f"validation {artist.words['vote']}"
    return _curves(artist, axes, f"eval_{kind.quality}", label, lambda row: True, kind.value)


def disagreement_curves(artist: Artist, axes: Axes) -> bool:
    name = "eval_disagreement"
    return _curves(artist, axes, name, "disagreement of two heads", _has_heads, lambda point: point[name])


def overlap_curves(artist: Artist, axes: Axes) -> bool:
    name, label = "mask_overlap", "overlap of two heads' masks"
    return _curves(artist, axes, name, label, lambda row: row["density"] < 1, lambda point: point[name])


def severity(artist: Artist, axes: Axes) -> bool:
    drawn = False
    for method, rows in artist.main.items():
        tested = [row["test_severities"] for row in rows if "test_severities" in row]
        if tested:
            levels = [point["severity"] for point in tested[0]]
            accuracies = [[100 * points[i]["accuracy"] for points in tested] for i in range(len(levels))]
            _error_bars(artist, axes, method, levels, accuracies)
            drawn = True
    axes.set_xlabel("severity of corruption (0: none)")
    axes.set_ylabel(artist.words["vote"])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)
    return drawn


def head_length(artist: Artist, axes: Axes) -> bool:
    drawn = False
    for method, main in artist.main.items():
        fixed = ("density", "num_ensemble_heads", "budget", "length")
        rows = [row for row in artist.rows if row["method"] == method and all(row[n] == main[0][n] for n in fixed)]
        lengths = grouped(rows, lambda row: row["num_head_layers"])
        if len(lengths) > 1:
            qualities = [[artist.kind.value(row) for row in lengths[length]] for length in sorted(lengths)]
            _error_bars(artist, axes, method, sorted(lengths), qualities)
            drawn = True
    axes.set_xlabel(f"{artist.words['layers']} in each head")
    axes.set_ylabel(artist.words["vote"])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(axes)
    return drawn


def goldilocks(artist: Artist, axes: Axes) -> bool:
    rows = [row for row in artist.rows if _has_heads(row)]
    for method, own in grouped(rows, lambda row: row["method"]).items():
        _scatter(artist, axes, method, [figure(row, "disagreement") for row in own], list(map(artist.kind.gain, own)))
    axes.set_xlabel("disagreement of two heads")
    axes.set_ylabel(artist.words["gain"])
    _legend(axes)
    return bool(rows)


def inference_cost(artist: Artist, axes: Axes) -> bool:
    item = artist.words["item"]
    axes.set_xlabel(f"forward FLOPs per {item} (millions)")
    return _pareto(artist, axes, f"forward_flops_per_{item}", 1e6)


def training_cost(artist: Artist, axes: Axes) -> bool:
    axes.set_xlabel("training FLOPs (10¹²)")
    return _pareto(artist, axes, "training_flops", 1e12)


def _pareto(artist: Artist, axes: Axes, cost: str, unit: float) -> bool:
    rows = [row for row in artist.rows if row.get(cost) is not None]
    found = [(_mean(own, lambda row: row[cost]) / unit, _mean(own, artist.kind.value), own[0]) for own in points(rows)]
    for method, own in grouped((row for *_, row in found), lambda row: row["method"]).items():
        mine = [(x, y) for x, y, row in found if any(row is other for other in own)]
        _scatter(artist, axes, method, *zip(*mine, strict=True))
    sign = -1 if artist.kind.higher_is_better else 1
    front = [
        (x, y)
        for x, y, _ in found
        if not any(u <= x and sign * v <= sign * y and (u, v) != (x, y) for u, v, _ in found)
    ]
    axes.plot(*zip(*sorted(front), strict=True), color=artist.theme.text, linewidth=1, linestyle=":", zorder=0)
    axes.set_ylabel(artist.words["vote"])
    _legend(axes)
    return len(found) > 1


def calibration(artist: Artist, axes: Axes) -> bool:
    drawn = False
    for method, rows in artist.main.items():
        bins = figure(rows[0], "reliability")
        if bins:
            axes.plot(
                [b["confidence"] for b in bins],
                [b["accuracy"] for b in bins],
                color=artist.colour(method),
                marker=artist.marker(method),
                label=method,
            )
            drawn = True
    axes.plot([0, 1], [0, 1], color=artist.theme.text, linewidth=1, linestyle=":", zorder=0)
    axes.set_xlabel("confidence of the vote")
    axes.set_ylabel("accuracy")
    _legend(axes)
    return drawn


def layer_density(artist: Artist, axes: Axes) -> bool:
    """A cell for each kind of tensor and layer of the sparsest main run; several heads are averaged."""
    sparse = [rows[0] for rows in artist.main.values() if rows[0]["density"] < 1 and "layer_density" in rows[0]]
    if not sparse:
        return False
    cells = _cells(min(sparse, key=lambda row: row["density"])["layer_density"])
    layers = list(dict.fromkeys(layer for layer, _ in cells))
    kinds = list(dict.fromkeys(kind for _, kind in cells))
    for (layer, kind), densities in cells.items():
        x, y, density = layers.index(layer), kinds.index(kind), spread(densities)[0]
        axes.add_patch(
            plt.Rectangle((x - 0.5, y - 0.5), 1, 1, color=artist.theme.series[0], alpha=0.75 * density, lw=0)
        )
        axes.text(x, y, f"{density:.2f}".removeprefix("0"), ha="center", va="center", fontsize=8)
    axes.set_xticks(range(len(layers)), layers, fontsize=8)
    axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.grid(False)
    return True


def _cells(densities: dict[str, float]) -> dict[tuple[str, str], list[float]]:
    """Densities by place (backbone or head, with the layer's number) and kind of tensor."""
    cells: dict[tuple[str, str], list[float]] = {}
    for name, density in densities.items():
        parts = name.removesuffix(".weight").split(".")
        numbers = [part for part in parts if part.isdigit()]
        in_head = any(part.endswith("heads") or part == "classifiers" for part in parts)
        is_layer = any(part in ("layers", "blocks") for part in parts)
        place = f"{'head' if in_head else 'base'} {numbers[-1]}" if is_layer else ("head" if in_head else "base")
        kind = next(part for part in reversed(parts) if not part.isdigit())
        cells.setdefault((place, kind), []).append(density)
    return cells


def _error_bars(artist: Artist, axes: Axes, method: str, x: Sequence[float], seeds: Sequence[list[float]]) -> None:
    """Mean over seeds with its standard deviation at each x."""
    values = [spread(own) for own in seeds]
    axes.errorbar(
        x,
        [mean for mean, _ in values],
        yerr=[deviation or 0.0 for _, deviation in values],
        color=artist.colour(method),
        marker=artist.marker(method),
        capsize=2,
        label=method,
    )


def _scatter(artist: Artist, axes: Axes, method: str, x: Sequence[float], y: Sequence[float]) -> None:
    axes.scatter(
        x,
        y,
        s=42,
        color=artist.colour(method),
        marker=artist.marker(method),
        edgecolors=artist.theme.surface,
        linewidths=0.5,
        label=method,
    )


def _mean(rows: Sequence[Row], value: Callable[[Row], float]) -> float:
    return spread([value(row) for row in rows])[0]


def _has_heads(row: Row) -> bool:
    return bool(row["num_ensemble_heads"] > 1)


def _plain_ticks(axes: Axes) -> None:
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_formatter(plain)
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))


def _legend(axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        canvas = axes.get_figure()
        assert canvas is not None
        canvas.legend(handles, labels, loc="outside lower center", ncols=3)


# Name, title, caption, which leave words to the kind of results, and what draws.
PLOTS: dict[str, tuple[str, str, Callable[[Artist, Axes], bool]]] = {
    "{quality}": (
        "{Quality} over training",
        "On validation {data}; mean over seeds, at equal training {equal}.",
        quality_curves,
    ),
    "disagreement": (
        "Disagreement over training",
        "Share of {items} on which two heads hold different {answers} for the most likely one.",
        disagreement_curves,
    ),
    "goldilocks": (
        "Vote gain over disagreement",
        "A point for each run with several heads: how much the vote gains on its heads, against how much they differ.",
        goldilocks,
    ),
    "severity": (
        "Accuracy over severity of corruption",
        "Mean over corruptions, all on the same test images; bars are standard deviations over seeds.",
        severity,
    ),
    "inference_cost": (
        "Quality against cost of inference",
        "Mean over seeds, all budgets. FLOPs count the weights that exist. The dotted line joins what nothing beats.",
        inference_cost,
    ),
    "training_cost": (
        "Quality against cost of training",
        "The same against the FLOPs of the whole training.",
        training_cost,
    ),
    "head_length": (
        "{Quality} over head length",
        "For each method at its main density and number of heads; bars are standard deviations over seeds.",
        head_length,
    ),
    "calibration": (
        "Calibration of the vote",
        "Accuracy of {items} predicted with a confidence, first seed; on the dotted line confidence is honest.",
        calibration,
    ),
    "layer_density": (
        "Density of layers",
        "Share of weights that exist, at the end of the sparsest main run; heads are averaged.",
        layer_density,
    ),
    "mask_overlap": (
        "Overlap of masks over training",
        "Of the weights that one or the other of two heads has, the share that both have.",
        overlap_curves,
    ),
}
