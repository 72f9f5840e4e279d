"""The package as a whole: what importing it costs, and the walls between its rooms."""

import ast
import os
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

import mlx_wan

ROOT = Path(mlx_wan.__file__).parent
HEAVY = {"torch", "transformers", "diffusers", "av", "PIL", "tokenizers", "huggingface_hub", "numpy", "ftfy"}
SLOW = {"importlib.metadata", "email", "logging", "http", "asyncio", "multiprocessing", "unittest", "xml"}  # of Python
FORBIDDEN = {"torch", "torchvision", "transformers", "diffusers", "safetensors"}


def modules_after(code: str) -> set[str]:
    """What a fresh interpreter has loaded by running `code`, beyond what it starts with."""
    code = f"import sys; before = set(sys.modules)\n{code}\nprint(*sys.modules.keys() - before)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(result.stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    loaded = modules_after("import mlx_wan")
    assert third_party(loaded) == {"mlx_wan"}
    assert not loaded & SLOW


HELP = """
from mlx_wan.cli.main import main; import io, contextlib
with contextlib.redirect_stdout(io.StringIO()): main({arguments})
"""


@pytest.mark.parametrize("command", [[], ["generate"], ["bench"], ["plan"], ["info"]], ids=str)
def test_help_loads_nothing_heavy(command):
    """Start-up is counted, not timed: no package of others, no slow corner of Python, no other command."""
    loaded = modules_after(HELP.format(arguments=[*command, "--help"]))
    assert "argparse" in loaded
    assert third_party(loaded) == {"mlx_wan"}
    assert not loaded & SLOW
    assert {f"mlx_wan.cli.{name}" for name in command} <= loaded
    if command == ["info"]:
        assert not loaded & {"mlx_wan.cli.generate", "mlx_wan.zoo", "mlx_wan.training"}


def test_import_takes_under_a_second():
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", "import mlx_wan"], check=True, timeout=60)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 1


def test_the_version_is_the_packages():
    assert mlx_wan.__version__ == metadata.version("mlx-wan")


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Pipeline'"):
        mlx_wan.Pipeline  # noqa: B018
    assert "WanPipeline" in dir(mlx_wan)


# --- walls ---------------------------------------------------------------------------------------------------


def imports(file: Path) -> set[str]:
    """Every module a file imports anywhere in it, in full: `mlx_wan.models.umt5`, `numpy`, ..."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ["mlx_wan", *file.relative_to(ROOT).parts][: -node.level] if node.level else []
            module = ".".join([*package, *([node.module] if node.module else [])])
            names |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return names


def third_party(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)


SOURCES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_walls(file):
    room = file.relative_to(ROOT).parts[0]
    names = imports(file)
    assert not third_party(names) & FORBIDDEN
    if room in ("models", "schedulers"):
        assert third_party(names) <= {"mlx", "numpy", "mlx_wan"}
        inner = tuple(f"mlx_wan.{allowed}" for allowed in (room, "errors", "backend"))
        assert all(name == "mlx_wan" or name.startswith(inner) for name in names if name.startswith("mlx_wan"))
    if room != "cli":
        assert not any(name.startswith("mlx_wan.cli") for name in names)
    if room == "training":
        assert not any(name.startswith("mlx_wan.pipeline") for name in names)


def test_the_walls_are_looked_at():
    assert {file.relative_to(ROOT).parts[0] for file in SOURCES} >= {"models", "schedulers", "cli", "backend.py"}


def test_no_file_grows_beyond_600_lines():
    long = {file.name: n for file in SOURCES if (n := len(file.read_text(encoding="utf-8").splitlines())) > 600}
    assert not long


def test_the_embedded_model_stays_small():
    files = [file for file in (ROOT / "embedded").rglob("*") if file.is_file()]
    assert sum(os.path.getsize(file) for file in files) <= 25_000_000
    assert all(os.path.getsize(file) <= 15_000_000 for file in files)
