"""The Wan2.2 video autoencoder: 16×16 pixels by 4 frames to one latent of 48 channels, and back.

Follows `wan/modules/vae2_2.py` of the official repository, whose parameter names it keeps; tensors are channels last.
Every convolution over time is causal, so a clip can pass in pieces, each layer keeping the last frames it saw in a
`FeatureCache`. The first frame of a clip stands alone: it is neither merged nor doubled in time, which is why a clip
has 4n + 1 frames. A piece may be of any length that the strides divide, so a whole clip at once (training) and one
latent frame at a time (generation) run the same code.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn

from .layers import SiLU, run_layers


@dataclass(frozen=True)
class VAEConfig:
    """Dimensions; the defaults are the released Wan2.2 VAE's.

    dim, dec_dim: base width of encoder and decoder. dim_mult: width of each stage over the base.
    temporal_downsample: which of the strided stages halve time too (the others only space).
    patch_size: side of the squares of pixels that become channels before the encoder.
    latents_mean, latents_std: per channel (z_dim); latents leave the encoder as (mean − latents_mean) / latents_std.
    """

    dim: int = 160
    dec_dim: int = 256
    z_dim: int = 48
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    patch_size: int = 2
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()

    @property
    def stride(self) -> tuple[int, int, int]:
        """Frames, rows and columns of video for one latent; (4, 16, 16) for the released model."""
        space = self.patch_size * 2 ** (len(self.dim_mult) - 1)
        return 2 ** sum(self.temporal_downsample), space, space


class FeatureCache:
    """What the causal layers remember between pieces of one clip.

    `first` is true while the piece that holds the clip's first frame passes.
    """

    def __init__(self) -> None:
        self.first = True
        self._frames: dict[int, mx.array] = {}

    def recall(self, layer: nn.Module) -> mx.array | None:
        """The frames `layer` kept from the piece before; None at the first."""
        return self._frames.get(id(layer))

    def keep(self, layer: nn.Module, frames: mx.array) -> None:
        """Keeps `frames` for `layer`, as a copy: a view would hold the whole array it is cut from."""
        self._frames[id(layer)] = mx.contiguous(frames)

    def arrays(self) -> list[mx.array]:
        """All stored frames, for mx.eval."""
        return list(self._frames.values())


class RMSNorm(nn.Module):
    """Scales each pixel's channels to unit root mean square."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = mx.ones((dim,))

    def __call__(self, x: mx.array) -> mx.array:
        # The reference guards only against a length of 0, by max(length, 1e-12): eps must vanish beside all others.
        return mx.fast.rms_norm(x, self.gamma, 1e-24)


class CausalConv3d(nn.Module):
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
        if memory:
            b, _, h, w, c = x.shape
            before = cache.recall(self)
            x = mx.concatenate([mx.zeros((b, memory, h, w, c), x.dtype) if before is None else before, x], axis=1)
            cache.keep(self, x[:, -memory:])
        return self.convolve(x)

    def convolve(self, x: mx.array) -> mx.array:
        """The convolution alone, over frames the caller has put in front."""
        _, _, kh, kw, _ = self.weight.shape
        return mx.conv3d(x, self.weight, stride=(self.stride_t, 1, 1), padding=(0, kh // 2, kw // 2)) + self.bias


class Conv2d(nn.Conv2d):
    """2-D convolution of every frame of (B, T, H, W, C)."""

    def __call__(self, x: mx.array) -> mx.array:
        frames = super().__call__(x.reshape(-1, *x.shape[2:]))
        return frames.reshape(*x.shape[:2], *frames.shape[1:])


class ResidualBlock(nn.Module):
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
        shortcut = self.shortcut
        h = shortcut(x, cache) if isinstance(shortcut, CausalConv3d) else x
        return h + run_cached(self.residual, x, cache)


class AttentionBlock(nn.Module):
    """Single-head self-attention among the pixels of each frame."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = RMSNorm(dim)
        self.to_qkv = Conv2d(dim, 3 * dim, 1)
        self.proj = Conv2d(dim, dim, 1)

    def __call__(self, x: mx.array, cache: FeatureCache) -> mx.array:
        b, t, h, w, c = x.shape
        q, k, v = mx.split(self.to_qkv(self.norm(x)).reshape(b * t, 1, h * w, 3 * c), 3, axis=-1)
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=c**-0.5)
        return x + self.proj(out.reshape(x.shape))


def run_cached(layers: list[nn.Module], x: mx.array, cache: FeatureCache) -> mx.array:
    """`run_layers` for lists in which some layers keep frames in the cache."""
    for layer in layers:
        remembers = isinstance(layer, CausalConv3d | ResidualBlock | AttentionBlock | Downsample | Upsample)
        x = layer(x, cache) if remembers else layer(x)
    return x


class Downsample(nn.Module):
    """Halves space by a strided convolution and, if asked, time by another; the clip's first frame stays single."""

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = [nn.Identity(), Conv2d(dim, dim, 3, stride=2)]
        if temporal:
            self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride_t=2)

    def __call__(self, x: mx.array, cache: FeatureCache) -> mx.array:
        # Only the right and lower edge are padded: the kernel starts on the pixel it halves.
        x = run_layers(self.resample, mx.pad(x, [(0, 0), (0, 0), (0, 1), (0, 1), (0, 0)]))
        if "time_conv" not in self:
            return x
        before = cache.recall(self)
        cache.keep(self, x[:, -1:])
        if before is not None:
            return self.time_conv.convolve(mx.concatenate([before, x], axis=1))
        if x.shape[1] == 1:
            return x
        return mx.concatenate([x[:, :1], self.time_conv.convolve(x)], axis=1)


class Upsample(nn.Module):
    """Doubles time, if asked, by a convolution that makes two frames of one, and space by repetition and a convolution.

    The clip's first frame stays single and takes no part in the convolution over time.
    """

    def __init__(self, dim: int, temporal: bool):
        super().__init__()
        self.resample = [nn.Identity(), Conv2d(dim, dim, 3, padding=1)]
        if temporal:
            self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1))

    def __call__(self, x: mx.array, cache: FeatureCache) -> mx.array:
        if "time_conv" in self:
            single, rest = (x[:, :1], x[:, 1:]) if cache.first else (x[:, :0], x)
            if rest.shape[1]:
                b, t, h, w, c = rest.shape
                pairs = self.time_conv(rest, cache).reshape(b, t, h, w, 2, c)
                rest = pairs.transpose(0, 1, 4, 2, 3, 5).reshape(b, 2 * t, h, w, c)
            x = mx.concatenate([single, rest], axis=1)
        b, t, h, w, c = x.shape
        x = mx.broadcast_to(x[:, :, :, None, :, None], (b, t, h, 2, w, 2, c)).reshape(b, t, 2 * h, 2 * w, c)
        return run_layers(self.resample, x)


def average_down(x: mx.array, out_dim: int, factor_t: int, factor_s: int) -> mx.array:
    """Shortcut of a strided stage: folds factor_t×factor_s×factor_s pixels into channels and averages groups of them.

    An odd number of frames is completed by zeros in front.
    """
    x = mx.pad(x, [(0, 0), (-x.shape[1] % factor_t, 0), (0, 0), (0, 0), (0, 0)])
    b, t, h, w, c = x.shape
    t, h, w = t // factor_t, h // factor_s, w // factor_s
    x = x.reshape(b, t, factor_t, h, factor_s, w, factor_s, c).transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(b, t, h, w, out_dim, -1).mean(axis=-1)


def duplicate_up(x: mx.array, out_dim: int, factor_t: int, factor_s: int, first: bool) -> mx.array:
    """Shortcut of an upsampling stage: repeats channels and unfolds them into pixels; reverses `average_down`."""
    b, t, h, w, c = x.shape
    repeats = out_dim * factor_t * factor_s**2 // c
    x = mx.repeat(x, repeats, axis=-1).reshape(b, t, h, w, out_dim, factor_t, factor_s, factor_s)
    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, t * factor_t, h * factor_s, w * factor_s, out_dim)
    return x[:, factor_t - 1 :] if first else x


class DownStage(nn.Module):
    """Residual blocks, then a Downsample unless it is the last stage; a parameterless shortcut around them."""

    def __init__(self, in_dim: int, out_dim: int, num_blocks: int, strided: bool, temporal: bool):
        super().__init__()
        self.out_dim = out_dim
        self.factor_t, self.factor_s = (2 if temporal else 1), (2 if strided else 1)
        widths = [in_dim] + [out_dim] * num_blocks
        self.downsamples: list[nn.Module] = [ResidualBlock(a, b) for a, b in pairwise(widths)]
        if strided:
            self.downsamples.append(Downsample(out_dim, temporal))

    def __call__(self, x: mx.array, cache: FeatureCache) -> mx.array:
        shortcut = average_down(x, self.out_dim, self.factor_t, self.factor_s)
        return run_cached(self.downsamples, x, cache) + shortcut


class UpStage(nn.Module):
    """Residual blocks, then an Upsample and a parameterless shortcut around them unless it is the last stage."""

    def __init__(self, in_dim: int, out_dim: int, num_blocks: int, strided: bool, temporal: bool):
        super().__init__()
        self.out_dim, self.strided = out_dim, strided
        self.factor_t = 2 if temporal else 1
        widths = [in_dim] + [out_dim] * num_blocks
        self.upsamples: list[nn.Module] = [ResidualBlock(a, b) for a, b in pairwise(widths)]
        if strided:
            self.upsamples.append(Upsample(out_dim, temporal))

    def __call__(self, x: mx.array, cache: FeatureCache) -> mx.array:
        out = run_cached(self.upsamples, x, cache)
        if not self.strided:
            return out
        return out + duplicate_up(x, self.out_dim, self.factor_t, 2, cache.first)


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = [config.dim * m for m in (1, *config.dim_mult)]
        last = len(dims) - 2
        temporal = (*config.temporal_downsample, False)
        self.conv1 = CausalConv3d(3 * config.patch_size**2, dims[0], (3, 3, 3))
        self.downsamples = [
            DownStage(a, b, config.num_res_blocks, i != last, temporal[i]) for i, (a, b) in enumerate(pairwise(dims))
        ]
        self.middle = [ResidualBlock(dims[-1], dims[-1]), AttentionBlock(dims[-1]), ResidualBlock(dims[-1], dims[-1])]
        self.head = [RMSNorm(dims[-1]), SiLU(), CausalConv3d(dims[-1], 2 * config.z_dim, (3, 3, 3))]

    def __call__(self, x: mx.array, cache: FeatureCache) -> mx.array:
        x = self.conv1(x, cache)
        for stage in self.downsamples:
            x = stage(x, cache)
        return run_cached(self.head, run_cached(self.middle, x, cache), cache)


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        dims = [config.dec_dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
        last = len(dims) - 2
        temporal = (*reversed(config.temporal_downsample), False)
        self.conv1 = CausalConv3d(config.z_dim, dims[0], (3, 3, 3))
        self.middle = [ResidualBlock(dims[0], dims[0]), AttentionBlock(dims[0]), ResidualBlock(dims[0], dims[0])]
        self.upsamples = [
            UpStage(a, b, config.num_res_blocks + 1, i != last, temporal[i]) for i, (a, b) in enumerate(pairwise(dims))
        ]
        self.head = [RMSNorm(dims[-1]), SiLU(), CausalConv3d(dims[-1], 3 * config.patch_size**2, (3, 3, 3))]

    def __call__(self, x: mx.array, cache: FeatureCache) -> mx.array:
        x = run_cached(self.middle, self.conv1(x, cache), cache)
        for stage in self.upsamples:
            x = stage(x, cache)
        return run_cached(self.head, x, cache)


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


def _floats(array: mx.array, what: str, channels: int) -> mx.array:
    """`array` (NumPy's too) as MLX has it, found to be (B, T, H, W, channels) of floats.

    Whole numbers are refused because pixels of 0 to 255 would pass for a video in [-1, 1].
    """
    array = array if isinstance(array, mx.array) else mx.array(array)
    if array.ndim != 5 or array.shape[-1] != channels or not mx.issubdtype(array.dtype, mx.floating):
        dtype = str(array.dtype).removeprefix("mlx.core.")
        raise ValueError(f"{what} must be floats (B, T, H, W, {channels}), not {dtype} {tuple(array.shape)}")
    return array


class WanVAE22(nn.Module):
    """The autoencoder. `encode` and `decode` work on normalised latents, as the transformer does."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1))
        self.conv2 = CausalConv3d(config.z_dim, config.z_dim, (1, 1, 1))
        self.decoder = Decoder(config)

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
        out = self.conv1(self.encoder(fold_pixels(piece, self.config.patch_size), cache), cache)
        cache.first = False
        mean, log_variance = mx.split(out, 2, axis=-1)
        return mean, log_variance

    def pixels(self, latents: mx.array, cache: FeatureCache) -> mx.array:
        """A piece of video, not clipped, from a piece (B, t, h, w, z_dim) of latents that are not normalised."""
        out = self.decoder(self.conv2(latents, cache), cache)
        cache.first = False
        return unfold_pixels(out, self.config.patch_size)

    def normalise(self, mean: mx.array) -> mx.array:
        """Latents as the transformer sees them."""
        return (mean - mx.array(self.config.latents_mean)) / mx.array(self.config.latents_std)

    def denormalise(self, latents: mx.array) -> mx.array:
        """Latents as the decoder sees them."""
        return latents * mx.array(self.config.latents_std) + mx.array(self.config.latents_mean)

    def stream_encode(self, video: mx.array) -> Iterator[mx.array]:
        """Normalised latents, one frame (B, 1, h, w, z_dim) at a time, of a video as in `encode`.

        Raises ValueError for a shape that the strides do not divide, or for whole numbers.
        """
        video = _floats(video, "video", 3)
        stride_t, stride_h, stride_w = self.config.stride
        frames, height, width = video.shape[1:4]
        if frames % stride_t != 1 or height % stride_h or width % stride_w:
            raise ValueError(
                f"video of {frames} frames, {width}×{height}: frames must be {stride_t}n+1, "
                f"width divisible by {stride_w} and height by {stride_h}"
            )
        cache = FeatureCache()
        for end in range(1, frames + 1, stride_t):
            mean, _ = self.moments(video[:, max(0, end - stride_t) : end], cache)
            latents = self.normalise(mean)
            mx.eval(latents, cache.arrays())
            yield latents

    def stream_decode(self, latents: mx.array) -> Iterator[mx.array]:
        """Video in pieces of 1, 4, 4, … frames (B, ·, H, W, 3) in [-1, 1], each evaluated; memory stays constant.

        Raises ValueError for latents of another shape than in `decode`.
        """
        latents = _floats(latents, "latents", self.config.z_dim)
        cache = FeatureCache()
        for i in range(latents.shape[1]):
            piece = mx.clip(self.pixels(self.denormalise(latents[:, i : i + 1]), cache), -1, 1)
            mx.eval(piece, cache.arrays())
            yield piece

    def encode(self, video: mx.array) -> mx.array:
        """Normalised latent mean (B, t, h, w, z_dim) of a video (B, T, H, W, 3) in [-1, 1]; T = 4n + 1."""
        return mx.concatenate(list(self.stream_encode(video)), axis=1)

    def decode(self, latents: mx.array) -> mx.array:
        """Video (B, T, H, W, 3) in [-1, 1] of normalised latents (B, t, h, w, z_dim); T = 4 (t − 1) + 1."""
        return mx.concatenate(list(self.stream_decode(latents)), axis=1)
