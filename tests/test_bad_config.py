# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Whatever a configuration is given, it works, or the error names the field, its value and the remedy."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub.errors import StrictDataclassFieldValidationError
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from nt_transformers.data import TextDataConfig
from nt_transformers.data.images import ImageDataConfig
from nt_transformers.models import NeuroTrailsLlamaConfig, NeuroTrailsLlamaForCausalLM
from nt_transformers.sparsity import Sparsifier, SparsityConfig
from nt_transformers.training import (
    LlamaArguments,
    PretrainedArguments,
    TextTrainingConfig,
    parse_arguments,
)
from nt_transformers.training.optimization import build_optimizer, learning_rate
from nt_transformers.training.vision import ClassifierArguments


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.sampled_from([10**30, -(10**5000), 2**63, 2**31, 2**32])
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["", "erk", "rigl", "dense", "adamw", "skip", "probs", "1", "nan", "\0", "\ud800", "float32"])
)
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)

SHAPE = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_ensemble_heads": 2,
    "num_head_layers": 1,
}
OWN_FIELDS = [
    *SHAPE,
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("pad_token_id", "tie_word_embeddings", "attention_bias", "attention_dropout", "mlp_bias", "vote", "dtype"),
    *("rope_parameters", "use_cache"),
]


def field_names(config_class: type) -> list[str]:
    return [field.name for field in dataclasses.fields(config_class)]


def build(config_class: Callable[..., Any], changes: dict[str, Any], **defaults: Any) -> Any:
    """The configuration, or None after an error that names one of the changed fields."""
    try:
        return config_class(**defaults | changes)
    except ValueError as error:
        message = str(error)
    assert any(name in message for name in changes), message
    assert len(message) < 1000
    return None


def changes(config_class: type) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(field_names(config_class)), VALUES, min_size=1, max_size=2)


def is_small(value: Any) -> bool:
    return not isinstance(value, int) or abs(value) < 10**4


@given(changes=st.dictionaries(st.sampled_from(OWN_FIELDS), VALUES, min_size=1, max_size=2))
@settings(max_examples=120, deadline=None)
def test_a_network_is_built_and_runs_or_its_config_is_refused(changes: dict[str, Any]) -> None:
    try:
        config = build(NeuroTrailsLlamaConfig, changes, **SHAPE)
    except StrictDataclassFieldValidationError:
        # A wrong type, which transformers checks first and names.
        return
    if config is None or not all(is_small(value) for value in changes.values()) or config.dtype is not None:
        return
    model = NeuroTrailsLlamaForCausalLM(config).eval()
    output = model(torch.zeros(1, 3, dtype=torch.long), output_head_logits=True)
    assert output.head_logits.shape == (config.num_ensemble_heads, 1, 3, config.vocab_size)


# Fields that only a network and a number of steps show to be wrong: too low a density, patterns without a match, gmp
# without an update.
NEEDS_MODEL = {"density": None, "exclude": None, "update_interval": None}


@given(changes=changes(SparsityConfig))
@settings(max_examples=120, deadline=None)
def test_a_network_is_sparsified_or_the_config_is_refused(changes: dict[str, Any]) -> None:
    config = build(SparsityConfig, changes)
    if config is None:
        return
    network = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 4))
    optimizer = torch.optim.Adam(network.parameters())
    sparsifier = build(lambda **_: Sparsifier(network, optimizer, config, total_steps=3), {**changes, **NEEDS_MODEL})
    if sparsifier is None:
        return
    for _ in range(3):
        network(torch.randn(2, 6)).square().sum().backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
    assert all(math.isfinite(float(parameter.detach().sum())) for parameter in network.parameters())


@given(changes=changes(TextDataConfig))
@settings(max_examples=120, deadline=None)
def test_data_configs(changes: dict[str, Any]) -> None:
    build(TextDataConfig, changes)


@given(changes=changes(LlamaArguments))
@settings(max_examples=100, deadline=None)
def test_model_arguments(changes: dict[str, Any]) -> None:
    build(LlamaArguments, changes, **SHAPE)


@given(changes=changes(PretrainedArguments))
@settings(max_examples=100, deadline=None)
def test_arguments_of_a_pretrained_model(changes: dict[str, Any]) -> None:
    build(PretrainedArguments, changes, from_pretrained="somewhere")


@given(changes=changes(ImageDataConfig))
@settings(max_examples=100, deadline=None)
def test_image_configs(changes: dict[str, Any]) -> None:
    build(ImageDataConfig, changes)


CLASSIFIER = {"model_type": "neurotrails_wide_resnet", "num_head_blocks": 1, "shape": {"depth": 10, "widen_factor": 1}}


@given(
    arguments=changes(ClassifierArguments) | st.just({}),
    shape=st.dictionaries(st.sampled_from(["depth", "widen_factor", "num_channels", "vote", "other"]), SCALARS),
)
@settings(max_examples=100, deadline=None)
def test_a_classifier_is_built_or_its_arguments_are_refused(arguments: dict[str, Any], shape: dict[str, Any]) -> None:
    given = {"shape": CLASSIFIER["shape"] | shape, **arguments}
    config = build(ClassifierArguments, given, **{**CLASSIFIER, "shape": {}})
    sizes = [*given.values(), *(config.shape.values() if config else ())]
    if config is None or not all(is_small(value) for value in sizes):
        return
    with torch.device("meta"):
        build(lambda **_: config.build(ImageDataConfig(), ["a", "b"]), {**given, **config.shape, "model": None})


def run_defaults() -> dict[str, Any]:
    return {
        "output_dir": "run",
        "max_steps": 10,
        "sparsity": SparsityConfig(),
        "model": LlamaArguments(**SHAPE),
        "data": TextDataConfig(),
    }


@given(changes=changes(TextTrainingConfig))
@settings(max_examples=120, deadline=None)
def test_training_configs(changes: dict[str, Any]) -> None:
    config = build(TextTrainingConfig, changes, **run_defaults())
    if config is None:
        return
    build_optimizer(torch.nn.Linear(2, 2), config)
    assert all(math.isfinite(learning_rate(step, config)) for step in (1, config.max_steps))


SECTIONS = {
    None: TextTrainingConfig,
    "sparsity": SparsityConfig,
    "model": LlamaArguments,
    "data": TextDataConfig,
}
PLACES = [(section, name) for section, config_class in SECTIONS.items() for name in field_names(config_class)]


@example(place=(None, "sparsity"), value={"": None})
@given(place=st.sampled_from(PLACES), value=VALUES)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_is_accepted_or_refused_with_one_message(
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    place: tuple[str | None, str],
    value: Any,
) -> None:
    section, name = place
    fields: dict[str, Any] = {"output_dir": "run", "max_steps": 10, "sparsity": {}, "model": dict(SHAPE), "data": {}}
    (fields[section] if section else fields)[name] = value
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    try:
        text = yaml.safe_dump(fields)
        yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # the command line's loader
    except (ValueError, yaml.YAMLError):
        return  # an integer too long to write, half of a surrogate pair
    file.write_text(text, encoding="utf-8")
    try:
        parse_arguments(TextTrainingConfig, "A run.", ["--config", str(file)])
    except SystemExit as stop:
        code = stop.code
    else:
        return
    message = capsys.readouterr().err
    assert code == 2
    assert name in message
    assert "Traceback" not in message
