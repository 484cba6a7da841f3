# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Text for training and evaluation: documents, token sequences, tokenizers, and corpora prepared offline."""

from .documents import TextDataConfig, load_documents
from .provenance import Provenance, text_provenance
from .sequences import TokenSequences, sequence_loader, training_sequences, validation_sequences
from .tokenization import check_vocab_size, load_tokenizer


__all__ = [
    "Provenance",
    "TextDataConfig",
    "TokenSequences",
    "check_vocab_size",
    "load_documents",
    "load_tokenizer",
    "sequence_loader",
    "text_provenance",
    "training_sequences",
    "validation_sequences",
]
