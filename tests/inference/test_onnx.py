# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The exported vote is torch's, for any batch and sequence."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageClassification, PreTrainedModel

import nt_transformers as nt
from nt_transformers.inference import compress
from nt_transformers.inference import onnx as onnx_module
from nt_transformers.inference.onnx import export_onnx


ort = pytest.importorskip("onnxruntime", reason="the extra `onnx` is not installed")
pytest.importorskip("onnxscript", reason="the extra `onnx` is not installed")

# torch's exporter uses what torch itself has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SMALL_RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic", "num_labels": 5}
SMALL_VIT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
CLASSIFIERS: dict[str, Any] = {
    "wide_resnet": nt.NeuroTrailsWideResNetConfig(depth=10, widen_factor=1, num_labels=5, num_head_blocks=2),
    "resnet": nt.NeuroTrailsResNetConfig(**SMALL_RESNET, num_head_blocks=1, vote="logits"),
    "vit": nt.NeuroTrailsViTConfig(**SMALL_VIT, image_size=16, patch_size=8, num_labels=5, num_head_layers=2),
}


def classifier(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(CLASSIFIERS[name])
    model.train()
    for _ in range(3):
        # Batch norms that tell the heads apart.
        model(torch.randn(8, 3, 16, 16))
    return model.eval()


def run(path: Path, **inputs: torch.Tensor) -> torch.Tensor:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
    return torch.from_numpy(logits)


@pytest.mark.slow
@pytest.mark.parametrize("vote", ["probs", "logits"])
@torch.no_grad()
def test_language_model(make_model, tmp_path: Path, vote: str) -> None:
    model = make_model(vote=vote)
    model.active_heads = [2, 0]
    export_onnx(model, tmp_path / "model.onnx")
    for batch, length in ((1, 1), (2, 7), (4, 30)):
        tokens = torch.randint(1, 99, (batch, length), generator=torch.Generator().manual_seed(batch))
        mask = torch.ones_like(tokens)
        mask[0, : length // 3] = 0
        logits = run(tmp_path / "model.onnx", input_ids=tokens, attention_mask=mask)
        expected = model(tokens, attention_mask=mask).logits
        torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["wide_resnet", *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet", "vit"))]
)
@torch.no_grad()
def test_classifiers(tmp_path: Path, name: str) -> None:
    model = classifier(name)
    path = tmp_path / "model.onnx"
    logits = {}
    for active in (3, [1]):
        model.active_heads = active
        export_onnx(model, path, image_size=16)
        for batch in (1, 2, 5):
            images = torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0))
            logits[str(active)] = run(path, pixel_values=images)
            torch.testing.assert_close(logits[str(active)], model(images).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits["3"], logits["[1]"])


@pytest.mark.slow
@torch.no_grad()
def test_command_line(make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compressed checkpoint is exported dense."""
    model = compress(make_model(), "fp32")
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(sys, "argv", ["onnx", str(tmp_path / "model"), str(tmp_path / "m.onnx")])
    onnx_module.main()
    tokens = torch.arange(1, 9)[None]
    logits = run(tmp_path / "m.onnx", input_ids=tokens, attention_mask=torch.ones_like(tokens))
    torch.testing.assert_close(logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


class TestMistakes:
    def test_compressed(self, make_model, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"export model\.dequantize\(\)\.float\(\)"):
            export_onnx(compress(make_model()), tmp_path / "model.onnx")

    def test_bfloat16(self, make_model, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"bfloat16 on cpu: export model\.float\(\)"):
            export_onnx(make_model(dtype=torch.bfloat16), tmp_path / "model.onnx")

    def test_another_model(self, make_model, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"NeuroTrailsLlamaModel does not vote"):
            export_onnx(make_model().model, tmp_path / "model.onnx")

    @pytest.mark.parametrize(
        ("name", "size"), [("resnet", None), ("vit", 32), ("resnet", 0), ("resnet", -3), ("resnet", 16.5)]
    )
    def test_image_size(self, tmp_path: Path, name: str, size: int | None) -> None:
        with pytest.raises(ValueError, match=r"image_size"):
            export_onnx(classifier(name), tmp_path / "model.onnx", image_size=size)

    def test_without_the_extra(self, make_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(ImportError, match=r"pip install nt_transformers\[onnx\]"):
            export_onnx(make_model(), tmp_path / "model.onnx")

    @pytest.mark.slow
    def test_another_prediction_is_noticed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(onnx_module, "TOLERANCE", 0)
        model = classifier("wide_resnet")
        with pytest.raises(RuntimeError, match=r"logits are off by"):
            export_onnx(model, tmp_path / "model.onnx", image_size=16)
