"""From a prompt, or a prompt and a picture, to a video: the order of things, and who is in memory when."""

import secrets
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Union

import mlx.core as mx
import numpy as np

from mlx_wan import backend
from mlx_wan.conditioning import to_uint8
from mlx_wan.errors import CheckpointError, UserError, WanError
from mlx_wan.lora.fuse import Adapters
from mlx_wan.lora.words import AdapterWords
from mlx_wan.models.autoencoder import WanVAE
from mlx_wan.models.clip import ImageEncoder
from mlx_wan.models.transformer import Control, WanTransformer
from mlx_wan.models.umt5 import UMT5Encoder
from mlx_wan.parallel.plan import ALONE, Parallel
from mlx_wan.request import checked_interval, checked_start, noise_for, open_picture, or_default, text, whole
from mlx_wan.sampling import Condition, Expert, Point, denoise
from mlx_wan.schedulers import Scheduler, make_scheduler
from mlx_wan.schedulers.flow import TRAIN_TIMESTEPS
from mlx_wan.step_cache import StepCache
from mlx_wan.text import Tokenizer, clean_prompt
from mlx_wan.text_cache import TextCache
from mlx_wan.vace import Source, control_channels, source_size
from mlx_wan.weights.load import (
    Checkpoint,
    load_image_encoder,
    load_vae,
    locate,
)
from mlx_wan.zoo import ModelSpec

if TYPE_CHECKING:
    from PIL import Image

OUTPUT_TYPES = ("np", "latent")
Picture = Union["Image.Image", str, Path]
Pictures = Picture | list[Picture] | tuple[Picture, ...]
EMBEDDINGS = 4  # that are kept: a few MB each
DTYPES = (mx.float32, mx.bfloat16, mx.float16)


class Event(NamedTuple):
    """Something finished on the way to a video.

    stage: "text", "image", "denoise", "frames" or "latents". index, total: how far that stage is, counted from 1.
    value: for "denoise" and "latents" normalised latents (1, t, h, w, C); for "frames" the next piece of the video,
    uint8 (n, H, W, 3); else None. point: for "denoise", what `start=` takes to go on from there.
    """

    stage: str
    index: int
    total: int
    value: Any = None
    point: Point | None = None


@dataclass(frozen=True)
class PipelineOutput:
    """frames: uint8 (T, H, W, 3), None for output_type="latent". latents: (1, t, h, w, C), normalised. seed: of the
    noise, None if the noise was given. fps: frames a second the model was made for."""

    frames: np.ndarray | None
    latents: mx.array
    seed: int | None
    fps: float


@dataclass(frozen=True)
class _Request:
    """A call with every default filled in."""

    prompt: str
    pictures: dict[int, "Image.Image"]  # frame -> what it shows
    negative_prompt: str
    width: int
    height: int
    num_frames: int
    guidance_scale: tuple[float, float]  # low noise, high noise
    scheduler: Scheduler
    seed: int | None
    start: mx.array | Point  # noise, or where an earlier run stood
    cache: StepCache | None
    guidance_interval: tuple[float, float]  # noise levels
    source: Source | None  # of VACE


class WanPipeline(AdapterWords):
    """Text, or text and a first frame, to video.

    Components are loaded when first needed. With `low_memory` the text encoder leaves memory once the prompt is
    encoded, VAE and image encoder once a picture is, and the transformer once the latents are done. Of two experts one
    is in memory at a time, unless `keep_both_experts`.

    Attributes:
        checkpoint: where the components come from, its headers checked.
        spec: the model's name, sizes and sampling defaults.
        dtype: of matrices and of what they are multiplied with; on a GPU of the VAE's convolutions too.
        scheduler: of the last call; before it, the default one.
        text_cache: a folder for embeddings of prompts, so that one that comes again needs no text encoder; None: none.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: mx.Dtype,
        low_memory: bool,
        keep_both_experts: bool = False,
        parallel: Parallel = ALONE,
    ):
        self.checkpoint, self.dtype, self.low_memory = checkpoint, dtype, low_memory
        self.keep_both_experts, self.parallel = keep_both_experts, parallel
        spec = checkpoint.spec
        self.scheduler = make_scheduler(spec.scheduler, spec.num_inference_steps, spec.shift, spec.timesteps or None)
        self.tokenizer = Tokenizer(checkpoint.tokenizer, checkpoint.transformer_config.text_len)
        if self.tokenizer.vocab_size > checkpoint.text_encoder_config.vocab_size:  # its ids would read beyond the table
            raise CheckpointError(
                f"{checkpoint.folder}: the tokenizer has {self.tokenizer.vocab_size} tokens, the text encoder "
                f"{checkpoint.text_encoder_config.vocab_size}: they are of different models"
            )
        self._transformers: dict[str, WanTransformer] = {}
        self._adapters = Adapters()
        self._embeddings: dict[bytes, mx.array] = {}  # of the last prompts, by their tokens
        self._text_encoder: UMT5Encoder | None = None
        self._image_encoder: ImageEncoder | None = None
        self._vae: WanVAE | None = None
        self.text_cache: Path | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | Checkpoint | None = None,
        dtype: mx.Dtype | None = None,
        low_memory: bool | None = None,
        keep_both_experts: bool = False,
        task: str | None = None,
        parallel: Parallel = ALONE,
        **files: str | Path | None,
    ) -> "WanPipeline":
        """The pipeline of a checkpoint folder, a Hub id such as "Wan-AI/Wan2.2-TI2V-5B", or "tiny".

        Args:
            path: see docs/checkpoints.md for the layouts; or what `locate` found.
            dtype: mx.float32, mx.bfloat16 or mx.float16; None means bfloat16 on a GPU and float32 on the CPU.
            low_memory: None decides: yes if all that would be in memory together takes over half of it.
            keep_both_experts: of a model with two, instead of loading the other when its turn comes.
            task: which model it must be, where single files do not tell; "t2v-14B" for instance.
            parallel: this process's part where several make one video (docs/distributed.md). All must do the same
                with the same arguments; all get the latents, and the first one alone the frames.
            files: transformer, transformer_2, text_encoder, image_encoder, vae, tokenizer: single files in place of the
                folder's, or of a folder.

        Raises:
            UserError: there is nothing at `path`, or `dtype` is another.
            CheckpointError: a file is missing, damaged or of another model.
        """
        if dtype is not None and dtype not in DTYPES:
            raise UserError(f"dtype is {dtype!r}; choose one of {', '.join(map(str, DTYPES))}")
        checkpoint = path if isinstance(path, Checkpoint) else locate(path, task=task, **files)
        dtype = dtype or backend.default_dtype()
        if low_memory is None:
            parts = {
                name: part for name, part in checkpoint.parts.items() if keep_both_experts or name != "transformer_2"
            }
            size = sum(info.nbytes for part in parts.values() for info in part.tensors.values())
            low_memory = size > backend.total_memory() / 2
        return cls(checkpoint, dtype, low_memory, keep_both_experts, parallel)

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.spec

    @property
    def transformer(self) -> WanTransformer:
        """(latents (B,t,h,w,C), timesteps (B,) or (B,tokens), context (B,n,text_dim)) -> velocity, float32.

        Of two experts the high-noise one. The pipeline lets go of the other then, unless `keep_both_experts`.
        """
        return self._load_transformer("transformer")

    @property
    def transformer_2(self) -> WanTransformer | None:
        """The low-noise expert, as `transformer`; None if the model has one transformer."""
        return None if self.checkpoint.transformer_2 is None else self._load_transformer("transformer_2")

    def _load_transformer(self, part: str) -> WanTransformer:
        if part not in self._transformers:
            if not self.keep_both_experts:
                self._release_transformers()
            transformer = self.parallel.load_transformer(self.checkpoint, self.dtype, part)
            self._adapters.install(transformer, part)
            transformer.eval()
            self._transformers[part] = transformer
        return self._transformers[part]

    def _release_transformers(self) -> None:
        self._transformers.clear()
        mx.clear_cache()

    @property
    def text_encoder(self) -> UMT5Encoder:
        """(ids (B,L), mask (B,L)) -> (B,L,text_dim)."""
        if self._text_encoder is None:
            self._text_encoder = self.parallel.load_text_encoder(self.checkpoint, self.dtype)
            self._text_encoder.eval()
        return self._text_encoder

    @property
    def image_encoder(self) -> ImageEncoder | None:
        """Pictures (B,224,224,3) in [-1, 1] -> (B,257,1280), of a model that takes such tokens; None for others."""
        if self._image_encoder is None and self.checkpoint.image_encoder is not None:
            self._image_encoder = load_image_encoder(self.checkpoint, self.dtype)
        return self._image_encoder

    @property
    def vae(self) -> WanVAE:
        """`encode` video (B,T,H,W,3) in [-1, 1] to normalised latents (B,t,h,w,C), `decode` them back."""
        if self._vae is None:
            self._vae = load_vae(self.checkpoint, backend.vae_dtype(self.dtype))
        return self._vae

    def encode_prompt(self, text: str) -> mx.array:
        """Text embedding (n_tokens, text_dim), unpadded. The text is cleaned as the official code does."""
        ids, mask = self.tokenizer(clean_prompt(text))
        length = int(mask.sum())
        # Padding is masked out of attention, so the tokens alone give the same vectors.
        ids = ids[:, :length]
        if (kept := self._embeddings.get(ids.tobytes())) is not None:
            return kept
        cache = None if self.text_cache is None else TextCache(self.text_cache, self.checkpoint, self.dtype)
        embedding = None if cache is None else cache.get(ids)
        if embedding is None:
            embedding = self.text_encoder(mx.array(ids))[0]
            mx.eval(embedding)
            if cache is not None:
                cache.put(ids, embedding)
        self._embeddings = dict([*self._embeddings.items(), (ids.tobytes(), embedding)][-EMBEDDINGS:])
        return embedding

    def __call__(
        self,
        prompt: str,
        image: "Pictures | None" = None,
        negative_prompt: str | None = None,
        width: int | None = None,
        height: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | tuple[float, float] | None = None,
        shift: float | None = None,
        scheduler: str | None = None,
        seed: int | None = None,
        latents: mx.array | None = None,
        output_type: Literal["np", "latent"] = "np",
        callback: Callable[[int, int, mx.array], None] | None = None,
        last_image: "Image.Image | str | Path | None" = None,
        start: Point | None = None,
        timesteps: Sequence[float] | None = None,
        cache: float | None = None,
        guidance_interval: Sequence[float] | None = None,
        source: Source | None = None,
    ) -> PipelineOutput:
        """Makes a video. What is None is the model's own default (`spec`).

        Args:
            prompt: what to show.
            image: the first frame: a picture (shown upright if its EXIF data say how) or its file. Without width and
                height the size follows the picture's aspect ratio at the model's default area; with both, the picture
                is scaled and cropped to them. I2V models need one, T2V models take none. Or a list of 4n + 1: so many
                frames the video begins with, the way a longer one is made (`extend`).
            negative_prompt: what to steer away from; has no effect at guidance_scale 1.
            width, height: in pixels, multiples of VAE stride times patch (32 for the 5B, 16 for others).
            num_frames: 4n + 1.
            num_inference_steps: 1 to 1000.
            guidance_scale: 1 is no guidance, and half the work. With two experts one for both, or a pair (low noise,
                high noise).
            shift: of the noise schedule.
            scheduler: "unipc", "dpm++", "euler", or "dmd" for models distilled to a few steps.
            seed: of the noise, 0 to 2**64 - 1; None draws one.
            latents: the noise to start from (1, t, h, w, C), MLX or NumPy, instead of a seed.
            output_type: "latent" leaves the latents undecoded.
            callback: called with (step, steps, latents) after each step, steps counted from 1.
            last_image: the last frame, as `image`; FLF2V models need one, I2V-A14B takes one.
            start: where an earlier run with the same arguments stood (`Event.point`, `resume.load_point`): the rest of
                it is made, bit for bit.
            timesteps: those to take, falling from at most 1000, in place of num_inference_steps and shift.
            cache: a step whose velocity is expected to differ by less than this from the last one computed does
                without the transformer, 0.1 for 10 %; None computes every step.
            guidance_interval: (low, high), the noise levels from 0 to 1 between which there is guidance; None: all.
            source: what a VACE model works from; the size is this video's if none is asked for.

        Raises:
            UserError: a value that the model cannot take.
            WanError: the latents became NaN or infinite, or the decoded video NaN.
        """
        if output_type not in OUTPUT_TYPES:
            raise UserError(f"output_type is {output_type!r}; choose one of {', '.join(OUTPUT_TYPES)}")
        request = self._request(
            prompt,
            image,
            negative_prompt,
            width,
            height,
            num_frames,
            num_inference_steps,
            guidance_scale,
            shift,
            scheduler,
            seed,
            latents,
            last_image,
            start,
            timesteps,
            cache,
            guidance_interval,
            source,
        )
        result, pieces = None, []
        for event in self._run(request, decode=output_type == "np"):
            if event.stage == "denoise" and callback is not None:
                callback(event.index, event.total, event.value)
            elif event.stage == "latents":
                result = event.value
            elif event.stage == "frames":
                pieces.append(event.value)
        assert result is not None  # every run has that event
        frames = np.concatenate(pieces) if pieces else None
        return PipelineOutput(frames, result, request.seed, self.spec.fps)

    def stream(self, prompt: str, **options: Any) -> Iterator[Event]:
        """Makes a video as `__call__` does, with its arguments but output_type and callback; yields each `Event`.

        Frames come in pieces as they are decoded, so that no more than a piece of the video is in memory. The request
        is checked at once, not at the first event.
        """
        names = ("image", "negative_prompt", "width", "height", "num_frames", "num_inference_steps")
        names += ("guidance_scale", "shift", "scheduler", "seed", "latents", "last_image", "start")
        names += ("timesteps", "cache", "guidance_interval", "source")
        unknown = sorted(options.keys() - set(names))
        if unknown:
            raise TypeError(f"stream() got an unexpected keyword argument {unknown[0]!r}")
        return self._run(self._request(prompt, *(options.get(name) for name in names)), decode=True)

    # --- the order of things -----------------------------------------------------------------------------------------

    def _run(self, request: _Request, decode: bool) -> Iterator[Event]:
        total, start = len(request.scheduler.timesteps), request.start
        latents = start.latents if isinstance(start, Point) else start
        if not isinstance(start, Point) or start.step < total:
            for point in (yield from self._denoising(request)):
                latents = point.latents
                yield Event("denoise", point.step, total, latents, point)
            if self.low_memory:
                self._release_transformers()  # the generator kept none
        if request.source is not None:
            latents = latents[:, len(request.source.references) :]
        yield Event("latents", 1, 1, latents)
        if decode:
            pieces = self.parallel.stream_decode(self.vae, latents)
            for index, piece in enumerate(pieces, start=1):
                _check_piece(piece, latents[:, index - 1], index)
                if not self.parallel.is_first:
                    continue
                yield Event("frames", index, latents.shape[1], to_uint8(piece[0]))

    def _denoising(self, request: _Request) -> Generator[Event, None, Iterator[Point]]:
        """The steps still to be made, once text and pictures are encoded."""
        context, negative = yield from self._encode_texts(request)
        condition = yield from self._encode_image(request)
        return denoise(
            lambda t: self._expert_at(t, request),
            request.scheduler,
            request.start,
            context,
            negative,
            condition,
            self.parallel.passes,
            request.cache,
        )

    def _expert_at(self, timestep: float, request: _Request) -> Expert:
        """The transformer for a timestep. They fall, so that two experts change places once in a run."""
        boundary, (least, most) = self.spec.boundary, request.guidance_interval
        number = 0 if boundary is None or timestep >= boundary * TRAIN_TIMESTEPS else 1
        guided = least <= timestep / TRAIN_TIMESTEPS <= most
        scale = request.guidance_scale[1 - number] if guided else 1.0  # (low noise, high noise)
        return Expert(
            self._load_transformer(("transformer", "transformer_2")[number]),
            scale,
            tuple(self._adapters.strengths.items()),
            number,
        )

    def _encode_texts(self, request: _Request) -> Generator[Event, None, tuple[mx.array, mx.array]]:
        context = self._padded(self.encode_prompt(request.prompt))
        yield Event("text", 1, 2)
        guided = request.guidance_scale != (1, 1)
        negative = self._padded(self.encode_prompt(request.negative_prompt)) if guided else context  # which is not read
        yield Event("text", 2, 2)
        if self.low_memory:
            self._text_encoder = None
            mx.clear_cache()
        return context, negative

    def _encode_image(self, request: _Request) -> Generator[Event, None, Condition]:
        if not request.pictures and request.source is None:
            return Condition()
        from mlx_wan.conditioning import image_to_frame

        if request.source is not None:
            size = request.width, request.height, request.num_frames
            channels = control_channels(self._encode, request.source, *size, self.checkpoint.vae_config.stride)
            condition = Condition(control=Control(channels, request.source.scale))
        elif self.spec.task == "ti2v":
            size = request.width, request.height
            frames = np.concatenate([image_to_frame(picture, *size) for picture in request.pictures.values()], axis=1)
            condition = Condition(first_frame=self._encode(mx.array(frames)))
            mx.eval(condition.first_frame)
        else:
            condition = self._known_frames(request)
        if self.low_memory:
            self._vae = self._image_encoder = None
            mx.clear_cache()
        yield Event("image", 1, 1)
        return condition

    def _known_frames(self, request: _Request) -> Condition:
        """Pictures as I2V and FLF2V models see them: as a video with grey frames, and some as image tokens."""
        from mlx_wan.conditioning import cropped, image_tokens, known_channels, stretched_frame

        size, step = (request.width, request.height), min(self.checkpoint.size_steps)
        pictures = {place: cropped(picture, *size, step) for place, picture in request.pictures.items()}
        frames = {place: stretched_frame(picture, *size) for place, picture in pictures.items()}
        stride = self.checkpoint.vae_config.stride[0]
        channels, image = known_channels(frames, request.num_frames, stride, self._encode), None
        if self.image_encoder is not None:
            ends = [picture for place, picture in pictures.items() if place in (0, request.num_frames - 1)]
            image = image_tokens(ends, self.image_encoder.config.image_size, self.image_encoder)
        mx.eval(channels, image)
        return Condition(channels=channels, image=image)

    def _encode(self, video: mx.array) -> mx.array:
        return self.parallel.encode(self.vae, video)

    def _padded(self, embedding: mx.array) -> mx.array:
        """(n, text_dim) -> (1, text_len, text_dim): the reference fills up with zeros, which attention does see."""
        missing = self.checkpoint.transformer_config.text_len - embedding.shape[0]
        return mx.pad(embedding, [(0, missing), (0, 0)])[None]

    # --- the request -------------------------------------------------------------------------------------------------

    def _request(
        self,
        prompt: str,
        image: "Pictures | None",
        negative_prompt: str | None,
        width: int | None,
        height: int | None,
        num_frames: int | None,
        num_inference_steps: int | None,
        guidance_scale: float | tuple[float, float] | None,
        shift: float | None,
        scheduler: str | None,
        seed: int | None,
        latents: mx.array | None,
        last_image: "Image.Image | str | Path | None" = None,
        start: Point | None = None,
        timesteps: Sequence[float] | None = None,
        cache: float | None = None,
        guidance_interval: Sequence[float] | None = None,
        source: Source | None = None,
    ) -> _Request:
        spec = self.spec
        given = [open_picture(each) for each in (image if isinstance(image, list | tuple) else [image])]
        first, last = [picture for picture in given if picture is not None], open_picture(last_image)
        picture = first[0] if first else None
        spec.check_pictures(picture is not None, last is not None)
        width, height = self._size(whole("width", width), whole("height", height), picture, source)
        num_frames = or_default(whole("num_frames", num_frames), spec.num_frames)
        if len(first) > 1 and ((len(first) - 1) % spec.vae_stride[0] or len(first) >= num_frames):
            raise UserError(f"image is {len(first)} pictures; one or {spec.vae_stride[0]}n+1, fewer than the frames")
        pictures = dict(enumerate(first)) | ({} if last is None else {num_frames - 1: last})
        if last is not None and num_frames == 1:
            raise UserError("num_frames is 1; a first and a last frame need more")
        solver, seed = or_default(scheduler, spec.scheduler), whole("seed", seed)
        if solver == "dmd" and cache is not None:
            raise UserError("cache: dmd adds new noise after every step, so no velocity is like the one before")
        if solver == "dmd" and seed is None:
            seed = secrets.randbelow(2**32)  # of the noise between the steps, if not of the first
        if spec.task == "vace":
            source = source or Source()
        elif source is not None:
            raise UserError(f"{spec.name} takes no source video or reference pictures: use a VACE model")
        shape = self._latent_shape(width, height, num_frames, source)
        noise, seed = noise_for(latents, seed, shape) if start is None else (checked_start(start, latents, shape), seed)
        self.scheduler = make_scheduler(
            solver,
            or_default(num_inference_steps, spec.num_inference_steps),
            or_default(shift, spec.shift_for(width, height)),
            spec.check_timesteps(timesteps, num_inference_steps, shift),
            seed or 0,
        )
        return _Request(
            text("prompt", prompt),
            pictures,
            text("negative_prompt", or_default(negative_prompt, spec.negative_prompt)),
            width,
            height,
            num_frames,
            spec.check_guidance(or_default(guidance_scale, spec.guidance_scale)),
            self.scheduler,
            seed,
            noise,
            None if cache is None else StepCache(cache, self.parallel.agree),
            checked_interval(guidance_interval),
            source,
        )

    def _size(
        self, width: int | None, height: int | None, picture: "Image.Image | None", source: Source | None
    ) -> tuple[int, int]:
        if (width is None) != (height is None):
            raise UserError("give both width and height, or neither")
        if width is not None and height is not None:
            return width, height
        area = self.spec.width * self.spec.height
        if source is not None and source.video is not None:
            rows, columns = source.video.shape[1:3]
            return source_size(columns, rows, *self.checkpoint.size_steps, area)
        if picture is None:
            return self.spec.width, self.spec.height
        from mlx_wan.conditioning import SIZE_RULES

        return SIZE_RULES[self.spec.task](picture.width, picture.height, *self.checkpoint.size_steps, area)

    def _latent_shape(self, width: int, height: int, num_frames: int, source: Source | None) -> tuple[int, ...]:
        step_w, step_h = self.checkpoint.size_steps
        stride_t, stride_h, stride_w = self.checkpoint.vae_config.stride
        if width <= 0 or height <= 0 or width % step_w or height % step_h:
            raise UserError(f"size {width}x{height}: width must be a multiple of {step_w} and height of {step_h}")
        if num_frames < 1 or num_frames % stride_t != 1 % stride_t:
            raise UserError(f"num_frames is {num_frames}; it must be {stride_t}n+1, such as {self.spec.num_frames}")
        frames = (num_frames - 1) // stride_t + 1 + (len(source.references) if source else 0)
        return 1, frames, height // stride_h, width // stride_w, self.checkpoint.vae_config.z_dim


def _check_piece(piece: mx.array, latents: mx.array, index: int) -> None:
    """A decoder that fails gives NaN, or one value for latents that differ; but ±1 may be a black or white scene."""
    if mx.isnan(piece).any().item():
        raise WanError(f"piece {index} of the decoded video is not finite: check the checkpoint's VAE")
    low, high = mx.min(piece).item(), mx.max(piece).item()
    if low == high and abs(low) < 1 and (mx.var(latents) > 0).item():  # pyright: ignore[reportArgumentType]
        raise WanError(
            f"piece {index} of the decoded video is one flat colour: the run was stopped; MLX gives zeros where a GPU "
            "runs out of memory: try a smaller size"
        )
