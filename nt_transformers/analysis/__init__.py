# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Measures of trained ensembles: quality, calibration, diversity, topology, and what they cost."""

from .calibration import expected_calibration_error, prediction_sums, reliability_diagram
from .classification import score_classifier
from .cost import LayerCost, ModelCost, count_cost, count_nonzeros, image_model_cost, language_model_cost
from .diversity import cross_entropy_sums, disagreement_counts, log_mean_probs, mean_of_pairs, mutual_information
from .perplexity import score_language_model
from .scores import EnsembleScores
from .topology import mask_overlap, topology_figures, weight_masks
from .unigram import unigram_perplexity


__all__ = [
    "EnsembleScores",
    "LayerCost",
    "ModelCost",
    "count_cost",
    "count_nonzeros",
    "cross_entropy_sums",
    "disagreement_counts",
    "expected_calibration_error",
    "image_model_cost",
    "language_model_cost",
    "log_mean_probs",
    "mask_overlap",
    "mean_of_pairs",
    "mutual_information",
    "prediction_sums",
    "reliability_diagram",
    "score_classifier",
    "score_language_model",
    "topology_figures",
    "unigram_perplexity",
    "weight_masks",
]
