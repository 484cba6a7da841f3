# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Greedy generation by small models, and its comparison."""

from typing import Any

import torch


TOKENS = torch.randint(1, 99, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(TOKENS)


def generate(model: Any, batch: int = 1, **kwargs: Any) -> Any:
    return model.generate(
        TOKENS[:batch],
        attention_mask=MASK[:batch],
        **{"max_new_tokens": 12, "do_sample": False, **kwargs},
        return_dict_in_generate=True,
        output_logits=True,
    )


def assert_same_generation(first: Any, second: Any) -> None:
    assert torch.equal(first.sequences, second.sequences)
    for a, b in zip(first.logits, second.logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
