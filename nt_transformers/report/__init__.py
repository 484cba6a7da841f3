# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Runs and studies as one self-contained HTML page, and its plots as PNG.

python -m nt_transformers.report RUN_FOLDER_OR_STUDY --output report.html --png plots/
"""

from .page import render_page
from .plots import draw_plots
from .results import load_results


__all__ = ["draw_plots", "load_results", "render_page"]
