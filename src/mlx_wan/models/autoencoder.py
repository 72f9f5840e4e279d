"""What the Wan2.1 and the Wan2.2 video autoencoder have in common: all but the order of their stages.

Every convolution over time is causal, so a clip can pass in pieces, each layer keeping the last frames it saw in a
`FeatureCache`. The first frame of a clip stands alone: it is neither merged nor doubled in time, which is why a clip
has 4n + 1 frames. A piece may be of any length that the strides divide, so a whole clip at once (training) and one
latent frame at a time (generation) run the same code. Tensors are channels last, parameter names the official ones.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_wan.errors import WanError

from . import vae_passes
from .features import FeatureCache
from .layers import SiLU, copied, run_layers, target, upload_stream
from .share import Rows


class AutoencoderConfig(Protocol):
    """What both configurations tell; see `vae22.VAEConfig`."""

    @property
    def dim(self) -> int: ...
    @property
    def dec_dim(self) -> int: ...
    @property
    def z_dim(self) -> int: ...
    @property
    def dim_mult(self) -> tuple[int, ...]: ...
    @property
    def num_res_blocks(self) -> int: ...
    @property
    def temporal_downsample(self) -> tuple[bool, ...]: ...
    @property
    def patch_size(self) -> int: ...
    @property
    def latents_mean(self) -> tuple[float, ...]: ...
    @property
    def latents_std(self) -> tuple[float, ...]: ...
    @property
    def stride(self) -> tuple[int, int, int]:
        """Frames, rows and columns of video for one latent."""
        ...


def stride(config: AutoencoderConfig) -> tuple[int, int, int]:
    """Frames, rows and columns of video for one latent, of any configuration."""
    space = config.patch_size * 2 ** (len(config.dim_mult) - 1)
    return 2 ** sum(config.temporal_downsample), space, space


def encoder_widths(config: AutoencoderConfig) -> list[int]:
    """Channels before the first stage of the encoder and after each."""
    return [config.dim * m for m in (1, *config.dim_mult)]


def decoder_widths(config: AutoencoderConfig) -> list[int]:
    """Channels before the first stage of the decoder and of each one's residual blocks."""
    return [config.dec_dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]


# Of a convolution over time: up to which cuDNN is faster with three 2-D ones (measured at 96), and with one over the
# channels of three frames (measured at 12).
FEW_CHANNELS, FEW_INPUTS = 128, 64


class Cached(nn.Module):
    """A layer that is called with the clip's cache."""


class RMSNorm(nn.Module):
    """Scales each pixel's channels to unit root mean square."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = mx.ones((dim,))

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.gamma.astype(x.dtype), vae_passes.EPS)


MAX_ELEMENTS = 2**31  # of a convolution's result: what lies beyond comes out wrong (ml-explore/mlx#3248)


def _check_size(elements: int) -> None:
    if elements > MAX_ELEMENTS:
        raise WanError(
            f"a convolution of the VAE would have {elements} values, more than MLX counts; use a smaller size"
        )


class CausalConv3d(Cached):
    """3-D convolution that sees the current frame and those before it; same size in space."""

    def __init__(self, in_dim: int, out_dim: int, kernel: tuple[int, int, int], stride_t: int = 1):
        super().__init__()
        bound = (in_dim * kernel[0] * kernel[1] * kernel[2]) ** -0.5
        self.stride_t = stride_t
        self.weight = mx.random.uniform(-bound, bound, (out_dim, *kernel, in_dim))
        self.bias = mx.random.uniform(-bound, bound, (out_dim,))

    def __call__(self, x: mx.array, cache: FeatureCache) -> mx.array:
        # x: (B, T, H, W, C). Frames before the clip are zeros.
        memory = self.weight.shape[1] - 1
        padded = cache.extend(self, x, memory) if memory else x
        if self.weight.shape[2] > 1:
            padded = cache.border(self, padded)
        return self.convolve(padded, cache.whole) + self.bias.astype(x.dtype)

    def after(self, norm: "RMSNorm", x: mx.array, cache: FeatureCache, bias: mx.array | None = None) -> mx.array:
        """This convolution, without its bias, of silu(norm(x + bias)); of a strip, a row behind x."""
        return self.convolve(self._activated(norm, x, cache, bias, self.weight.shape[1] - 1), cache.whole)

    def _activated(
        self, norm: "RMSNorm", x: mx.array, cache: FeatureCache, bias: mx.array | None = None, memory: int = 0
    ) -> mx.array:
        """silu(norm(x + bias)) behind the `memory` frames before it, with the rows around it that a kernel needs."""
        if cache.streaming and vae_passes.has_kernels(x):
            before, above = cache.recall(self) if memory else None, cache.rows_above(self)
            x, kept = vae_passes.norm_silu(x, bias, norm.gamma, before, memory, above, cache.top, cache.bottom)
            if memory:
                cache.keep(self, kept)
            cache.keep_rows(self, x, 2)
            return x if cache.rows is None else cache.rows.border(x)
        x = _silu(norm(x if bias is None else x + bias.astype(x.dtype)))
        return cache.border(self, cache.extend(self, x, memory) if memory else x)

    def by_frames(self, norm: "RMSNorm", x: mx.array, cache: FeatureCache) -> mx.array:
        """This convolution of silu(norm(x)) in float32, each frame convolved once and the results of three summed up.

        Where they are narrower than what they are made of, there is less to read and to remember.
        """
        out_dim, kt, kh, kw, in_dim = self.weight.shape
        x = self._activated(norm, x, cache)
        b, t, h, w, _ = x.shape
        weight = cache.once(self, lambda: self.weight.swapaxes(0, 1).reshape(kt * out_dim, kh, kw, in_dim))
        padding = kh // 2 if cache.whole else 0, kw // 2
        _check_size(b * t * h * w * kt * out_dim)
        y = mx.conv2d(x.reshape(b * t, h, w, in_dim), weight, padding=padding)
        y = cache.extend(self, y.reshape(b, t, *y.shape[1:]), kt - 1)
        frames = (y[:, i : i + t, :, :, i * out_dim : (i + 1) * out_dim].astype(mx.float32) for i in range(kt))
        return sum(frames, self.bias.astype(mx.float32))

    def convolve(self, x: mx.array, whole: bool = True) -> mx.array:
        """The convolution without its bias, over frames the caller has put in front; and, unless frames are whole, over
        rows around them."""
        out_dim, kt, kh, kw, _ = self.weight.shape
        b, t, h, w, _ = x.shape
        _check_size(b * ((t - kt) // self.stride_t + 1) * h * w * out_dim)
        padding = kh // 2 if whole else 0, kw // 2
        if target() == "CUDA" and (b, kt, self.stride_t) == (1, 3, 1):
            frames = [x[0, i : t - kt + i + 1] for i in range(kt)]
            if x.shape[-1] == out_dim <= FEW_CHANNELS:
                parts = [mx.conv2d(f, self.weight[:, i], padding=padding) for i, f in enumerate(frames)]
                return (parts[0] + parts[1] + parts[2])[None]
            if x.shape[-1] <= FEW_INPUTS:
                weight = self.weight.transpose(0, 2, 3, 1, 4).reshape(out_dim, kh, kw, -1)
                rest = [(0, 0)] * 3 + [(0, -weight.shape[-1] % 8)]
                stacked = mx.pad(mx.concatenate(frames, axis=-1), rest)
                return mx.conv2d(stacked, mx.pad(weight, rest), padding=padding)[None]
        return mx.conv3d(x, self.weight, stride=(self.stride_t, 1, 1), padding=(0, *padding))


_silu = SiLU()


class Conv2d(nn.Conv2d):
    """2-D convolution of every frame of (B, T, H, W, C)."""

    def __call__(self, x: mx.array) -> mx.array:
        _check_size(math.prod(x.shape[:-1]) * self.weight.shape[0] // self.stride[0] ** 2)
        frames = mx.conv2d(x.reshape(-1, *x.shape[2:]), self.weight, self.stride, self.padding)
        return frames.reshape(*x.shape[:2], *frames.shape[1:]) + self.bias.astype(x.dtype)


class ResidualBlock(Cached):
    behind = 2  # rows of a strip: one for each convolution

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.residual = [
            RMSNorm(in_dim),
            SiLU(),
            CausalConv3d(in_dim, out_dim, (3, 3, 3)),
            RMSNorm(out_dim),
            SiLU(),
            nn.Identity(),  # the official dropout, which keeps the numbering
            CausalConv3d(out_dim, out_dim, (3, 3, 3)),
        ]
        self.shortcut = CausalConv3d(in_dim, out_dim, (1, 1, 1)) if in_dim != out_dim else nn.Identity()

    def __call__(self, x: mx.array, cache: FeatureCache) -> mx.array:
        norm1, _, conv1, norm2, _, _, conv2 = self.residual
        h, bias = x, conv2.bias
        if isinstance(self.shortcut, CausalConv3d):
            h, bias = self.shortcut.convolve(x), bias + self.shortcut.bias
        y = cache.settle(conv1.after(norm1, x, cache))
        y = cache.settle(conv2.after(norm2, y, cache, conv1.bias))
        if cache.streaming and vae_passes.has_kernels(y):
            above = cache.rows_above(self)
            cache.keep_rows(self, h, self.behind)
            return vae_passes.add(h, y, bias, above)  # too short a pass to wait for: the device would be idle after it
        return cache.late(self, h, self.behind) + (y + bias.astype(y.dtype))


class AttentionBlock(Cached):
    """Single-head self-attention among the pixels of each frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim)
        self.to_qkv = Conv2d(dim, 3 * dim, 1)
        self.proj = Conv2d(dim, dim, 1)

    def __call__(self, x: mx.array, cache: FeatureCache) -> mx.array:
        b, t, *_, c = x.shape
        q, k, v = mx.split(self.to_qkv(self.norm(x)), 3, axis=-1)
        if cache.rows is not None:
            k, v = cache.rows.gather(k), cache.rows.gather(v)
        q, k, v = (a.reshape(b * t, 1, -1, c) for a in (q, k, v))
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=c**-0.5)
        return x + self.proj(out.reshape(x.shape))


def run_cached(layers: list[nn.Module], x: mx.array, cache: FeatureCache) -> mx.array:
    """`run_layers` for lists in which some layers keep frames in the cache."""
    for layer in layers:
        x = layer(x, cache) if isinstance(layer, Cached) else layer(x)
    return x


class Downsample(Cached):
    """Halves space by a strided convolution and, if asked, time by another; the clip's first frame stays single."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = [nn.Identity(), Conv2d(dim, dim, 3, stride=2)]
        if temporal:
            self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride_t=2)

    def __call__(self, x: mx.array, cache: FeatureCache) -> mx.array:
        # Only the right and lower edge are padded: the kernel starts on the pixel it halves.
        x, bottom = (x, 1) if cache.rows is None else (cache.rows.border(x)[:, :, 1:], 0)
        x = run_layers(self.resample, mx.pad(x, [(0, 0), (0, 0), (0, bottom), (0, 1), (0, 0)]))
        if "time_conv" not in self:
            return x
        before = cache.recall(self)
        cache.keep(self, copied(x[:, -1:]))
        bias = self.time_conv.bias.astype(x.dtype)
        if before is not None:
            return self.time_conv.convolve(mx.concatenate([before, x], axis=1)) + bias
        if x.shape[1] == 1:
            return x
        return mx.concatenate([x[:, :1], self.time_conv.convolve(x) + bias], axis=1)


def duplicate_up(x: mx.array, out_dim: int, factor_t: int, factor_s: int, first: bool) -> mx.array:
    """Shortcut of an upsampling stage: repeats channels and unfolds them into pixels; reverses `average_down`."""
    b, t, h, w, c = x.shape
    repeats = out_dim * factor_t * factor_s**2 // c
    x = mx.repeat(x, repeats, axis=-1).reshape(b, t, h, w, out_dim, factor_t, factor_s, factor_s)
    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, t * factor_t, h * factor_s, w * factor_s, out_dim)
    return x[:, factor_t - 1 :] if first else x


class Upsample(Cached):
    """Doubles time, if asked, by a convolution that makes two frames of one, and space by repetition and a convolution.

    The clip's first frame stays single and takes no part in the convolution over time.
    """

    def __init__(self, dim: int, out_dim: int, temporal: bool):
        super().__init__()
        self.resample = [nn.Identity(), Conv2d(dim, out_dim, 3, padding=1)]
        self.temporal = temporal
        if temporal:
            self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1))

    def __call__(self, x: mx.array, cache: FeatureCache) -> mx.array:
        return self.widen(*self.lengthen(x, cache), cache)

    def lengthen(self, x: mx.array, cache: FeatureCache) -> tuple[mx.array, mx.array | None]:
        """The half of a call that may double time; what the other half takes, and what its shortcut does, if any."""
        return self.double_time(x, cache), None

    def widen(self, x: mx.array, shortcut: mx.array | None, cache: FeatureCache) -> mx.array:
        """The half that doubles space."""
        return cache.settle(self.double(x, cache, shortcut))

    def double_time(self, x: mx.array, cache: FeatureCache) -> mx.array:
        """Two frames of each but the clip's first, if this layer doubles time."""
        if "time_conv" in self:
            single, rest = (x[:, :1], x[:, 1:]) if cache.first else (x[:, :0], x)
            if rest.shape[1]:
                b, t, h, w, c = rest.shape
                pairs = self.time_conv(rest, cache).reshape(b, t, h, w, 2, c)
                rest = pairs.transpose(0, 1, 4, 2, 3, 5).reshape(b, 2 * t, h, w, c)
            x = mx.concatenate([single, rest], axis=1)
        return x

    def double(
        self, x: mx.array, cache: FeatureCache, shortcut: mx.array | None = None, factor_t: int = 1, behind: int = 0
    ) -> mx.array:
        """Twice the rows and columns of x, and the unfolded channels of `shortcut` on top (`duplicate_up`).

        Of a strip, x is `behind` rows behind the shortcut, and what is doubled one row more.
        """
        conv = cast(Conv2d, self.resample[1])
        b, t, _, w, _ = x.shape
        x = cache.border(self, x)
        out_dim, h = conv.weight.shape[0], x.shape[2] - (0 if cache.whole else 2)
        _check_size(b * t * 4 * h * w * out_dim)
        weight = cache.once(conv, lambda: vae_passes.phase_weights(conv.weight))
        y = mx.conv2d(x.reshape(b * t, *x.shape[2:]), weight, padding=(1 if cache.whole else 0, 1))
        y = cache.settle(y.reshape(b, t, h + 1, w + 1, 4 * out_dim))
        if cache.streaming and vae_passes.has_kernels(y):
            above = None
            if shortcut is not None:
                above = cache.rows_above(conv)
                cache.keep_rows(conv, shortcut, behind + 1)
            return vae_passes.interleave(y, conv.bias, shortcut, factor_t, above)
        y = y.reshape(b, t, h + 1, w + 1, 2, 2, out_dim)
        rows = [mx.stack([y[:, :, i : i + h, j : j + w, i, j] for j in (0, 1)], axis=4) for i in (0, 1)]
        y = mx.stack(rows, axis=3).reshape(b, t, 2 * h, 2 * w, out_dim) + conv.bias.astype(x.dtype)
        if shortcut is None:
            return y
        return y + duplicate_up(cache.late(conv, shortcut, behind + 1), out_dim, factor_t, 2, cache.first)


def run_head(layers: list[nn.Module], x: mx.array, cache: FeatureCache) -> mx.array:
    """Norm, SiLU and the last convolution, in float32."""
    norm, conv = cast(RMSNorm, layers[0]), cast(CausalConv3d, layers[2])
    return conv.by_frames(norm, x, cache)


def middle(dim: int) -> list[nn.Module]:
    """The narrowest part of encoder and decoder."""
    return [ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim)]


class Encoder(nn.Module):
    """Pixels to mean and log-variance. `stages` are made after the first convolution, as their order in the official
    code is."""

    def __init__(self, config: AutoencoderConfig, stages: Iterable[nn.Module]):
        super().__init__()
        first, *_, last = encoder_widths(config)
        self.conv1 = CausalConv3d(3 * config.patch_size**2, first, (3, 3, 3))
        self.downsamples = list(stages)
        self.middle = middle(last)
        self.head = [RMSNorm(last), SiLU(), CausalConv3d(last, 2 * config.z_dim, (3, 3, 3))]

    def __call__(self, x: mx.array, cache: FeatureCache) -> mx.array:
        x = run_cached(self.downsamples, self.conv1(x, cache), cache)
        return run_head(self.head, run_cached(self.middle, x, cache), cache).astype(x.dtype)


class Decoder(nn.Module):
    """Latents to pixels; `stages` as in `Encoder`."""

    def __init__(self, config: AutoencoderConfig, stages: Iterable[nn.Module]):
        super().__init__()
        first, *_, last = decoder_widths(config)
        self.conv1 = CausalConv3d(config.z_dim, first, (3, 3, 3))
        self.middle = middle(first)
        self.upsamples = list(stages)
        self.in_time = 1 + max((i for i, s in enumerate(self.upsamples) if getattr(s, "temporal", False)), default=-1)
        self.head = [RMSNorm(last), SiLU(), CausalConv3d(last, 3 * config.patch_size**2, (3, 3, 3))]
        # More than all layers of a strip are behind together: a doubling, a row, then the blocks of ever wider frames.
        self.least_rows = (2 if self.in_time else 4) * (config.num_res_blocks + 2)

    def __call__(self, x: mx.array, cache: FeatureCache) -> mx.array:
        x = run_cached(self.middle, self.conv1(x, cache), cache)
        *narrow, last = self.upsamples[: self.in_time] or [None]
        x, doubling = run_cached(cast(list[nn.Module], narrow), x, cache), cast(Upsample | None, last)
        given = (x, None) if doubling is None else doubling.lengthen(x, cache)
        del x
        # From here on frames are at their widest.
        wide, done = self.upsamples[self.in_time :], []
        for strip in cache.strips(self.least_rows, *given):
            x = strip[0] if doubling is None else doubling.widen(*strip, cache)
            done.append(run_head(self.head, run_cached(wide, x, cache), cache))
        return mx.concatenate(done, axis=2) if len(done) > 1 else done[0]


def fold_pixels(video: mx.array, p: int) -> mx.array:
    """(B, T, H, W, 3) -> (B, T, H/p, W/p, 3p²); of the new channels colour varies slowest, then column, then row."""
    b, t, h, w, c = video.shape
    x = video.reshape(b, t, h // p, p, w // p, p, c).transpose(0, 1, 2, 4, 6, 5, 3)
    return x.reshape(b, t, h // p, w // p, c * p * p)


def unfold_pixels(x: mx.array, p: int) -> mx.array:
    """The way back of `fold_pixels`."""
    b, t, h, w, c = x.shape
    x = x.reshape(b, t, h, w, c // (p * p), p, p).transpose(0, 1, 2, 6, 3, 5, 4)
    return x.reshape(b, t, h * p, w * p, c // (p * p))


def clipped(pixels: mx.array) -> mx.array:
    """Pixels within [-1, 1]; what is infinite becomes NaN, which would else pass for black or white."""
    return mx.where(mx.isinf(pixels), mx.nan, mx.clip(pixels, -1, 1))


def _check_floats(array: Any, what: str, channels: int) -> None:
    """`array`, MLX's or NumPy's, is found to be (B, T, H, W, channels) of floats.

    Whole numbers are refused because pixels of 0 to 255 would pass for a video in [-1, 1].
    """
    floats = mx.issubdtype(array.dtype, mx.floating) if isinstance(array, mx.array) else array.dtype.kind == "f"
    if array.ndim != 5 or array.shape[-1] != channels or not floats:
        dtype = str(array.dtype).removeprefix("mlx.core.")
        raise ValueError(f"{what} must be floats (B, T, H, W, {channels}), not {dtype} {tuple(array.shape)}")


def _one_ahead(piece: Callable[[int], mx.array], places: range, cache: FeatureCache) -> Iterator[mx.array]:
    """`piece` of each of the places, evaluated, the next one begun before: the device has work while one is taken."""
    done: mx.array | None = None
    for place in places:
        begun = piece(place)
        mx.async_eval(begun, *cache.arrays())
        if done is not None:
            mx.eval(done)
            yield done
        done = begun
    if done is not None:
        mx.eval(done)
        yield done


class WanVAE(nn.Module):
    """An autoencoder. `encode` and `decode` work on normalised latents, as the transformer does.

    Args:
        down, up: the stages of encoder and decoder.
    """

    def __init__(self, config: AutoencoderConfig, down: Iterable[nn.Module], up: Iterable[nn.Module]):
        super().__init__()
        self.encoder = Encoder(config, down)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config, up)
        self.config = config

    def init_weights(self) -> None:
        """For training from scratch: latents begin almost without noise, at a log-variance near −6.

        At a variance of one, where random weights would start, there is little to learn from.
        """
        z_dim = self.config.z_dim
        self.conv1.bias = mx.concatenate([mx.zeros((z_dim,)), mx.full((z_dim,), -6.0)])

    def moments(self, piece: mx.array, cache: FeatureCache) -> tuple[mx.array, mx.array]:
        """Mean and log-variance, each (B, t, h, w, z_dim) and not normalised, of a piece (B, T, H, W, 3) of video.

        T is 4n + 1 for the first piece of a clip and 4n for the others.
        """
        piece = fold_pixels(piece.astype(self.conv1.weight.dtype), self.config.patch_size)
        out = self.conv1(self.encoder(piece, cache), cache).astype(mx.float32)
        cache.first = False
        mean, log_variance = mx.split(out, 2, axis=-1)
        return mean, log_variance

    def pixels(self, latents: mx.array, cache: FeatureCache) -> mx.array:
        """A piece of video, not clipped, from a piece (B, t, h, w, z_dim) of latents that are not normalised."""
        out = self.decoder(self.conv2(latents.astype(self.conv2.weight.dtype), cache), cache)
        cache.first = False
        return unfold_pixels(out.astype(mx.float32), self.config.patch_size)

    def normalise(self, mean: mx.array) -> mx.array:
        """Latents as the transformer sees them."""
        return (mean - mx.array(self.config.latents_mean)) / mx.array(self.config.latents_std)

    def denormalise(self, latents: mx.array) -> mx.array:
        """Latents as the decoder sees them."""
        return latents * mx.array(self.config.latents_std) + mx.array(self.config.latents_mean)

    def stream_encode(self, video: mx.array, rows: Rows | None = None) -> Iterator[mx.array]:
        """Normalised latents, one frame (B, 1, h, w, z_dim) at a time, of a video (MLX's or NumPy's) as in `encode`.

        rows: see `FeatureCache`; latents are of these rows.

        Raises ValueError for a shape that the strides do not divide, or for whole numbers.
        """
        _check_floats(video, "video", 3)
        stride_t, stride_h, stride_w = self.config.stride
        frames, height, width = video.shape[1:4]
        if frames % stride_t != 1 or height % stride_h or width % stride_w:
            raise ValueError(
                f"video of {frames} frames, {width}×{height}: frames must be {stride_t}n+1, "
                f"width divisible by {stride_w} and height by {stride_h}"
            )
        video = video if rows is None else rows.take(video)
        cache, upload = FeatureCache(streaming=True, rows=rows), upload_stream()

        def begun(end: int) -> mx.array:
            part = mx.array(video[:, max(0, end - stride_t) : end]).astype(self.conv1.weight.dtype, stream=upload)
            mx.async_eval(part)
            return part

        coming = begun(1)

        def piece(end: int) -> mx.array:
            nonlocal coming
            given = coming
            if end < frames:
                coming = begun(end + stride_t)  # on its way to the device while this piece is computed
            mean, _ = self.moments(given, cache)
            return self.normalise(mean)

        yield from _one_ahead(piece, range(1, frames + 1, stride_t), cache)

    def stream_decode(self, latents: mx.array, rows: Rows | None = None) -> Iterator[mx.array]:
        """Video in pieces of 1, 4, 4, … frames (B, ·, H, W, 3) in [-1, 1], each evaluated; memory stays constant.

        rows: see `FeatureCache`; pieces are of these rows.

        Raises ValueError for latents of another shape than in `decode`.
        """
        _check_floats(latents, "latents", self.config.z_dim)
        latents = mx.array(latents) if rows is None else rows.take(mx.array(latents))
        cache = FeatureCache(streaming=True, rows=rows)

        def piece(i: int) -> mx.array:
            return clipped(self.pixels(self.denormalise(latents[:, i : i + 1]), cache))

        yield from _one_ahead(piece, range(latents.shape[1]), cache)

    def encode(self, video: mx.array) -> mx.array:
        """Normalised latent mean (B, t, h, w, z_dim) of a video (B, T, H, W, 3) in [-1, 1]; T = 4n + 1."""
        return mx.concatenate(list(self.stream_encode(video)), axis=1)

    def decode(self, latents: mx.array) -> mx.array:
        """Video (B, T, H, W, 3) in [-1, 1] of normalised latents (B, t, h, w, z_dim); T = 4 (t − 1) + 1."""
        return mx.concatenate(list(self.stream_decode(latents)), axis=1)
