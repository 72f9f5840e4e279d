"""What must happen before `mlx.core` is first imported, and what this machine offers.

MLX's Linux CPU wheel ships the reference BLAS, which is 30 to 60 times slower than OpenBLAS. A system OpenBLAS
loaded with its symbols global before MLX is imported takes its place, so `prepare` looks for one. Some old
OpenBLAS builds compute wrong products on processors newer than themselves: a library is tried out privately
(RTLD_LOCAL) and only one that multiplies exactly is made global.

The environment variable MLX_WAN_BLAS chooses: `auto` (default), `none`, or the path of a library.
"""

import _ctypes
import ctypes
import os
import platform
import sys
import warnings
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_wan.errors import UserError

if TYPE_CHECKING:
    import mlx.core as mx

BLAS_VARIABLE = "MLX_WAN_BLAS"
CORE_VARIABLE = "OPENBLAS_CORETYPE"
BLAS_HINT = (
    "MLX's own BLAS is slow: `apt install libopenblas0-pthread` (Fedora: `dnf install openblas-threads`) "
    "makes it about 50 times faster"
)
# Fedora's libopenblas.so.0 is single-threaded, so the threaded names come first.
_SONAMES = ("libopenblasp.so.0", "libopenblaso.so.0", "libopenblas.so.0", "libopenblas.so")
_WHEELS = ("mlx-cpu", "mlx-cuda-13", "mlx-cuda-12")
_SHARED_LIBRARY = "mlx/lib/libmlx.so"
_ROW_MAJOR, _NO_TRANSPOSE, _TRANSPOSE = 101, 111, 112


@dataclass(frozen=True)
class BlasState:
    """What `prepare` did. `library` is the one MLX was given, None when MLX keeps its own BLAS."""

    library: str | None
    reason: str
    setting_error: str | None = None
    hint: str | None = None


_state: BlasState | None = None


# --- the BLAS ------------------------------------------------------------------------------------------------


def prepare() -> BlasState:
    """Give MLX a fast BLAS where it lacks one; idempotent, silent unless a library computes wrong results."""
    global _state
    if _state is None:
        _state = _choose_blas(os.environ.get(BLAS_VARIABLE, "auto").strip() or "auto")
    return _state


def check_setting() -> None:
    """Raise UserError if MLX_WAN_BLAS names a library that cannot be used (import itself never fails for it)."""
    state = prepare()
    if state.setting_error:
        raise UserError(state.setting_error)


def _choose_blas(setting: str) -> BlasState:
    if sys.platform != "linux":
        return BlasState(None, "MLX uses the system's BLAS")
    if (active_wheel() or "").startswith("mlx-cuda"):
        return BlasState(None, "MLX is a CUDA build")
    if setting.lower() == "none":
        return BlasState(None, f"{BLAS_VARIABLE}=none")
    if "mlx.core" in sys.modules:
        return BlasState(None, "mlx.core was imported before mlx_wan, so it kept its own BLAS")
    if setting.lower() != "auto":
        return _use_chosen(setting)
    return _use_first_good()


def _use_chosen(path: str) -> BlasState:
    remedy = f"set {BLAS_VARIABLE} to auto, none, or the path of a BLAS with the cblas interface"
    try:
        library = _open(path)
    except (OSError, AttributeError) as error:
        return BlasState(None, "the chosen BLAS does not load", f"{BLAS_VARIABLE}={path}: {error}; {remedy}")
    if not multiplies_exactly(library):
        problem = f"{BLAS_VARIABLE}={path}: computes wrong products on this processor; {remedy}"
        return BlasState(None, "the chosen BLAS computes wrong products", problem)
    return _make_global(path, f"chosen by {BLAS_VARIABLE}")


def _use_first_good() -> BlasState:
    wrong = []
    for name in (*_SONAMES, str(Path(sys.prefix, "lib", "libopenblas.so.0"))):
        try:
            library = _open(name)
        except (OSError, AttributeError):
            continue
        if multiplies_exactly(library):
            return _make_global(name, "found")
        wrong.append(name)
    if not wrong:
        return BlasState(None, "no OpenBLAS found", hint=BLAS_HINT)
    reason = f"{wrong[0]} computes wrong products on this processor"
    _warn(f"{reason}; staying with MLX's slow BLAS. A newer OpenBLAS, or OPENBLAS_CORETYPE=Haswell, may help")
    return BlasState(None, reason)


def _open(path: str) -> ctypes.CDLL:
    """Load a library privately and declare its cblas_sgemm; OSError or AttributeError if it has none."""
    library = ctypes.CDLL(path, mode=os.RTLD_LOCAL | os.RTLD_NOW)
    core = better_core(_core(library), _processor_flags())
    if core and CORE_VARIABLE not in os.environ:
        _ctypes.dlclose(library._handle)
        os.environ[CORE_VARIABLE] = core  # read when the library is loaded
        try:
            library = ctypes.CDLL(path, mode=os.RTLD_LOCAL | os.RTLD_NOW)
        finally:
            del os.environ[CORE_VARIABLE]
    order, size, factor, matrix = ctypes.c_int, ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    library.cblas_sgemm.argtypes = [
        *(order, order, order),
        *(size, size, size),
        *(factor, matrix, size, matrix, size, factor, matrix, size),
    ]
    library.cblas_sgemm.restype = None
    return library


def better_core(core: str, flags: set[str]) -> str | None:
    """The OpenBLAS kernels to ask for where it chose `core` for a processor with these flags; None if it chose well.

    It takes a processor younger than itself for a Prescott of 2004, whose kernels do a fifth of what AVX-512's do.
    """
    if core.lower() != "prescott":
        return None
    if {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= flags:
        return "SkylakeX"
    return "Haswell" if {"avx2", "fma"} <= flags else None


def _core(library: ctypes.CDLL) -> str:
    """The kernels that an OpenBLAS has chosen; "" of other libraries."""
    try:
        ask = library.openblas_get_corename
    except AttributeError:
        return ""
    ask.restype = ctypes.c_char_p
    return ask().decode()


def _processor_flags() -> set[str]:
    """Of the first processor, as Linux names them; none if it does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in text.splitlines() if line.startswith("flags")), set())


def _make_global(path: str, reason: str) -> BlasState:
    ctypes.CDLL(path, mode=os.RTLD_GLOBAL | os.RTLD_NOW)  # dlopen promotes the copy that is already loaded
    return BlasState(_loaded_path(path), reason)


def _loaded_path(name: str) -> str:
    """The file behind a soname, from this process's memory map; the name itself if that is not readable."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return name
    files = {fields[5] for line in maps.splitlines() if len(fields := line.split(maxsplit=5)) == 6}
    if name in files:
        return name
    stem = Path(name).name.split(".so")[0]
    system = [f for f in sorted(files) if Path(f).name.startswith(stem) and ".so" in f]
    return system[0] if system else name


def multiplies_exactly(library: Any) -> bool:
    """Whether `library.cblas_sgemm` is right on products of an awkward size, plain and with B transposed.

    The matrices hold small integers, so float32 is exact and any difference is an error of the library. The
    product C is checked as C x = A (B x) in integers (Freivalds, 1977), and its finiteness by that too. NumPy is
    no judge here: its wheels carry an OpenBLAS themselves, and importing it takes longer than the whole check.
    """
    m, n, k = 131, 67, 259  # odd, off every kernel's block size, large enough to run on several threads
    a = [[(31 * i + 17 * j + i * j) % 19 - 9 for j in range(k)] for i in range(m)]
    b = [[(23 * i + 29 * j + 3 * i * j) % 17 - 8 for j in range(n)] for i in range(k)]
    x = [1 + 7 * j % 13 for j in range(n)]
    bx = [_dot(row, x) for row in b]
    expected = [_dot(row, bx) for row in a]
    stored_b = ((_NO_TRANSPOSE, b, n), (_TRANSPOSE, [list(column) for column in zip(*b, strict=True)], k))
    for transpose, rows, stride in stored_b:
        c = _sgemm(library, (m, n, k), _flat(a), _flat(rows), transpose, stride)
        if [_dot(c[i * n : (i + 1) * n], x) for i in range(m)] != expected:
            return False
    return True


def _sgemm(
    library: Any, size: tuple[int, int, int], a: array, b: array, transpose_b: int, stride_b: int
) -> list[float]:
    m, n, k = size
    c = array("f", bytes(4 * m * n))
    pa, pb, pc = (ctypes.c_void_p(matrix.buffer_info()[0]) for matrix in (a, b, c))
    library.cblas_sgemm(_ROW_MAJOR, _NO_TRANSPOSE, transpose_b, m, n, k, 1.0, pa, k, pb, stride_b, 0.0, pc, n)
    return c.tolist()


def _flat(rows: list[list[int]]) -> array:
    return array("f", [value for row in rows for value in row])


def _dot(left: list, right: list) -> float:
    return sum(map(float.__mul__, map(float, left), map(float, right)))


def _warn(message: str) -> None:
    # warn_explicit prints one line without the source line that plain warn() adds.
    warnings.warn_explicit(message, RuntimeWarning, "mlx_wan", 1)


# --- the installation ----------------------------------------------------------------------------------------


def wheels() -> dict[str, str]:
    """The MLX backend wheels installed, as {name: version}; Linux needs exactly one of them."""
    return {name: info.name.removesuffix(".dist-info").split("-")[1] for name, info in _wheel_records().items()}


def active_wheel() -> str | None:
    """The wheel whose library is really there: of two installed, one has overwritten the other's. None: unknown."""
    records = _wheel_records()
    if len(records) < 2:
        return next(iter(records), None)
    for name, info in records.items():
        lines = (info / "RECORD").read_text().splitlines() if (info / "RECORD").is_file() else []
        sizes = [line.rsplit(",", 1)[1] for line in lines if line.startswith(f"{_SHARED_LIBRARY},")]
        library = info.parent / _SHARED_LIBRARY
        if sizes and library.is_file() and str(library.stat().st_size) == sizes[0]:
            return name
    return None


def wheel_conflict() -> str | None:
    """One line with the remedy when two MLX backend wheels overwrite each other's files, else None."""
    installed = wheels()
    if len(installed) < 2:
        return None
    cuda = next(name for name in installed if name.startswith("mlx-cuda"))
    names, both = " and ".join(installed), " ".join(installed)
    return (
        f"{names} are both installed, and both own {_SHARED_LIBRARY} (now {active_wheel() or 'of unknown origin'}); "
        f"keep one: `uv pip uninstall {both}`, then `uv pip install {cuda}=={installed[cuda]}` for the GPU "
        f"or `uv pip install mlx-cpu=={installed[cuda]}` for the CPU"
    )


def _wheel_records() -> dict[str, Path]:
    """The .dist-info folder of each backend wheel; found by name, since importlib.metadata is slow to import."""
    found: dict[str, Path] = {}
    for name in _WHEELS:
        for folder in sys.path:
            for info in Path(folder or ".").glob(f"{name.replace('-', '_')}-*.dist-info"):
                found.setdefault(name, info)
    return found


# --- the device ----------------------------------------------------------------------------------------------


def device_name() -> str:
    """`Metal`, `CUDA` or `CPU`: where MLX computes by default."""
    import mlx.core as mx

    if mx.default_device() != mx.Device(mx.gpu):
        return "CPU"
    return "Metal" if mx.metal.is_available() else "CUDA"


def default_dtype() -> "mx.Dtype":
    """bfloat16 on a GPU; float32 on the CPU, where MLX's bfloat16 product has no BLAS and is 30 times slower."""
    import mlx.core as mx

    return mx.float32 if device_name() == "CPU" else mx.bfloat16


def vae_dtype(dtype: "mx.Dtype", device: str | None = None) -> "mx.Dtype":
    """What the VAE's convolutions compute in when the rest computes in `dtype`: on the CPU float32 all the same."""
    import mlx.core as mx

    return mx.float32 if (device or device_name()) == "CPU" else dtype


def total_memory() -> int:
    """Bytes a model can live in: the GPU's own memory under CUDA, else the machine's RAM."""
    if device_name() == "CUDA":
        import mlx.core as mx

        return int(mx.device_info().get("total_memory", 0)) or _physical_memory()
    return min(_physical_memory(), _container_limit())


# Share of the memory that a run may use; the rest is the system's. Metal says itself where it can.
_USABLE = {"CPU": 0.9, "CUDA": 0.95, "Metal": 0.75}


def usable_memory(total: int | None = None) -> int:
    """Bytes that a run may hold: what Metal recommends, else a share of `total_memory`.

    total: bytes of another machine's memory, whose device is of this one's kind.
    """
    import mlx.core as mx

    name = device_name()
    if total is not None:
        return int(_USABLE[name] * total)
    recommended = mx.device_info().get("max_recommended_working_set_size") if name == "Metal" else None
    return min(total_memory(), int(recommended)) if recommended else int(_USABLE[name] * total_memory())


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _container_limit() -> int:
    """The cgroup's memory limit in bytes (version 2, then 1), or a huge number where there is none."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdigit() else sys.maxsize
    return sys.maxsize


def peak_memory() -> int:
    """The most bytes this process has held: MLX's arrays on a GPU, all resident memory on the CPU."""
    import mlx.core as mx

    if device_name() != "CPU":
        return int(mx.get_peak_memory())
    return _peak_resident()


def _peak_resident() -> int:
    try:
        # getrusage would do, but on Linux its maximum includes the parent process from before exec.
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    except (OSError, IndexError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# --- facts ---------------------------------------------------------------------------------------------------


def facts(*, measure: bool = True) -> dict[str, Any]:
    """What `mlx-wan info` prints: versions, device, BLAS, memory and folders, as plain JSON values.

    With `measure` a float32 product is timed (tens of milliseconds with a fast BLAS, a second with a slow one).
    """
    import mlx.core as mx

    return {
        "mlx-wan": version("mlx-wan"),
        "mlx": version("mlx"),
        "mlx wheels": wheels(),
        "wheel conflict": wheel_conflict(),
        "device": device_name(),
        "device info": {key: value for key, value in mx.device_info().items() if key != "uuid"},
        "default dtype": str(default_dtype()).removeprefix("mlx.core."),
        "blas": _blas_facts(measure),
        "memory": {"total bytes": total_memory(), "peak bytes": peak_memory()},
        "cache": _cache_folder(),
        "packages": {name: version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "system": platform.platform(),
    }


_PACKAGES = ("numpy", "av", "pillow", "tokenizers", "huggingface-hub", "ftfy", "tqdm", "pyyaml")


def _blas_facts(measure: bool) -> dict[str, Any]:
    state = prepare()
    facts: dict[str, Any] = {"library": state.library, "reason": state.reason, "hint": state.hint}
    if measure:
        speed, error = _measure_product()
        facts |= {"gflops": speed, "relative error": error}
    return facts


def _measure_product(size: int = 384) -> tuple[float, float]:
    """Speed (GFLOP/s) and relative error, against float64 in NumPy, of MLX's default-device float32 product."""
    import time

    import mlx.core as mx
    import numpy as np

    a, b = np.random.default_rng(0).standard_normal((2, size, size), dtype=np.float32)
    ma, mb = mx.array(a), mx.array(b)
    mx.eval(ma @ mb)
    start = time.perf_counter()
    product = ma @ mb
    mx.eval(product)
    seconds = time.perf_counter() - start
    exact = a.astype(np.float64) @ b.astype(np.float64)
    error = float(np.linalg.norm(np.array(product) - exact) / np.linalg.norm(exact))
    return round(2 * size**3 / seconds / 1e9, 1), error


def version(name: str) -> str | None:
    """Of an installed package; None if there is none."""
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cache_folder() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)
