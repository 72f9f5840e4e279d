"""How fast the parts of a model are on this machine, with random weights: no file is needed.

Each part is built alone, of the types that loading gives it, and leaves memory before the next one comes.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_wan import backend
from mlx_wan.errors import UserError
from mlx_wan.memory.plan import (
    Dimensions,
    Setting,
    Stage,
    gib,
    image_work,
    make_vae,
    nearest,
    plans,
    transformer_inputs,
)
from mlx_wan.models.transformer import Control, WanTransformer
from mlx_wan.models.umt5 import UMT5Encoder
from mlx_wan.weights.fit import parameter_dtype
from mlx_wan.weights.quantize import Quantization, quantize_module

TIMESTEP = 500.0
MOST_SECONDS = 60.0  # spent on the repetitions of a part; one is made always
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Measurement:
    """What a piece of work took.

    part: one of `PARTS`. work: in words. first: seconds of the first call, which may compile. seconds: of each call
    after it. peak: the most bytes that MLX held during those, weights included. weights: theirs.
    """

    part: str
    work: str
    first: float
    seconds: tuple[float, ...]
    peak: int
    weights: int

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def check(model: Dimensions, setting: Setting, parts: tuple[str, ...], pieces: int, device: str, memory: int) -> None:
    """Raises UserError, with the nearest setting that fits, unless each of these parts fits into `memory` bytes.

    device: as `memory.plan.plans`.
    """
    sizes = planned(model, setting, pieces, device)
    part = max(parts, key=lambda part: sizes[part].peak)
    if sizes[part].peak > memory:
        near = nearest(model, setting, device, memory, packing="-q {}")
        raise UserError(
            f"{part} takes {gib(sizes[part].peak)} ({gib(sizes[part].weights)} of weights), and {gib(memory)} of "
            f"memory can be used: {near or 'no smaller setting fits either'}"
        )


def planned(model: Dimensions, setting: Setting, pieces: int, device: str, memory: int = 0) -> dict[str, Stage]:
    """Part -> what it will hold alone; `device` and `memory` as `memory.plan.plans`."""
    leaving = {stage.name: stage for stage in plans(model, setting, device, memory)[1].stages}
    frames, size = _frames(model, setting, pieces), (setting.width, setting.height)
    weights = leaving["decode"].weights
    room = math.inf if device == "CPU" else memory - weights
    encoding = image_work(model.vae, size, (frames - 1) * model.vae.stride[0] + 1, setting.dtype, device, room)
    return {
        "text": leaving["text"],
        "encode": Stage("encode", weights, encoding),
        "transformer": leaving["denoise"],
        "decode": leaving["decode"],
    }


def measure(
    model: Dimensions, setting: Setting, parts: tuple[str, ...], repeat: int, pieces: int
) -> Iterator[Measurement]:
    """The parts in the order of a run, each yielded when it is known.

    Args:
        parts: of `PARTS`.
        repeat: calls of transformer and text encoder after the first one, unless they take more than a minute.
        pieces: latent frames of the VAE after the first one; a clip's last may be before that.
    """
    for part, work in PARTS.items():
        if part in parts:
            yield from work(model, setting, repeat, pieces)
            mx.clear_cache()


def random_module(module: Module, part: str, how: Quantization | None, dtype: mx.Dtype) -> Module:
    """The module with the random weights it is made with, packed and of the types that loading gives them."""
    if how is not None:
        quantize_module(module, part, how)
    named: list[tuple[str, Any]] = tree_flatten(module.parameters())  # pyright: ignore[reportAssignmentType]
    named = [(name, array.astype(parameter_dtype(part, name, array.dtype, dtype))) for name, array in named]
    module.update(tree_unflatten(named))  # pyright: ignore[reportArgumentType]
    for _, array in named:
        mx.eval(array)  # one by one: what a matrix is made of leaves before the next is made
    mx.clear_cache()
    module.eval()  # as the pipeline runs it: MLX works ahead by half a block
    return module


def _weights(module: nn.Module) -> int:
    named: list[tuple[str, mx.array]] = tree_flatten(module.parameters())  # pyright: ignore[reportAssignmentType]
    return sum(array.nbytes for _, array in named)


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    mx.eval(call())
    return time.perf_counter() - start


def _calls(part: str, work: str, module: nn.Module, call: Callable[[], mx.array], repeat: int) -> Measurement:
    first, seconds = _timed(call), []
    mx.reset_peak_memory()
    while not seconds or (len(seconds) < repeat and sum(seconds) < MOST_SECONDS):
        seconds.append(_timed(call))
    return Measurement(part, work, first, tuple(seconds), mx.get_peak_memory(), _weights(module))


def _text(model: Dimensions, setting: Setting, repeat: int, pieces: int) -> Iterator[Measurement]:
    tokens = model.transformer.text_len
    module = random_module(UMT5Encoder(model.text_encoder), "text_encoder", model.text_quantization, setting.dtype)
    ids = mx.random.randint(0, model.text_encoder.vocab_size, (1, tokens))
    yield _calls("text", f"{tokens} tokens", module, lambda: module(ids), repeat)


def _transformer(model: Dimensions, setting: Setting, repeat: int, pieces: int) -> Iterator[Measurement]:
    module = random_module(
        WanTransformer(model.transformer, setting.dtype), "transformer", model.quantization, setting.dtype
    )
    inputs = [mx.random.normal(array.shape).astype(array.dtype) for array in transformer_inputs(model, setting)]
    inputs[1] = mx.full(inputs[1].shape, TIMESTEP)
    if inputs[1].size > 1:
        inputs[1][:, 0] = 0  # of a given first frame
    (latents, timesteps, context, *images), control = inputs, None
    if model.transformer.vace_layers:
        control = Control(mx.random.normal((*latents.shape[:-1], model.transformer.vace_in_dim)))
        mx.eval(control.channels)
    image = images[0] if images else None
    t, h, w = module.token_grid(latents.shape)
    mx.eval(inputs)
    call = lambda: module(latents, timesteps, context, image, control)  # noqa: E731
    yield _calls("transformer", f"{t * h * w} tokens", module, call, repeat)


def _vae(part: str, model: Dimensions, setting: Setting, repeat: int, pieces: int) -> Iterator[Measurement]:
    """A clip's first latent frame is a frame of video, the others four: two measurements."""
    module = random_module(make_vae(model.vae), "vae", None, backend.vae_dtype(setting.dtype))
    stride_t, stride_h, stride_w = model.vae.stride
    frames = _frames(model, setting, pieces)
    if part == "decode":
        count = frames
        inputs = mx.random.normal((1, frames, setting.height // stride_h, setting.width // stride_w, model.vae.z_dim))
        stream = module.stream_decode
    else:
        count = (frames - 1) * stride_t + 1
        inputs = mx.random.uniform(-1, 1, (1, count, setting.height, setting.width, 3))
        stream = module.stream_encode
    mx.eval(inputs)
    first, peaks, seconds = [0.0, 0.0], [0, 0], [0.0, 0.0]
    for attempt in range(2):  # the first time compiles
        for row, length in enumerate((1, count)):
            mx.reset_peak_memory()
            took = _timed(lambda length=length: [mx.eval(piece) for piece in stream(inputs[:, :length])])
            seconds[row], peaks[row] = took, mx.get_peak_memory()
            first[row] = first[row] if attempt else took
    more = max(0, frames - 1)
    yield Measurement(part, "the first frame", first[0], (seconds[0],), peaks[0], _weights(module))
    if more:
        # A stream works ahead, so that single pieces have no time of their own.
        each = max(0.0, seconds[1] - seconds[0]) / more
        work = f"each {stride_t} frames more"
        yield Measurement(part, work, max(0.0, first[1] - seconds[0]), (each,), peaks[1], _weights(module))


def _frames(model: Dimensions, setting: Setting, pieces: int) -> int:
    """Latent frames that the VAE is measured with."""
    return min((setting.num_frames - 1) // model.vae.stride[0], pieces) + 1


PARTS: dict[str, Callable[[Dimensions, Setting, int, int], Iterator[Measurement]]] = {
    "text": _text,
    "encode": lambda *args: _vae("encode", *args),
    "transformer": _transformer,
    "decode": lambda *args: _vae("decode", *args),
}
