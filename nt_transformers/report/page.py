# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The page: tables and plots in one HTML file that needs nothing else."""

from collections.abc import Callable, Sequence
from html import escape
from importlib.resources import files

from .kinds import Kind, Row
from .plots import PAGE, draw_plots
from .results import Results, main_points, points, spread


def render_page(results: Results) -> str:
    """The HTML of a report."""
    sections = [_introduction(results)]
    if results.rows:
        main = list(main_points(results.rows).values())
        rest = [group for group in points(results.rows) if group not in main]
        sections.append(_table(f"Equal training {results.kind.words['equal']}", main, results.kind))
        sections.append('<div class="plots">' + "".join(_plots(results)) + "</div>")
        if rest:
            sections.append(_table("All other points of the grids", rest, results.kind, points_first=True))
    if results.failed:
        sections.append(_failures(results.failed))
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(results.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(sections)
        + "\n</main>\n</body>\n</html>\n"
    )


def _introduction(results: Results) -> str:
    measured = "test" if any(f"test_{results.kind.quality}" in row for row in results.rows) else "validation"
    runs = f"{len(results.rows)} finished runs" if len(results.rows) != 1 else "1 finished run"
    failed = f", {len(results.failed)} failed" if results.failed else ""
    return (
        f"<header><h1>{escape(results.title)}</h1><p>{escape(results.setting)}</p><p>{runs}{failed}. Figures are "
        f"measured on {measured} data; ± is the standard deviation over seeds.</p></header>"
    )


def _table(title: str, groups: Sequence[list[Row]], kind: Kind, *, points_first: bool = False) -> str:
    figures = [heading for heading, _, _ in kind.columns]
    # What tells the points of a grid apart.
    point = ["density", "heads", f"head {kind.words['layers']}", "budget", "length", "seeds"]
    headings = ["method", *(point + figures if points_first else figures + point)]
    header = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join(f"<tr>{''.join(_cells(group, kind, points_first))}</tr>" for group in groups)
    return (
        f'<section><h2>{escape(title)}</h2><div class="scroll" tabindex="0"><table><thead><tr>{header}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>"
    )


def _cells(group: list[Row], kind: Kind, points_first: bool) -> list[str]:
    row = group[0]
    split = [f"{row['density']:g}", row["num_ensemble_heads"], row["num_head_layers"]]
    point = [*split, row["budget"], f"{row['length']:g}", len(group)]
    figures = [_number(group, value, form) for _, value, form in kind.columns]
    cells = point + figures if points_first else figures + point
    return [f"<th>{escape(row['method'])}</th>", *(f"<td>{escape(str(cell))}</td>" for cell in cells)]


def _number(group: list[Row], value: Callable[[Row], float | None], form: str) -> str:
    values = [number for row in group if (number := value(row)) is not None]
    if not values:
        return "–"  # noqa: RUF001 (a dash, as tables have it)
    mean, deviation = spread(values)
    text = format(mean, form)
    return f"{text} ± {deviation:{form}}" if deviation and float(format(deviation, form)) else text


def _plots(results: Results) -> list[str]:
    return [
        f'<figure id="{plot.name}"><h2>{escape(plot.title)}</h2>{plot.svg()}'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
        for plot in draw_plots(results, PAGE)
    ]


def _failures(failed: Sequence[Row]) -> str:
    items = "".join(
        f"<details><summary>{escape(row['run'])}, exit code {row['exit_code']}</summary>"
        f"<pre>{escape(row['error'])}</pre></details>"
        for row in failed
    )
    return f"<section><h2>Runs that broke</h2>{items}</section>"
