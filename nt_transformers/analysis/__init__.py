# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Measures of trained ensembles, and what they cost."""

from .cost import LayerCost, ModelCost, count_cost, count_nonzeros, image_model_cost, language_model_cost
from .perplexity import EnsembleScores, score_language_model
from .unigram import unigram_perplexity


__all__ = [
    "EnsembleScores",
    "LayerCost",
    "ModelCost",
    "count_cost",
    "count_nonzeros",
    "image_model_cost",
    "language_model_cost",
    "score_language_model",
    "unigram_perplexity",
]
