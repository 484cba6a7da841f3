# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The command line on a tiny checkpoint."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from nt_transformers import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM


REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_it_measures_any_checkpoint(tmp_path: Path, corpus_dir: Path, tokenizer_dir: Path) -> None:
    torch.manual_seed(0)
    model = NeuroTrailsLlamaForCausalLM(
        NeuroTrailsLlamaConfig(
            vocab_size=320,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_ensemble_heads=3,
            num_head_layers=1,
            initializer_range=0.5,
        )
    )
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(tmp_path / "model")
    command = [
        sys.executable,
        "eval/diversity.py",
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(corpus_dir / "test"),
    ]
    command += ["--sequence_length", "32", "--text", "The farmer crosses", "--output", str(tmp_path / "figures.json")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (figures,) = json.loads((tmp_path / "figures.json").read_text()).values()
    mean_head_loss = sum(figures["eval_loss_heads"]) / 3
    assert figures["eval_loss"] + figures["eval_ambiguity"] == pytest.approx(mean_head_loss)
    assert f"{figures['eval_disagreement']:.4f}" in done.stdout
    assert figures["mask_overlap"] == 1  # dense
    assert "".join(row["token"] for row in figures["tokens"]).endswith("crosses")
    assert all(0 <= row["epistemic"] <= row["total"] for row in figures["tokens"])
