"""Dataclasses from plain values, as YAML and JSON give them, with every value checked."""

import math
import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Union, get_args, get_origin

from mlx_wan.errors import UserError

_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false", dict: "a mapping"}


def build(cls: type, values: Any, where: str) -> Any:
    """The dataclass `cls` of plain `values`.

    Dataclasses among its fields are built the same way; lists become tuples; 3 serves as 3.0, and so does the text
    "1e-3", which is how YAML reads a number without a point.

    Raises:
        UserError: an unknown or missing key, a value of the wrong type, or one that `cls` refuses. It names the key
            and `where`, the file it stood in.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where}: must be keys with values, not {values!r}")
    known = {field.name: field for field in fields(cls)}
    unknown = sorted(str(name) for name in values.keys() - known.keys())
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}")
    missing = [
        name
        for name, field in known.items()
        if name not in values and field.default is MISSING and field.default_factory is MISSING
    ]
    if missing:
        raise UserError(f"{where}: the key {missing[0]!r} is missing")
    made = {name: _value(value, known[name].type, f"{where}: {name}") for name, value in values.items()}
    try:
        return cls(**made)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _value(value: Any, kind: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (types.UnionType, Union):
        options = [option for option in arguments if option is not type(None)]
        return None if value is None else _value(value, options[0], where)
    if is_dataclass(kind) and isinstance(kind, type):
        return build(kind, value, where)
    if origin is tuple:
        return _tuple(value, arguments, where)
    return _plain(value, dict if origin is dict else kind, where)


def _tuple(value: Any, arguments: tuple, where: str) -> tuple:
    if not isinstance(value, list | tuple):
        raise UserError(f"{where} is {value!r}; it must be a list")
    if arguments[-1] is not Ellipsis and len(value) != len(arguments):
        raise UserError(f"{where} has {len(value)} entries; it must have {len(arguments)}")
    kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
    return tuple(_value(each, kind, where) for each, kind in zip(value, kinds, strict=True))


def _plain(value: Any, kind: Any, where: str) -> Any:
    if kind is float and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isfinite(number):
            return number
    elif isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
        return value
    raise UserError(f"{where} is {value!r}; it must be {_NAMES[kind]}")
