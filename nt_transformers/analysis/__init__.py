# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Measures of trained ensembles."""

from .perplexity import EnsembleScores, score_language_model
from .unigram import unigram_perplexity


__all__ = ["EnsembleScores", "score_language_model", "unigram_perplexity"]
