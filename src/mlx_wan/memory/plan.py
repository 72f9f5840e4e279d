"""What each stage of a run will hold, from dimensions alone, and whether that fits.

Weights are counted from modules that are built and never filled; what a stage works with is found by `liveness` from
the graph of the very model that will run. So a change of a model changes its plan.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_wan import backend
from mlx_wan.errors import UserError
from mlx_wan.memory.liveness import peak_bytes
from mlx_wan.models.autoencoder import FeatureCache, WanVAE, clipped
from mlx_wan.models.clip import ImageEncoder, ImageEncoderConfig
from mlx_wan.models.transformer import Control, TransformerConfig, WanTransformer
from mlx_wan.models.umt5 import TextEncoderConfig, UMT5Encoder
from mlx_wan.models.vae21 import VAE21Config, WanVAE21
from mlx_wan.models.vae22 import VAEConfig, WanVAE22
from mlx_wan.weights.checkpoint import Checkpoint
from mlx_wan.weights.fit import parameter_dtype
from mlx_wan.weights.quantize import Quantization, quantize_module
from mlx_wan.zoo import LATENT_STATISTICS, MODELS, RELEASES, VACE_LAYERS, ModelSpec

LAYERS = 3  # traced of each stack: blocks are alike, and MLX runs ahead by less than three
HEAD_DIM = 128  # of every released transformer
LOWERED = (1, 2, 4, 16, 64)  # by how many times what is too much a limit is brought down, until nothing is
LATENTS_HELD = 6  # noise, latents, velocity, and three of UniPC's state


@dataclass(frozen=True)
class Dimensions:
    """A model by its dimensions; `experts` of the transformer, 1 or 2."""

    spec: ModelSpec
    transformer: TransformerConfig
    text_encoder: TextEncoderConfig
    vae: VAEConfig | VAE21Config
    image_encoder: ImageEncoderConfig | None = None
    experts: int = 1
    quantization: Quantization | None = None
    packs_text: bool = True  # whether quantization is the text encoder's too

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> "Dimensions":
        """Of a checkpoint whose headers were read."""
        return cls(
            checkpoint.spec,
            checkpoint.transformer_config,
            checkpoint.text_encoder_config,
            checkpoint.vae_config,
            checkpoint.image_encoder_config,
            1 if checkpoint.transformer_2 is None else 2,
            checkpoint.quantization,
            checkpoint.packing("text_encoder") == checkpoint.quantization,
        )

    @property
    def text_quantization(self) -> Quantization | None:
        """How the text encoder is packed."""
        return self.quantization if self.packs_text else None

    @classmethod
    def of_release(cls, name: str) -> "Dimensions":
        """Of a released model, a key of `zoo.MODELS`, without any file."""
        spec = MODELS[name]
        found = next(release for release in RELEASES if name in release.models)
        dims = dict(found.dims)
        dims |= {"num_heads": dims["dim"] // HEAD_DIM, "vace_layers": VACE_LAYERS.get(name, ())}
        transformer = TransformerConfig(**dims, model_type=spec.task)
        mean, std = LATENT_STATISTICS[spec.vae]
        vae = (VAEConfig if spec.vae == "Wan2.2" else VAE21Config)(latents_mean=mean, latents_std=std)
        image_encoder = ImageEncoderConfig() if transformer.image_dim else None
        experts = 1 if spec.boundary is None else 2
        return cls(spec, transformer, TextEncoderConfig(), vae, image_encoder, experts)


@dataclass(frozen=True)
class Setting:
    """What is asked of a run. pictures: how many are given. tokens: of the longer prompt; None for the most."""

    width: int
    height: int
    num_frames: int
    dtype: mx.Dtype
    pictures: int = 0
    tokens: int | None = None
    keep_both_experts: bool = False
    references: int = 0  # pictures that VACE is given, which fill latent frames of their own
    begins: int = 1  # frames that are given at the beginning, of a video that goes on


@dataclass(frozen=True)
class Stage:
    """name: "text", "image" (its latents), "tokens" (of it), "denoise" or "decode". weights: bytes of the parts in
    memory then. work: the most bytes of everything else."""

    name: str
    weights: int
    work: int

    @property
    def peak(self) -> int:
        return self.weights + self.work


@dataclass(frozen=True)
class Plan:
    """The stages of a run in order; low_memory: whether parts leave memory when their work is done.

    limit: on a GPU, the bytes from which on MLX waits instead of working ahead (mx.set_memory_limit).
    """

    stages: tuple[Stage, ...]
    low_memory: bool
    limit: int = 0

    @property
    def peak(self) -> int:
        """The most bytes of any stage."""
        return max(stage.peak for stage in self.stages)


# --- plans ---------------------------------------------------------------------------------------------------


def plans(model: Dimensions, setting: Setting, device: str, memory: int = 0) -> tuple[Plan, Plan]:
    """The plan that keeps every part in memory, and the one that lets go of each after its work.

    device: "CPU", "Metal" or "CUDA", whose order of things counts.
    memory: bytes that may be used. On a GPU MLX takes more of it when there is more, to run ahead; with 0 this is what
        a run needs at least.
    """
    sizes = _weights(model, setting.dtype, device)
    experts = sizes["transformer"] * (model.experts if setting.keep_both_experts else 1)
    small = {
        "text": sizes["text_encoder"],
        "image": sizes["vae"],
        "tokens": sizes["vae"] + sizes["image_encoder"],
        "denoise": experts,
        "decode": sizes["vae"],
    }
    everything = sizes["text_encoder"] + sizes["image_encoder"] * bool(setting.pictures) + experts + sizes["vae"]

    def plan(held: dict[str, int], low_memory: bool) -> Plan:
        room = {name: math.inf if device == "CPU" else memory - weights for name, weights in held.items()}
        work = _work(model, setting, device, room)
        limit = 0 if device == "CPU" else memory
        return Plan(tuple(Stage(name, held[name], needed) for name, needed in work), low_memory, limit)

    return plan(dict.fromkeys(small, everything), False), plan(small, True)


def choose(model: Dimensions, setting: Setting, device: str, memory: int) -> Plan:
    """The plan for `memory` bytes: everything stays loaded if that fits, else parts leave.

    Raises UserError, with the nearest setting that fits, if neither does.
    """
    keeping, leaving = plans(model, setting, device)
    if min(keeping.peak, leaving.peak) <= memory:
        return limited(model, setting, device, memory, keeping.peak > memory)
    worst = max(leaving.stages, key=lambda stage: stage.peak)
    near = nearest(model, setting, device, memory)
    raise UserError(
        f"{worst.name} takes {gib(worst.peak)} ({gib(worst.weights)} of weights), and {gib(memory)} of memory can be "
        f"used: {near or 'no smaller setting fits either; use a larger machine'}"
    )


def limited(model: Dimensions, setting: Setting, device: str, memory: int, low_memory: bool) -> Plan:
    """A plan that fits, with the limit that makes it fit: MLX goes beyond one by the operation that it looks after."""
    plan = plans(model, setting, device, memory)[low_memory]
    for times in LOWERED:
        if plan.peak <= memory or device == "CPU":
            break
        plan = plans(model, setting, device, plan.limit - times * (plan.peak - memory))[low_memory]
    return plan


def nearest(
    model: Dimensions, setting: Setting, device: str, memory: int, packing: str = "mlx-wan convert -q {}, then"
) -> str | None:
    """In words, the change that makes a run fit and changes least; None if none does. packing: how bits are said.

    Fewer bits first, since the video stays what was asked for; then fewer frames; then smaller ones too.
    """

    def fits(candidate: Dimensions, wanted: Setting) -> bool:
        return plans(candidate, wanted, device)[1].peak <= memory

    packed = () if model.quantization is not None else tuple(Quantization(bits) for bits in (8, 4))
    models = [model, *(replace(model, quantization=how) for how in packed if _can_be(model, how))]
    for candidate in models[1:]:
        if fits(candidate, setting):
            return f"{_said(candidate, packing).removesuffix(', then')} fits"
    stride = model.vae.stride[0]
    most = (setting.num_frames - 1) // stride
    for width, height in _sizes(model, setting):
        for candidate in models:
            clips = [replace(setting, width=width, height=height, num_frames=n * stride + 1) for n in range(most + 1)]
            number = _largest(most, lambda n, candidate=candidate, clips=clips: fits(candidate, clips[n]))
            if number is not None:
                size = "" if (width, height) == (setting.width, setting.height) else f"--size {width}*{height} "
                first = "" if candidate is model else f"{_said(candidate, packing)} "
                return f"{first}{size}--frame_num {number * stride + 1} fits"
    return None


def _can_be(model: Dimensions, how: Quantization) -> bool:
    """Whether the group size divides the rows of all that would be packed."""
    try:
        _weights(replace(model, quantization=how), mx.float32, "CPU")
    except ValueError:
        return False
    return True


def _said(model: Dimensions, packing: str) -> str:
    assert model.quantization is not None
    return packing.format(model.quantization.bits)


def _largest(most: int, fits: Callable[[int], bool]) -> int | None:
    """The largest number up to `most` that fits, if smaller ones always do; None if 0 does not."""
    if fits(most):
        return most
    if not fits(0):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _sizes(model: Dimensions, setting: Setting) -> Iterator[tuple[int, int]]:
    """The size asked for, and smaller ones of about its shape."""
    (_, stride_h, stride_w), (_, patch_h, patch_w) = model.vae.stride, model.transformer.patch_size
    for share in (1, 0.75, 0.5, 0.375, 0.25):
        steps = ((setting.width, stride_w * patch_w), (setting.height, stride_h * patch_h))
        width, height = (max(int(n * share) // step, 1) * step for n, step in steps)
        yield width, height


def gib(size: int) -> str:
    """Bytes in words."""
    return f"{size / 2**30:.2f} GiB"


# --- weights -------------------------------------------------------------------------------------------------


def _weights(model: Dimensions, dtype: mx.Dtype, device: str) -> dict[str, int]:
    modules = {
        "transformer": (WanTransformer, model.transformer),
        "text_encoder": (UMT5Encoder, model.text_encoder),
        "image_encoder": (ImageEncoder, model.image_encoder),
        "vae": (make_vae, model.vae),
    }
    kinds = {"vae": backend.vae_dtype(dtype, device)}
    packed = {"text_encoder": model.text_quantization}
    return {
        part: 0
        if config is None
        else _weight_bytes(make, config, part, packed.get(part, model.quantization), kinds.get(part, dtype))
        for part, (make, config) in modules.items()
    }


@cache
def _weight_bytes(
    make: Callable[[Any], nn.Module], config: Any, part: str, how: Quantization | None, dtype: mx.Dtype
) -> int:
    return sum(array.nbytes for _, array in _parameters(make(config), part, how, dtype))


def make_vae(config: VAEConfig | VAE21Config) -> WanVAE:
    """The module of a VAE's dimensions, not filled."""
    return WanVAE21(config) if isinstance(config, VAE21Config) else WanVAE22(config)


def _parameters(module: nn.Module, part: str, how: Quantization | None, dtype: mx.Dtype) -> list[tuple[str, mx.array]]:
    """The parameters of a module by name, of the types they are loaded in and without values; it is quantized."""
    if how is not None:
        quantize_module(module, part, how)
    named: list[tuple[str, mx.array]] = tree_flatten(module.parameters())  # pyright: ignore[reportAssignmentType]
    return [(name, mx.zeros(array.shape, parameter_dtype(part, name, array.dtype, dtype))) for name, array in named]


# --- work ----------------------------------------------------------------------------------------------------


def _work(model: Dimensions, setting: Setting, device: str, room: dict[str, float]) -> Iterator[tuple[str, int]]:
    """(stage, the most bytes it holds besides weights). room: stage -> the bytes from which on MLX runs less ahead."""
    model = replace(model, quantization=_traceable(model.quantization))
    how, dtype, size = model.text_quantization, setting.dtype, (setting.width, setting.height)
    text_len = model.transformer.text_len
    yield (
        "text",
        _text_work(model.text_encoder, min(setting.tokens or text_len, text_len), how, dtype, device, room["text"]),
    )
    if setting.pictures or model.spec.task == "vace":
        frames = setting.begins if model.spec.task == "ti2v" else setting.num_frames
        yield "image", image_work(model.vae, size, frames, dtype, device, room["image"])
        if model.image_encoder is not None:
            yield "tokens", _tokens_work(model.image_encoder, setting.pictures, dtype, device, room["tokens"])
    yield "denoise", _denoise_work(model, setting, device, room["denoise"])
    yield (
        "decode",
        _latents(model.vae, setting).nbytes + _decode_work(model.vae, size, dtype, device, room["decode"]),
    )


def _traceable(how: Quantization | None) -> Quantization | None:
    """Packing whose graph MLX can export, which those with 8-bit floating-point scales are not: the matrices that are
    unpacked from as many bits are as large."""
    return how if how is None or how.mode in ("affine", "mxfp4") else Quantization(how.bits, 32)


def _latents(vae: VAEConfig | VAE21Config, setting: Setting) -> mx.array:
    stride_t, stride_h, stride_w = vae.stride
    frames = (setting.num_frames - 1) // stride_t + 1 + setting.references
    return mx.zeros((1, frames, setting.height // stride_h, setting.width // stride_w, vae.z_dim))


@cache
def _text_work(
    config: TextEncoderConfig, tokens: int, how: Quantization | None, dtype: mx.Dtype, device: str, room: float
) -> int:
    config = replace(config, num_layers=min(config.num_layers, LAYERS))
    module = UMT5Encoder(config).eval()
    return _module_peak(
        module, _parameters(module, "text_encoder", how, dtype), [mx.zeros((1, tokens), mx.int32)], device, room
    )


@cache
def image_work(
    vae: VAEConfig | VAE21Config,
    size: tuple[int, int],
    frames: int,
    dtype: mx.Dtype,
    device: str,
    room: float = math.inf,
) -> int:
    """A TI2V model encodes the frames that are given, others a video of the pictures and grey frames."""
    width, height = size
    rest = vae.stride[0]
    pieces = [mx.zeros((1, n, height, width, 3)) for n in (1, *[rest] * min((frames - 1) // rest, 2))]
    video = 4 * 3 * frames * height * width
    return video + _stream_peak(vae, lambda m, x, c: m.normalise(m.moments(x, c)[0]), pieces, dtype, device, room)


@cache
def _tokens_work(config: ImageEncoderConfig, pictures: int, dtype: mx.Dtype, device: str, room: float) -> int:
    module = ImageEncoder(replace(config, num_layers=min(config.num_layers, LAYERS)))
    squares = mx.zeros((pictures, config.image_size, config.image_size, 3))
    return _module_peak(module, _parameters(module, "image_encoder", None, dtype), [squares], device, room)


def transformer_inputs(model: Dimensions, setting: Setting) -> list[mx.array]:
    """Zeros of the shapes and types that the transformer is given in such a run: latents, timesteps, context, and
    image tokens where it takes them."""
    config, latents = model.transformer, _latents(model.vae, setting)
    first = model.spec.task == "ti2v" and setting.pictures > 0
    inputs = [
        mx.zeros((*latents.shape[:-1], config.in_dim)),
        mx.zeros((1, latents.shape[1] if first else 1)),
        mx.zeros((1, config.text_len, config.text_dim), setting.dtype),
    ]
    if model.image_encoder is not None:
        inputs.append(mx.zeros((1, setting.pictures * model.image_encoder.num_tokens, config.image_dim), setting.dtype))
    return inputs


def _denoise_work(model: Dimensions, setting: Setting, device: str, room: float) -> int:
    config = replace(model.transformer, num_layers=min(model.transformer.num_layers, LAYERS))
    if config.vace_layers:
        config = replace(config, vace_layers=(0,))
    inputs, latents = transformer_inputs(model, setting), _latents(model.vae, setting)
    module = WanTransformer(config, setting.dtype).eval()
    named = _parameters(module, "transformer", model.quantization, setting.dtype)
    blocks = model.transformer.num_layers + len(model.transformer.vace_layers)
    known = inputs[0].nbytes - latents.nbytes
    texts = 2 * 2 * blocks * config.text_len * config.dim * setting.dtype.size  # keys, values
    held = LATENTS_HELD * latents.nbytes + 2 * known + 2 * inputs[2].nbytes + texts
    if config.vace_layers:
        channels = mx.zeros((*latents.shape[:-1], config.vace_in_dim))
        held += 2 * channels.nbytes
        told = lambda x, t, c, channels: module(x, t, c, control=Control(channels))  # noqa: E731
        return held + _module_peak(module, named, [*inputs, channels], device, room - held, told)
    return held + _module_peak(module, named, inputs, device, room - held)


@cache
def _decode_work(vae: VAEConfig | VAE21Config, size: tuple[int, int], dtype: mx.Dtype, device: str, room: float) -> int:
    (_, stride_h, stride_w), (width, height) = vae.stride, size
    pieces = [mx.zeros((1, 1, height // stride_h, width // stride_w, vae.z_dim))] * 3
    return _stream_peak(vae, lambda m, z, c: clipped(m.pixels(m.denormalise(z), c)), pieces, dtype, device, room)


def _module_peak(
    module: nn.Module,
    named: Sequence[tuple[str, mx.array]],
    inputs: Sequence[mx.array],
    device: str,
    room: float,
    run: Callable[..., mx.array] | None = None,
) -> int:
    """What a call, or `run` of the inputs, holds beyond weights and inputs."""

    def call(*arrays: mx.array) -> Any:
        _fill(module, named, arrays)
        return (run or module)(*arrays[len(named) :])  # pyright: ignore[reportCallIssue]

    return peak_bytes(call, [*(array for _, array in named), *inputs], device, limit=room)


def _fill(module: nn.Module, named: Sequence[tuple[str, mx.array]], arrays: Sequence[mx.array]) -> None:
    pairs = [(name, array) for (name, _), array in zip(named, arrays, strict=False)]
    module.update(tree_unflatten(pairs))  # pyright: ignore[reportArgumentType]


def _stream_peak(
    config: VAEConfig | VAE21Config,
    work: Callable[[WanVAE, mx.array, FeatureCache], mx.array],
    pieces: Sequence[mx.array],
    dtype: mx.Dtype,
    device: str,
    room: float,
) -> int:
    """What `work` holds besides the VAE's weights, on piece after piece; from the third on they are alike."""
    module = make_vae(config)
    named = _parameters(module, "vae", None, backend.vae_dtype(dtype, device))
    remembered: dict[int, mx.array] = {}
    most = 0
    for place, piece in enumerate(pieces):
        after = FeatureCache()

        def call(*arrays: mx.array, before=tuple(remembered), place=place) -> list[mx.array]:
            nonlocal after
            _fill(module, named, arrays)
            old = dict(zip(before, arrays[len(named) + 1 :], strict=True))
            after = FeatureCache(old, place == 0, streaming=True)
            return [work(module, arrays[len(named)], after), *after.arrays()]

        old = list(remembered.values())
        kept = sum(array.nbytes for array in old)
        given = [*(array for _, array in named), piece, *old]
        most = max(most, kept + peak_bytes(call, given, device, len(old), room - kept))
        remembered = {layer: mx.zeros(array.shape, array.dtype) for layer, array in after.frames.items()}
    return most
