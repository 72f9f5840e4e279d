"""`--help` that fits a screen: a command with many flags shows one group in full and names the others.

A group's title is `key: what it is about`; `--help KEY` shows that group, `--help all` everything. A command without
such groups is shown whole.
"""

import argparse
import textwrap
from typing import Any

from mlx_wan.errors import UserError

WIDTH = 100


class Formatter(argparse.HelpFormatter):
    """Spellings of a flag side by side, with what they take said once."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"


class HelpAction(argparse.Action):
    def __init__(self, option_strings: Any, dest: str = argparse.SUPPRESS, **_: Any) -> None:
        words = "show this; of a group alone, or of `all`"
        super().__init__(option_strings, dest, nargs="?", default=argparse.SUPPRESS, metavar="GROUP", help=words)

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        print(screen(parser, values), end="")
        parser.exit()


def screen(parser: argparse.ArgumentParser, wanted: str | None) -> str:
    """The help text. Raises UserError if there is no group of that name."""
    groups = {
        _key(group): group for group in parser._action_groups if _key(group).isalpha() and ":" in str(group.title)
    }
    if wanted == "all" or not groups:
        return parser.format_help()
    if wanted is None:
        return _overview(parser, groups)
    if wanted not in groups:
        raise UserError(f"--help {wanted}: no such group; use one of {', '.join((*groups, 'all'))}")
    return _in_full(groups[wanted])


def _overview(parser: argparse.ArgumentParser, groups: dict[str, Any]) -> str:
    first, *others = groups
    parts = [f"usage: {parser.prog} [flags]\n\n{parser.description}\n", _in_full(groups[first])]
    for key in others:
        names = " ".join(action.option_strings[0] for action in groups[key]._group_actions)
        parts.append(
            f"{groups[key].title}\n" + textwrap.fill(names, WIDTH, initial_indent="  ", subsequent_indent="  ")
        )
    rest = [action.option_strings[0] for action in parser._optionals._group_actions if action.dest != "help"]
    parts.append(f"\nevery flag: {parser.prog} --help all; one group: --help {others[0]}. Also {' '.join(rest)}\n")
    return "\n".join(parts)


def _in_full(group: Any) -> str:
    formatter = Formatter("", max_help_position=32, width=WIDTH)
    formatter.start_section(group.title)
    formatter.add_arguments(group._group_actions)
    formatter.end_section()
    return formatter.format_help().replace(f"{group.title}:", group.title)


def _key(group: Any) -> str:
    return (group.title or "").partition(":")[0]
