# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Trains by Trainer and saves the masks of each process: torchrun trainer_run.py FOLDER BATCH_SIZE."""

import os
import sys

import torch
from transformers import Trainer, TrainingArguments

from nt_transformers import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM
from nt_transformers.sparsity import SparsityConfig
from nt_transformers.training import SparsifierCallback


def main() -> None:
    folder, batch_size = sys.argv[1], int(sys.argv[2])
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = NeuroTrailsLlamaConfig(vocab_size=50, **shape, num_ensemble_heads=2, num_head_layers=1)
    rows = torch.randint(50, (64, 12))
    callback = SparsifierCallback(SparsityConfig(density=0.5, update_interval=2, stop_fraction=1.0))
    arguments = TrainingArguments(
        folder,
        max_steps=8,
        save_strategy="no",
        per_device_train_batch_size=batch_size,
        use_cpu=True,
        report_to="none",
        learning_rate=1e-2,
        max_grad_norm=0.0,
        optim="sgd",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = Trainer(NeuroTrailsLlamaForCausalLM(config), arguments, train_dataset=data, callbacks=[callback])
    trainer.train()
    assert arguments.world_size == int(os.environ["WORLD_SIZE"])
    torch.save(callback.sparsifier.state_dict()["masks"], f"{folder}_{arguments.process_index}.pt")
    # Gloo's threads abort the process if the interpreter ends first.
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
