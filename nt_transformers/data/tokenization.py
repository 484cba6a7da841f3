# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Tokenizers, and what a training run asks of one."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase


def load_tokenizer(name_or_path: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from the hub or a local folder.

    Raises:
        ValueError: there is none of that name, or it has no end-of-sequence token (which separates documents).
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"tokenizer: cannot load {name_or_path!r}: {error} Name a local folder that holds a tokenizer, or a "
            "tokenizer of the hub."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer: {name_or_path!r} has no eos_token, which ends every document: set one and save.")
    return tokenizer


def check_vocab_size(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise a `ValueError` unless the model's `vocab_size` is the number of the tokenizer's tokens."""
    if len(tokenizer) != vocab_size:
        raise ValueError(
            f"vocab_size of the model is {vocab_size}, but the tokenizer {tokenizer.name_or_path!r} has "
            f"{len(tokenizer)} tokens: set vocab_size to {len(tokenizer)} or choose another tokenizer."
        )
