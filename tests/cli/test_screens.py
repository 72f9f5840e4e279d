"""`--help` by groups, and completion."""

import subprocess

import pytest

from mlx_wan.cli import completion
from mlx_wan.cli.main import build, main


def test_help_fits_a_screen_and_names_every_flag(capsys):
    assert main(["generate", "--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 100
    for action in build()[1]["generate"]._actions:
        assert action.option_strings[-1 if action.dest == "help" else 0] in text


def test_help_of_a_group_and_of_all(capsys):
    assert main(["generate", "--help", "output"]) == 0
    text = capsys.readouterr().out
    assert "--codec" in text
    assert "h264 for .mp4" in text
    assert "--prompt" not in text
    assert main(["generate", "--help", "all"]) == 0
    text = capsys.readouterr().out
    assert "--codec" in text
    assert "memory is shared" in text
    assert main(["generate", "--help", "qqq"]) == 2
    assert "no such group; use one of video, output, " in capsys.readouterr().err


def completions(*words: str) -> list[str]:
    """What bash offers for the last word."""
    script = completion.bash({name: list(completion._flags(parser)) for name, parser in build()[1].items()}, {})
    line = " ".join(f"'{word}'" for word in words)
    test = f'{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _mlx_wan; printf "%s\\n" "${{COMPREPLY[@]}}"'
    return subprocess.run(["bash", "-c", test], capture_output=True, text=True, check=True).stdout.split()


def test_bash_completes_commands_flags_values_and_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "movie.mp4").touch()
    assert completions("mlx-wan", "in") == ["inspect", "info"]
    assert completions("mlx-wan", "generate", "--save") == ["--save_file", "--save_settings", "--save_every"]
    assert completions("mlx-wan", "generate", "--codec", "pro") == ["prores"]
    assert completions("mlx-wan", "generate", "--steps", "") == []
    assert completions("mlx-wan", "generate", "--ckpt_dir", "mo") == ["model"]
    assert sorted(completions("mlx-wan", "generate", "--from", "mo")) == ["model", "movie.mp4"]
    assert completions("mlx-wan", "completion", "z") == ["zsh"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_flag_of_every_command_is_in_the_script(capsys, shell):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for name, parser in build()[1].items():
        lines = [line for line in script.splitlines() if name in line]
        for action in parser._actions:
            for flag in action.option_strings:
                if flag.startswith("--"):
                    assert any((f"-l {flag[2:]} " if shell == "fish" else flag) in line for line in lines), (name, flag)
    assert main(["completion", "csh"]) == 2
