"""`mlx-wan COMMAND ...`: finds the command, and turns every failure into one line and an exit code."""

import argparse
import contextlib
import difflib
import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from typing import Any, NoReturn

import mlx_wan
from mlx_wan import backend
from mlx_wan.cli import help as screens
from mlx_wan.cli import report
from mlx_wan.errors import UserError, WanError

# Each module offers add_parser(subparsers) -> parser, and run(args) -> exit code or None for 0. Importing one must
# stay cheap: whatever is heavy is imported inside run.
COMMANDS = {
    "generate": "mlx_wan.cli.generate",
    "plan": "mlx_wan.cli.plan",
    "inspect": "mlx_wan.cli.inspect",
    "convert": "mlx_wan.cli.convert",
    "fuse": "mlx_wan.cli.fuse",
    "train": "mlx_wan.cli.train",
    "evaluate": "mlx_wan.cli.evaluate",
    "scenes": "mlx_wan.cli.scenes",
    "bench": "mlx_wan.cli.bench",
    "info": "mlx_wan.cli.info",
    "completion": "mlx_wan.cli.completion",
}
COMPUTING = ("generate", "train", "evaluate", "bench")  # these get the hint about a missing BLAS
EXIT_FAILED, EXIT_USAGE, EXIT_STOPPED, EXIT_BROKEN_PIPE = 1, 2, 130, 141


class Parser(argparse.ArgumentParser):
    """argparse with full flag names only, help by groups, and errors that suggest the flag that was meant."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(
            *args, **{"allow_abbrev": False, "add_help": False, "formatter_class": screens.Formatter, **kwargs}
        )
        self.add_argument("-h", "--help", action=screens.HelpAction)

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        if message.startswith("unrecognized") and unknown.startswith("-"):
            close = difflib.get_close_matches(unknown.split("=")[0], _flags(self), n=1)
            message = f"unknown flag {unknown}" + (f", did you mean {close[0]}?" if close else "")
        raise UserError(f"{message} (see {self.prog} --help)")


def door(command: str) -> NoReturn:
    """What a script such as generate.py at the repository's root calls: the command with the script's arguments."""
    sys.exit(main([command, *sys.argv[1:]]))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code: 0 done, 1 failed, 2 the user's mistake, 130 Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    report.use_json("--progress=json" in arguments or ("--progress", "json") in itertools.pairwise(arguments))
    if report.is_json():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # stderr is for objects
    try:
        with _terminate_cleanly():
            return _run(arguments)
    except SystemExit as stop:  # argparse, for --help and --version
        return stop.code if isinstance(stop.code, int) else EXIT_FAILED
    except KeyboardInterrupt:
        return _failed(EXIT_STOPPED, "stopped", debug, kind="stopped")
    except WanError as error:
        return _failed(error.exit_code, str(error), debug)
    except BrokenPipeError:  # the reader (`| head`) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except MemoryError:
        return _failed(EXIT_FAILED, "out of memory; try fewer frames or a smaller size", debug)
    except Exception as error:
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return _failed(EXIT_FAILED, f"{what} (add --debug to see where)", debug)


def _run(arguments: list[str]) -> int:
    command, args = parse(arguments)
    if command in COMPUTING:
        _check_backend()
    code = int(import_module(COMMANDS[command]).run(args) or 0)
    sys.stdout.flush()  # a closed pipe shows here, where it is handled, instead of at exit
    return code


def parse(arguments: Sequence[str]) -> tuple[str, argparse.Namespace]:
    """The command and its options, without running it; SystemExit for --help, UserError for mistakes."""
    name, rest = _split(list(arguments))
    parser, parsers = build([name] if name in COMMANDS else COMMANDS)
    if name not in parsers:
        # No command, an unknown one, or -h: argparse knows what to say, and exits.
        parser.parse_args(["--help"] if name is None else [name, *rest])
        raise AssertionError(f"argparse accepted {name}")
    known = {_plain(flag): flag for flag in _flags(parsers[name])}
    return name, parsers[name].parse_args([_official(token, known) for token in rest])


def _check_backend() -> None:
    backend.check_setting()
    for advice in (backend.wheel_conflict(), backend.prepare().hint):
        if advice:
            report.say("hint", advice)


def build(names: Iterable[str] = COMMANDS) -> tuple[Parser, dict[str, Parser]]:
    """The parser of `mlx-wan`, and those of the commands of these names."""
    parser = Parser(prog="mlx-wan", description="Wan2.2 video generation and training on MLX")
    parser.add_argument("--version", action="version", version=f"mlx-wan {mlx_wan.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    parsers: dict[str, Parser] = {}
    for name in names:
        parsers[name] = import_module(COMMANDS[name]).add_parser(commands)
        if "--debug" not in _flags(parsers[name]):
            parsers[name].add_argument("--debug", action="store_true", help="show tracebacks")
    return parser, parsers


def _split(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The command and its arguments, without a lone `--` in front of either (older notes type one)."""
    rest = arguments[1:] if arguments[:1] == ["--"] else arguments
    if not rest:
        return None, []
    name, rest = rest[0], rest[1:]
    return name, rest[1:] if rest[:1] == ["--"] else rest


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    return [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]


def _plain(flag: str) -> str:
    return flag.replace("_", "-").lower()


def _official(token: str, known: dict[str, str]) -> str:
    """A flag as the parser spells it: `--sample-steps=4` and `--sample_steps=4` are the same."""
    if not token.startswith("--"):
        return token
    flag, equals, value = token.partition("=")
    return known.get(_plain(flag), flag) + equals + value


@contextlib.contextmanager
def _terminate_cleanly() -> Iterator[None]:
    """Let SIGTERM unwind the stack like Ctrl-C, so that half-written files are removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _failed(code: int, message: str, debug: bool, kind: str = "error") -> int:
    if debug:
        import traceback

        traceback.print_exc()
    if report.is_json():
        report.event(kind, message=" ".join(message.split()), exit_code=code)
    elif kind == "error":
        report.say(kind, message)
    else:
        print(message, file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
