"""What files a video can become: which name's ending means which container, and which codecs go into it.

Tables alone, so that the command line can name the choices without loading an encoder.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Codec:
    """How PyAV encodes.

    Attributes:
        encoder: FFmpeg's name; a build of PyAV may lack it.
        pix_fmt: what the encoder is given; "rgb24" is given as it is, others are converted to BT.709.
        options: the encoder's own.
        tag: four letters that players look for in MP4 and MOV, where they are not FFmpeg's default.
    """

    encoder: str
    pix_fmt: str
    options: Mapping[str, str] = field(default_factory=dict)
    tag: str | None = None


CODECS: dict[str, Codec] = {
    # CRF 16 is visually lossless; "medium" keeps 1280x704 far faster than the model makes frames. Without mbtree,
    # because with it small frames (96x96) come out different from one call to the next.
    "h264": Codec("libx264", "yuv420p", {"crf": "16", "x264-params": "mbtree=0"}),
    "hevc": Codec("libx265", "yuv420p", {"crf": "18", "x265-params": "log-level=error"}, tag="hvc1"),
    "vp9": Codec("libvpx-vp9", "yuv420p", {"crf": "18", "deadline": "good", "cpu-used": "2", "row-mt": "1"}),
    "prores": Codec("prores_ks", "yuv422p10le", {"profile": "hq", "vendor": "apl0"}),  # ProRes 422 HQ
    "lossless": Codec("libx264rgb", "rgb24", {"qp": "0"}),  # H.264 of RGB: the very pixels
}


@dataclass(frozen=True)
class Format:
    """A kind of file: its name for the library that writes it, and the codecs it takes, the usual one first."""

    container: str
    codecs: tuple[str, ...]


# Written by PyAV, frame by frame.
VIDEOS: dict[str, Format] = {
    ".mp4": Format("mp4", ("h264", "hevc", "lossless")),
    ".mov": Format("mov", ("prores", "h264", "hevc", "lossless")),
    ".mkv": Format("matroska", ("h264", "hevc", "vp9", "prores", "lossless")),
    ".webm": Format("webm", ("vp9",)),
}
# Written by Pillow, which wants every frame at once.
ANIMATIONS: dict[str, Format] = {".gif": Format("GIF", ("gif",)), ".webp": Format("WEBP", ("webp", "lossless"))}
PICTURES: dict[str, Format] = {".png": Format("PNG", ("png",))}
FORMATS: dict[str, Format] = VIDEOS | ANIMATIONS | PICTURES
CODEC_NAMES = tuple(dict.fromkeys(name for form in FORMATS.values() for name in form.codecs))

FRAMES_IN_FOLDER = "%04d.png"
_PATTERN = re.compile(r"[^%]*%0?[1-9]?d[^%]*\.png", re.IGNORECASE)


def output_path(name: str) -> Path:
    """The path that a user's words mean: `frames/` is a folder of pictures, `frames/%04d.png`."""
    return Path(name) / FRAMES_IN_FOLDER if name.endswith("/") else Path(name)


def is_pattern(path: Path) -> bool:
    """Whether a path stands for many pictures: `shot_%04d.png`."""
    return _PATTERN.fullmatch(path.name) is not None


def sibling(path: Path, mark: str) -> Path:
    """The path of another video of the same kind: `out.mp4` and "seed7" give `out_seed7.mp4`.

    A folder of frames gives another folder.
    """
    if path.name == FRAMES_IN_FOLDER:
        return path.parent.with_name(f"{path.parent.name}_{mark}") / path.name
    if is_pattern(path):
        return path.with_name(f"{mark}_{path.name}")
    return path.with_name(f"{path.stem}_{mark}{path.suffix}")


RESUME_SUFFIX = ".resume.safetensors"


def resume_path(path: Path) -> Path:
    """Where a run is kept while its video is not there: `out.mp4.resume.safetensors`; for `frames/` beside it."""
    if path.name == FRAMES_IN_FOLDER:
        return path.parent.with_name(f"{path.parent.name}{RESUME_SUFFIX}")
    return path.with_name(f"{path.name}{RESUME_SUFFIX}")


def resumed_output(file: Path) -> str:
    """The video that belongs to such a file, as a user would type it."""
    video = str(file).removesuffix(RESUME_SUFFIX)
    return video if Path(video).suffix.lower() in FORMATS or video == str(file) else f"{video}/"


def settings_path(path: Path) -> Path:
    """Where the settings of a video lie beside it: `out.mp4.json`; `frames.json` for the folder `frames/`."""
    if path.name == FRAMES_IN_FOLDER:
        return path.parent.with_name(f"{path.parent.name}.json")
    return path.with_name(f"{path.name.replace('%', '')}.json")
