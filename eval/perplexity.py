# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Perplexity of language models on held-out text: every head and both votes, weighted by token.

python eval/perplexity.py --model runs/llama_130m --data shards/test --output perplexity.json

Several models are compared in one table; perplexities compare only between models of the same tokenizer. Calibration
and divergence of the heads are left to eval/diversity.py.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import nt_transformers  # noqa: F401  (registers the models)
from nt_transformers.analysis import score_language_model, unigram_perplexity
from nt_transformers.data import TokenSequences, load_documents, load_tokenizer


def main() -> None:
    args = parse_args()
    results: dict[str, Any] = {}
    for name in args.model:
        tokenizer = load_tokenizer(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval()
        results[name] = measure(model, tokenizer, args)
        if args.prompt:
            results[name]["sample"] = sample(model, tokenizer, args.prompt)
    if args.unigram:
        results["unigram"] = {
            "eval_perplexity": unigram_perplexity(
                sequences(args.unigram, tokenizer, args), sequences(args.data, tokenizer, args), len(tokenizer)
            )
        }
    if args.output:
        args.output.write_text(json.dumps(results, indent=2), encoding="utf-8")
    show(results)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, help="folder or hub id; may be given several times")
    parser.add_argument("--data", required=True, help="held-out shards: a folder, file, glob or hub id")
    parser.add_argument("--sequence_length", type=int, default=256, help="tokens a sequence (default: %(default)s)")
    parser.add_argument("--packing", action="store_true", help="join documents instead of truncating each")
    parser.add_argument("--batch_size", type=int, default=16, help="sequences at a time (default: %(default)s)")
    parser.add_argument("--unigram", metavar="DATA", help="also score the token frequencies of these training shards")
    parser.add_argument("--prompt", help="also continue this text with each model, greedily")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures")
    return parser.parse_args()


def sequences(data: str, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> TokenSequences:
    return TokenSequences(
        load_documents(data),
        tokenizer,
        sequence_length=args.sequence_length,
        batch_size=args.batch_size,
        packing=args.packing,
        training=False,
    )


def measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> dict[str, Any]:
    scores = score_language_model(model, sequences(args.data, tokenizer, args), calibration=False)
    return {
        **scores.language_figures(model.config.vote),
        "parameters": model.num_parameters(),
        "nonzero_parameters": sum(int(parameter.count_nonzero()) for parameter in model.parameters()),
    }


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.2)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


def show(results: dict[str, Any]) -> None:
    row = "{:<28}{:>12}{:>12}{:>10}{:>14}  {}".format
    print(row("model", "perplexity", "parameters", "non-zero", "disagreement", "heads alone"))
    for name, figures in results.items():
        if "parameters" not in figures:
            print(row(name, f"{figures['eval_perplexity']:.1f}", "", "", "", ""))
            continue
        heads = figures["eval_perplexity_heads"]
        print(
            row(
                name,
                f"{figures['eval_perplexity']:.1f}",
                f"{figures['parameters'] / 1e6:.2f}M",
                f"{figures['nonzero_parameters'] / 1e6:.2f}M",
                f"{figures['eval_disagreement']:.2f}" if len(heads) > 1 else "",
                " ".join(f"{head:.1f}" for head in heads) if len(heads) > 1 else "",
            )
        )
    for name, figures in results.items():
        if "sample" in figures:
            print(f"\n{name} continues:\n{figures['sample']}")


if __name__ == "__main__":
    main()
