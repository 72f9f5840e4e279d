"""The README is a contract: what it says can be typed is typed here, or at least parsed."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_wan.cli import main as cli

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"(<!-- run -->\n)?```(\w+)\n(.*?)```", re.DOTALL)
BLOCKS = [(bool(run), language, body) for run, language, body in BLOCK.findall(TEXT)]
LINES = [line for _, language, body in BLOCKS if language == "bash" for line in body.splitlines() if line]
DOORS = {"generate.py": "generate", "inspect_model.py": "inspect"}


def arguments(line: str) -> list[str] | None:
    """What a line passes to mlx-wan, or None if it does something else."""
    words = shlex.split(line)
    words = words[2:] if words[:2] == ["uv", "run"] else words
    words = words[1:] if words[:1] == ["--no-sync"] else words
    words = words[words.index("--") + 1 :] if words[:1] == ["mlx.launch"] else words
    if words[:1] == ["mlx-wan"]:
        return words[1:]
    if words[:1] == ["python"] and words[1] in DOORS:
        return [DOORS[words[1]], *words[2:]]
    return None


OURS = [line for line in LINES if arguments(line)]


@pytest.mark.parametrize("line", OURS)
def test_the_command_line_accepts_every_command(line):
    words = arguments(line) or []
    assert cli.parse(words)[0] == words[0]


def test_nothing_else_is_promised():
    others = [line for line in LINES if line not in OURS]
    allowed = ("pip install uv", "uv run pytest", "uv pip install -e", "uv sync --extra cuda", "echo ")
    assert all(line.startswith(allowed) for line in others), others


def test_ci_runs_the_test_command():
    assert "uv run pytest" in LINES
    assert (ROOT / ".ci/run").read_text().splitlines()[-1].startswith("uv run pytest")


@pytest.mark.parametrize("body", [body for run, language, body in BLOCKS if run and language == "bash"])
def test_marked_commands_run(body, tmp_path):
    for line in body.splitlines():
        command = [sys.executable, "-m", "mlx_wan.cli.main", *(arguments(line) or [])]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("body", [body for run, language, body in BLOCKS if run and language == "python"])
def test_marked_python_runs_and_prints_what_its_comments_say(body, tmp_path):
    result = subprocess.run([sys.executable, "-c", body], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    promised = [line.split("  # ")[1] for line in body.splitlines() if line.startswith("print") and "  # " in line]
    for said, printed in zip(promised, result.stdout.splitlines(), strict=True):
        assert said.startswith(printed)


def test_there_are_marked_blocks_of_both_kinds():
    assert {language for run, language, _ in BLOCKS if run} == {"bash", "python"}


def test_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", TEXT)
    local = [target for target in targets if not target.startswith("http")]
    assert local
    assert [target for target in local if not (ROOT / target).exists()] == []
