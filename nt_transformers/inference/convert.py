# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Compresses a checkpoint, or makes a compressed one dense again.

python -m nt_transformers.inference.convert runs/demo runs/demo_compressed --values bf16
python -m nt_transformers.inference.convert runs/demo_compressed runs/demo_dense --dense
"""

import argparse
from pathlib import Path
from typing import get_args

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

import nt_transformers  # noqa: F401  (registers the models)

from .compress import compress
from .matrix import Values


def convert(
    source: str, target: str, values: Values = "bf16", *, dense: bool = False, output_layers: bool = True
) -> None:
    """Reads the checkpoint `source` (folder or hub id) and writes `target`, compressed, or dense if so asked.

    Raises:
        ValueError: `target` exists, `source` cannot be loaded, or it is compressed (dense) already.
    """
    if Path(target).exists() and not (Path(target).is_dir() and not any(Path(target).iterdir())):
        raise ValueError(f"target={target!r}: it exists and is no empty folder; name another one.")
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        tokenizer = AutoTokenizer.from_pretrained(source)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"source={source!r} cannot be loaded: {error}") from error
    if not dense:
        compress(model, values, output_layers=output_layers)
    elif getattr(model, "hf_quantizer", None) is None:
        raise ValueError(f"source={source!r}: it is not compressed, so there is nothing to make dense.")
    else:
        model = model.dequantize()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def main() -> None:
    """Command line of `convert`."""
    parser = argparse.ArgumentParser(
        prog="python -m nt_transformers.inference.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="checkpoint to read: a folder or hub id")
    parser.add_argument("target", help="folder to write")
    parser.add_argument("--values", choices=get_args(Values), default="bf16", help="type of the stored weights")
    parser.add_argument("--dense", action="store_true", help="make a compressed checkpoint dense again")
    parser.add_argument(
        "--keep_output_layers", action="store_false", dest="output_layers", help="leave the output layers as they are"
    )
    options = vars(parser.parse_args())
    try:
        convert(options.pop("source"), options.pop("target"), **options)
    except ValueError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
