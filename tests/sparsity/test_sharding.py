# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The sparsifier on two processes: DDP and FSDP2 choose the masks that one process chooses."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch


SCRIPT = Path(__file__).parent / "scripts" / "engines.py"
METHODS = list(runpy.run_path(str(SCRIPT))["METHODS"])
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("engines")
    launch(2, SCRIPT, folder)
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_train_as_one(ranks: list[dict[str, Any]], engine: str, method: str) -> None:
    alone = ranks[0][f"{method} alone"]
    assert len({str(masks) for masks in alone["masks"]}) >= 4, "the topology changes"
    for rank in ranks:
        shared = rank[f"{method} {engine}"]
        for name in alone["weights"]:
            torch.testing.assert_close(shared["weights"][name], alone["weights"][name], rtol=1e-9, atol=1e-12)
        for ours, theirs in zip(shared["masks"], alone["masks"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        torch.testing.assert_close(shared["norms"], alone["norms"], rtol=1e-9, atol=0)
        assert shared["explored"] == alone["explored"]


def test_the_weights_of_both_processes_are_equal_bit_for_bit(ranks: list[dict[str, Any]]) -> None:
    for name, first in ranks[0].items():
        if "weights" in first:
            torch.testing.assert_close(first["weights"], ranks[1][name]["weights"], rtol=0, atol=0)


def test_masks_are_sharded_like_their_parameters(ranks: list[dict[str, Any]]) -> None:
    for name in ranks[0]["update"]["parts"]:
        parts = [rank["update"]["parts"][name] for rank in ranks]
        assert all(mask == parameter for mask, parameter, _ in parts)
        assert all(sum(mask.numel() for mask, *_ in parts) == whole.numel() for *_, whole in parts)


def test_an_update_gathers_one_tensor_at_a_time(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        together = rank["update"]["gathered_together"]
        assert {len(shapes) for shapes in together} == {1}
        # The fourth is dense by ERK and does not change.
        assert len(set.union(*together)) == 3


def test_a_state_of_one_process_continues_sharded(ranks: list[dict[str, Any]]) -> None:
    whole, resumed = ranks[0]["uninterrupted"], ranks[0]["resumed"]
    torch.testing.assert_close(resumed["masks"], whole["masks"][5:], rtol=0, atol=0)
    torch.testing.assert_close(resumed["weights"], whole["weights"], rtol=1e-9, atol=1e-12)
    assert resumed["explored"] == whole["explored"]
