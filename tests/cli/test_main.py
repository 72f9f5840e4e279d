"""The frame around the commands: flags, exit codes, one line for every failure."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from mlx_wan import backend
from mlx_wan.cli import main as cli
from mlx_wan.errors import CheckpointError, UserError, WanError


@pytest.fixture
def command(monkeypatch):
    """A command `work` whose `run` a test may replace; it records the arguments it was run with."""

    def add_parser(commands):
        parser = commands.add_parser("work")
        parser.add_argument("--sample_steps", type=int)
        parser.add_argument("--dry-run", action="store_true")
        parser.add_argument("--text")
        return parser

    module = SimpleNamespace(add_parser=add_parser, seen=[])
    module.run = lambda args: module.seen.append(args)
    monkeypatch.setattr(cli, "COMMANDS", {"work": "work"})
    monkeypatch.setattr(cli, "import_module", lambda name: module)
    return module


@pytest.mark.parametrize("flag", ["--sample_steps", "--sample-steps"])
@pytest.mark.parametrize("dry", ["--dry-run", "--dry_run"])
@pytest.mark.parametrize("style", ["{} 4", "{}=4"])
def test_dashes_and_underscores_are_the_same(command, flag, dry, style):
    assert cli.main(["work", *style.format(flag).split(), dry, "--text", "my_text-here"]) == 0
    (args,) = command.seen
    assert (args.sample_steps, args.dry_run, args.text) == (4, True, "my_text-here")


@pytest.mark.parametrize("line", ["-- work --text a", "work -- --text a", "-- work -- --text a"])
def test_a_lone_leading_double_dash_is_skipped(command, line):
    assert cli.main(line.split()) == 0
    assert command.seen[0].text == "a"


def test_a_text_may_look_like_a_flag_or_a_number(command):
    assert cli.main(["work", "--text=--sample_steps"]) == 0
    assert cli.main(["work", "--text", "-5 degrees outside"]) == 0
    assert [args.text for args in command.seen] == ["--sample_steps", "-5 degrees outside"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("work --sample-step 4", "error: unknown flag --sample-step, did you mean --sample_steps? (see"),
        ("work --qqq", "error: unknown flag --qqq (see mlx-wan work --help)"),
        ("work --sample_steps four", "error: argument --sample_steps: invalid int value: 'four' (see"),
        ("work --text", "error: argument --text: expected one argument (see"),
        ("work extra", "error: unrecognized arguments: extra (see"),
        ("wrok", "error: argument COMMAND: invalid choice: 'wrok'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(command, capsys, line, message):
    assert cli.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert out == ""
    assert not command.seen


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("size 5x5: too small"), 2, "error: size 5x5: too small\n"),
        (CheckpointError("a.pth: cut\nshort"), 1, "error: a.pth: cut short\n"),
        (WanError("disk full"), 1, "error: disk full\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (ZeroDivisionError("division by zero"), 1, "error: ZeroDivisionError: division by zero (add --debug to"),
        (AssertionError(), 1, "error: AssertionError (add --debug to"),
        (MemoryError(), 1, "error: out of memory;"),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_every_failure_is_one_line_unless_debugging(command, capsys, error, code, line, debug):
    def fail(args):
        raise error

    command.run = fail
    assert cli.main(["work", *(["--debug"] if debug else [])]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert ("Traceback" in err) == debug
    assert err.splitlines(keepends=True)[-1].startswith(line)
    assert debug or err.count("\n") == 1


def test_a_command_chooses_its_exit_code(command):
    command.run = lambda args: 3
    assert cli.main(["work"]) == 3


def test_sigterm_unwinds_like_ctrl_c_and_the_handler_is_given_back(command, capsys):
    cleaned = []
    before = signal.getsignal(signal.SIGTERM)

    def wait(args):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            cleaned.append(True)

    command.run = wait
    assert cli.main(["work"]) == 130
    assert cleaned
    assert capsys.readouterr().err == "stopped\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_computing_commands_give_the_blas_hint_once(command, capsys, monkeypatch):
    monkeypatch.setattr(cli, "COMPUTING", ("work",))
    monkeypatch.setattr(backend, "_state", backend.BlasState(None, "none found", hint="install it"))
    assert cli.main(["work"]) == 0
    assert capsys.readouterr().err == "hint: install it\n"


def test_a_bad_blas_setting_is_the_users_mistake(command, capsys, monkeypatch):
    monkeypatch.setattr(cli, "COMPUTING", ("work",))
    monkeypatch.setattr(backend, "_state", backend.BlasState(None, "bad", setting_error="MLX_WAN_BLAS=x: no"))
    assert cli.main(["work"]) == 2
    assert capsys.readouterr().err == "error: MLX_WAN_BLAS=x: no\n"
    assert not command.seen


# --- the real thing ------------------------------------------------------------------------------------------


def run_cli(*arguments, **options):
    line = [sys.executable, "-m", "mlx_wan.cli.main", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, **options)


def test_every_command_has_help_and_the_flag_debug():
    listing = run_cli("--help").stdout
    for name in cli.COMMANDS:
        assert f"  {name}" in listing
        help_text = run_cli(name, "--help").stdout
        assert help_text.startswith(f"usage: mlx-wan {name}")
        assert "--debug" in help_text


def test_no_arguments_show_the_help():
    result = run_cli()
    assert result.returncode == 0
    assert result.stdout.startswith("usage: mlx-wan")


def test_info_names_device_and_blas():
    result = run_cli("info")
    assert result.returncode == 0
    rows = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert rows["device"].startswith(backend.device_name())
    assert "GFLOP/s" in rows["product"]
    assert "Traceback" not in result.stderr


def test_a_reader_that_stops_early_is_no_error():
    shell = f'"{sys.executable}" -m mlx_wan.cli.main info | true; echo "${{PIPESTATUS[0]}}"'
    result = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=120)
    assert result.stdout == f"{cli.EXIT_BROKEN_PIPE}\n"
    assert result.stderr == ""


def test_a_prefix_of_a_flag_is_not_the_flag():
    parser = cli.Parser(prog="x")
    parser.add_argument("--prompt")
    with pytest.raises(UserError, match="unknown flag --prom"):
        parser.parse_args(["--prom", "a"])
