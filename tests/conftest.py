"""Its being here also puts this folder on the import path: `import small`, `import cases` from any test."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # one process a core: more threads than that would wait for each other
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import mlx_wan  # noqa: F401  before mlx.core: it chooses the BLAS

import mlx.core as mx  # isort: skip

mx.set_default_device(mx.cpu)  # the golden numbers are compared in float32, which a GPU may round further
