# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Compresses a checkpoint, or makes a compressed one dense again.

python -m nt_transformers.inference.convert runs/demo runs/demo_compressed --values bf16
python -m nt_transformers.inference.convert runs/demo_compressed runs/demo_dense --dense
"""

import argparse
import logging
from pathlib import Path
from typing import Any, get_args

from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoProcessor,
    PreTrainedModel,
)
from transformers.utils import cached_file

import nt_transformers  # noqa: F401  (registers the models)

from .compress import compress
from .matrix import Values


logger = logging.getLogger(__name__)

PROCESSOR_FILES = ("tokenizer_config.json", "tokenizer.json", "preprocessor_config.json", "processor_config.json")


def load_checkpoint(source: str) -> PreTrainedModel:
    """The language model or image classifier of a checkpoint (folder or hub id)."""
    is_classifier = type(AutoConfig.from_pretrained(source)) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    loader: Any = AutoModelForImageClassification if is_classifier else AutoModelForCausalLM
    model: PreTrainedModel = loader.from_pretrained(source)
    return model


def convert(
    source: str,
    target: str,
    values: Values = "bf16",
    *,
    dense: bool = False,
    output_layers: bool = True,
    fast_decoding: bool = True,
) -> None:
    """Reads the checkpoint `source` (folder or hub id) and writes `target`, compressed, or dense if so asked.

    Its tokenizer or image processor comes along. `values`, `output_layers`, `fast_decoding`: see `compress`.

    Raises:
        ValueError: `target` exists, `source` cannot be loaded, or it is compressed (dense) already.
    """
    if Path(target).exists() and not (Path(target).is_dir() and not any(Path(target).iterdir())):
        raise ValueError(f"target={target!r}: it exists and is no empty folder; name another one.")
    try:
        model = load_checkpoint(source)
        processor = _load_processor(source)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"source={source!r} cannot be loaded: {error}") from error
    if not dense:
        compress(model, values, output_layers=output_layers, fast_decoding=fast_decoding)
    elif getattr(model, "hf_quantizer", None) is None:
        raise ValueError(f"source={source!r}: it is not compressed, so there is nothing to make dense.")
    else:
        model = model.dequantize()
    model.save_pretrained(target)
    if processor is not None:
        processor.save_pretrained(target)


def _load_processor(source: str) -> Any:
    """The tokenizer or image processor of a checkpoint; None, which is logged, where it has none."""
    found = (cached_file(source, name, _raise_exceptions_for_missing_entries=False) for name in PROCESSOR_FILES)
    if not any(found):
        logger.warning("source=%r has no tokenizer or image processor, so none is written.", source)
        return None
    try:
        return AutoProcessor.from_pretrained(source)
    except Exception as error:  # of any type, where one of the files is damaged
        raise ValueError(f"source={source!r}: its tokenizer or image processor cannot be loaded: {error}") from error


def main() -> None:
    """Command line of `convert`."""
    parser = argparse.ArgumentParser(
        prog="python -m nt_transformers.inference.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="checkpoint to read: a folder or hub id")
    parser.add_argument("target", help="folder to write")
    parser.add_argument("--values", choices=get_args(Values), help="type of the stored weights (bf16)")
    parser.add_argument("--dense", action="store_true", help="make a compressed checkpoint dense again")
    parser.add_argument("--keep_output_layers", action="store_true", help="leave the output layers as they are")
    parser.add_argument("--weights_once", action="store_true", help="less memory, slower decoding: no `fast_decoding`")
    args = parser.parse_args()
    if args.dense and (args.values or args.keep_output_layers or args.weights_once):
        parser.error("--dense keeps every weight as it is: leave --values and the options of compressing out")
    try:
        convert(
            args.source,
            args.target,
            args.values or "bf16",
            dense=args.dense,
            output_layers=not args.keep_output_layers,
            fast_decoding=not args.weights_once,
        )
    except ValueError as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
