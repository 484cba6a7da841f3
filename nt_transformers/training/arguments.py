# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Command lines of the recipes: YAML files plus any field again as an option."""

from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import TypeVar

from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter

from .plan import Hardware, Plannable


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
    if issubclass(config_class, Plannable):
        parser.add_argument(
            "--plan", action="store_true", help="print parameters, FLOPs, memory of a process and time; do not train"
        )
        parser.add_class_arguments(Hardware, "hardware")
    fields = parser.parse_args(arguments)
    del fields["config"]
    try:
        values = vars(parser.instantiate(fields))
        hardware, planned = values.pop("hardware", None), values.pop("plan", False)
        config = config_class(**values)
        plan = config.plan(hardware) if planned and isinstance(config, Plannable) else None
    except ValueError as error:
        parser.error(str(error))
    if plan is not None:
        print(plan)
        parser.exit()
    return config
