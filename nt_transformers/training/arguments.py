# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Command lines of the recipes: YAML files plus any field again as an option."""

import os
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_origin, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from .checkpoint import CheckpointError
from .nonfinite import NonFiniteError
from .plan import Hardware, Plannable


Config = TypeVar("Config")


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of the description."""


class Parser(ArgumentParser):
    """Names the sections of the configuration where jsonargparse's message names no field."""

    sections: Sequence[str] = ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the program with exit code 2 and `message`."""
        if message.startswith("Empty nested key"):
            message = f"{message.rstrip('.')}: check that {', '.join(self.sections)} are given by their fields"
        super().error(message, ex)


def parse_arguments(config_class: type[Config], description: str, arguments: Sequence[str] | None = None) -> Config:
    """Builds a `config_class` from `--config FILE.yaml` (later files override earlier ones) and `--field value`.

    Fields of nested dataclasses are written with dots: `--sparsity.density 0.5`. A wrong field or value ends the
    program with exit code 2 and one message, before any work. If the dataclass can plan its run, `--plan` prints the
    plan for `--hardware.*` and ends the program.

    Args:
        config_class: A dataclass; its docstring becomes the help text.
        description: What the program does.
        arguments: The command line, `sys.argv[1:]` by default.
    """
    parser = Parser(
        description=description,
        allow_abbrev=False,
        usage="%(prog)s --config FILE.yaml [--config FILE.yaml ...] [--field value ...]",
        formatter_class=HelpFormatter,
    )
    parser.add_argument(
        "--config", action=ActionConfigFile, help="YAML file of fields; may be given several times, the last one wins"
    )
    parser.add_class_arguments(config_class, as_group=False)
    if issubclass(config_class, Plannable):
        parser.add_argument(
            "--plan", action="store_true", help="print parameters, FLOPs, memory of a process and time; do not train"
        )
        parser.add_class_arguments(Hardware, "hardware")
    hints = get_type_hints(config_class)
    parser.sections = sections = [name for name, hint in hints.items() if is_dataclass(hint)]
    arguments = sys.argv[1:] if arguments is None else arguments
    for path in (argument.partition("=")[0].removeprefix("--").split(".") for argument in arguments):
        if len(path) > 2 and get_origin(hints.get(path[0])) is dict:
            # jsonargparse would drop the other values of what holds this one.
            parser.error(f"{'.'.join(path)}: {'.'.join(path[:2])} cannot be changed in part; change it in a file")
    try:
        fields = parser.parse_args(arguments)
    except Exception as error:
        # Not those that jsonargparse reports itself: a section that is a text, for example, may be no path either.
        parser.error(f"{error}: check that {', '.join(sections)} are given by their fields")
    del fields["config"]
    for name in sections:
        if not isinstance(fields[name], Namespace):
            parser.error(f"{name}={fields[name]!r}: give its fields, or leave it out for the defaults")
    try:
        values = vars(parser.instantiate(fields))
        hardware, planned = values.pop("hardware", None), values.pop("plan", False)
        config = config_class(**values)
        plan = config.plan(hardware) if planned and isinstance(config, Plannable) else None
    except ValueError as error:
        parser.error(str(error))
    if plan is not None:
        if os.environ.get("RANK", "0") == "0":
            print(plan)
        parser.exit()
    return config


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


def run_recipe(
    config_class: type[Config],
    train: Callable[[Config], object],
    description: str,
    arguments: Sequence[str] | None = None,
) -> None:
    """A recipe's whole program: builds the configuration as `parse_arguments` does and trains.

    Mistakes, in the configuration or in what it names, end the program with exit code 2 and one message, a full disk
    or numbers that are not finite with exit code 1 and one message, SIGTERM and SIGINT with exit code 75 once a
    checkpoint is saved. With `python -X dev` errors keep their tracebacks.
    """
    config = parse_arguments(config_class, description, arguments)
    try:
        train(config)
    except (ValueError, CheckpointError, NonFiniteError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
