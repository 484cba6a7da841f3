# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Image classifiers saved and loaded, with their image processors, with the package and without it."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    ConvNextImageProcessorPil,
    ViTImageProcessorPil,
    pipeline,
)
from vision_models import CLASSES, FAMILIES, MIDDLE, make_classifier, make_config, make_images


# Split within the network, and no backbone at all.
SPLITS = [*MIDDLE, *((name, family.depth) for name, family in FAMILIES.items())]
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.mark.parametrize("shard_size", ["1GB", "10KB"], ids=["one file", "shards"])
@pytest.mark.parametrize(("family", "head_depth"), SPLITS)
def test_saving_and_loading_keeps_every_bit(family, head_depth, shard_size, tmp_path):
    model = make_classifier(family, head_depth, vote="logits")
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "10KB")
    loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is FAMILIES[family].classifier
    assert not any(info.values()), info
    assert loaded.config.vote == "logits"
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert torch.equal(loaded(make_images()).logits, model(make_images()).logits)


@every_family
def test_base_model_loads_from_a_classifier_checkpoint(family, tmp_path):
    model = make_classifier(family, 1)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is FAMILIES[family].model
    torch.testing.assert_close(base.state_dict(), model.base_model.state_dict(), rtol=0, atol=0)


@every_family
def test_another_number_of_classes_gives_every_head_a_new_classifier(family, tmp_path):
    model = make_classifier(family, 1)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert loaded(make_images(), output_head_logits=True).head_logits.shape == (3, 4, 7)
    torch.testing.assert_close(loaded.base_model.state_dict(), model.base_model.state_dict(), rtol=0, atol=0)
    assert all(classifier.weight.isfinite().all() for classifier in loaded.classifiers)


@every_family
def test_auto_classes_know_the_model(family):
    config = make_config(family, 1)
    assert type(AutoConfig.for_model(config.model_type)) is FAMILIES[family].config
    assert type(AutoModel.from_config(config)) is FAMILIES[family].model
    assert type(AutoModelForImageClassification.from_config(config)) is FAMILIES[family].classifier


@every_family
def test_config_round_trip_keeps_the_split(family, tmp_path):
    config = make_config(family, 0, num_ensemble_heads=5, vote="logits")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()


PROCESSORS = {
    "resnet": (ConvNextImageProcessorPil, {"size": {"shortest_edge": 8}, "crop_pct": 1.0}),
    "wide_resnet": (ViTImageProcessorPil, {"size": {"height": 8, "width": 8}}),
    "vit": (ViTImageProcessorPil, {"size": {"height": 8, "width": 8}}),
}


@every_family
def test_image_processor_is_found_by_the_model_and_saved_with_it(family, tmp_path):
    make_config(family, 1).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    by_model = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    processor, options = PROCESSORS[family]
    assert type(by_model) is processor

    processor(**options, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert type(loaded) is processor
    assert tuple(loaded.image_mean) == (0.1, 0.2, 0.3)


@every_family
def test_image_classification_pipeline(family, tmp_path):
    model = make_classifier(family, 1)
    model.save_pretrained(tmp_path)
    processor, options = PROCESSORS[family]
    processor(**options).save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(256, size=(8, 8, 3), dtype=np.uint8)
    classify = pipeline("image-classification", str(tmp_path), device="cpu")
    scores = {entry["label"]: entry["score"] for entry in classify(Image.fromarray(pixels), top_k=CLASSES)}
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
    expected = model(images, output_head_logits=True).head_logits.softmax(-1).mean(0)[0]
    assert [scores[f"LABEL_{label}"] for label in range(CLASSES)] == pytest.approx(expected.tolist(), abs=1e-5)


WITHOUT_THE_PACKAGE = """
import sys
sys.modules["nt_transformers"] = None  # any import of the package fails
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
for folder in sys.argv[1:]:
    expected = load_file(f"{folder}/expected.safetensors")
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).num_ensemble_heads == 3
    processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    assert tuple(processor.image_mean) == (0.1, 0.2, 0.3)
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(base(expected["images"]).last_hidden_state, expected["hidden_states"])
    model = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(model(expected["images"]).logits, expected["logits"])
"""


def test_checkpoints_load_where_the_package_is_unknown(tmp_path):
    for family, head_depth in MIDDLE:
        folder = tmp_path / family
        model = make_classifier(family, head_depth)
        model.save_pretrained(folder)
        processor, options = PROCESSORS[family]
        processor(**options, image_mean=[0.1, 0.2, 0.3]).save_pretrained(folder)
        with torch.no_grad():
            expected = {
                "images": make_images(),
                "hidden_states": model.base_model(make_images()).last_hidden_state,
                "logits": model(make_images()).logits,
            }
        save_file(expected, folder / "expected.safetensors")

    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, *(str(tmp_path / family) for family in FAMILIES)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
