"""`mlx-wan completion SHELL`: prints a script that completes commands, flags and their values, from the parsers."""

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

SUMMARY = "print completion for bash, zsh or fish"
FOLDERS, FILES = ("DIR", "DST"), ("FILE", "VIDEO", "PATH", "FILE_OR_DIR", "SRC", "OUT")


class Flag(NamedTuple):
    """names: its spellings. values: "none", "folder", "file", "words" or "any". words: the choices."""

    names: list[str]
    values: str
    words: list[str]
    help: str


def add_parser(commands: Any) -> argparse.ArgumentParser:
    description = """Prints a script. bash: eval "$(mlx-wan completion bash)" in ~/.bashrc; zsh: the same in ~/.zshrc,
    after compinit; fish: mlx-wan completion fish > ~/.config/fish/completions/mlx-wan.fish"""
    parser = commands.add_parser("completion", help=SUMMARY, description=description)
    parser.add_argument("shell", choices=tuple(SCRIPTS), metavar="SHELL", help="bash, zsh or fish")
    return parser


def run(args: argparse.Namespace) -> None:
    from mlx_wan.cli.main import build

    parsers = build()[1]
    print(SCRIPTS[args.shell]({name: list(_flags(parser)) for name, parser in parsers.items()}, _summaries()))


def _summaries() -> dict[str, str]:
    from mlx_wan.cli.main import build

    (commands,) = (action for action in build()[0]._actions if isinstance(action, argparse._SubParsersAction))
    return {action.dest: action.help or "" for action in commands._choices_actions}


def _flags(parser: argparse.ArgumentParser) -> Iterator[Flag]:
    """The flags, and last of all one without names for what a command takes besides."""
    for action in parser._actions:
        words = [str(choice) for choice in action.choices or ()]
        metavar = action.metavar[0] if isinstance(action.metavar, tuple) else action.metavar
        if action.dest == "help" or action.nargs == 0:
            values = "none"
        elif words:
            values = "words"
        else:
            values = "folder" if metavar in FOLDERS else "file" if metavar in FILES else "any"
        yield Flag(list(action.option_strings), values, words, (action.help or "").replace("%%", "%"))


def bash(commands: dict[str, list[Flag]], summaries: dict[str, str]) -> str:
    return _bash_function(commands) + "complete -o filenames -F _mlx_wan mlx-wan"


def zsh(commands: dict[str, list[Flag]], summaries: dict[str, str]) -> str:
    """zsh runs bash's function through its own bashcompinit, which needs compinit; a bare .zshrc has neither."""
    begin = "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }\n"
    return begin + "autoload -U +X bashcompinit && bashcompinit\n" + bash(commands, summaries)


def _bash_function(commands: dict[str, list[Flag]]) -> str:
    how = {"folder": '$(compgen -d -- "$cur")', "file": '$(compgen -f -- "$cur")', "any": ""}
    cases, flags = [], []
    for command, options in commands.items():
        names = [name for option in options for name in option.names if name.startswith("--")]
        flags.append(f'    {command}) flags="{" ".join(names)}" ;;')
        for option in options:
            if option.names and option.values != "none":
                pattern = "|".join(f'"{command} {name}"' for name in option.names)
                reply = how.get(option.values) if not option.words else _words(option.words)
                cases.append(f"    {pattern}) COMPREPLY=({reply}); return ;;")
        places = [option for option in options if not option.names and option.words]
        cases += [f'    "{command} {command}") COMPREPLY=({_words(option.words)}); return ;;' for option in places]
    return "\n".join(
        [
            "_mlx_wan() {",
            '  local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}"',
            """  local cmd="${COMP_WORDS[1]}" flags="" IFS=$' \\t\\n'""",
            f'  if [ "$COMP_CWORD" -eq 1 ]; then COMPREPLY=({_words(list(commands))}); return; fi',
            '  case "$cmd $prev" in',
            *cases,
            "  esac",
            '  case "$cmd" in',
            *flags,
            "  esac",
            '  case "$cur" in',
            '    -*) COMPREPLY=($(compgen -W "$flags" -- "$cur")) ;;',
            '    *) COMPREPLY=($(compgen -f -- "$cur")) ;;',
            "  esac",
            "}\n",
        ]
    )


def _words(words: list[str]) -> str:
    return f'$(compgen -W "{" ".join(words)}" -- "$cur")'


def fish(commands: dict[str, list[Flag]], summaries: dict[str, str]) -> str:
    lines = ["complete -c mlx-wan -f"]
    for command, text in summaries.items():
        lines.append(f"complete -c mlx-wan -n __fish_use_subcommand -a {command} -d {_fish_text(text)}")
    for command, options in commands.items():
        when = f"-n '__fish_seen_subcommand_from {command}'"
        for option in options:
            names = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names]
            kinds = {"folder": " -x -a '(__fish_complete_directories)'", "file": " -r -F", "any": " -x", "none": ""}
            values = f" -x -a '{' '.join(option.words)}'" if option.words else kinds[option.values]
            if names:
                text = _fish_text(option.help)
                lines.append(f"complete -c mlx-wan {when} {' '.join(names)}{values} -d {text}")
            else:
                lines.append(f"complete -c mlx-wan {when}{values.replace(' -x', '').replace(' -r', '')}")
    return "\n".join(lines)


def _fish_text(text: str) -> str:
    return "'" + " ".join(text.split()).replace("\\", "\\\\").replace("'", "\\'") + "'"


SCRIPTS = {"bash": bash, "zsh": zsh, "fish": fish}
