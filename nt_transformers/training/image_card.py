# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The model card of a trained image classifier."""

from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from .export import CITATION


CARD_TEMPLATE = (
    """---
{{ card_data }}
---

# {{ name }}

A sparse multi-head ensemble (NeuroTrails) for {{ classes }} classes of images: {{ heads }} heads on a shared backbone
(`{{ model_type }}`, {{ head_blocks }} of its blocks in each head). {{ active }} of {{ parameters }} parameters are
active (density {{ density }} of the weights that the topology covers, method `{{ method }}`). The heads vote by mean
{{ vote }}.

## Measured

On {{ measured_on }}, after {{ images_trained }} training images
(augmented, repeats counted):

| prediction | accuracy | NLL | ECE (15 bins) | Brier |
|---|---|---|---|---|
{{ rows }}

Two heads disagree on the class of {{ disagreement }} of the images (mean over pairs of heads).

## Training data

`{{ data }}`

## Use

```python
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained("{{ name }}")
model = AutoModelForImageClassification.from_pretrained("{{ name }}", trust_remote_code=True)
inputs = processor(Image.open("image.png").convert("{{ mode }}"), return_tensors="pt")
print(model.config.id2label[model(**inputs).logits.argmax(-1).item()])
```

`trust_remote_code=True` is not needed where `nt_transformers` is imported. `model.active_heads = 1` votes with
the first head only.

## Licence

Weights: {{ license }}. Modelling code: Apache-2.0. The training images keep the licences of their sources.
"""
    + CITATION
)
FIGURES = ("accuracy", "nll", "ece", "brier")


def image_classifier_card(name: str, license: str, model: PreTrainedModel, summary: dict[str, Any]) -> ModelCard:
    """The card of a trained image classifier, filled with the figures of `summary`: those on test images, or on
    held-out ones where test images were left alone.

    `name` is what the model is loaded by: its id on the hub, or the name of its folder.
    """
    config, run = model.config, summary["config"]
    prefix = "test" if "test_accuracy" in summary else "eval"
    predictions = {
        "vote, mean probability": [summary[f"{prefix}_{figure}_probs_vote"] for figure in FIGURES],
        "vote, mean logit": [summary[f"{prefix}_{figure}_logits_vote"] for figure in FIGURES],
    }
    for head in range(config.num_ensemble_heads):
        predictions[f"head {head}"] = [summary[f"{prefix}_{figure}_heads"][head] for figure in FIGURES]
    if prefix == "test":
        source = f"{run['data.test'] or run['data.train']}, {run['data.test_split']}"
        measured_on = (
            f"the {summary['test_images']:,} images of `{source}`, which had no part in training or any choice"
        )
    else:
        source = f"held-out images of {run['data.train']}, {run['data.train_split']}"
        measured_on = f"{summary['eval_images']:,} {source}"
    card_data = ModelCardData(
        library_name="transformers",
        license=license,
        pipeline_tag="image-classification",
        tags=["neurotrails", "sparse", "ensemble"],
        model_name=name,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type="image",
                dataset_name=source,
                metric_type=figure,
                metric_name=f"{figure}, {label}",
                metric_value=value,
            )
            for label, values in predictions.items()
            for figure, value in zip(FIGURES, values, strict=True)
        ],
    )
    rows = (
        f"| {label} | {accuracy:.2%} | {nll:.4f} | {ece:.4f} | {brier:.4f} |"
        for label, (accuracy, nll, ece, brier) in predictions.items()
    )
    return ModelCard.from_template(
        card_data,
        template_str=CARD_TEMPLATE,
        name=name,
        license=license,
        classes=config.num_labels,
        heads=config.num_ensemble_heads,
        head_blocks=run["model.num_head_blocks"] or "all",
        model_type=config.model_type,
        active=f"{summary['active_parameters']:,}",
        parameters=f"{summary['parameters']:,}",
        density=f"{summary['density']:.4g}",
        method=run["sparsity.method"],
        vote={"probs": "probability", "logits": "logit"}[config.vote],
        measured_on=measured_on,
        images_trained=f"{summary['images']:,}",
        rows="\n".join(rows),
        disagreement=f"{summary[f'{prefix}_disagreement']:.1%}",
        data=run["data.train"],
        mode="RGB" if config.num_channels == 3 else "L",
    )
