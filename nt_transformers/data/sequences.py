# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Token sequences: from documents to the micro-batches of one process, in an order that can be continued exactly.

Notable: the position in the data is a place in the corpus (epoch, shard, document, token), not the state of a reader.
It travels with every batch, so prefetching cannot spoil it; it is the same on all processes, and holds for another
number of processes or another batch size.
"""

import itertools
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerBase

from .documents import Documents, TextDataConfig


# Tokenizers take many documents at once several times quicker than one by one.
CHUNK = 64

Batch = dict[str, Any]


@dataclass(frozen=True)
class Position:
    """Where in the stream of tokens a sequence starts.

    `shard` and `document` count in the order of the epoch, `token` within the document (its special tokens included).
    `skipped_records` counts the damaged records passed over up to here, in all epochs.
    """

    epoch: int = 0
    shard: int = 0
    document: int = 0
    token: int = 0
    skipped_records: int = 0


class TokenSequences(IterableDataset[Batch]):
    """The micro-batches of one process, each a dict:

    - `input_ids`: int64 `[batch_size, sequence_length]`, padded on the right. There is no attention mask: causal
      attention never looks at what follows, and without a mask SDPA takes its fastest kernels.
    - `labels`: the same with -100 on the padding (unshifted, as `transformers` models expect).
    - `position`: JSON-able dict; `TokenSequences(..., position=position)` yields what follows this batch.

    Every document ends with the tokenizer's end-of-sequence token and starts as the tokenizer starts it. A sequence is
    one document, truncated (the published runs), or with `packing` the next `sequence_length` tokens of all documents
    joined, so that nothing is dropped. Documents of white space are skipped, and records that `load_documents` found
    damaged; they keep their numbers, so that positions hold whatever is skipped.

    Global micro-batch i holds the sequences `[i * W * b, (i + 1) * W * b)` for W processes of batch size b, of which
    process r takes the r-th b: W processes see together what one process sees with batch size `W * b`.

    Args:
        documents: Data set with a column `text`, as from `load_documents`.
        tokenizer: Fast tokenizer with an end-of-sequence token.
        sequence_length: Tokens in a sequence.
        batch_size: Sequences in a micro-batch of one process.
        packing: Join documents instead of truncating and padding each.
        training: True: endless, and shuffled anew each epoch, keyed by (seed, epoch): all documents of a map-style
            data set, the order of the shards of a streamed one (no buffer: it could not be continued exactly).
            False: one pass in order; the last batches are filled up with padding, so that all processes get as many.
        max_tokens: Stop after so many predicted tokens in all processes together; None for no limit.
        rank: Number of this process.
        world_size: Number of processes, W.
        seed: Seed of the shuffling.
        position: Where to start, from a former batch; None for the beginning.

    Raises:
        ValueError: in iteration, if no document holds any text.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: PreTrainedTokenizerBase,
        *,
        sequence_length: int,
        batch_size: int,
        packing: bool = False,
        training: bool = True,
        max_tokens: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        position: Mapping[str, int] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: a batch holds at least 1 sequence.")
        assert 0 <= rank < world_size
        self.documents = documents
        self.tokenizer = tokenizer
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.packing = packing
        self.training = training
        self.max_tokens = max_tokens
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.start = Position()
        if position is not None:
            self.seek(position)

    def seek(self, position: Mapping[str, int]) -> None:
        """Let the next iteration start behind the batch that carried `position`."""
        self.start = Position(**position)

    def __iter__(self) -> Iterator[Batch]:
        sequences = self._packed() if self.packing else self._truncated()
        if self.max_tokens is not None:
            sequences = _limited(sequences, self.max_tokens)
        first = self.rank * self.batch_size
        while global_batch := list(itertools.islice(sequences, self.world_size * self.batch_size)):
            rows = [tokens for tokens, _ in global_batch[first : first + self.batch_size]]
            yield {**self._collate(rows), "position": asdict(global_batch[-1][1])}

    def _collate(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        input_ids = torch.full((self.batch_size, self.sequence_length), pad)
        labels = torch.full_like(input_ids, -100)
        for row, tokens in enumerate(rows):
            input_ids[row, : len(tokens)] = labels[row, : len(tokens)] = torch.tensor(tokens)
        return {"input_ids": input_ids, "labels": labels}

    def _truncated(self) -> Iterator[tuple[list[int], Position]]:
        """Sequences of one document each, and the position after each; those of other processes are left empty."""
        for position, tokens in self._tokenized():
            yield tokens[: self.sequence_length], replace(position, document=position.document + 1)

    def _packed(self) -> Iterator[tuple[list[int], Position]]:
        """Sequences cut from the documents joined, and the position after each."""
        sequence: list[int] = []
        position, skipped = self.start, self.start.token
        for position, tokens in self._tokenized():
            end, skipped = skipped, 0
            while taken := min(self.sequence_length - len(sequence), len(tokens) - end):
                sequence += tokens[end : end + taken]
                end += taken
                if len(sequence) == self.sequence_length:
                    yield sequence, replace(position, token=end)
                    sequence = []
        if sequence:
            yield sequence, replace(position, document=position.document + 1)

    def _tokenized(self) -> Iterator[tuple[Position, list[int]]]:
        """Documents as tokens, with their positions; no tokens where another process takes the document."""
        documents = enumerate(self._documents())
        while chunk := list(itertools.islice(documents, CHUNK)):
            texts = [text for index, (_, text) in chunk if self._is_mine(index)]
            tokenized = iter(self._tokenize(texts) if texts else [])
            for index, (position, _) in chunk:
                yield position, next(tokenized) if self._is_mine(index) else []

    def _is_mine(self, index: int) -> bool:
        """Whether this process needs the tokens of the document: cutting and counting need those of all."""
        needs_all = self.packing or self.max_tokens is not None
        return needs_all or index // self.batch_size % self.world_size == self.rank

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        eos = self.tokenizer.eos_token_id
        # Not verbose: documents longer than the tokenizer's model_max_length are cut later, no cause for a warning.
        encoded = self.tokenizer(texts, return_attention_mask=False, return_token_type_ids=False, verbose=False)
        return [tokens if tokens[-1:] == [eos] else [*tokens, eos] for tokens in encoded["input_ids"]]

    def _documents(self) -> Iterator[tuple[Position, str]]:
        """All documents with text from the start position on, and the position of each."""
        start, skipped = self.start, self.start.skipped_records
        num_shards = 1 if isinstance(self.documents, datasets.Dataset) else self.documents.num_shards
        for epoch in itertools.count(start.epoch):
            found = (start.shard, start.document, start.token) != (0, 0, 0)
            for shard in range(start.shard, num_shards):
                for document, text in enumerate(self._texts(epoch, shard, start.document), start.document):
                    if text is None:
                        skipped += 1
                    elif text and not text.isspace():
                        found = True
                        yield Position(epoch, shard, document, skipped_records=skipped), text
                start = Position(epoch, shard + 1)
            if not found:
                raise ValueError("data: no document of the corpus holds any text.")
            if not self.training:
                return
            start = Position(epoch + 1)

    def _texts(self, epoch: int, shard: int, first: int) -> Iterator[str | None]:
        """The texts of one shard from number `first` on, in the order of the epoch."""
        if isinstance(self.documents, datasets.Dataset):
            order = self._order(len(self.documents), epoch)
            for begin in range(first, len(order), CHUNK):
                yield from self.documents[order[begin : begin + CHUNK]]["text"]
        else:
            num_shards = self.documents.num_shards
            index = int(self._order(num_shards, epoch)[shard])
            for chunk in self.documents.shard(num_shards, index).skip(first).iter(batch_size=CHUNK):
                yield from chunk["text"]

    def _order(self, size: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(size) if self.training else np.arange(size)


def _limited(sequences: Iterator[tuple[list[int], Position]], max_tokens: int) -> Iterator[tuple[list[int], Position]]:
    """Cut the stream after `max_tokens` predicted tokens: all of a sequence's but its first."""
    for tokens, position in sequences:
        yield tokens[: max_tokens + 1], position
        max_tokens -= len(tokens) - 1
        if max_tokens <= 0:
            return


def training_sequences(
    config: TextDataConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    position: Mapping[str, int] | None = None,
) -> TokenSequences:
    """The endless training stream of one process; arguments as for `TokenSequences`, errors of `load_documents`."""
    return TokenSequences(
        config.load("train"),
        tokenizer,
        sequence_length=config.sequence_length,
        batch_size=batch_size,
        packing=config.packing,
        rank=rank,
        world_size=world_size,
        seed=seed,
        position=position,
    )


def validation_sequences(
    config: TextDataConfig, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, rank: int = 0, world_size: int = 1
) -> TokenSequences:
    """One process's pass over the first `eval_tokens` predicted tokens of the held-out documents."""
    return TokenSequences(
        config.load("validation"),
        tokenizer,
        sequence_length=config.sequence_length,
        batch_size=batch_size,
        packing=config.packing,
        training=False,
        max_tokens=config.eval_tokens,
        rank=rank,
        world_size=world_size,
    )


def sequence_loader(sequences: TokenSequences, num_workers: int = 1) -> DataLoader[Batch]:
    """Read ahead in `num_workers` background processes, 0 (none) or 1: more would repeat the sequences."""
    if num_workers not in (0, 1):
        raise ValueError(f"num_workers is {num_workers}: choose 0 or 1, since every worker would read all sequences.")
    return DataLoader(
        sequences,
        batch_size=None,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=_prepare_worker,
        pin_memory=torch.cuda.is_available(),
        # Its own, because a loader draws from the global generator otherwise, and a resumed run makes one more loader.
        generator=torch.Generator(),
    )


def _prepare_worker(worker: int) -> None:
    # A fork does not copy the tokenizers library's threads: waiting for them, as this variable can demand, hangs.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Terminals and launchers signal a whole group; the training process finishes its step first, which takes data.
    os.setpgrp()
    _outlast_first_signal()


def _outlast_first_signal() -> None:
    # Schedulers signal every process. The second one has to end it: so the training process ends its workers.
    numbers = (signal.SIGTERM, signal.SIGINT)

    def obey_the_next(*_: object) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)

    for number in numbers:
        signal.signal(number, obey_the_next)
