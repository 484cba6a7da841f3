# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Models as ONNX, the vote inside, for the engines of others.

python -m nt_transformers.inference.onnx runs/demo demo.onnx
python -m nt_transformers.inference.onnx runs/cifar100_wrn28_10 wrn.onnx --image_size 32
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nt_transformers.models import (
    NeuroTrailsLlamaForCausalLM,
    NeuroTrailsResNetForImageClassification,
    NeuroTrailsViTForImageClassification,
    NeuroTrailsWideResNetForImageClassification,
)
from nt_transformers.models.neurotrails_resnet.modeling_neurotrails_resnet import _vote as vote_of

from .convert import load_checkpoint


CLASSIFIERS = (
    NeuroTrailsResNetForImageClassification,
    NeuroTrailsViTForImageClassification,
    NeuroTrailsWideResNetForImageClassification,
)
# What the exporter writes without converting, and the file format of that time, which older engines read as well.
OPSET, IR_VERSION = 18, 8
# Largest difference of a logit between ONNX Runtime and torch, as a share of the largest logit where that is above 1.
TOLERANCE = 1e-4
# Sizes to export with, and to check with; others would do as well.
BATCH, SEQUENCE = 2, 7


class _LanguageModel(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


class _Classifier(nn.Module):
    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values).logits


class _ConvolutionalClassifier(_Classifier):
    """Pools the feature maps of each head by itself: not all engines take tensors of five dimensions."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        model: Any = self.model
        backbone, heads = model.base_model.backbone, model.base_model.heads
        stem = backbone(pixel_values, None)
        pooled = {m: heads[m](stem, None).mean((-2, -1)) for m in model.active_heads}
        return vote_of(torch.stack([model.classifiers[m](x) for m, x in pooled.items()]), model.config.vote)


def export_onnx(model: PreTrainedModel, path: str | Path, *, image_size: int | None = None) -> None:
    """Writes the vote of a model's active heads as an ONNX file, and checks it in ONNX Runtime against torch.

    Language models take `input_ids` and `attention_mask` [batch, sequence] and return `logits` [batch, sequence,
    vocab], without a cache; classifiers take `pixel_values` [batch, channels, height, width] and return `logits`
    [batch, classes]. Batch and sequence may have any length. Removed weights are zeros, which some engines skip.

    Args:
        model: A NeuroTrails language model or image classifier in float32 on the CPU.
        path: The file to write; weights beyond 2 GB go into a second file beside it.
        image_size: Height and width of the images; ViT knows its own.

    Raises:
        ImportError: the extra `onnx` is not installed.
        ValueError: another kind of model, a compressed one, another type or device, or no `image_size`.
        RuntimeError: the exported model predicts something else.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("export_onnx needs the extra: pip install nt_transformers[onnx]") from error
    _check_model(model)
    is_text = isinstance(model, NeuroTrailsLlamaForCausalLM)
    if not Path(path).absolute().parent.is_dir():
        raise ValueError(f"path={str(path)!r}: there is no such folder; make it before.")
    training, wrapper = model.training, _wrap(model)
    size = None if is_text else _image_size(model, image_size)
    inputs = _example(model, size, BATCH, SEQUENCE)
    # The axes are named by the first input; those of the other are the same.
    names: dict[int, Any] = {0: "batch"} | ({1: "sequence"} if is_text else {})
    shapes = dict.fromkeys(inputs, dict.fromkeys(names, torch.export.Dim.DYNAMIC)) | {next(iter(inputs)): names}
    try:
        program = torch.onnx.export(
            wrapper.eval(),
            kwargs=inputs,
            dynamic_shapes=shapes,
            input_names=list(inputs),
            output_names=["logits"],
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.model.ir_version = IR_VERSION
        program.save(str(path))
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        _compare(session, wrapper, _example(model, size, BATCH + 1, SEQUENCE + 4))
    finally:
        model.train(training)


def _wrap(model: PreTrainedModel) -> nn.Module:
    """The model as a function of tensors alone."""
    if isinstance(model, NeuroTrailsLlamaForCausalLM):
        return _LanguageModel(model)
    return (_Classifier if isinstance(model, NeuroTrailsViTForImageClassification) else _ConvolutionalClassifier)(
        model
    )


def _check_model(model: PreTrainedModel) -> None:
    if not isinstance(model, (NeuroTrailsLlamaForCausalLM, *CLASSIFIERS)):
        raise ValueError(
            f"model: {type(model).__name__} does not vote; give a NeuroTrails language model or classifier."
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("the model is compressed, which ONNX cannot express: export model.dequantize().float().")
    if model.dtype != torch.float32 or model.device.type != "cpu":
        raise ValueError(f"{model.dtype} on {model.device}: export model.float().cpu().")


def _image_size(model: Any, given: int | None) -> int:
    own = getattr(model.config, "image_size", None)
    if given is None and own is None:
        raise ValueError("image_size: say how high and wide the images are, such as image_size=32 for CIFAR.")
    if given is not None and (not isinstance(given, int) or given < 1):
        raise ValueError(f"image_size={given!r}: give a whole number of pixels, such as 32.")
    if given is not None and own not in (None, given):
        raise ValueError(f"image_size={given}: this model takes images of {own} x {own}; leave it out.")
    size: Any = own if given is None else given
    return int(size)


def _example(model: Any, image_size: int | None, batch: int, sequence: int) -> dict[str, Tensor]:
    """Inputs by name; of text, the first one padded on its left."""
    generator = torch.Generator().manual_seed(0)
    if image_size is not None:
        shape = (batch, model.config.num_channels, image_size, image_size)
        return {"pixel_values": torch.randn(shape, generator=generator)}
    attention_mask = torch.ones(batch, sequence, dtype=torch.long)
    attention_mask[0, :2] = 0
    tokens = torch.randint(model.config.vocab_size, (batch, sequence), generator=generator)
    return {"input_ids": tokens, "attention_mask": attention_mask}


@torch.no_grad()
def _compare(session: Any, wrapper: nn.Module, inputs: dict[str, Tensor]) -> None:
    expected = wrapper(**inputs)
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
    difference = (torch.from_numpy(found) - expected).abs()
    if "attention_mask" in inputs:
        # What comes of padding means nothing.
        difference = difference[inputs["attention_mask"].bool()]
    limit = TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference.max() <= limit:
        raise RuntimeError(f"ONNX Runtime's logits are off by {difference.max():.2g}, more than {limit:.2g}.")


def main() -> None:
    """Command line of `export_onnx`."""
    parser = argparse.ArgumentParser(
        prog="python -m nt_transformers.inference.onnx",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="checkpoint to read: a folder or hub id")
    parser.add_argument("target", type=Path, help="file to write")
    parser.add_argument("--image_size", type=int, help="height and width of the images (not for text and ViT)")
    args = parser.parse_args()
    try:
        export_onnx(_load(args.source), args.target, image_size=args.image_size)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: error: {error}\n")


def _load(source: str) -> PreTrainedModel:
    """The model of a checkpoint, dense and in float32."""
    model: Any = load_checkpoint(source)
    return (model if getattr(model, "hf_quantizer", None) is None else model.dequantize()).float()


if __name__ == "__main__":
    main()
