# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The finished network as a Hub checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from ..data import text_provenance
from ..files import partial_path, sync, write_text


CITATION = """
## Citation

```bibtex
@article{grooten2025neurotrails,
  title={NeuroTrails: Training with Dynamic Sparse Heads as the Key to Effective Ensembling},
  author={Grooten, Bram and Hasanov, Farid and Zhang, Chenxiang and Xiao, Qiao and Wu, Boqian and Atashgahi, Zahra and
    Sokar, Ghada and Liu, Shiwei and Yin, Lu and Mocanu, Elena and Pechenizkiy, Mykola and Mocanu, Decebal Constantin},
  journal={arXiv preprint arXiv:2505.17909},
  year={2025}
}
```
"""

CARD_TEMPLATE = (
    """---
{{ card_data }}
---

# {{ name }}

A sparse multi-head ensemble (NeuroTrails): {{ heads }} heads of {{ head_layers }} layers on a shared backbone of
{{ backbone_layers }} layers. {{ active }} of {{ parameters }} parameters are active (density {{ density }} of the
weights that the topology covers, method `{{ method }}`). The heads vote by mean {{ vote }}.

## Measured

On {{ tokens_evaluated }} tokens of held-out documents of {{ held_out }}, after {{ tokens_trained }} training tokens:

| prediction | perplexity |
|---|---|
{{ perplexity_rows }}

The heads disagree on the most likely next token at {{ disagreement }} of the positions (mean over pairs of heads).

## Training data

{{ data }}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{{ name }}")
model = AutoModelForCausalLM.from_pretrained("{{ name }}", trust_remote_code=True)
inputs = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```

`trust_remote_code=True` is not needed where `nt_transformers` is imported. `model.active_heads = 1` votes with
the first head only; `model(..., output_head_logits=True).head_logits` are every head's own.

## Licence

Weights: {{ license }}. Modelling code: Apache-2.0. The training texts keep the licences of their sources.
"""
    + CITATION
)


class Processor(Protocol):
    """A tokenizer or an image processor."""

    def save_pretrained(self, save_directory: Path) -> Any: ...


def export_checkpoint(
    output_dir: Path,
    model: PreTrainedModel,
    processor: Processor,
    card: ModelCard,
    summary: dict[str, Any],
) -> None:
    """Writes weights, configurations, modelling code, processor, model card and `summary.json`.

    Each file is written whole or not at all, the weights after all they need and `summary.json` last of all.
    """
    partial = partial_path(output_dir / "export")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    card.save(partial / "README.md")
    paths = sorted(partial.iterdir(), key=lambda path: (".safetensors" in path.name, path.suffix == ".json"))
    for path in paths:
        sync(path)
    for path in paths:
        path.replace(output_dir / path.name)
    partial.rmdir()
    write_text(output_dir / "summary.json", json.dumps(summary, indent=2))


def remove_export(output_dir: Path) -> None:
    """Takes away what makes a folder look like a trained model, before another run of the same folder begins."""
    for name in ("summary.json", "model*.safetensors.index.json", "model*.safetensors"):
        for path in output_dir.glob(name):
            path.unlink()


def model_card(name: str, license: str, model: PreTrainedModel, summary: dict[str, Any]) -> ModelCard:
    """The card of a trained language model, filled with the measured figures of `summary`.

    `name` is what the model is loaded by: its id on the hub, or the name of its folder.
    """
    config, run = model.config, summary["config"]
    base_model = run.get("model.from_pretrained")
    perplexity = {
        "vote, mean probability": summary["eval_perplexity_probs_vote"],
        "vote, mean logit": summary["eval_perplexity_logits_vote"],
    } | {f"head {index}": value for index, value in enumerate(summary["eval_perplexity_heads"])}
    data = text_provenance(run["data.train"], run["data.name"])
    held_out = text_provenance(run["data.validation"]).name if run["data.validation"] else data.name
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["neurotrails", "sparse", "ensemble"],
        model_name=name,
        license=license,
        base_model=base_model if base_model and not Path(base_model).exists() else None,
        datasets=data.hub_id,
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=data.hub_id or "text",
                dataset_name=f"held-out documents of {held_out}",
                metric_type="perplexity",
                metric_name=f"perplexity, {label}",
                metric_value=value,
            )
            for label, value in perplexity.items()
        ],
    )
    return ModelCard.from_template(
        card_data,
        template_str=CARD_TEMPLATE,
        name=name,
        heads=config.num_ensemble_heads,
        head_layers=config.num_head_layers,
        backbone_layers=config.num_hidden_layers - config.num_head_layers,
        active=f"{summary['active_parameters']:,}",
        parameters=f"{summary['parameters']:,}",
        density=f"{summary['density']:.4g}",
        method=run["sparsity.method"],
        vote={"probs": "probability", "logits": "logit"}[config.vote],
        tokens_evaluated=f"{summary['eval_tokens']:,}",
        tokens_trained=f"{summary['tokens']:,}",
        perplexity_rows="\n".join(f"| {label} | {value:.2f} |" for label, value in perplexity.items()),
        disagreement=f"{summary['eval_disagreement']:.1%}",
        held_out=held_out,
        data=data.description,
        license=license,
    )
