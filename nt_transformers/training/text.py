# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Training a NeuroTrails LLaMA on text, from configuration to Hub checkpoint."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from ..analysis import EnsembleScores, ModelCost, language_model_cost, score_language_model
from ..data import (
    TextDataConfig,
    check_vocab_size,
    load_tokenizer,
    sequence_loader,
    training_sequences,
    validation_sequences,
)
from ..models import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM
from ..sparsity import SparsitySummary, planned_nonzeros
from ..validation import check, check_types
from .config import TrainingConfig
from .engine import accelerated
from .export import export_checkpoint, model_card
from .hub import create_hub_repository, push_run
from .loop import Batch, Position
from .plan import Hardware, Plan, plan_training
from .run import cost_figures, run_training


# For checks of the shape before the tokenizer is known.
_ANY_VOCAB_SIZE = 2**15


@dataclass(kw_only=True)
class LlamaArguments:
    """Shape of the network. One class covers the family: one head is a single network, all layers in the heads a full
    ensemble, anything between with `sparsity.method: dense` TreeNet.

    Args:
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the feed-forward layers.
        num_hidden_layers: Layers from input to output, L.
        num_attention_heads: Attention heads of a layer.
        num_key_value_heads: Key and value heads of a layer; null for as many as attention heads.
        num_ensemble_heads: Ensemble heads, M.
        num_head_layers: Layers of each ensemble head, B; null for all of them: a full ensemble.
        vote: How the heads' outputs become one prediction: mean of probabilities or mean of logits.
        vocab_size: Null takes the tokenizer's; a number must equal it.
        max_position_embeddings: Longest sequence the network is meant for.
        tie_word_embeddings: One matrix for input embedding and output layers.
        initializer_range: Standard deviation of the initial weights.
        attn_implementation: How attention is computed.
    """

    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    num_ensemble_heads: int = 3
    num_head_layers: int | None = 8
    vote: Literal["probs", "logits"] = "probs"
    vocab_size: int | None = None
    max_position_embeddings: int = 1024
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"

    def __post_init__(self) -> None:
        check_types(self, "model.")
        # Mistakes show before tokenizer and text are loaded.
        self._config(vocab_size=_ANY_VOCAB_SIZE if self.vocab_size is None else self.vocab_size)

    def build(self, tokenizer: PreTrainedTokenizerBase) -> NeuroTrailsLlamaForCausalLM:
        """A new network for the tokenizer's vocabulary, drawn from torch's global generator."""
        vocab_size = len(tokenizer) if self.vocab_size is None else self.vocab_size
        check_vocab_size(tokenizer, vocab_size)
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return NeuroTrailsLlamaForCausalLM(self._config(vocab_size=vocab_size, **special))

    def outline(self, tokenizer: str) -> NeuroTrailsLlamaConfig:
        """The network's configuration; the tokenizer (folder or hub id) is read only where it gives the vocabulary."""
        return self._config(vocab_size=len(load_tokenizer(tokenizer)) if self.vocab_size is None else self.vocab_size)

    def _config(self, **fields: Any) -> NeuroTrailsLlamaConfig:
        layers = self.num_hidden_layers if self.num_head_layers is None else self.num_head_layers
        try:
            return NeuroTrailsLlamaConfig(**asdict(self) | {"num_head_layers": layers} | fields)
        except StrictDataclassError as error:
            raise ValueError(f"model: {error}") from error


# What a dense LLaMA and the NeuroTrails LLaMA made of it have in common, as far as it decides over size.
_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)


@dataclass(kw_only=True)
class PretrainedArguments:
    """The checkpoint that training starts from. A dense LLaMA is upcycled: its lower layers become the backbone, its
    upper ones are copied into every head. A NeuroTrails LLaMA goes on as it is. All else comes from the checkpoint.

    Args:
        from_pretrained: Folder or hub id of the checkpoint.
        num_ensemble_heads: Ensemble heads, M; a dense checkpoint has to be told.
        num_head_layers: Layers of each ensemble head, B; a dense checkpoint has to be told.
        vote: How the heads' outputs become one prediction; null takes the checkpoint's, `probs` if it is dense.
        noise: Standard deviation of the noise that sets the copies of a dense checkpoint apart, as a share of the
            standard deviation of each weight; masks set them apart as well.
        attn_implementation: How attention is computed.
    """

    from_pretrained: str
    num_ensemble_heads: int | None = None
    num_head_layers: int | None = None
    vote: Literal["probs", "logits"] | None = None
    noise: float = 0.0
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = "sdpa"

    def __post_init__(self) -> None:
        check_types(self, "model.")
        check(self.from_pretrained != "", "model.from_pretrained", "", "name a folder or a model of the hub")
        check(self.noise >= 0, "model.noise", self.noise, "give zero or a positive number")

    def build(self, tokenizer: PreTrainedTokenizerBase) -> NeuroTrailsLlamaForCausalLM:
        """The checkpoint's network in float32, with the heads asked for; noise is keyed by torch's seed."""
        source = self._source()
        check_vocab_size(tokenizer, source.vocab_size)
        load: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": self.attn_implementation}
        if isinstance(source, NeuroTrailsLlamaConfig):
            self._check_agreement(source)
            return NeuroTrailsLlamaForCausalLM.from_pretrained(self.from_pretrained, **load)
        return NeuroTrailsLlamaForCausalLM.from_dense(
            self.from_pretrained,
            *self._split(),
            vote=self.vote or "probs",
            noise=self.noise,
            seed=torch.initial_seed(),
            **load,
        )

    def outline(self, tokenizer: str) -> NeuroTrailsLlamaConfig:
        """The network's configuration, as far as it decides over size."""
        source = self._source()
        if isinstance(source, NeuroTrailsLlamaConfig):
            return source
        heads, head_layers = self._split()
        shape = {name: getattr(source, name) for name in _SHAPE}
        return NeuroTrailsLlamaConfig(**shape, num_ensemble_heads=heads, num_head_layers=head_layers)

    def _source(self) -> PreTrainedConfig:
        try:
            return AutoConfig.from_pretrained(self.from_pretrained)
        except OSError as error:
            raise ValueError(f"model.from_pretrained={self.from_pretrained!r}: cannot be loaded: {error}") from error

    def _split(self) -> tuple[int, int]:
        for name in ("num_ensemble_heads", "num_head_layers"):
            remedy = f"say how the dense checkpoint {self.from_pretrained!r} is to be split"
            check(getattr(self, name) is not None, f"model.{name}", None, remedy)
        assert self.num_ensemble_heads is not None
        assert self.num_head_layers is not None
        return self.num_ensemble_heads, self.num_head_layers

    def _check_agreement(self, source: NeuroTrailsLlamaConfig) -> None:
        remedy = f"the checkpoint {self.from_pretrained!r} has heads already: leave the field out"
        for name in ("num_ensemble_heads", "num_head_layers", "vote"):
            value = getattr(self, name)
            check(value in (None, getattr(source, name)), f"model.{name}", value, remedy)
        check(self.noise == 0, "model.noise", self.noise, remedy)


@dataclass(kw_only=True)
class LanguageModelTrainingConfig(TrainingConfig):
    """What all training on text is told, whatever the network starts from.

    Args:
        model: Where the network comes from.
        data: Where the text comes from and how it becomes sequences of tokens.
        activation_checkpointing: Layers that keep nothing but their input for the backward pass and run twice: those
            of the `heads`, `all`, or `none`.
        headwise_backward: Compute each head's gradients before the next head runs, so that the activations of the
            backbone and of one head are alive at a time. Null: on a single process, where it takes no longer; with
            several, gradients travel while others are still computed, of which it leaves less. Not with FSDP2.
        compile: Compile the decoder layers by `torch.compile`: minutes at the start for faster steps.
    """

    model: LlamaArguments | PretrainedArguments
    data: TextDataConfig
    activation_checkpointing: Literal["none", "heads", "all"] = "none"
    headwise_backward: bool | None = None
    compile: bool = False

    def prepare(self, network: NeuroTrailsLlamaForCausalLM) -> None:
        """Sets the network up as these options say."""
        if self.activation_checkpointing != "none":
            network.activation_checkpointing_enable(heads_only=self.activation_checkpointing == "heads")
        if self.compile:
            # Layer by layer, since equal layers share what is compiled.
            for module in network.modules():
                if isinstance(module, LlamaDecoderLayer):
                    module.compile()

    def loss(self, model: nn.Module, *, alone: bool, **inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss (scalar) of a training step and each head's own, [heads]; `alone` without data parallelism."""
        headwise = alone if self.headwise_backward is None else self.headwise_backward
        output = model(**inputs, skip_logits=True, headwise_backward=headwise, use_cache=False)
        return output.loss, output.head_losses

    def plan(self, hardware: Hardware) -> Plan:
        """What training as configured would take, memory as without `compile`."""
        with torch.device("meta"):
            network = NeuroTrailsLlamaForCausalLM(self.model.outline(self.data.tokenizer)).train()
        replace(self, compile=False).prepare(network)
        shape = (self.per_device_batch_size, self.data.sequence_length)
        alone = hardware.num_processes == 1 and hardware.sharding == "ddp"

        def step(network: nn.Module) -> torch.Tensor:
            batch = torch.zeros(shape, dtype=torch.long)
            return self.loss(network, alone=alone, input_ids=batch, labels=batch)[0]

        recomputed = {"none": (), "heads": ("model.heads.",), "all": ("model.heads.", "model.layers.")}
        return plan_training(
            self,
            hardware,
            network,
            step,
            language_model_cost(network, shape[1], planned_nonzeros(network, self.sparsity)),
            items_per_example=shape[1],
            recomputed=lambda name: name.startswith(recomputed[self.activation_checkpointing]),
        )


@dataclass(kw_only=True)
class TextTrainingConfig(LanguageModelTrainingConfig):
    """Training of a NeuroTrails LLaMA on text.

    Args:
        model: Shape of the network.
    """

    model: LlamaArguments


@dataclass(kw_only=True)
class ContinuedTextTrainingConfig(LanguageModelTrainingConfig):
    """Training that starts from a checkpoint, dense or NeuroTrails.

    Args:
        model: The checkpoint, and the heads that a dense one gets.
        license: Licence of the trained weights, for the model card: mostly the checkpoint's.
    """

    model: PretrainedArguments
    license: str = "other"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sparsity.mask_init is None:
            self.sparsity = replace(self.sparsity, mask_init="soft_magnitude")


class TextTask:
    """A NeuroTrails LLaMA and its text, for the training loop.

    Raises:
        ValueError: tokenizer, text or shape of the network are unusable or do not fit together.
    """

    items: Literal["tokens"] = "tokens"

    def __init__(self, config: TextTrainingConfig | ContinuedTextTrainingConfig, accelerator: Accelerator) -> None:
        check(
            not (config.headwise_backward and accelerator.is_fsdp2),
            "headwise_backward",
            True,
            "FSDP2 gathers weights for one backward pass; use activation_checkpointing: heads, or DDP",
        )
        self.config = config
        self.accelerator = accelerator
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        shares = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
        self.training = training_sequences(
            config.data, self.tokenizer, batch_size=config.per_device_batch_size, seed=config.seed, **shares
        )
        self.validation = sequence_loader(
            validation_sequences(config.data, self.tokenizer, batch_size=config.per_device_batch_size, **shares),
            config.data.num_workers,
        )
        set_seed(config.seed)
        network = config.model.build(self.tokenizer)
        config.prepare(network)
        self.model: nn.Module = network

    def batches(self, position: Position | None) -> Iterator[Batch]:
        if position is not None:
            self.training.seek(position)
        return iter(sequence_loader(self.training, self.config.data.num_workers))

    def count_items(self, batch: Batch) -> int:
        return int((batch["labels"][:, 1:] != -100).sum())

    def loss(self, model: nn.Module, batch: Batch, num_items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alone = self.accelerator.num_processes == 1 and not self.accelerator.is_fsdp2
        return self.config.loss(model, alone=alone, **batch, num_items_in_batch=num_items)

    def evaluate(self) -> dict[str, Any]:
        network = self.accelerator.unwrap_model(self.model)
        with self.accelerator.autocast():
            local = score_language_model(network, self.validation)
        scores = EnsembleScores(self.accelerator.reduce(local.sums, "sum"))
        return scores.language_figures(network.config.vote)


def train_language_model(config: TextTrainingConfig | ContinuedTextTrainingConfig) -> dict[str, Any]:
    """Trains as `config` says and leaves a Hub checkpoint in `config.output_dir`.

    Returns:
        The final figures, as in `summary.json`.

    Raises:
        ValueError: anything in `config` is unusable; nothing has been trained or overwritten then.
        Interrupted, NonFiniteError, CheckpointError: see `TrainingLoop.run`.
    """
    with accelerated(config) as accelerator:
        task = TextTask(config, accelerator)
        repository = create_hub_repository(config) if config.push_to_hub and accelerator.is_main_process else None
        network, topology, summary = run_training(config, task, accelerator)
        # Padding is computed as well.
        positions = summary["steps"] * config.global_batch_size * config.data.sequence_length
        summary |= cost_figures(config, _cost(config, network, topology), "token", positions)
        if accelerator.is_main_process:
            output_dir = Path(config.output_dir)
            card = model_card(repository or output_dir.resolve().name, config.license, network, summary)
            export_checkpoint(output_dir, network, task.tokenizer, card, summary)
            if repository is not None:
                push_run(output_dir, repository)
    return summary


def _cost(
    config: TextTrainingConfig | ContinuedTextTrainingConfig, network: Any, topology: SparsitySummary
) -> ModelCost:
    # The network itself may be sharded over processes.
    with torch.device("meta"):
        whole = NeuroTrailsLlamaForCausalLM(network.config)
    nonzeros = {name: tensor.nonzeros for name, tensor in topology.tensors.items()}
    return language_model_cost(whole, config.data.sequence_length, nonzeros)
