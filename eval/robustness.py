# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Robustness and calibration of image classifiers: every head and both votes, on clean, corrupted and shifted images.

python eval/robustness.py --model runs/cifar100_wrn28_10 --data uoft-cs/cifar100 --image_column img \\
    --label_column fine_label --corrupted CIFAR-100-C --output robustness.json --plot robustness.png
python eval/robustness.py --model runs/imagenet_resnet50 --data imagenet --split val --corrupted imagenet-c \\
    --shifted imagenet-sketch

Without --corrupted the corruptions are made on the way, as strong as in ImageNet-C; --write_corrupted keeps them for
the next model. Several models are compared in one table and plot.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

import nt_transformers  # noqa: F401  (registers the models)
from nt_transformers.analysis.robustness import RobustnessTest, plot_severity
from nt_transformers.data.corruptions import CORRUPTIONS, SEVERITIES, write_corrupted
from nt_transformers.data.image_batches import preparation_of
from nt_transformers.data.images import LabelledImages, load_images


def main() -> None:
    args = parse_args()
    results = {name: measure(name, args) for name in args.model}
    if args.output:
        args.output.write_text(json.dumps(results, indent=2), encoding="utf-8")
    show(results)
    if args.plot:
        plot_severity(results, args.plot)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, help="folder or hub id; may be given several times")
    parser.add_argument("--data", required=True, help="clean test images: a hub id, table, folder of classes or IDX")
    parser.add_argument("--name", help="configuration of the hub's data set")
    parser.add_argument("--split", default="test", help="split or subfolder of the test images (default: %(default)s)")
    parser.add_argument("--image_column", default="image", help="column of the images (default: %(default)s)")
    parser.add_argument("--label_column", default="label", help="column of the classes (default: %(default)s)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--corrupted", type=Path, metavar="DIR", help="corrupted images, as CIFAR-C's or ImageNet-C's")
    source.add_argument("--write_corrupted", type=Path, metavar="DIR", help="make them once, in CIFAR-C's form")
    parser.add_argument(
        "--corruptions", nargs="*", default=CORRUPTIONS, help="which ones (default: the 15; may be none)"
    )
    parser.add_argument("--severities", nargs="+", type=int, default=SEVERITIES, help="which ones (default: 1 to 5)")
    parser.add_argument(
        "--shifted", action="append", default=[], metavar="DIR", help="folder of classes, other domain"
    )
    parser.add_argument("--batch_size", type=int, default=128, help="images at a time (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that read (default: %(default)s)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw accuracy over severity")
    return parser.parse_args()


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Figures of one model, by kind of images."""
    model = AutoModelForImageClassification.from_pretrained(name, dtype="auto").eval().to(args.device)
    class_names = [model.config.id2label[label] for label in range(model.config.num_labels)]
    preparation = preparation_of(AutoImageProcessor.from_pretrained(name))
    test = RobustnessTest(model, preparation, args.batch_size, args.num_workers)

    def load(source: str) -> LabelledImages:
        columns = {"image_column": args.image_column, "label_column": args.label_column}
        return load_images(source, args.split, name=args.name, **columns).with_classes(class_names)

    clean = load(args.data)
    result: dict[str, Any] = {"clean": test.on(clean)}
    if args.corruptions:
        if args.write_corrupted:
            missing = [kind for kind in args.corruptions if not (args.write_corrupted / f"{kind}.npy").exists()]
            write_corrupted(clean, preparation, args.write_corrupted, missing, args.num_workers)
        images = args.corrupted or args.write_corrupted or clean
        result["corrupted"] = test.on_corrupted(images, args.corruptions, args.severities)
    if args.shifted:
        result["shifted"] = {source: test.on(load(source)) for source in args.shifted}
    return result


def show(results: dict[str, Any]) -> None:
    """Prints the figures of each model's votes and heads, on each kind of images."""
    row = "  {:<24}{:>10}{:>9}{:>9}{:>9}".format
    for name, result in results.items():
        kinds = {"clean": result["clean"]}
        if "corrupted" in result:
            kinds["corrupted (cAcc, cNLL, cECE)"] = result["corrupted"]["mean"]
        for kind, figures in {**kinds, **result.get("shifted", {})}.items():
            print(f"\n{name}, {kind}: heads disagree on {figures['disagreement']:.1%}")
            print(row("", "accuracy", "NLL", "ECE", "Brier"))
            for member, values in members(figures).items():
                accuracy, *others = values
                print(row(member, f"{accuracy:.2%}", *(f"{value:.4f}" for value in others)))


def members(figures: dict[str, Any]) -> dict[str, list[float]]:
    """Accuracy, NLL, ECE and Brier of each vote and head."""
    kinds = ("accuracy", "nll", "ece", "brier")
    votes = {f"vote, mean {vote}": [figures[f"{kind}_{vote}_vote"] for kind in kinds] for vote in ("probs", "logits")}
    heads = zip(*(figures[f"{kind}_heads"] for kind in kinds), strict=True)
    return votes | {f"head {number}": list(values) for number, values in enumerate(heads)}


if __name__ == "__main__":
    main()
