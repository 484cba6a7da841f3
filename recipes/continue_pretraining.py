# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Continues the training of a checkpoint: a dense LLaMA, which is upcycled, or a NeuroTrails LLaMA.

accelerate launch recipes/continue_pretraining.py --config recipes/configs/continue_pretraining.yaml \\
    --model.from_pretrained DIR_OR_HUB_ID --data.tokenizer DIR_OR_HUB_ID --output_dir runs/continued
A dense checkpoint also needs the split: --model.num_ensemble_heads 3 --model.num_head_layers 8

Unless sparsity.mask_init is given, the first masks are drawn by magnitude; a sparse checkpoint keeps its own masks at
its own sparsity.density. Any field can be given again as --field value.
"""

from nt_transformers.training import ContinuedTextTrainingConfig, run_recipe, train_language_model


def main() -> None:
    run_recipe(ContinuedTextTrainingConfig, train_language_model, __doc__)


if __name__ == "__main__":
    main()
