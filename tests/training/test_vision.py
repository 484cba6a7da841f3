# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Training on images, end to end on a small folder in ImageNet's layout."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from runs import assert_resumed_exactly, copy_stopped, read_metrics
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForImageClassification

from nt_transformers import NeuroTrailsWideResNetConfig, NeuroTrailsWideResNetForImageClassification
from nt_transformers.analysis import image_model_cost
from nt_transformers.data.image_batches import EvaluationBatches
from nt_transformers.data.images import ImageDataConfig, load_images
from nt_transformers.sparsity import SparsityConfig, planned_nonzeros
from nt_transformers.training import parse_arguments
from nt_transformers.training.engine import check_shardable
from nt_transformers.training.plan import Hardware
from nt_transformers.training.vision import (
    ClassifierArguments,
    VisionTask,
    VisionTrainingConfig,
    train_image_classifier,
)


RECIPES = Path(__file__).parents[2] / "recipes"
CONFIGS = RECIPES / "configs"
VARIANTS = sorted(path.stem for path in (CONFIGS / "vision_variants").glob("*.yaml"))
SIZES = sorted(
    path.stem for path in CONFIGS.glob("*.yaml") if "method: neurotrails_vision\n" in path.read_text(encoding="utf-8")
)
NETWORKS = {
    "wide_resnet": {"depth": 10, "widen_factor": 1},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "vit": {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "patch_size": 8,
    },
}

RunConfig = Callable[..., VisionTrainingConfig]


@pytest.fixture
def run_config(tmp_path: Path, image_folder: Path) -> RunConfig:
    """Makes the configuration of a tiny run; arguments override fields, those of nested parts as dicts."""

    def make(
        model: dict[str, Any] | None = None,
        data: dict[str, Any] | None = None,
        sparsity: dict[str, Any] | None = None,
        **fields: Any,
    ) -> VisionTrainingConfig:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 8,
            "global_batch_size": 12,
            "per_device_batch_size": 6,
            "optimizer": "sgd",
            "learning_rate": 0.05,
            "lr_schedule": "multistep",
            "weight_decay": 5e-4,
            "logging_steps": 3,
            "eval_steps": 4,
            "checkpoint_steps": 2,
            "keep_last": 100,
        }
        network = {
            "model_type": "neurotrails_wide_resnet",
            "num_ensemble_heads": 2,
            "num_head_blocks": 1,
            "shape": NETWORKS["wide_resnet"],
        }
        images = {
            "train": str(image_folder),
            "test_split": "val",
            "validation_size": 6,
            "image_size": 16,
            "crop": "resized",
            "num_workers": 0,
        }
        topology = {"method": "rigl", "density": 0.5, "update_interval": 2, "stop_fraction": 1.0}
        return VisionTrainingConfig(
            model=ClassifierArguments(**network | (model or {})),
            data=ImageDataConfig(**images | (data or {})),
            sparsity=SparsityConfig(**topology | (sparsity or {})),
            **defaults | fields,
        )

    return make


def test_from_a_folder_in_imagenets_layout_to_a_checkpoint_that_loads(
    run_config: RunConfig, image_folder: Path
) -> None:
    config = run_config(
        model={"model_type": "neurotrails_resnet", "shape": NETWORKS["resnet"]},
        max_steps=40,
        checkpoint_steps=40,
        learning_rate=0.1,
        channels_last=True,
        data={"label_smoothing": 0.1},
    )
    summary = train_image_classifier(config)
    folder = Path(config.output_dir)
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["test_images"] == 12
    assert summary["test_accuracy"] > 0.8, "classes differ in brightness"

    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    last = load_file(folder / "checkpoints" / "step_40" / "model.safetensors")
    assert all(torch.equal(parameter, last[name]) for name, parameter in model.named_parameters())
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    kept = sum(int(p.count_nonzero()) for p in matrices) / sum(p.numel() for p in matrices)
    assert kept <= summary["density"] == pytest.approx(0.5, abs=1e-3)
    assert [model.config.id2label[i] for i in range(3)] == ["n01", "n02", "n03"]

    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    images = load_images(str(image_folder), "val")
    ours = EvaluationBatches(images, config.data, batch_size=12)[0]["pixel_values"]
    theirs = processor([images.read(i) for i in range(12)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    with torch.no_grad():
        accuracy = (model(theirs).logits.argmax(-1) == torch.from_numpy(images.labels)).float().mean()
    assert float(accuracy) == pytest.approx(summary["test_accuracy"])

    card = (folder / "README.md").read_text()
    for vote in ("probs_vote", "logits_vote"):
        assert f"| {summary[f'test_accuracy_{vote}']:.2%} | {summary[f'test_nll_{vote}']:.4f} |" in card


def test_metrics_name_images_and_evaluate_on_held_out_ones(run_config: RunConfig) -> None:
    config = run_config()
    summary = train_image_classifier(config)
    lines = read_metrics(config.output_dir)
    training = [line for line in lines if "loss" in line]
    evaluation = [line for line in lines if "eval_nll" in line]
    assert [line["images"] for line in training] == [36, 72]
    assert [line["step"] for line in evaluation] == [4, 8]
    for line in training:
        assert line["loss"] == pytest.approx(sum(line["head_losses"]) / 2, rel=1e-5)
        assert "tokens" not in line
    for line in evaluation:
        assert line["eval_images"] == 6
        assert len(line["eval_accuracy_heads"]) == len(line["eval_ece_heads"]) == 2
    assert not any(name.startswith("test_") for line in lines for name in line)
    assert summary["images"] == 96


@pytest.mark.parametrize(
    ("model", "data", "sparsity", "fields"),
    [
        ("wide_resnet", {"mixup": 0.2, "num_workers": 2}, {"method": "neurotrails_vision"}, {}),
        ("resnet", {}, {}, {"mixed_precision": "bf16", "channels_last": True}),
        ("vit", {"crop": "pad", "rand_augment": 5}, {"method": "set"}, {"mixed_precision": "bf16"}),
    ],
)
def test_resumed_equals_uninterrupted(
    run_config: RunConfig,
    tmp_path: Path,
    model: str,
    data: dict[str, Any],
    sparsity: dict[str, Any],
    fields: dict[str, Any],
) -> None:
    network = {"model_type": f"neurotrails_{model}", "shape": NETWORKS[model]}
    whole = run_config(network, data, sparsity, **fields)
    train_image_classifier(whole)
    trained = load_file(Path(whole.output_dir) / "model.safetensors")
    assert {tensor.dtype for tensor in trained.values() if tensor.is_floating_point()} == {torch.float32}
    destination = str(tmp_path / "resumed")
    resumed = run_config(network, data, sparsity, **fields, output_dir=destination, resume_from_checkpoint="latest")
    copy_stopped(whole.output_dir, resumed.output_dir, 4)
    train_image_classifier(resumed)
    assert_resumed_exactly(resumed.output_dir, whole.output_dir)


def test_batch_norms_see_the_same_batches_after_a_resume(run_config: RunConfig) -> None:
    train_image_classifier(run_config(max_steps=2))
    other = run_config(max_steps=2, per_device_batch_size=12, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match="per_device_batch_size: 6 there, 12 here"):
        train_image_classifier(other)


def test_all_images_train_when_none_are_held_out(run_config: RunConfig) -> None:
    config = run_config(data={"validation_size": 0}, max_steps=2, eval_steps=None, checkpoint_steps=None)
    summary = train_image_classifier(config)
    assert "eval_nll" not in summary
    assert summary["test_images"] == 12


def test_test_images_may_be_left_alone(run_config: RunConfig, tmp_path: Path) -> None:
    config = run_config(max_steps=2, checkpoint_steps=None)
    summary = train_image_classifier(config, test=False)
    assert not [name for name in summary if name.startswith("test_")]
    card = (Path(config.output_dir) / "README.md").read_text()
    assert "On 6 held-out images of" in card
    assert f"| {summary['eval_accuracy_probs_vote']:.2%} | {summary['eval_nll_probs_vote']:.4f} |" in card
    none_held_out = run_config(data={"validation_size": 0}, eval_steps=None, output_dir=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="data.validation_size=0: hold images out"):
        train_image_classifier(none_held_out, test=False)


def test_the_summary_holds_what_training_cost(run_config: RunConfig) -> None:
    config = run_config(max_steps=3, checkpoint_steps=None)
    summary = train_image_classifier(config)
    model = AutoModelForImageClassification.from_pretrained(config.output_dir)
    cost = image_model_cost(model, 16, nonzeros=planned_nonzeros(model, config.sparsity))
    assert summary["forward_flops_per_image"] == cost.forward
    # Every second step the gradients of weights that do not exist are computed as well.
    assert summary["training_flops"] == 36 * cost.training(2)


@pytest.mark.parametrize(
    ("model", "heads"),
    [({"num_ensemble_heads": 1}, 1), ({"num_head_blocks": None}, 2)],
    ids=["single", "full ensemble"],
)
@pytest.mark.parametrize("network", NETWORKS)
def test_the_whole_family_trains_dense(run_config: RunConfig, network: str, model: dict[str, Any], heads: int) -> None:
    shape = {"model_type": f"neurotrails_{network}", "shape": NETWORKS[network]}
    config = run_config(shape | model, sparsity={"method": "dense"}, max_steps=1, checkpoint_steps=None)
    summary = train_image_classifier(config)
    assert len(summary["test_accuracy_heads"]) == heads
    assert summary["active_parameters"] == summary["parameters"]
    loaded = AutoModelForImageClassification.from_pretrained(config.output_dir)
    assert loaded.num_parameters() == summary["parameters"]
    if heads == 2:
        backbone = [n for n, _ in loaded.named_parameters() if "backbone" in n]
        assert not backbone, "every block is a head's own"


def test_a_full_ensemble_equals_networks_trained_alone() -> None:
    """At M times the learning rate and 1/M of the weight decay, since the loss is the mean over the heads."""
    torch.manual_seed(0)
    fields = {"depth": 10, "widen_factor": 1, "num_labels": 3, "num_head_blocks": 3}
    ensemble = NeuroTrailsWideResNetForImageClassification(NeuroTrailsWideResNetConfig(num_ensemble_heads=2, **fields))
    alone = NeuroTrailsWideResNetForImageClassification(NeuroTrailsWideResNetConfig(num_ensemble_heads=1, **fields))
    weights = ensemble.state_dict()
    second = {name: weights[re.sub(r"(heads|classifiers)\.0", r"\1.1", name)] for name in alone.state_dict()}
    alone.load_state_dict({name: tensor.clone() for name, tensor in second.items()})
    for network, rate, decay in ((ensemble, 0.2, 0.01), (alone, 0.1, 0.02)):
        optimizer = torch.optim.SGD(network.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=decay)
        generator = torch.Generator().manual_seed(1)
        for _ in range(3):
            images = torch.randn(6, 3, 16, 16, generator=generator)
            network(images, labels=torch.arange(6) % 3).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_sum_of_the_heads_losses_trains_a_full_ensemble_at_its_members_rate(
    run_config: RunConfig, tmp_path: Path
) -> None:
    full = {"model": {"num_head_blocks": None}, "sparsity": {"method": "dense"}, "data": {"label_smoothing": 0.1}}
    rates = {
        "sum": {"head_loss": "sum", "learning_rate": 0.05, "weight_decay": 5e-4},
        "mean": {"learning_rate": 0.1, "weight_decay": 2.5e-4},
    }
    weights = []
    for name, fields in rates.items():
        config = run_config(**full, **fields, output_dir=str(tmp_path / name), max_steps=4, checkpoint_steps=None)
        train_image_classifier(config, test=False)
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-4, atol=1e-5)


def test_a_last_feature_map_of_one_pixel(run_config: RunConfig) -> None:
    shape = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    config = run_config({"model_type": "neurotrails_resnet", "shape": shape}, max_steps=1, checkpoint_steps=None)
    assert config.plan(Hardware(num_processes=1)).memory.weights > 0
    assert train_image_classifier(config)["forward_flops_per_image"] > 0


def test_a_checkpoint_from_before_a_field_was_free_continues(run_config: RunConfig) -> None:
    train_image_classifier(run_config(max_steps=4))
    state = Path(run_config().output_dir) / "checkpoints" / "step_4" / "state.json"
    assert "head_loss" not in json.loads(state.read_text())["config"], "as in checkpoints from before there was one"
    resumed = run_config(max_steps=4, resume_from_checkpoint="latest", data={"skip_damaged_images": True})
    assert train_image_classifier(resumed)["steps"] == 4


def test_the_logged_loss_is_the_mean_of_the_heads(run_config: RunConfig) -> None:
    config = run_config(head_loss="sum", max_steps=3, checkpoint_steps=None)
    train_image_classifier(config, test=False)
    (line,) = [line for line in read_metrics(config.output_dir) if "loss" in line]
    assert line["loss"] == pytest.approx(sum(line["head_losses"]) / 2, rel=1e-5)


def test_fsdp_does_not_shard_channels_last(run_config: RunConfig) -> None:
    with pytest.raises(ValueError, match="channels_last=True: FSDP2 shards contiguous weights only.*DDP"):
        VisionTask(run_config(channels_last=True), SimpleNamespace(is_fsdp2=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("network", NETWORKS)
def test_fsdp_does_not_convert_batch_norms(run_config: RunConfig, network: str) -> None:
    config = run_config({"model_type": f"neurotrails_{network}", "shape": NETWORKS[network]})
    model = config.model.build(config.data, config.data.class_names())
    check_shardable(model, "no")
    if network == "vit":
        check_shardable(model, "bf16")
    else:
        with pytest.raises(ValueError, match="mixed_precision='bf16': FSDP2 would convert batch norms.*DDP"):
            check_shardable(model, "bf16")


class TestBadInput:
    """Each mistake is named before anything is trained or overwritten."""

    def fails(self, config: VisionTrainingConfig, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            train_image_classifier(config)
        assert not (Path(config.output_dir) / "metrics.jsonl").exists()

    def test_no_classes(self, run_config: RunConfig, tmp_path: Path) -> None:
        self.fails(run_config(data={"train": str(tmp_path)}), "no folder of image classes")

    def test_test_images_of_other_classes(self, run_config: RunConfig, tmp_path: Path) -> None:
        (tmp_path / "val" / "n77").mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / "val" / "n77" / "0.png")
        self.fails(run_config(data={"test": str(tmp_path)}), "'n77'.*3, 'n01' among them")

    def test_unknown_field_of_the_network(self, run_config: RunConfig) -> None:
        self.fails(run_config(model={"shape": {"widen_facto": 2}}), r"model.shape=\['widen_facto'\]: no fields of")

    @pytest.mark.parametrize("field", ["num_ensemble_heads", "num_head_blocks", "vote", "num_channels"])
    def test_fields_of_the_network_that_are_given_elsewhere(self, run_config: RunConfig, field: str) -> None:
        shape = {**NETWORKS["wide_resnet"], field: 1}
        self.fails(run_config(model={"shape": shape}), rf"model.shape=\['{field}'\]: they follow from the other")

    def test_images_that_patches_do_not_cover(self, run_config: RunConfig) -> None:
        vit = {"model_type": "neurotrails_vit", "shape": NETWORKS["vit"]}
        self.fails(run_config(vit, {"image_size": 20}), "data.image_size=20: give a multiple of patch_size=.8")
        self.fails(run_config(vit, {"image_size": 4}), "image_size=4: smaller than patch_size=8")

    @pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
    @pytest.mark.parametrize(
        "field", [{"patch_size": 0}, {"patch_size": -8}, {"hidden_size": 0}, {"hidden_act": "none"}]
    )
    def test_networks_that_cannot_be_built(self, run_config: RunConfig, field: dict[str, Any]) -> None:
        vit = {"model_type": "neurotrails_vit", "shape": NETWORKS["vit"] | field}
        self.fails(run_config(vit), "model")

    def test_a_damaged_held_out_image(self, run_config: RunConfig, image_folder: Path, tmp_path: Path) -> None:
        shutil.copytree(image_folder, tmp_path / "images")
        data = {"train": str(tmp_path / "images")}
        _, held_out = run_config(data=data).data.load_train()
        Path(held_out.place(0)).write_bytes(b"no image")
        self.fails(run_config(data=data), re.escape(held_out.place(0)))

    def test_evaluations_without_images(self, run_config: RunConfig) -> None:
        with pytest.raises(ValueError, match="eval_steps=4: there is nothing to evaluate on; .*data.validation_size"):
            run_config(data={"validation_size": 0})

    def test_a_damaged_test_image(self, run_config: RunConfig, image_folder: Path, tmp_path: Path) -> None:
        shutil.copytree(image_folder, tmp_path / "images")
        (tmp_path / "images" / "val" / "n03" / "00.png").write_bytes(b"no image")
        data = {"train": str(tmp_path / "images")}
        self.fails(run_config(data=data), r"n03/00\.png cannot be decoded")
        skipping = run_config(data=data | {"skip_damaged_images": True}, max_steps=1, checkpoint_steps=None)
        assert train_image_classifier(skipping)["test_images"] == 11

    def test_shape(self, run_config: RunConfig) -> None:
        self.fails(run_config(model={"num_head_blocks": 4}), "num_head_blocks=4")
        self.fails(run_config(model={"shape": {"depth": 11}}), "depth=11")


def test_the_recipe_ends_with_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = RECIPES / "train_vision.py"
    config = CONFIGS / "cifar10_wrn10_2_cpu.yaml"
    options = [f"--config={config}", f"--data.train={tmp_path}", f"--output_dir={tmp_path / 'run'}"]
    monkeypatch.setattr("sys.argv", [str(recipe), *options])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(recipe), run_name="__main__")
    assert stop.value.code == 2
    assert re.fullmatch(
        r"train_vision.py: error: data: .* is no folder of image classes .*\n", capsys.readouterr().err
    )


def test_a_damaged_image_ends_training_with_its_name(
    run_config: RunConfig, tmp_path: Path, image_folder: Path
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    (folder / "train" / "n02" / "03.png").write_bytes(b"no image")
    data = {"train": str(folder), "validation_size": 0}
    with pytest.raises(ValueError, match=r"n02/03\.png cannot be decoded"):
        train_image_classifier(run_config(data=data, eval_steps=None))
    skip: dict[str, Any] = {"data": data | {"skip_damaged_images": True}, "eval_steps": None}
    skipping = run_config(**skip, overwrite_output_dir=True, max_steps=6)
    assert train_image_classifier(skipping)["images"] == 2 * 36 - 2


def load(size: str, variant: str | None = None, *arguments: str) -> VisionTrainingConfig:
    files = ["--config", str(CONFIGS / f"{size}.yaml")]
    if variant:
        files += ["--config", str(CONFIGS / "vision_variants" / f"{variant}.yaml")]
    return parse_arguments(VisionTrainingConfig, "test", [*files, *arguments])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", [None, *VARIANTS])
def test_every_configuration_with_every_variant(size: str, variant: str | None) -> None:
    config = load(size, variant)
    assert config.model.num_ensemble_heads == (1 if variant == "single" else 3)
    assert (config.sparsity.method == "dense") == (variant in ("single", "treenet", "full_ensemble"))
    assert (config.model.num_head_blocks is None) == (variant == "full_ensemble")
    assert (config.head_loss == "sum") == (variant == "full_ensemble"), "its members are networks of their own"
    base = load(size)
    assert config.sparsity.update_interval == base.sparsity.update_interval
    assert config.max_steps == base.max_steps, "equal epochs"
    with torch.device("meta"):
        model = config.model.build(config.data, ["a", "b"])
    assert len(model.active_heads) == config.model.num_ensemble_heads


@pytest.mark.parametrize(
    ("size", "classes", "single", "treenet", "neurotrails", "full_ensemble"),
    [
        ("cifar100_wrn28_10", 100, 36.5, 106.3, 21.3, 109.5),
        ("imagenet_resnet50", 1000, 25.6, 74.3, 22.4, 76.8),
    ],
)
def test_published_parameter_counts(
    size: str, classes: int, single: float, treenet: float, neurotrails: float, full_ensemble: float
) -> None:
    def count(variant: str | None = None) -> float:
        config = load(size, variant)
        with torch.device("meta"):
            model = config.model.build(config.data, list(map(str, range(classes))))
        nonzeros = planned_nonzeros(model, config.sparsity)
        removed = sum(p.numel() - nonzeros[name] for name, p in model.named_parameters() if name in nonzeros)
        return (model.num_parameters() - removed) / 1e6

    close = {"rel": 0.002}
    assert count("single") == pytest.approx(single, **close)
    assert count("treenet") == pytest.approx(treenet, **close)
    assert count("full_ensemble") == pytest.approx(full_ensemble, **close)
    assert count() == pytest.approx(neurotrails, **close)


def test_plan_of_a_published_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for number in range(100):
        (tmp_path / f"{number:02d}").mkdir()
        Image.new("RGB", (32, 32)).save(tmp_path / f"{number:02d}" / "0.png")
    with pytest.raises(SystemExit) as stop:
        load("cifar100_wrn28_10", None, f"--data.train={tmp_path}", "--plan")
    assert stop.value.code == 0
    printed = dict(re.split(r"  +", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert printed["parameters"] == "106.3 M"
    assert printed["active parameters"] == "21.3 M"


@pytest.mark.parametrize(
    ("optimizer", "moments"), [({}, 1), ({"momentum": 0.0, "nesterov": False}, 0), ({"optimizer": "adam"}, 2)]
)
def test_plan_counts_what_the_optimizer_keeps(run_config: RunConfig, optimizer: dict[str, Any], moments: int) -> None:
    memory = run_config(**optimizer).plan(Hardware(num_processes=1)).memory
    assert memory.optimizer == moments * memory.weights


def test_names_of_the_hubs_classes_need_no_images(run_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def builder(source: str, name: str | None) -> Any:
        assert (source, name) == ("uoft-cs/cifar100", None)
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
        return SimpleNamespace(info=datasets.DatasetInfo(features=features))

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    assert ImageDataConfig().class_names() == ["cat", "dog"]
    with pytest.raises(ValueError, match=r"does not name the classes of column 'img': set label_column"):
        ImageDataConfig(label_column="img").class_names()


MEASURE = """
import json, sys
import torch
from nt_transformers.sparsity import Sparsifier
from nt_transformers.training import parse_arguments
from nt_transformers.training.optimization import build_optimizer
from nt_transformers.training.vision import VisionTrainingConfig

def peak():
    # Not ru_maxrss, which a process takes over from the one that started it.
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024

torch.set_num_threads(1)
config = parse_arguments(VisionTrainingConfig, "", sys.argv[1:])
before = peak()
model = config.model.build(config.data, config.data.class_names()).train().to(memory_format=config.memory_format)
optimizer = build_optimizer(model, config)
sparsifier = Sparsifier(model, optimizer, config.sparsity, total_steps=100)
size = (config.per_device_batch_size, 3, config.data.image_size, config.data.image_size)
images, labels = torch.randn(size).contiguous(memory_format=config.memory_format), torch.zeros(size[0]).long()
for _ in range(2):
    model(images, labels=labels).loss.backward()
    optimizer.step()
    sparsifier.step()
    optimizer.zero_grad()
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "split", "shape", "size"),
    [
        ("wide_resnet", 2, {"depth": 10, "widen_factor": 4}, 32),
        ("resnet", 3, {"depths": [1, 1, 1, 1]}, 96),
        (
            "vit",
            4,
            {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 3},
            96,
        ),
    ],
    ids=["wide_resnet", "resnet", "vit"],
)
def test_planned_memory_is_what_training_takes(
    image_folder: Path, model_type: str, split: int, shape: dict[str, Any], size: int
) -> None:
    options = {
        "data.train": image_folder,
        "data.image_size": size,
        "global_batch_size": 64,
        "per_device_batch_size": 64,
        "model.model_type": f"neurotrails_{model_type}",
        "model.num_head_blocks": split,
        "model.shape": json.dumps(shape),
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    planned = load("cifar10_wrn10_2_cpu", None, *arguments).plan(Hardware(num_processes=1)).memory.total
    root = Path(__file__).parents[2]
    # Lets glibc return what is freed, which it would keep in part.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(root)}
    files = ["--config", str(CONFIGS / "cifar10_wrn10_2_cpu.yaml")]
    command = [sys.executable, "-c", MEASURE, *files, *arguments]
    run = subprocess.run(command, check=True, cwd=root, env=environment, capture_output=True, text=True)
    assert planned == pytest.approx(int(run.stdout), rel=0.15)


@pytest.mark.slow
def test_the_recipe_runs_as_a_command(image_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(RECIPES / "train_vision.py"), "--config", str(CONFIGS / "cifar10_wrn10_2_cpu.yaml")]
    overrides = {
        "output_dir": tmp_path / "run",
        "max_steps": 3,
        "global_batch_size": 8,
        "per_device_batch_size": 8,
        "eval_steps": 2,
        "sparsity.update_interval": 2,
        "data.train": image_folder,
        "data.test_split": "val",
        "data.validation_size": 6,
        "data.num_workers": 1,
    }
    options = [text for name, value in overrides.items() for text in (f"--{name}", str(value))]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "preprocessor_config.json").is_file()
