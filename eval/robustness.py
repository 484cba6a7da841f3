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
import itertools
import json
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from transformers import AutoImageProcessor, AutoModelForImageClassification

import nt_transformers  # noqa: F401  (registers the models)
from nt_transformers.analysis.robustness import RobustnessTest, check_plot, plot_severity
from nt_transformers.data.corruptions import CORRUPTIONS, SEVERITIES, Corruption, write_corrupted
from nt_transformers.data.image_batches import preparation_of
from nt_transformers.data.images import ImageDataConfig, LabelledImages, load_images
from nt_transformers.files import write_text


def main() -> None:
    parser = argument_parser()
    args = parser.parse_args()
    try:
        check_arguments(args)
        subjects = {name: Subject.load(name, args) for name in args.model}
        if args.write_corrupted:
            check_same_input(subjects)
        results: dict[str, Any] = {}
        for name, subject in subjects.items():
            results[name] = subject.measure(args)
            if args.output:
                write_text(args.output, json.dumps(results, indent=2))
    except (ValueError, OSError, SafetensorError) as error:
        parser.error(str(error))
    show(results)
    if args.plot:
        plot_severity(results, args.plot)


def argument_parser() -> argparse.ArgumentParser:
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
    parser.add_argument(
        "--skip_damaged_images", action="store_true", help="go on without images that cannot be decoded, naming them"
    )
    parser.add_argument("--batch_size", type=int, default=128, help="images at a time (default: %(default)s)")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that read (default: %(default)s)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the figures")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw accuracy over severity")
    return parser


def check_arguments(args: argparse.Namespace) -> None:
    """Raises a `ValueError` for what would come to light only after hours."""
    if args.batch_size < 1 or args.num_workers < 0:
        raise ValueError(f"--batch_size {args.batch_size} --num_workers {args.num_workers}: give at least 1 and 0.")
    # A folder may hold others than the 15.
    for name, severity in itertools.product(CORRUPTIONS[:1] if args.corrupted else args.corruptions, args.severities):
        Corruption(name, severity)
    for path in filter(None, (args.output, args.plot)):
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise ValueError(f"{str(path)!r}: name a file, in a folder that is there.")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {args.device}: {error}") from error
    if args.plot:
        if not args.corruptions:
            raise ValueError(f"--plot {args.plot}: draws accuracy over severity; name --corruptions, or leave it out.")
        check_plot(args.plot)


def check_same_input(subjects: dict[str, "Subject"]) -> None:
    """Raises a `ValueError` unless all models take the same images, so that they can share corrupted ones."""
    inputs = {
        (*attrgetter("image_size", "crop", "center_crop", "num_channels")(each.preparation), *each.clean.class_names)
        for each in subjects.values()
    }
    if len(inputs) > 1:
        raise ValueError(
            "--write_corrupted: the models differ in size or channels of their images, or in the order of classes, "
            "and cannot share corrupted ones; measure them one by one, each with a folder of its own."
        )


@dataclass
class Subject:
    """One model, and the images as it takes them: loaded for all models before any is measured."""

    model: Any
    preparation: ImageDataConfig
    clean: LabelledImages
    shifted: dict[str, LabelledImages]

    @classmethod
    def load(cls, name: str, args: argparse.Namespace) -> Self:
        model = AutoModelForImageClassification.from_pretrained(name, dtype="auto").eval()
        if not hasattr(model, "active_heads"):
            raise ValueError(
                f"--model {name}: {type(model).__name__} has no heads; NeuroTrails classifiers are measured, to which "
                "from_dense takes stock ones."
            )
        class_names = [model.config.id2label[label] for label in range(model.config.num_labels)]
        preparation = replace(
            preparation_of(AutoImageProcessor.from_pretrained(name)), skip_damaged_images=args.skip_damaged_images
        )
        columns = {"image_column": args.image_column, "label_column": args.label_column}

        def load(source: str) -> LabelledImages:
            return load_images(source, args.split, name=args.name, **columns).with_classes(class_names)

        return cls(model, preparation, load(args.data), {source: load(source) for source in args.shifted})

    def measure(self, args: argparse.Namespace) -> dict[str, Any]:
        """Figures by kind of images."""
        test = RobustnessTest(self.model.to(args.device), self.preparation, args.batch_size, args.num_workers)
        result: dict[str, Any] = {}
        # The corrupted first: what is wrong with their files shows before any of them is read.
        if args.corruptions:
            if args.write_corrupted:
                write_corrupted(self.clean, self.preparation, args.write_corrupted, args.corruptions, args.num_workers)
            images = args.corrupted or args.write_corrupted or self.clean
            result["corrupted"] = test.on_corrupted(images, args.corruptions, args.severities)
        result["clean"] = test.on(self.clean)
        if args.shifted:
            result["shifted"] = {source: test.on(images) for source, images in self.shifted.items()}
        self.model.cpu()
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
