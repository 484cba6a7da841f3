# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Zero-shot evaluation of every head and both votes against that of the vote alone.

    python benchmarks/zero_shot.py [--quick] [--json FILE]

Both are whole runs of lm-eval (prompts, tokens, model, metrics, standard errors) on its HellaSwag task, with made-up
documents of four endings in the place of the data. The model has hidden size 256, 8 layers, 5 of them in each of 3
heads, vocabulary 4096. The plain run is lm-eval's own `HFLM`.
"""

import argparse
import random
import string
import tempfile
from collections.abc import Callable
from pathlib import Path

import lm_eval
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from harness import parse_args, report, time_interleaved
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerBase

from nt_transformers import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM
from nt_transformers.data.prepare import train_tokenizer
from nt_transformers.evaluation import NeuroTrailsLM, PerHeadTaskManager
from nt_transformers.evaluation.offline import write_tasks


BATCH = 16
CONFIG = NeuroTrailsLlamaConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=688,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_ensemble_heads=3,
    num_head_layers=5,
)


def make_text(rng: random.Random, words: int) -> str:
    """Made-up words of two to eight letters."""
    return " ".join("".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 8))) for _ in range(words))


def make_documents(rng: random.Random, number: int) -> pa.Table:
    """HellaSwag's columns, its texts about as long as there."""
    rows = [
        {
            "activity_label": make_text(rng, 2),
            "ctx_a": make_text(rng, 20),
            "ctx_b": make_text(rng, 3),
            "endings": [make_text(rng, 12) for _ in range(4)],
            "label": str(rng.randrange(4)),
        }
        for _ in range(number)
    ]
    return pa.Table.from_pylist(rows)


def evaluation(lm: HFLM, members: list[str], tasks: Path) -> Callable[[], object]:
    """A function that evaluates `lm`, and the members of its ensemble that are named."""
    return lambda: lm_eval.simple_evaluate(
        lm,
        tasks=["hellaswag"],
        num_fewshot=0,
        log_samples=False,
        task_manager=PerHeadTaskManager(members, include_path=tasks, include_defaults=False),
    )


def main() -> None:
    """Time both evaluations in turn and report."""
    args = parse_args(argparse.ArgumentParser(description=__doc__.partition("\n")[0]))
    rng = random.Random(0)
    torch.manual_seed(0)
    documents = make_documents(rng, 40 if args.quick else 200)
    model = NeuroTrailsLlamaForCausalLM(CONFIG).eval()
    tokenizer: PreTrainedTokenizerBase = train_tokenizer([make_text(rng, 2000) for _ in range(20)], CONFIG.vocab_size)
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch, "data")
        tasks = Path(scratch, "tasks")
        (data / "hellaswag").mkdir(parents=True)
        tasks.mkdir()
        pq.write_table(documents, data / "hellaswag" / "validation.parquet")
        write_tasks(data, tasks)
        per_head = NeuroTrailsLM(model, per_head=True, tokenizer=tokenizer, batch_size=BATCH)
        plain = HFLM(model, tokenizer=tokenizer, batch_size=BATCH)
        seconds = time_interleaved(
            {"plain": evaluation(plain, [], tasks), "per_head": evaluation(per_head, per_head.members, tasks)},
            rounds=5 if args.quick else 7,
        )
    report(
        {
            "per_head_over_plain": seconds["per_head"] / seconds["plain"],
            **{f"{name}_s": value for name, value in seconds.items()},
            "documents": len(documents),
        },
        args,
    )


if __name__ == "__main__":
    main()
