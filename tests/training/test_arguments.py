# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The command line of the recipes, and the configurations that come with them."""

from pathlib import Path

import pytest
import torch

from nt_transformers.models import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM
from nt_transformers.sparsity.distributions import nonzero_counts
from nt_transformers.training import TextTrainingConfig, parse_arguments


CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
SIZES = sorted(path.stem for path in CONFIGS.glob("llama_*.yaml"))
VARIANTS = sorted(path.stem for path in (CONFIGS / "variants").glob("*.yaml"))


def parse(*arguments: str) -> TextTrainingConfig:
    return parse_arguments(TextTrainingConfig, "test", arguments)


def load(size: str, variant: str | None = None, *arguments: str) -> TextTrainingConfig:
    files = ["--config", str(CONFIGS / f"{size}.yaml")]
    if variant:
        files += ["--config", str(CONFIGS / "variants" / f"{variant}.yaml")]
    return parse(*files, *arguments)


def test_fields_override_files_and_later_files_earlier_ones() -> None:
    config = load(
        "llama_130m", "set", "--sparsity.density", "0.5", "--learning_rate", "1e-4", "--data.packing", "true"
    )
    assert (config.sparsity.method, config.sparsity.growth, config.sparsity.density) == ("set", "random", 0.5)
    assert config.learning_rate == 1e-4
    assert config.data.packing
    assert config.model.hidden_size == 768


@pytest.mark.parametrize("size", [*SIZES, "demo"])
@pytest.mark.parametrize("variant", [None, *VARIANTS])
def test_every_configuration_with_every_variant(size: str, variant: str | None) -> None:
    config = load(size, variant)
    heads = {"single": 1}.get(str(variant), 3)
    assert config.model.num_ensemble_heads == heads
    assert (config.sparsity.method == "dense") == (variant in ("single", "treenet", "full_ensemble"))
    undivided = variant in ("full_ensemble", "sparse_ensemble") or size == "demo"
    assert (config.model.num_head_layers is None) == undivided


def parameters(config: TextTrainingConfig) -> tuple[int, int]:
    """All parameters and the active ones, counted on the meta device."""
    shape = vars(config.model) | {"num_head_layers": config.model.num_head_layers or config.model.num_hidden_layers}
    with torch.device("meta"):
        model = NeuroTrailsLlamaForCausalLM(NeuroTrailsLlamaConfig(**shape))
    shapes = [tuple(p.shape) for p in model.parameters() if p.ndim == 2]
    removed = sum(torch.Size(s).numel() for s in shapes) - sum(
        nonzero_counts(shapes, config.sparsity.density, config.sparsity.distribution)
    )
    return model.num_parameters(), model.num_parameters() - removed


@pytest.mark.parametrize(
    ("size", "single", "treenet", "neurotrails", "full_ensemble"),
    [("llama_130m", 134.1, 296.5, 266.8, 402.3), ("llama_350m", 367.9, 836.6, 753.0, 1103.8)],
)
def test_published_parameter_counts(
    size: str, single: float, treenet: float, neurotrails: float, full_ensemble: float
) -> None:
    close = {"rel": 0.002}
    assert parameters(load(size, "single"))[0] / 1e6 == pytest.approx(single, **close)
    assert parameters(load(size, "treenet"))[0] / 1e6 == pytest.approx(treenet, **close)
    assert parameters(load(size, "full_ensemble"))[0] / 1e6 == pytest.approx(full_ensemble, **close)
    assert parameters(load(size))[1] / 1e6 == pytest.approx(neurotrails, **close)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity.density", "1.5"], "density=1.5"),
        (["--sparsity.density", "0"], "density=0.0"),
        (["--sparsity.method", "magic"], "magic"),
        (["--learning_rat", "1"], "learning_rat"),
        (["--model.vote", "borda"], "borda"),
        (["--max_steps", "many"], "many"),
        (["--max_steps", "0"], "max_steps=0"),
        (["--report_to", "paper"], "paper"),
        (["--config", "missing.yaml"], "missing.yaml"),
    ],
)
def test_mistakes_end_with_one_message(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        load("demo", None, *arguments)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_unknown_field_in_a_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "typo.yaml").write_text("sparsity:\n  densty: 0.5\n")
    with pytest.raises(SystemExit):
        load("demo", None, "--config", str(tmp_path / "typo.yaml"))
    assert "densty" in capsys.readouterr().err
