"""The most memory an MLX computation holds, from its graph alone: nothing is computed.

The function is traced with arrays that have shapes and no values (`mx.export_function`), its operations are put into
the order in which `mx.eval` takes them, and played through: which buffers each one needs, which it takes over from an
input nobody else wants, and when each is let go of. What MLX does here was read in mlx/transforms.cpp and
mlx/backend/cpu of 0.32; `tests/memory` compares the outcome with `mx.get_peak_memory`.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlx_wan.models import layers

# How far the allocation of results runs ahead of the computation that lets go of inputs: at most 10 tasks, each of 10
# dispatches on the CPU. On Metal a task is a command buffer, which for large arrays holds one operation; not measured.
# On CUDA it is a graph, which ends with the operation that brings it beyond GRAPH_OPERATIONS, or what its operations
# read beyond GRAPH_ELEMENTS; the one being filled comes on top.
RUN_AHEAD = {"CPU": 100, "Metal": 10, "CUDA": 11}
GRAPH_ELEMENTS, GRAPH_OPERATIONS = 1000 << 20, 100  # of an H100; smaller devices have smaller graphs
SPARE = 16384  # bytes that a buffer may be larger than a result that takes it over
MAX_WIDTH = 20  # of the breadth-first order of mx.eval (MLX_BFS_MAX_WIDTH)

Shape = tuple[int, ...]


class Operation(NamedTuple):
    """name: of the primitive. inputs, outputs: names of arrays. arguments: the primitive's own."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    arguments: list[Any]


@dataclass
class Graph:
    """A traced function.

    Attributes:
        operations: in the order of tracing.
        shapes, sizes: of every array by its name, and the bytes of one of its elements.
        inputs, outputs: names of the function's own.
    """

    operations: list[Operation] = field(default_factory=list)
    shapes: dict[str, Shape] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)

    def add(self, array: tuple[str, Shape, mx.Dtype]) -> str:
        """Notes an array and returns its name."""
        name, shape, dtype = array
        self.shapes[name], self.sizes[name] = tuple(shape), dtype.size
        return name


def trace(function: Callable[..., Any], arrays: Sequence[mx.array], device: str = "CPU") -> Graph:
    """The graph of `function(*arrays)` on `device`, whose result may be any tree of arrays. No array is evaluated."""
    graph = Graph()

    def take(record: dict[str, Any]) -> None:
        kind = record["type"]
        if kind in ("inputs", "outputs"):
            setattr(graph, kind, [graph.add(array) for array in record[kind]])
        elif kind == "constants":
            for name, value in record["constants"]:
                graph.add((name, value.shape, value.dtype))
        elif kind == "primitive":
            inputs, outputs = (tuple(graph.add(array) for array in record[side]) for side in ("inputs", "outputs"))
            graph.operations.append(Operation(record["name"], inputs, outputs, record.get("arguments", [])))

    with layers.traceable(device), _eager():
        mx.export_function(take, lambda *given: _flat(function(*given)), *arrays)
    return graph


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Compiled functions cannot be exported as such."""
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


def _flat(tree: Any) -> list[mx.array]:
    return [tree] if isinstance(tree, mx.array) else [array for branch in tree for array in _flat(branch)]


def evaluation_order(graph: Graph) -> list[Operation]:
    """The operations that the outputs need, as `mx.eval` orders them.

    Breadth first from the outputs, backwards, going down a level where more than `MAX_WIDTH` wait; then reversed.
    """
    operations, maker = graph.operations, {}
    for index, operation in enumerate(operations):
        maker |= dict.fromkeys(operation.outputs, index)
    last = len(operations)  # stands for what waits for all outputs

    def needs(index: int) -> list[int]:
        names = graph.outputs if index == last else operations[index].inputs
        return [maker[name] for name in names if name in maker]

    missing, stack, seen = Counter[int](), [last], {last}
    while stack:
        for needed in needs(stack.pop()):
            missing[needed] += 1
            if needed not in seen:
                seen.add(needed)
                stack.append(needed)
    tape, aside, at = [last], [], 0
    while at < len(tape) or aside:
        if at < len(tape):
            index, start = tape[at], 0
            at += 1
        else:
            index, start = aside.pop()
        inputs = needs(index)
        for j in range(start, len(inputs)):
            if len(tape) - at >= MAX_WIDTH:
                aside.append((index, j))
                break
            missing[inputs[j]] -= 1
            if not missing[inputs[j]]:
                tape.append(inputs[j])
    return [operations[index] for index in reversed(tape[1:])]


@dataclass
class _Buffer:
    """Memory that one or more arrays share.

    size: bytes. uses: how often arrays on it are still asked for. busy: the dispatch up to which something that was
    handed out reads it. kept: whether it outlives the computation.
    """

    size: int
    uses: int = 0
    busy: int = -(10**9)
    kept: bool = False


# Results that may take over an input's buffer.
# fmt: off
ELEMENTWISE = frozenset((
    "Abs", "Add", "AsType", "BitwiseBinary", "Ceil", "Cos", "Divide", "Equal", "Erf", "Exp", "Expm1", "Floor",
    "Greater", "LayerNorm", "Less", "Log", "Log1p", "LogicalNot", "Maximum", "Minimum", "Multiply", "Negative",
    "NotEqual", "Power", "RMSNorm", "Round", "Rsqrt", "Select", "Sigmoid", "Sign", "Sin", "Softmax", "Sqrt",
    "Square", "Subtract", "Tanh",
))
# Results that share an input's buffer, where its strides allow.
VIEWS = frozenset((
    "Broadcast", "BroadcastAxes", "Contiguous", "Copy", "Depends", "ExpandDims", "Flatten", "Reshape", "Slice",
    "Split", "Squeeze", "StopGradient", "Transpose", "Unflatten", "View",
))
# fmt: on


class _Playback:
    """The memory of a computation, operation by operation.

    Arrays are shadowed by NumPy views of one byte with their strides, which say what is a view and what a copy.
    """

    def __init__(self, graph: Graph, released: Iterable[str], device: str, limit: float = math.inf):
        self.graph, self.device, self.limit = graph, device, limit
        self.order = evaluation_order(graph)
        self.uses = Counter(name for operation in self.order for name in operation.inputs)
        self.shadow: dict[str, np.ndarray] = {}
        self.buffer: dict[str, _Buffer] = {}
        self.now = 0  # dispatches handed out; on CUDA graphs
        self.done = -RUN_AHEAD[device]  # of them, at least
        self.waited = 0  # where somebody waited last
        self.counted = self.done  # the last graph that MLX ended because it was full: a limit makes it wait for those
        self.in_graph = self.elements_read = 0  # of the graph being filled: its operations, and what they read
        self.held = self.peak = 0
        self.leaving: list[tuple[int, int]] = []  # (dispatch after which they go, bytes)
        made = {name for operation in self.order for name in operation.outputs}
        kept = set(graph.inputs).difference(released)
        for name in graph.shapes:
            if name not in made and (self.uses[name] or name in graph.inputs):
                self._place(name, _packed(graph.shapes[name]), _Buffer(self._bytes(name), kept=name in kept))
                self._allocate(0 if name in graph.inputs else self._bytes(name))  # constants are made for this alone

    def play(self) -> int:
        """The most bytes held beyond the inputs; what `released` lets go of may be used again."""
        for operation in self.order:
            self._step(operation)
        return self.peak

    def _bytes(self, name: str) -> int:
        return math.prod(self.graph.shapes[name]) * self.graph.sizes[name]

    def _place(self, name: str, shadow: np.ndarray, buffer: _Buffer) -> None:
        self.shadow[name], self.buffer[name] = shadow, buffer
        buffer.uses += self.uses[name]
        buffer.kept = buffer.kept or name in self.graph.outputs

    def _step(self, operation: Operation) -> None:
        name = operation.name
        if (
            name == "Depends"
        ):  # somebody waits here: for this (`layers.finish`), or for the part before it (`layers.Pace`)
            self._hand_out()
            self.done = max(self.done, self.now if operation.inputs[0] == operation.inputs[1] else self.waited)
            self.waited = self.now
        self._let_go()
        shadows = [self.shadow[given] for given in operation.inputs]
        views = _views(operation, shadows, [self.graph.shapes[out] for out in operation.outputs])
        if views is not None:
            buffer = self.buffer[operation.inputs[0]]
            for out, view in zip(operation.outputs, views, strict=True):
                self._place(out, view, buffer)
            kernels, temporary = 0, 0
        else:
            temporary = self._temporary(operation, shadows)
            donor = self._donor(operation) if name in ELEMENTWISE else None
            for out in operation.outputs:
                buffer = donor or _Buffer(self._bytes(out))
                if donor is None:
                    self._allocate(buffer.size)
                self._place(out, self._result(operation, shadows, out), buffer)
            self._allocate(temporary)
            kernels = 1
        if self.device != "CUDA":
            self.counted = self.now
            self._hand_out(kernels + (1 if self.device == "CPU" else 0))
        if temporary:
            self.leaving.append((self.now, temporary))
        taken = {id(self.buffer[out]) for out in operation.outputs}
        for given in operation.inputs:
            buffer = self.buffer[given]
            buffer.uses -= 1
            if id(buffer) not in taken:
                buffer.busy = self.now
            self._release(buffer)
        for out in operation.outputs:
            self._release(self.buffer[out])
        if self.device == "CUDA" and kernels:
            self.in_graph += 1
            self.elements_read += sum(math.prod(self.graph.shapes[given]) for given in operation.inputs)
            if self.in_graph > GRAPH_OPERATIONS or self.elements_read > GRAPH_ELEMENTS:
                self.counted = self.now
                self._hand_out()
        if self.held > self.limit and self.counted > self.done:
            self._hand_out()
            self._wait()

    def _hand_out(self, dispatches: int = 1) -> None:
        """Ends the graph being filled."""
        self.now, self.in_graph, self.elements_read = self.now + dispatches, 0, 0
        self.done = max(self.done, self.now - RUN_AHEAD[self.device])

    def _wait(self) -> None:
        """Until no more is held than the limit, or nothing more comes of it."""
        for when in sorted({when for when, _ in self.leaving if when <= self.counted}):
            if self.held <= self.limit:
                return
            self.done = max(self.done, when)
            self._let_go()
        self.done = max(self.done, self.counted) if self.held > self.limit else self.done

    def _result(self, operation: Operation, shadows: list[np.ndarray], out: str) -> np.ndarray:
        """An elementwise result is laid out as its inputs, if they agree and have neither gaps nor repetitions."""
        shape = self.graph.shapes[out]
        layouts = {shadow.strides for shadow in shadows if shadow.size > 1}
        if operation.name in ELEMENTWISE and len(layouts) == 1:
            shadow = max(shadows, key=lambda shadow: shadow.size)
            if shadow.shape == shape and _dense(shadow):
                return _strided(shape, shadow.strides)
        return _packed(shape)

    def _donor(self, operation: Operation) -> _Buffer | None:
        (out, *_) = operation.outputs
        strides = self._result(operation, [self.shadow[given] for given in operation.inputs], out).strides
        for given in operation.inputs:
            buffer, shadow = self.buffer[given], self.shadow[given]
            alone = buffer.uses == operation.inputs.count(given) and buffer.busy <= self.done
            fits = shadow.shape == self.graph.shapes[out] and self.graph.sizes[given] == self.graph.sizes[out]
            small = buffer.size <= self._bytes(out) + SPARE
            if alone and fits and small and not buffer.kept and shadow.strides == strides:
                return buffer
        return None

    def _temporary(self, operation: Operation, shadows: list[np.ndarray]) -> int:
        """Bytes that an operation needs besides its result."""
        sizes = [self.graph.sizes[name] for name in operation.inputs]
        if operation.name in ("Matmul", "AddMM"):  # operands that are neither plain nor transposed are copied
            return sum(s.size * size for s, size in zip(shadows[:2], sizes, strict=False) if not _matrix(s))
        if operation.name == "Convolution" and self.device == "CPU":
            (x, weight), (out,) = shadows, operation.outputs
            _, *space, _ = self.graph.shapes[out]
            padding = _paddings(operation)
            padded = math.prod(n + 2 * p for n, p in zip(x.shape[1:-1], padding, strict=True))
            patches = math.prod(space) * math.prod(weight.shape[1:])
            return x.shape[0] * (padded * x.shape[-1] + patches) * sizes[0]
        return 0

    def _allocate(self, size: int) -> None:
        self.held += size
        self.peak = max(self.peak, self.held)

    def _release(self, buffer: _Buffer) -> None:
        if not buffer.uses and not buffer.kept and buffer.size:
            self.leaving.append((max(self.now, buffer.busy), buffer.size))
            buffer.size = 0

    def _let_go(self) -> None:
        gone = sum(size for when, size in self.leaving if when <= self.done)
        if gone:
            self.leaving = [(when, size) for when, size in self.leaving if when > self.done]
            self.held -= gone


def peak_bytes(
    function: Callable[..., Any],
    arrays: Sequence[mx.array],
    device: str,
    released: int = 0,
    limit: float = math.inf,
) -> int:
    """The most bytes that evaluating `function(*arrays)` on `device` ("CPU", "Metal" or "CUDA") holds beyond `arrays`.

    Results count. The last `released` of the arrays are nobody else's and leave when they are used up. limit: bytes
    beyond `arrays` from which on MLX waits for what it has handed out (mx.set_memory_limit).
    """
    graph = trace(function, arrays, device)
    return _Playback(graph, graph.inputs[len(graph.inputs) - released :], device, limit).play()


# --- shadows -------------------------------------------------------------------------------------------------


def _strided(shape: Shape, strides: tuple[int, ...]) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(np.empty((), np.uint8), shape, strides)


def _packed(shape: Shape) -> np.ndarray:
    return _strided(shape, tuple(math.prod(shape[i + 1 :]) for i in range(len(shape))))


def _dense(shadow: np.ndarray) -> bool:
    """Whether its elements fill a buffer without gaps or repetitions, in any order of dimensions."""
    expected = 1
    for stride, n in sorted((s, n) for s, n in zip(shadow.strides, shadow.shape, strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= n
    return True


def _matrix(shadow: np.ndarray) -> bool:
    rows, columns = shadow.shape[-2:]
    return shadow.strides[-2:] in ((columns, 1), (1, rows))


def _reshaped(shadow: np.ndarray, shape: Shape) -> np.ndarray | None:
    """`shadow` with another shape as a view; None where that takes a copy."""
    runs: list[list[int]] = []  # [elements, stride] of neighbouring dimensions that are one
    for n, stride in zip(shadow.shape, shadow.strides, strict=True):
        if n == 1:
            continue
        if runs and runs[-1][1] == n * stride:
            runs[-1] = [runs[-1][0] * n, stride]
        else:
            runs.append([n, stride])
    strides: list[int] = []
    for n in reversed(shape):
        if n == 1:
            strides.append(1)
            continue
        if not runs or runs[-1][0] % n:
            return None
        left, stride = runs.pop()
        strides.append(stride)
        if left > n:
            runs.append([left // n, stride * n])
    return _strided(shape, tuple(reversed(strides)))


def _views(operation: Operation, shadows: list[np.ndarray], shapes: list[Shape]) -> list[np.ndarray] | None:
    """What an operation hands out if it shares its input's buffer; None if it has a result of its own."""
    name, arguments = operation.name, operation.arguments
    if name not in VIEWS:
        return None
    source = shadows[0]
    if name == "View":  # as another type, here always one of the same size
        return [source] if source.shape == shapes[0] else None
    if name in ("Copy", "Depends", "StopGradient"):
        return shadows[: len(shapes)]
    if name in ("Broadcast", "BroadcastAxes"):
        return [np.broadcast_to(source, shapes[0])]
    if name == "Transpose":
        return [source.transpose(arguments[0])]
    if name == "Slice":
        start, stop, step = arguments
        return [source[tuple(map(slice, start, stop, step))]]
    if name == "Split":
        places, axis = arguments
        return list(np.split(source, places, axis))
    if name == "Contiguous":
        return [source] if _packed(source.shape).strides == source.strides else None
    view = _reshaped(source, shapes[0])  # Reshape, Flatten, Unflatten, ExpandDims, Squeeze
    return None if view is None else [view]


def _paddings(operation: Operation) -> list[int]:
    """Of a Convolution along each dimension of space, at its beginning."""
    return list(operation.arguments[1])
