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
from transformers import AutoConfig, PreTrainedTokenizerBase

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
from ..sparsity import SparsitySummary
from ..validation import check, check_types
from .config import TrainingConfig
from .engine import accelerated
from .export import export_checkpoint, model_card
from .hub import create_hub_repository, push_run
from .loop import Batch, Position, TrainingLoop
from .state import unsharded, whole_weights


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
        self._config(vocab_size=1 if self.vocab_size is None else self.vocab_size)

    def build(self, tokenizer: PreTrainedTokenizerBase) -> NeuroTrailsLlamaForCausalLM:
        """A new network for the tokenizer's vocabulary, drawn from torch's global generator."""
        vocab_size = len(tokenizer) if self.vocab_size is None else self.vocab_size
        check_vocab_size(tokenizer, vocab_size)
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return NeuroTrailsLlamaForCausalLM(self._config(vocab_size=vocab_size, **special))

    def _config(self, **fields: Any) -> NeuroTrailsLlamaConfig:
        layers = self.num_hidden_layers if self.num_head_layers is None else self.num_head_layers
        try:
            return NeuroTrailsLlamaConfig(**asdict(self) | {"num_head_layers": layers} | fields)
        except StrictDataclassError as error:
            raise ValueError(f"model: {error}") from error


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
        try:
            source = AutoConfig.from_pretrained(self.from_pretrained)
        except OSError as error:
            raise ValueError(f"model.from_pretrained={self.from_pretrained!r}: cannot be loaded: {error}") from error
        check_vocab_size(tokenizer, source.vocab_size)
        load: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": self.attn_implementation}
        if isinstance(source, NeuroTrailsLlamaConfig):
            self._check_agreement(source)
            return NeuroTrailsLlamaForCausalLM.from_pretrained(self.from_pretrained, **load)
        for name in ("num_ensemble_heads", "num_head_layers"):
            remedy = f"say how the dense checkpoint {self.from_pretrained!r} is to be split"
            check(getattr(self, name) is not None, f"model.{name}", None, remedy)
        assert self.num_ensemble_heads is not None
        assert self.num_head_layers is not None
        return NeuroTrailsLlamaForCausalLM.from_dense(
            self.from_pretrained,
            self.num_ensemble_heads,
            self.num_head_layers,
            vote=self.vote or "probs",
            noise=self.noise,
            seed=torch.initial_seed(),
            **load,
        )

    def _check_agreement(self, source: NeuroTrailsLlamaConfig) -> None:
        remedy = f"the checkpoint {self.from_pretrained!r} has heads already: leave the field out"
        for name in ("num_ensemble_heads", "num_head_layers", "vote"):
            value = getattr(self, name)
            check(value in (None, getattr(source, name)), f"model.{name}", value, remedy)
        check(self.noise == 0, "model.noise", self.noise, remedy)


@dataclass(kw_only=True)
class TextTrainingConfig(TrainingConfig):
    """Training of a NeuroTrails LLaMA on text.

    Args:
        model: Shape of the network.
        data: Where the text comes from and how it becomes sequences of tokens.
    """

    model: LlamaArguments
    data: TextDataConfig


@dataclass(kw_only=True)
class ContinuedTextTrainingConfig(TrainingConfig):
    """Training that starts from a checkpoint, dense or NeuroTrails.

    Args:
        model: The checkpoint, and the heads that a dense one gets.
        data: Where the text comes from and how it becomes sequences of tokens.
        license: Licence of the trained weights, for the model card: mostly the checkpoint's.
    """

    model: PretrainedArguments
    data: TextDataConfig
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

    def __init__(self, config: TextTrainingConfig | ContinuedTextTrainingConfig, accelerator: Accelerator) -> None:
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
        self.model: nn.Module = config.model.build(self.tokenizer)

    def batches(self, position: Position | None) -> Iterator[Batch]:
        if position is not None:
            self.training.seek(position)
        return iter(sequence_loader(self.training, self.config.data.num_workers))

    def count_items(self, batch: Batch) -> int:
        return int((batch["labels"][:, 1:] != -100).sum())

    def loss(self, model: nn.Module, batch: Batch, num_items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = model(**batch, num_items_in_batch=num_items, skip_logits=True, use_cache=False)
        return output.loss, output.head_losses

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
        loop = TrainingLoop(config, task, accelerator)
        if config.report_to:
            run_name = config.run_name or Path(config.output_dir).name
            accelerator.init_trackers(run_name, config={key: str(value) for key, value in config.identity().items()})
        loop.run()
        weights = whole_weights(loop.network, accelerator)
        parameters = loop.network.num_parameters()
        topology = loop.sparsifier.summary()
        cost = _cost(config, loop.network, topology)
        training_flops = cost.training(config.sparsity.dense_gradient_interval)
        # Padding is computed as well.
        positions = loop.step * config.global_batch_size * config.data.sequence_length
        summary = {
            "steps": loop.step,
            "tokens": loop.items,
            "parameters": parameters,
            "active_parameters": parameters - (topology.numel - topology.nonzeros),
            "density": topology.density,
            "explored": topology.explored,
            "forward_flops_per_token": cost.forward,
            "training_flops_per_token": training_flops,
            # While gmp prunes, its cost changes from step to step.
            "training_flops": None if config.sparsity.method == "gmp" else training_flops * positions,
            **loop.last_evaluation,
            "config": config.identity(),
        }
        if accelerator.is_main_process:
            network = unsharded(loop.network, weights)
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
