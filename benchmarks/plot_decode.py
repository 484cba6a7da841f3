# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Draws what decode.py measured.

python benchmarks/plot_decode.py results/inference/decode.json docs/inference.png
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl


mpl.use("agg")

from matplotlib import pyplot as plt


DENSITIES = (0.1, 0.2, 0.5, 0.9)
VALUES = ("bf16", "int8")
COLORS = {"bf16": "#1f77b4", "int8": "#d95f02"}


def draw(figures: dict[str, float], output: Path) -> None:
    """Two panels: speed by density, and speed by length of the context at density 0.2."""
    figure, (by_density, by_context) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for values in VALUES:
        for other, style in (("dense_single", "o-"), ("tuned_single", "s--")):
            label = f"{values}, over one dense network {'in torch' if other == 'dense_single' else 'on our kernel'}"
            keys = {density: f"neurotrails_{density}_{values}_over_{other}" for density in DENSITIES}
            ratios = {density: figures[key] for density, key in keys.items() if key in figures}
            by_density.plot(list(ratios), list(ratios.values()), style, color=COLORS[values], label=label)
            name = f"neurotrails_0.2_{values}_over_{other}"
            contexts = {128: name, 512: f"context_512_{name}", 2048: f"context_2048_{name}"}
            by_context.plot(list(contexts), [figures[key] for key in contexts.values()], style, color=COLORS[values])
    by_density.set(xlabel="density of all three heads and the backbone", ylabel="ratio of tokens/s")
    by_context.set(xlabel="tokens of context (density 0.2)", xscale="log", xticks=[128, 512, 2048])
    by_context.get_xaxis().set_major_formatter(mpl.ticker.ScalarFormatter())
    by_context.minorticks_off()
    for axes in (by_density, by_context):
        axes.axhline(1, color="gray", linewidth=0.8)
        axes.set_ylim(bottom=0)
    by_density.legend(fontsize="small")
    figure.savefig(output, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", type=Path, help="JSON file of decode.py (not --quick)")
    parser.add_argument("output", type=Path, help="image to write")
    args = parser.parse_args()
    draw(json.loads(args.figures.read_text()), args.output)


if __name__ == "__main__":
    main()
