# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Fine-tunes a sparse checkpoint on text with transformers.Trainer, as sparse as it is.

python recipes/finetune_trainer.py --model runs/demo --train data/demo --sparsity.density 0.9 \\
    --training.output_dir runs/finetuned --training.max_steps 200 --training.learning_rate 1e-4

--training.resume_from_checkpoint DIR continues from one of Trainer's checkpoints.
"""

from dataclasses import dataclass
from typing import Any

from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments

import nt_transformers  # noqa: F401 (registers the models)
from nt_transformers.data import load_documents, load_tokenizer
from nt_transformers.sparsity import SparsityConfig
from nt_transformers.training import SparsifierCallback, run_recipe


@dataclass(kw_only=True)
class FinetuningConfig:
    """Fine-tuning of a sparse checkpoint.

    Args:
        model: Folder or hub id of the checkpoint, tokenizer included.
        train: Documents: a local file or folder of JSON lines, parquet or arrow, or a data set of the hub.
        sparsity: How the topology changes. At the density and distribution of the checkpoint all of its weights stay,
            unless `mask_init` is `random`; `magnitude` is the default here.
        training: Fields of transformers' TrainingArguments.
        max_length: Tokens of a document that are used.
    """

    model: str
    train: str
    sparsity: SparsityConfig
    training: dict[str, Any]
    max_length: int = 256


def main() -> None:
    run_recipe(FinetuningConfig, finetune, __doc__)


def finetune(config: FinetuningConfig) -> None:
    try:
        arguments = TrainingArguments(**config.training)
    except TypeError as error:
        raise ValueError(f"training={config.training}: no fields of TrainingArguments ({error})") from error
    if config.sparsity.mask_init is None:
        config.sparsity.mask_init = "magnitude"
    tokenizer = load_tokenizer(config.model)
    model = AutoModelForCausalLM.from_pretrained(config.model)
    data = load_documents(config.train, "train").map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=config.max_length),
        batched=True,
        remove_columns=["text"],
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        callbacks=[SparsifierCallback(config.sparsity)],
    )
    trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
    trainer.save_model()
    # Processes that end with the group still open are aborted.
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
