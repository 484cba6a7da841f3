# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Sparse models on CPUs: what is not there is neither stored nor read.

Importing registers the format of compressed checkpoints with transformers, so that `from_pretrained` reads them.
"""

from .adaptive import AdaptiveScores, AdaptiveVoting
from .compress import SparseWeightsConfig, compress, compressed_bytes
from .linear import SparseLinear
from .matrix import SparseMatrix


__all__ = [
    "AdaptiveScores",
    "AdaptiveVoting",
    "SparseLinear",
    "SparseMatrix",
    "SparseWeightsConfig",
    "compress",
    "compressed_bytes",
]
