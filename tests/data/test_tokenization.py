# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Tokenizers: a clear error for one that is missing or does not fit."""

from pathlib import Path

import pytest

from nt_transformers.data import check_vocab_size, load_tokenizer


def test_load_and_check(tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    check_vocab_size(tokenizer, 320)
    with pytest.raises(ValueError, match="vocab_size of the model is 32000, but .* has 320 tokens: set"):
        check_vocab_size(tokenizer, 32000)


@pytest.mark.parametrize("name", ["/nowhere/tokenizer", "nowhere/tokenizer", "a b c"])
def test_no_such_tokenizer(name: str) -> None:
    with pytest.raises(ValueError, match=f"tokenizer: cannot load '{name}'"):
        load_tokenizer(name)


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer: cannot load"):
        load_tokenizer(str(tmp_path))


def test_tokenizer_without_end_of_sequence(tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_dir))
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no eos_token"):
        load_tokenizer(str(tmp_path))
