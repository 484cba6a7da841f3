# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Turns a run or a study into one HTML file that needs no network.

python -m nt_transformers.report runs/study_text --output report.html --png plots/
"""

import argparse
from pathlib import Path


def main() -> None:
    args = parse_args()
    try:
        from . import draw_plots, load_results, render_page
        from .plots import PAPER
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error}: the report draws with matplotlib; pip install 'nt_transformers[plots]'") from error
    try:
        results = load_results(args.source)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    args.output.write_text(render_page(results), encoding="utf-8")
    print(f"wrote {args.output}")
    if args.png is not None:
        args.png.mkdir(parents=True, exist_ok=True)
        for plot in draw_plots(results, PAPER):
            plot.figure.savefig(args.png / f"{plot.name}.png", dpi=200, facecolor=PAPER.surface)
        print(f"wrote {args.png}/*.png")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m nt_transformers.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="folder of a study or of a run, or a study's results.jsonl")
    parser.add_argument("--output", type=Path, default=Path("report.html"), help="the page (default: %(default)s)")
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="also write the plots as PNG")
    return parser.parse_args()


if __name__ == "__main__":
    main()
