# Copyright 2026 The nt_transformers authors. Licensed under the Apache License, Version 2.0.
"""Checks of configurations: every error names the field, its value and the remedy."""

import math
import types
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints


if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# What torch and numpy take for an integer.
INTEGER_BITS = 63
SHOWN_CHARACTERS = 200


def check(valid: bool, name: str, value: object, remedy: str) -> None:
    """Raises a `ValueError` that names the field, its value and the remedy, unless `valid`."""
    if not valid:
        raise ValueError(f"{name}={_shown(value)}: {remedy}")


def check_types(config: "DataclassInstance", name: str = "") -> None:
    """Raises a `ValueError` unless every field of a dataclass holds what its annotation says.

    Stricter than Python where the difference would surface late: no truth values for numbers, no NaN or infinity, no
    integers beyond 64 bits, no text that no file could hold. An integer given for a float becomes one.

    Args:
        config: An instance; annotations may be bool, int, float, str, None, literals, dataclasses, sequences and
            unions of them, and dictionaries, of which the keys count.
        name: What precedes the names of the fields in errors, such as `data.`.
    """
    hints = get_type_hints(type(config))
    for field in fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        check(_fits(value, hint), name + field.name, value, f"set it to {_words(hint)}")
        if hint in (float, float | None) and value is not None:
            # Some of torch's optimizers ask for floats.
            setattr(config, field.name, float(value))


def _fits(value: object, hint: Any) -> bool:
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if kind in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if kind in (list, Sequence):
        return isinstance(value, list | tuple) and all(_fits(element, arguments[0]) for element in value)
    if kind is dict:
        return isinstance(value, dict) and all(_fits(key, arguments[0]) for key in value)
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is int or (hint is float and isinstance(value, int)):
        return isinstance(value, int) and value.bit_length() <= INTEGER_BITS
    if hint is float:
        return isinstance(value, float) and math.isfinite(value)
    if hint is str:
        return isinstance(value, str) and "\0" not in value and not any("\ud800" <= char <= "\udfff" for char in value)
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    kind, arguments = get_origin(hint), get_args(hint)
    if kind is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if kind in (Union, types.UnionType):
        return " or ".join(_words(argument) for argument in arguments)
    if kind in (list, Sequence):
        return f"a list, each element {_words(arguments[0])}"
    if kind is dict:
        return "fields by their names"
    if isinstance(hint, type) and is_dataclass(hint):
        return f"a {hint.__name__}"
    return {
        bool: "true or false",
        int: "a whole number",
        float: "a finite number",
        str: "text",
        types.NoneType: "null",
    }[hint]


def _shown(value: object) -> str:
    try:
        shown = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except ValueError:
        # Python refuses to write integers of thousands of digits.
        return f"<{type(value).__name__} with an integer of thousands of digits>"
    return shown if len(shown) <= SHOWN_CHARACTERS else f"{shown[:SHOWN_CHARACTERS]}..."
