# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""The settings: presets, overrides, and clear errors."""

import math
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from nt_transformers.sparsity import SparsityConfig


def test_default_is_rigl_and_not_silently_something_else() -> None:
    config = SparsityConfig()
    assert (config.method, config.drop, config.growth) == ("rigl", "magnitude", "gradient")
    assert (config.density, config.distribution) == (0.9, "erk")
    assert (config.update_interval, config.stop_fraction) == (100, 0.75)
    assert (config.drop_fraction, config.final_drop_fraction, config.drop_schedule) == (0.5, 0.005, "cosine")
    assert (config.allow_regrow, config.grow_init, config.optimizer_state) == (False, "zero", "reset")


def test_published_settings() -> None:
    llm, vision = SparsityConfig(method="neurotrails_llm"), SparsityConfig(method="neurotrails_vision")
    for config in (llm, vision):
        assert (config.growth, config.distribution, config.stop_fraction) == ("gradient", "erk", 1.0)
        assert (config.allow_regrow, config.grow_init, config.optimizer_state) == (True, "keep", "keep")
    assert (llm.density, llm.drop, llm.temperature, llm.update_interval) == (0.9, "soft_magnitude", 3.0, 50)
    assert (vision.density, vision.drop, vision.update_interval) == (0.2, "magnitude", 1000)


def test_given_values_override_the_preset_even_if_falsy() -> None:
    config = SparsityConfig(method="neurotrails_llm", density=0.5, allow_regrow=False, stop_fraction=0.0)
    assert (config.density, config.allow_regrow, config.stop_fraction) == (0.5, False, 0.0)
    assert config.drop == "soft_magnitude"


def test_method_alone_turns_a_run_into_its_baseline() -> None:
    given: dict[str, Any] = {"density": 0.3, "stop_fraction": 0.9, "growth": "gradient"}
    assert SparsityConfig(method="static", **given).stop_fraction == 0
    assert SparsityConfig(method="dense", **given).density == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "magic"),
        ("method", None),
        ("density", 0.0),
        ("density", 1.01),
        ("density", math.nan),
        ("density", "0.5"),
        ("distribution", "erdos"),
        ("drop", "smallest"),
        ("growth", "none"),
        ("update_interval", 0),
        ("update_interval", 1.5),
        ("stop_fraction", -0.1),
        ("stop_fraction", 1.1),
        ("drop_fraction", 0.0),
        ("drop_fraction", 2.0),
        ("final_drop_fraction", -0.1),
        ("drop_schedule", "cubic"),
        ("temperature", 0.0),
        ("temperature", math.inf),
        ("allow_regrow", "yes"),
        ("grow_init", "random"),
        ("optimizer_state", "mask"),
        ("density_schedule", "constant"),
        ("exclude", "lm_head"),
        ("exclude", [1]),
        ("dense_embeddings", 1),
        ("seed", "0"),
    ],
)
def test_a_bad_value_is_named_with_its_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"sparsity\.{field}=.*: \w+"):
        SparsityConfig(**{field: value})


def test_command_line_leaves_the_rest_to_the_method() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SparsityConfig, "sparsity")
    arguments = parser.parse_args(["--sparsity.method=set", "--sparsity.density=0.4", "--sparsity.exclude=[head.*]"])
    config = parser.instantiate(arguments).sparsity
    assert (config.method, config.density, config.growth, config.exclude) == ("set", 0.4, "random", ["head.*"])
    assert "Share of weights kept" in parser.format_help()
