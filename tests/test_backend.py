import ctypes
import json
import os
import platform
import subprocess
import sys
import warnings

import mlx.core as mx
import numpy as np
import pytest

from mlx_wan import backend
from mlx_wan.errors import UserError

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux wheels need a BLAS")


class NumpyBlas:
    """A cblas_sgemm in NumPy; `damage` may spoil the product, and `only` says for which transpose of B."""

    def __init__(self, damage=None, only=(111, 112)):
        self.damage, self.only = damage, only

    def cblas_sgemm(self, order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc):
        assert (order, ta, alpha, beta) == (101, 111, 1.0, 0.0)

        def matrix(pointer, rows, columns):
            cells = ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float * (rows * columns))).contents
            return np.frombuffer(cells, dtype=np.float32).reshape(rows, columns)

        left = matrix(a, m, lda)[:, :k]
        right = matrix(b, n, ldb)[:, :k].T if tb == 112 else matrix(b, k, ldb)[:, :n]
        out = matrix(c, m, ldc)
        out[:] = left @ right
        if self.damage and tb in self.only:
            self.damage(out)


def spoil_one_cell(product):
    product[-1, -1] += 1


def spoil_with_nan(product):
    product[0, 3] = np.nan


def skip_the_last_row(product):
    product[-1] = 0


def test_the_check_accepts_a_right_product():
    assert backend.multiplies_exactly(NumpyBlas())


@pytest.mark.parametrize("damage", [spoil_one_cell, spoil_with_nan, skip_the_last_row])
@pytest.mark.parametrize("transpose", [111, 112])
def test_the_check_refuses_any_wrong_product(damage, transpose):
    assert not backend.multiplies_exactly(NumpyBlas(damage, only=(transpose,)))


@pytest.fixture
def loads(monkeypatch):
    """Every library opens as a NumPy BLAS; the list says how: (name, was it made global)."""
    opened = []

    def load(name, mode):
        opened.append((name, bool(mode & os.RTLD_GLOBAL)))

    monkeypatch.setattr(backend, "_open", lambda name: (load(name, os.RTLD_LOCAL), NumpyBlas())[1])
    monkeypatch.setattr(backend.ctypes, "CDLL", load)
    return opened


def test_a_good_library_is_tried_privately_before_it_is_made_global(loads):
    state = backend._use_first_good()
    assert state.library is not None
    assert loads == [(backend._SONAMES[0], False), (backend._SONAMES[0], True)]


def test_a_wrong_library_never_becomes_global_and_is_reported(loads, monkeypatch):
    monkeypatch.setattr(backend, "multiplies_exactly", lambda library: False)
    with pytest.warns(RuntimeWarning, match=r"libopenblasp\.so\.0 computes wrong products"):
        state = backend._use_first_good()
    assert state.library is None
    assert loads
    assert not any(is_global for _, is_global in loads)


def test_a_wrong_chosen_library_is_the_users_mistake(loads, monkeypatch):
    monkeypatch.setattr(backend, "multiplies_exactly", lambda library: False)
    monkeypatch.setattr(backend, "_state", backend._use_chosen("/opt/blas.so"))
    with pytest.raises(UserError, match=r"MLX_WAN_BLAS=/opt/blas\.so: computes wrong products"):
        backend.check_setting()
    assert loads == [("/opt/blas.so", False)]


AVX2, AVX512 = {"avx2", "fma"}, {"avx2", "fma", "avx512f", "avx512dq", "avx512bw", "avx512vl"}


@pytest.mark.parametrize(
    ("core", "flags", "better"),
    [
        ("Prescott", AVX512, "SkylakeX"),
        ("Prescott", AVX2, "Haswell"),
        ("Prescott", {"sse2"}, None),
        ("Prescott", set(), None),
        ("Haswell", AVX512, None),
        ("Zen", AVX2, None),
        ("", AVX512, None),
    ],
)
def test_kernels_are_asked_for_where_openblas_does_not_know_the_processor(core, flags, better):
    assert backend.better_core(core, flags) == better


def test_a_library_is_loaded_again_for_better_kernels():
    """What it chose first is made up; whether the second copy took it, it says itself."""
    library = backend.prepare().library
    if library is None or "openblas" not in library or platform.machine() != "x86_64":
        pytest.skip("needs OpenBLAS on an x86")
    code = (
        "import mlx_wan.backend as b; asked = []; b.better_core = lambda core, flags: asked.append(core) or 'Nehalem';"
        f"print(b._core(b._open({library!r})), 'OPENBLAS_CORETYPE' in b.os.environ)"
    )
    environment = {"MLX_WAN_BLAS": "none", **{k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"}}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["Nehalem", "False"]
    chosen = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**environment, "OPENBLAS_CORETYPE": "Haswell"},
        check=True,
    )
    assert chosen.stdout.split() == ["Haswell", "True"], "who chooses is not overruled"


def test_no_library_at_all_gives_the_hint_and_no_warning(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(backend, "_open", missing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = backend._use_first_good()
    assert state.library is None
    assert "apt install libopenblas0-pthread" in (state.hint or "")


@pytest.mark.parametrize(
    ("platform", "installed", "setting", "reason"),
    [
        ("darwin", None, "auto", "system's BLAS"),
        ("linux", "mlx-cuda-13", "auto", "CUDA"),
        ("linux", "mlx-cpu", "None", "MLX_WAN_BLAS=none"),
        ("linux", "mlx-cpu", "auto", "imported before"),  # this test process has mlx.core already
    ],
)
def test_when_mlx_keeps_its_own_blas(monkeypatch, platform, installed, setting, reason):
    monkeypatch.setattr(backend.sys, "platform", platform)
    monkeypatch.setattr(backend, "active_wheel", lambda: installed)
    state = backend._choose_blas(setting)
    assert state.library is None
    assert reason in state.reason


SPEED = """
import json, mlx_wan
from mlx_wan import backend
state = backend.prepare()
speed, error = backend._measure_product(384)
print(json.dumps([state.library, state.reason, speed, error]))
"""


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


@on_linux
def test_with_and_without_the_library_products_are_right_and_one_is_fast():
    if len(backend.wheels()) != 1 or "mlx-cpu" not in backend.wheels():
        pytest.skip("needs the CPU wheel alone")
    fast, slow = (run_python(SPEED, MLX_WAN_BLAS=setting) for setting in ("auto", "none"))
    library, reason, fast_speed, fast_error = json.loads(fast.stdout)
    none, _, slow_speed, slow_error = json.loads(slow.stdout)
    assert none is None
    assert slow_error < 1e-6
    if library is None:
        pytest.skip(f"no fast BLAS on this machine: {reason}")
    assert os.path.exists(library)
    assert fast_error < 1e-6
    assert fast_speed > 4 * slow_speed  # measured: 40 to 60 times


@on_linux
def test_a_setting_that_names_no_library_fails_at_first_use_not_at_import():
    result = run_python("import mlx_wan; print('imported'); mlx_wan.WanPipeline", MLX_WAN_BLAS="/no/such.so")
    assert result.stdout == "imported\n"
    assert result.returncode == 1
    assert "UserError: MLX_WAN_BLAS=/no/such.so:" in result.stderr


def fake_wheel(folder, name, version, library_size):
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "RECORD").write_text(f"mlx/lib/libmlx.so,sha256=x,{library_size}\n{info.name}/RECORD,,\n")


def test_wheels_are_found_and_a_clash_names_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(backend.sys, "path", [str(tmp_path)])
    assert backend.active_wheel() is None
    fake_wheel(tmp_path, "mlx_cpu", "0.32.4", library_size=10)
    assert backend.wheels() == {"mlx-cpu": "0.32.4"}
    assert backend.active_wheel() == "mlx-cpu"
    assert backend.wheel_conflict() is None

    fake_wheel(tmp_path, "mlx_cuda_13", "0.32.5", library_size=20)
    (tmp_path / "mlx/lib").mkdir(parents=True)
    for size, active in ((10, "mlx-cpu"), (20, "mlx-cuda-13"), (30, None)):
        (tmp_path / "mlx/lib/libmlx.so").write_bytes(bytes(size))
        assert backend.active_wheel() == active
    remedy = backend.wheel_conflict()
    assert remedy is not None
    assert "uv pip uninstall mlx-cpu mlx-cuda-13" in remedy
    assert "uv pip install mlx-cuda-13==0.32.5" in remedy


def test_facts_are_plain_json_and_name_the_device():
    facts = backend.facts(measure=False)
    assert json.loads(json.dumps(facts)) == facts
    assert facts["device"] == backend.device_name()
    assert facts["mlx"] == mx.__version__


def test_the_default_dtype_follows_the_device(monkeypatch):
    for device, dtype in (("CPU", mx.float32), ("Metal", mx.bfloat16), ("CUDA", mx.bfloat16)):
        monkeypatch.setattr(backend, "device_name", lambda device=device: device)
        assert backend.default_dtype() == dtype


def test_peak_memory_counts_what_arrays_take():
    code = (
        "from mlx_wan import backend; import mlx.core as mx; before = backend.peak_memory();"
        "mx.eval(mx.zeros((2**28,), dtype=mx.uint8) + 1); print(backend.peak_memory() - before)"
    )
    grown = int(run_python(code).stdout)
    assert 2**28 <= grown < 2**30


def test_total_memory_is_what_the_system_says():
    if backend.device_name() != "CUDA":
        assert 2**28 < backend.total_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
