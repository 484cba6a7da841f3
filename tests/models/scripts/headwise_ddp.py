# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Prints how far the gradients of data-parallel headwise training, two micro-batches a step, are from those of one
process that sees the whole batch at once: the largest relative difference over all parameters."""

import torch
from accelerate import Accelerator

from nt_transformers import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM


def build() -> NeuroTrailsLlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4}
    split = {"num_hidden_layers": 3, "num_ensemble_heads": 3, "num_head_layers": 2}
    return NeuroTrailsLlamaForCausalLM(NeuroTrailsLlamaConfig(**shape, **split)).train()


def main() -> None:
    accelerator = Accelerator()
    tokens = torch.randint(61, (8, 10), generator=torch.Generator().manual_seed(1))
    expected = build()
    expected(tokens, labels=tokens, skip_logits=True).loss.backward()

    network = build()
    model = accelerator.prepare(network)
    own = tokens.chunk(accelerator.num_processes)[accelerator.process_index]
    for _ in range(2):  # from the second step on DDP reduces by buckets that it has rebuilt
        network.zero_grad()
        for index, micro_batch in enumerate(own.chunk(2)):
            kwargs = {"labels": micro_batch, "skip_logits": True, "num_items_in_batch": 8 * 9}
            with accelerator.no_sync(model) if index == 0 else torch.enable_grad():
                loss = model(micro_batch, headwise_backward=True, use_cache=False, **kwargs).loss
                accelerator.backward(loss * accelerator.num_processes)
    pairs = zip(network.parameters(), expected.parameters(), strict=True)
    difference = max(float((own.grad - other.grad).norm() / other.grad.norm()) for own, other in pairs)
    if accelerator.is_main_process:
        print(difference)
    accelerator.end_training()


if __name__ == "__main__":
    main()
