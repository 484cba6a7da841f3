# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Command lines of the recipes: YAML files plus any field again as an option."""

from argparse import RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, DefaultHelpFormatter


Config = TypeVar("Config")


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of the description."""


def parse_arguments(config_class: type[Config], description: str, arguments: Sequence[str] | None = None) -> Config:
    """Builds a `config_class` from `--config FILE.yaml` (later files override earlier ones) and `--field value`.

    Fields of nested dataclasses are written with dots: `--sparsity.density 0.5`. A wrong field or value ends the
    program with exit code 2 and one message, before any work.

    Args:
        config_class: A dataclass; its docstring becomes the help text.
        description: What the program does.
        arguments: The command line, `sys.argv[1:]` by default.
    """
    parser = ArgumentParser(
        description=description,
        allow_abbrev=False,
        usage="%(prog)s --config FILE.yaml [--config FILE.yaml ...] [--field value ...]",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--config", action=ActionConfigFile, help="YAML file of fields; may be given several times, the last one wins"
    )
    parser.add_class_arguments(config_class, as_group=False)
    fields = parser.parse_args(arguments)
    del fields["config"]
    try:
        return config_class(**vars(parser.instantiate(fields)))
    except ValueError as error:
        parser.error(str(error))


def build_config(config_class: type[Config], fields: Mapping[str, Any]) -> Config:
    """Builds a `config_class` from its fields, nested dataclasses as dicts, checked as on a command line.

    Raises:
        ValueError: a field is unknown, missing or has an unusable value.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(config_class, as_group=False)
    try:
        return config_class(**vars(parser.instantiate(parser.parse_object(dict(fields)))))
    except (ArgumentError, TypeError) as error:
        raise ValueError(str(error)) from error
