"""`mlx-wan generate --batch FILE`: a JSON object a line, each a run with the command line's flags as defaults."""

import argparse
import copy
import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_wan.errors import UserError

NOT_IN_A_LINE = ("batch", "debug", "help", "progress")


Line = tuple[str, argparse.Namespace | None, str]


def lines(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Iterator[Line]:
    """(name of the line, its flags, "") for each line that is not empty, or (name, None, what is wrong with it).

    Raises UserError if the file cannot be read or has no lines.
    """
    path = Path(args.batch)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({getattr(error, 'strerror', None) or error})") from None
    numbered = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not numbered:
        raise UserError(f'{path}: has no lines; write one JSON object a line, such as {{"prompt": "a red circle"}}')
    for number, line in numbered:
        name = f"{path} line {number}"
        try:
            yield name, parse_line(line, args, parser), ""
        except UserError as error:
            yield name, None, str(error)


def parse_line(line: str, base: argparse.Namespace, parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The flags of one line over those of the command line. Raises UserError."""
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"is not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(values, dict):
        raise UserError('is not a JSON object, such as {"prompt": "a red circle"}')
    known = {_plain(flag): action for action in parser._actions for flag in action.option_strings if flag[:2] == "--"}
    merged = copy.copy(base)
    tokens: list[str] = []
    for key, value in values.items():
        action = known.get(_plain(f"--{key}"))
        if action is None or action.dest in NOT_IN_A_LINE:
            close = difflib.get_close_matches(_plain(f"--{key}"), known, n=1)
            hint = f", did you mean {close[0].removeprefix('--').replace('-', '_')}?" if close and not action else ""
            raise UserError(f"{key} is no option of a line{hint}")
        if value is None or (action.nargs == 0 and value is False):
            setattr(merged, action.dest, action.default)
        else:
            tokens += _tokens(key, action, value)
    return parser.parse_args(tokens, merged)


def _tokens(key: str, action: argparse.Action, value: Any) -> list[str]:
    """A value as it would be typed."""
    flag = action.option_strings[0]
    if isinstance(value, dict) or (action.nargs == 0 and value is not True):
        raise UserError(f"{key} cannot be {json.dumps(value)}")
    if action.nargs == 0:
        return [flag]
    if isinstance(value, list) and action.nargs == "+":
        several = value if value and isinstance(value[0], list) else [value]  # [["a", 1], ["b", 1]]: given twice
        return [token for one in several for token in (flag, *map(str, one))]
    if isinstance(value, list):
        value = ",".join(map(str, value))  # guidance: [3, 4]
    return [f"{flag}={value}"]


def _plain(flag: str) -> str:
    return flag.replace("_", "-").lower()
