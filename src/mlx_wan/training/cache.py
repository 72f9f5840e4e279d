"""Latents and text embeddings on disk, computed once: the encoders are not needed while the transformer trains.

A file's name is the fingerprint of all that decides its contents, so another clip, caption, bucket or encoder is
another file, and a changed video is encoded again. Files carry checksums: one that was cut off is made again.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_wan.conditioning import KNOWN_FRAMES, frame_to_image, image_tokens, known_channels
from mlx_wan.errors import UserError
from mlx_wan.text import Tokenizer, clean_prompt
from mlx_wan.training.dataset import Clip, Skipped, read_clip
from mlx_wan.weights.load import Checkpoint, load_image_encoder, load_text_encoder, load_vae
from mlx_wan.weights.whole import is_whole, write_arrays

VERSION = 1
_REMEDY = "make room or choose another --cache, then start again"
_BLOCKS, _BLOCK_BYTES = 64, 1 << 16  # of a weight file, spread over it: every byte of 34 GB would take minutes


@dataclass
class Cached:
    """What a run trains on.

    latents: (clip, file) in the order of the clips. texts: caption -> file. skipped: clips that could not be encoded.
    computed: how many files are new.
    """

    latents: list[tuple[Clip, Path]] = field(default_factory=list)
    texts: dict[str, Path] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    computed: int = 0


class Cache:
    """Encoded clips and texts of one model in one folder.

    Args:
        folder: made when the first file is written.
        checkpoint: whose encoders.
        dtype: the text encoder computes in; the VAE is always float32.
        report: called with (done, of how many, "clip" or "text").
    """

    def __init__(
        self,
        folder: Path,
        checkpoint: Checkpoint,
        dtype: mx.Dtype,
        report: Callable[[int, int, str], None] = lambda done, total, what: None,
    ):
        self.folder, self.checkpoint, self.dtype, self.report = folder, checkpoint, dtype, report
        self._known = KNOWN_FRAMES.get(checkpoint.spec.task, ())
        self._vae = component_print(checkpoint, "vae", asdict(checkpoint.vae_config))
        self._image_encoder: list[str] = []
        if checkpoint.image_encoder_config is not None:
            config = asdict(checkpoint.image_encoder_config)
            self._image_encoder = [component_print(checkpoint, "image_encoder", config)]
        tokenizer = hashlib.sha256(checkpoint.tokenizer_json()).hexdigest()
        text = [asdict(checkpoint.text_encoder_config), str(dtype), tokenizer]
        text += [checkpoint.transformer_config.text_len, str(checkpoint.quantization)]
        self._text = component_print(checkpoint, "text_encoder", text)

    def fill(self, clips: list[Clip], texts: Iterable[str]) -> Cached:
        """Computes what is missing, clips first, with one encoder in memory at a time.

        Several processes share the work, and need to see the same folder. A clip that cannot be decoded is skipped.
        WanError if the folder cannot be written.
        """
        cached = Cached()
        digests = self._digests(clips, cached.skipped)
        files = {clip: self._clip_file(clip, digests[path]) for clip in clips if (path := clip.source.path) in digests}
        words = {text: self._text_file(text) for text in sorted(set(texts))}
        self._make("clip", list(files.items()), self._clip_encoder, cached)
        self._make("text", list(words.items()), self._text_encoder, cached)
        failed = {one.path for one in cached.skipped}
        cached.latents = [(clip, file) for clip, file in files.items() if file.exists()]
        for clip in {clip for clip, file in files.items() if not file.exists() and clip.source.path not in failed}:
            cached.skipped.append(Skipped(clip.source.path, "could not be encoded by another process"))
        cached.texts = words
        return cached

    def _make(self, what: str, wanted: list[tuple[Any, Path]], encoder: Callable, cached: Cached) -> None:
        world = mx.distributed.init()
        # Shared out before looking what is missing, which another process may be changing just now.
        share = [(item, file) for item, file in wanted[world.rank() :: world.size()] if not is_whole(file)]
        if share:
            encode = encoder()  # loads it: not before something is missing
            for done, (item, file) in enumerate(share, start=1):
                try:
                    arrays, facts = encode(item)
                except UserError as error:
                    cached.skipped.append(Skipped(item.source.path, str(error)))
                    file.unlink(missing_ok=True)
                    continue
                finally:
                    self.report(done, len(share), what)
                write_arrays(file, arrays, {name: str(value) for name, value in facts.items()}, _REMEDY)
                cached.computed += 1
            del encode
            mx.clear_cache()
        mx.eval(mx.distributed.all_sum(mx.array(1), group=world))  # wait until all have written theirs

    def _clip_encoder(self) -> Callable[[Clip], tuple[dict[str, mx.array], dict[str, Any]]]:
        vae, stride = load_vae(self.checkpoint), self.checkpoint.vae_config.stride[0]
        image_encoder = load_image_encoder(self.checkpoint, self.dtype) if self._image_encoder else None

        def encode(clip: Clip) -> tuple[dict[str, mx.array], dict[str, Any]]:
            pixels = read_clip(clip)
            arrays = {"latents": vae.encode(mx.array(pixels))[0]}
            frames = {place % pixels.shape[1]: pixels[:, [place]] for place in self._known}
            if frames:
                arrays["channels"] = known_channels(frames, pixels.shape[1], stride, vae.encode)[0]
            if image_encoder is not None:
                pictures = [frame_to_image(frame) for frame in frames.values()]
                arrays["image"] = image_tokens(pictures, image_encoder.config.image_size, image_encoder)[0]
            if not all(mx.isfinite(array).all().item() for array in arrays.values()):
                raise UserError(f"{clip.name}: its latents are not finite")
            arrays = {name: array.astype(mx.float16) for name, array in arrays.items()}
            return arrays, {"clip": clip.name, "bucket": clip.bucket}

        return encode

    def _text_encoder(self) -> Callable[[str], tuple[dict[str, mx.array], dict[str, Any]]]:
        encoder = load_text_encoder(self.checkpoint, self.dtype)
        tokenizer = Tokenizer(self.checkpoint.tokenizer, self.checkpoint.transformer_config.text_len)

        def encode(text: str) -> tuple[dict[str, mx.array], dict[str, Any]]:
            ids, mask = tokenizer(clean_prompt(text))
            return {"context": encoder(mx.array(ids[:, : int(mask.sum())]))[0]}, {"text": text}

        return encode

    def _digests(self, clips: list[Clip], skipped: list[Skipped]) -> dict[Path, str]:
        digests = {}
        for path in dict.fromkeys(clip.source.path for clip in clips):
            try:
                digests[path] = _digest(path)
            except OSError as error:
                skipped.append(Skipped(path, f"cannot be read ({error.strerror})"))
        return digests

    def _clip_file(self, clip: Clip, digest: str) -> Path:
        facts = [VERSION, digest, clip.bucket, clip.frames, clip.flip, clip.source.kind, self._vae]
        facts += [*self._image_encoder, *self._known]
        return self.folder / f"clip-{_print(facts)}.safetensors"

    def _text_file(self, text: str) -> Path:
        return self.folder / f"text-{_print([VERSION, text, self._text])}.safetensors"


def load_clip(file: Path) -> dict[str, mx.array]:
    """What the cache holds of a clip, float16: latents (t, h, w, C) and, for models that are shown some of its frames,
    channels (t, h, w, ·) beside them and perhaps image tokens (m, image_dim): `image`."""
    return mx.load(str(file))  # type: ignore[return-value]


def load_context(file: Path, length: int) -> mx.array:
    """Embedding (length, text_dim) of a cached text, zeros after the text, as the pipeline hands it over."""
    context: mx.array = mx.load(str(file))["context"]  # type: ignore[index, assignment]
    return mx.pad(context, [(0, length - context.shape[0]), (0, 0)])


def _print(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def component_print(checkpoint: Checkpoint, component: str, config: Any) -> str:
    """What tells one set of weights from another: names, shapes and types, samples of the contents, and `config`."""
    tensors = getattr(checkpoint, component).tensors.values()
    facts: list[Any] = [config, sorted((info.name, info.shape, info.dtype) for info in tensors)]
    for file in sorted({info.file for info in tensors}):
        size, digest = file.stat().st_size, hashlib.sha256()
        with file.open("rb") as stream:
            for i in range(_BLOCKS):
                stream.seek(i * max(0, size - _BLOCK_BYTES) // (_BLOCKS - 1))
                digest.update(stream.read(_BLOCK_BYTES))
        facts.append([size, digest.hexdigest()])
    return _print(facts)
