# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Zero-shot accuracy on lm-eval's tasks: the model's vote and, with --per_head, every head and both votes.

python eval/zero_shot.py --model runs/llama_130m --output zero_shot.json
python eval/zero_shot.py --model runs/llama_130m --tasks sciq,lambada_openai --per_head --offline

Needs the extra `eval`. Without a hub, `make eval-data` first, then --offline.
"""

import argparse
import json
from pathlib import Path

from lm_eval.utils import handle_non_serializable, make_table

from nt_transformers.evaluation import SUITES, evaluate_zero_shot


def main() -> None:
    args = parse_args()
    results = evaluate_zero_shot(
        args.model,
        args.tasks.split(",") if args.tasks else SUITES[args.suite],
        per_head=args.per_head,
        offline=args.offline,
        batch_size=args.batch_size,
        limit=args.limit,
        device=args.device,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
    )
    if results is None:  # another process than the first
        return
    if args.output:
        args.output.write_text(json.dumps(results, indent=2, default=handle_non_serializable), encoding="utf-8")
    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of a checkpoint with its tokenizer")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--tasks", metavar="A,B", help="lm-eval's tasks, groups or tags")
    choice.add_argument(
        "--suite", choices=SUITES, default="published", help=f"published: {', '.join(SUITES['published'])} (default)"
    )
    parser.add_argument("--per_head", action="store_true", help="also every head and both votes, in the same pass")
    parser.add_argument(
        "--offline",
        type=Path,
        nargs="?",
        const=Path("data/eval"),
        metavar="DIR",
        help="take the data from this folder, made by `make eval-data`, instead of the hub (default DIR: %(const)s)",
    )
    parser.add_argument("--batch_size", type=batch_size, default=8, help='inputs at a time, or "auto" (default: 8)')
    parser.add_argument("--limit", type=number, metavar="N", help="only N documents of each task, or a share below 1")
    parser.add_argument("--device", help="default: the accelerator if there is one")
    parser.add_argument("--dtype", default="auto", help="of the weights (default: that of the checkpoint)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the checkpoint")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the results")
    return parser.parse_args()


def batch_size(text: str) -> int | str:
    return text if text == "auto" else int(text)


def number(text: str) -> int | float:
    return float(text) if "." in text else int(text)


if __name__ == "__main__":
    main()
