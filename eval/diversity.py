# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""How the heads of a language model differ on held-out text, and how well the vote knows what it does not know.

python eval/diversity.py --model runs/llama_130m --data shards/test --output diversity.json

Prints, for each model, losses of heads and vote with their difference (the ambiguity), disagreement, divergence,
mutual information, calibration, and the overlap of the heads' masks. With --text, also the uncertainty of every token
of a text: total, and the part that comes from the heads contradicting each other.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import nt_transformers  # noqa: F401  (registers the models)
from nt_transformers.analysis import (
    log_mean_probs,
    mask_overlap,
    mean_of_pairs,
    mutual_information,
    score_language_model,
    weight_masks,
)
from nt_transformers.data import TokenSequences, load_documents, load_tokenizer


def main() -> None:
    args = parse_args()
    results = {}
    for name in args.model:
        tokenizer = load_tokenizer(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
        results[name] = measure(model, tokenizer, args)
        show(name, results[name])
        if args.text:
            results[name]["tokens"] = token_uncertainty(model, tokenizer, args.text)
            show_tokens(results[name]["tokens"])
    if args.output:
        args.output.write_text(json.dumps(results, indent=2), encoding="utf-8")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, help="folder or hub id; may be given several times")
    parser.add_argument("--data", required=True, help="held-out shards: a folder, file, glob or hub id")
    parser.add_argument("--sequence_length", type=int, default=256, help="tokens a sequence (default: %(default)s)")
    parser.add_argument("--packing", action="store_true", help="join documents instead of truncating each")
    parser.add_argument("--batch_size", type=int, default=16, help="sequences at a time (default: %(default)s)")
    parser.add_argument("--text", help="also show the uncertainty of every token of this text")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures")
    return parser.parse_args()


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> dict[str, Any]:
    sequences = TokenSequences(
        load_documents(args.data),
        tokenizer,
        sequence_length=args.sequence_length,
        batch_size=args.batch_size,
        packing=args.packing,
        training=False,
    )
    figures = score_language_model(model, sequences).language_figures(model.config.vote)
    overlap = mask_overlap(weight_masks(model))
    return {**figures, "mask_overlap": float(mean_of_pairs(overlap)), "mask_overlap_pairs": overlap.tolist()}


@torch.no_grad()
def token_uncertainty(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str) -> list[dict[str, Any]]:
    """For each token but the first: entropy of the vote before it was seen, and the mutual information, in nats."""
    tokens = tokenizer(text, return_tensors="pt").input_ids
    log_probs = model(tokens, output_head_logits=True).head_logits[:, 0, :-1].float().log_softmax(-1)
    vote = log_mean_probs(log_probs)
    entropy = -(vote.exp() * vote).sum(-1)
    return [
        {"token": tokenizer.decode(token), "total": total, "epistemic": epistemic}
        for token, total, epistemic in zip(
            tokens[0, 1:], entropy.tolist(), mutual_information(log_probs).tolist(), strict=True
        )
    ]


def show(name: str, figures: dict[str, Any]) -> None:
    heads = figures["eval_loss_heads"]
    print(name)
    for label, value in {
        "loss of the heads": " ".join(f"{loss:.4f}" for loss in heads),
        "mean": f"{sum(heads) / len(heads):.4f}",
        "- ambiguity": f"{figures['eval_ambiguity']:.4f}",
        "= loss of the vote": f"{figures['eval_loss']:.4f}",
        "disagreement": f"{figures['eval_disagreement']:.4f}",
        "divergence of two heads": f"{figures['eval_kl']:.4f}",
        "mutual information": f"{figures['eval_mutual_information']:.4f}",
        "calibration error, vote": f"{figures['eval_ece']:.4f}",
        "calibration error, heads": " ".join(f"{error:.4f}" for error in figures["eval_ece_heads"]),
        "Brier score, vote": f"{figures['eval_brier']:.4f}",
        "mask overlap": f"{figures['mask_overlap']:.4f}",
    }.items():
        print(f"  {label:<26}{value}")


def show_tokens(tokens: list[dict[str, Any]]) -> None:
    print(f"  {'token':<20}{'total':>8}{'epistemic':>11}  (nats)")
    for row in tokens:
        print(f"  {row['token']!r:<20}{row['total']:>8.3f}{row['epistemic']:>11.3f}")


if __name__ == "__main__":
    main()
