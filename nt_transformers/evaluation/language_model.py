# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""lm-eval's model of a NeuroTrails checkpoint, which can score every head and both votes in one pass."""

import logging
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch.nn.functional import log_softmax
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from nt_transformers.models.neurotrails_llama.modeling_neurotrails_llama import close_vote, count_vote


logger = logging.getLogger(__name__)

VOTES = ("probs", "logits")
Answer = tuple[float, bool]
# What lm-eval passes on: the strings, the context's tokens, the continuation's.
Request = tuple[tuple[str, str], list[int], list[int]]


class EnsembleAnswer(tuple[float, bool]):
    """What the model answers to a request, as lm-eval expects it: (log-likelihood in nats, is it the greedy choice).

    `members` holds the answers of every active head ("head_0", ...) and of both votes ("probs_vote", "logits_vote").
    """

    members: dict[str, Answer]


@register_model("neurotrails")
class NeuroTrailsLM(HFLM):
    """lm-eval's `HFLM`, and the same bit for bit unless `per_head` is set.

    With `per_head` an answer to a log-likelihood request is still the model's own, and also carries those of all
    `members`; `PerHeadTaskManager` has lm-eval compute metrics for each of them. The backbone and the heads run once.

    Args:
        pretrained: a checkpoint's folder or hub id, or the model itself.
        per_head: see above.
        kwargs: see `lm_eval.models.huggingface.HFLM`.

    Raises:
        ValueError: `per_head` for a model without ensemble heads.
    """

    def __init__(self, pretrained: Any, *, per_head: bool = False, **kwargs: Any) -> None:
        super().__init__(pretrained, **kwargs)
        self.per_head = per_head
        if per_head and not hasattr(self.model, "active_heads"):
            raise ValueError(f"per_head: {type(self.model).__name__} has no ensemble heads; leave per_head out.")

    @property
    def members(self) -> list[str]:
        """Names of the active heads and of both votes."""
        return [f"head_{m}" for m in self.model.active_heads] + [f"{vote}_vote" for vote in VOTES]

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        if not (self.per_head and requests):
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        # HFLM's batches, so that its results are met exactly: requests that share their input share a row, the
        # longest rows come first.
        sharing: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, (_, context, continuation) in enumerate(requests):
            sharing[(*context, *continuation[:-1])].append(index)
        inputs = sorted(sharing, key=lambda tokens: (-len(tokens), tokens))
        self._check_lengths(inputs, max(len(continuation) for *_, continuation in requests))
        batch_size = self.batch_size
        if batch_size == "auto":
            batch_size = override_bs or self._detect_batch_size([requests[sharing[inputs[0]][0]]])

        answers: dict[int, EnsembleAnswer] = {}
        progress = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Scoring every head")
        for start in range(0, len(inputs), batch_size):
            batch = inputs[start : start + batch_size]
            indices = [index for tokens in batch for index in sharing[tokens]]
            rows = [row for row, tokens in enumerate(batch) for _ in sharing[tokens]]
            continuations = [requests[index][2] for index in indices]
            answers.update(zip(indices, self._score(batch, rows, continuations), strict=True))
            progress.update(len(indices))
        progress.close()
        return [answers[index] for index in range(len(requests))]

    def _check_lengths(self, inputs: list[tuple[int, ...]], longest_continuation: int) -> None:
        if longest_continuation > self.max_length:
            raise ValueError(
                f"max_length={self.max_length}: a continuation to score has {longest_continuation} tokens."
            )
        if truncated := sum(len(tokens) > self.max_length for tokens in inputs):
            logger.warning(
                "%d of %d inputs exceed %d tokens: cut on the left", truncated, len(inputs), self.max_length
            )

    def _score(
        self, inputs: list[tuple[int, ...]], rows: list[int], continuations: list[list[int]]
    ) -> list[EnsembleAnswer]:
        """Answers for `continuations`, each predicted at the end of the input of its row."""
        tokens = [torch.tensor(row[-self.max_length :]) for row in inputs]
        lengths = [len(continuation) for continuation in continuations]
        row_T = torch.tensor(rows).repeat_interleave(torch.tensor(lengths))
        position_T = torch.cat(
            [torch.arange(len(tokens[row]) - n, len(tokens[row])) for row, n in zip(rows, lengths, strict=True)]
        )
        target_T = torch.tensor([token for continuation in continuations for token in continuation])
        input_ids, row_T, position_T, target_T = (
            tensor.to(self.device) for tensor in (pad_sequence(tokens, batch_first=True), row_T, position_T, target_T)
        )
        members = {}
        for name, logits_TV in self._member_logits(input_ids, row_T, position_T):
            log_prob_TV = log_softmax(logits_TV, dim=-1, dtype=self.softmax_dtype)
            log_prob_T = log_prob_TV.gather(1, target_T[:, None])
            greedy_T = log_prob_TV.argmax(-1) == target_T
            members[name] = [
                (float(log_prob.sum()), bool(greedy.all()))
                for log_prob, greedy in zip(
                    log_prob_T.cpu().split(lengths), greedy_T.cpu().split(lengths), strict=True
                )
            ]
        answers = [EnsembleAnswer(answer) for answer in members[f"{self.model.config.vote}_vote"]]
        for index, answer in enumerate(answers):
            answer.members = {name: member[index] for name, member in members.items()}
        return answers

    @torch.no_grad()
    def _member_logits(
        self, input_ids: torch.Tensor, row_T: torch.Tensor, position_T: torch.Tensor
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and logits [targets, vocab] of every member, predicted at the given rows and positions of the input.

        One head's logits are alive at a time, and those of the votes.
        """
        model = self.model
        heads = model.active_heads
        with self._precision():
            hidden_MBSH = model.model(input_ids=input_ids, use_cache=False).head_hidden_states
        tallies: dict[str, torch.Tensor] = {}
        for m, hidden_BSH in zip(heads, hidden_MBSH, strict=True):
            with self._precision():
                # Selected after the output layer: fewer rows would round differently than the model's own forward.
                logits_TV = model.lm_heads[m](hidden_BSH)[row_T, position_T]
            for vote in VOTES:
                tallies[vote] = count_vote(tallies.get(vote), logits_TV, vote)
            yield f"head_{m}", logits_TV
        for vote, tally_TV in tallies.items():
            # The model, too, does not pass a single head's logits through a vote.
            yield (
                f"{vote}_vote",
                logits_TV if len(heads) == 1 else close_vote(tally_TV, len(heads), vote).to(logits_TV.dtype),
            )

    def _precision(self) -> AbstractContextManager[Any]:
        """HFLM's mixed precision."""
        dtype = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)
