"""Wan2.2 video generation and training on MLX.

Importing this package is cheap: it loads no model, and nothing but the BLAS (see `backend`).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlx_wan import backend

if TYPE_CHECKING:
    from mlx_wan.pipeline import PipelineOutput, WanPipeline

# Must run before mlx.core is imported by anything below this package.
backend.prepare()

__version__ = "0.1.0"
__all__ = ["PipelineOutput", "WanPipeline", "__version__"]

_LAZY = {"WanPipeline": "mlx_wan.pipeline", "PipelineOutput": "mlx_wan.pipeline"}


def __getattr__(name: str) -> Any:
    """Load the pipeline (PEP 562) the first time somebody asks for it."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    backend.check_setting()
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
