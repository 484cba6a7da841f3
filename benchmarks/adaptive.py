# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Adaptive voting of a trained model: its threshold from validation text, its quality and time on test text.

    python benchmarks/adaptive.py --model runs/demo --validation data/demo/validation --test data/demo/test

For both measures of certainty, the threshold of the fewest consultations with a perplexity within 0.5 % of the full
vote's on validation documents; with it, on test documents:

    <measure>_share                     of the tokens, those that needed the other heads
    <measure>_perplexity_over_full_vote
    first_head_perplexity_over_full_vote

Then test documents are read token by token with a cache, by the model as it was trained and compressed (bf16):

    <form>_adaptive_time_over_full_vote     seconds per token, at the threshold for the margin
    <form>_first_head_time_over_full_vote
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import islice

import torch
from harness import parse_args, report, time_interleaved

import nt_transformers  # noqa: F401  (registers the models)
from nt_transformers import NeuroTrailsLlamaForCausalLM
from nt_transformers.data import TokenSequences, load_documents, load_tokenizer
from nt_transformers.inference import AdaptiveScores, AdaptiveVoting, compress


TOLERANCE = 0.005


BATCH = 16


def sequences(data: str, args: argparse.Namespace) -> Iterator[dict[str, torch.Tensor]]:
    """The first tokens of the documents, packed."""
    length = args.sequence_length
    options = {"sequence_length": length, "batch_size": BATCH, "packing": True, "training": False}
    batches = TokenSequences(load_documents(data), load_tokenizer(args.model), **options)
    return islice(batches, args.tokens // (BATCH * length))


@torch.inference_mode()
def read(model: NeuroTrailsLlamaForCausalLM, tokens: torch.Tensor) -> None:
    """Predicts after each token of a text but the first few."""
    start = 8
    cache = model(tokens[:, :start], logits_to_keep=1).past_key_values
    for t in range(start, tokens.shape[1]):
        model(input_ids=tokens[:, t : t + 1], past_key_values=cache)


def reader(
    model: NeuroTrailsLlamaForCausalLM, heads: list[int], voting: AdaptiveVoting | None, texts: torch.Tensor
) -> Callable[[], None]:
    """A function that reads the texts one by one with these heads."""

    def run() -> None:
        model.active_heads = heads
        with voting or nullcontext():
            for text in texts:
                read(model, text[None])

    return run


def quality(args: argparse.Namespace, model: NeuroTrailsLlamaForCausalLM) -> dict[str, float]:
    """Thresholds chosen on validation documents, and what they give on test documents."""
    figures = {}
    for measure in ("margin", "entropy"):
        validation, test = (
            AdaptiveScores.of(model, sequences(data, args), measure) for data in (args.validation, args.test)
        )
        threshold = validation.choose_threshold(TOLERANCE)
        full = test.perplexity(2)
        figures |= {
            f"{measure}_threshold": threshold,
            f"{measure}_validation_share": validation.share(threshold),
            f"{measure}_share": test.share(threshold),
            f"{measure}_perplexity_over_full_vote": test.perplexity(threshold) / full,
            "first_head_perplexity_over_full_vote": test.perplexity(0) / full,
            "full_vote_perplexity": full,
            "test_tokens": len(test.certainty),
        }
    return figures


def main() -> None:
    """Measure quality, then time, and report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="folder or hub id of a trained model")
    parser.add_argument("--validation", required=True, help="shards to choose the threshold on")
    parser.add_argument("--test", required=True, help="shards to measure on")
    parser.add_argument("--sequence_length", type=int, default=64, help="tokens a sequence (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=100_000, help="of each of the two (default: %(default)s)")
    args = parse_args(parser)
    model = NeuroTrailsLlamaForCausalLM.from_pretrained(args.model).eval()
    figures = quality(args, model)
    texts = next(iter(sequences(args.test, args)))["input_ids"][: 2 if args.quick else 8]
    heads = model.active_heads
    for form, network in {"trained": model, "compressed": compress(copy.deepcopy(model), "bf16")}.items():
        voting = AdaptiveVoting(network, figures["margin_threshold"])
        runs = {
            "full_vote": reader(network, heads, None, texts),
            "adaptive": reader(network, heads, voting, texts),
            "first_head": reader(network, heads[:1], None, texts),
        }
        seconds = time_interleaved(runs, rounds=3 if args.quick else 9)
        for name in ("adaptive", "first_head"):
            figures[f"{form}_{name}_time_over_full_vote"] = seconds[name] / seconds["full_vote"]
        figures |= {f"{form}_{name}_s": value / texts.numel() for name, value in seconds.items()}
        figures[f"{form}_share_while_timed"] = voting.share
    report(figures, args)


if __name__ == "__main__":
    main()
