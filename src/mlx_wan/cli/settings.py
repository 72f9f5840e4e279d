"""What a run leaves in its video, and how `generate --from VIDEO` makes a run of it again."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_wan import backend
from mlx_wan.cli.fuse import parse_loras
from mlx_wan.cli.parts import PARTS
from mlx_wan.cli.report import note
from mlx_wan.cli.sources import references
from mlx_wan.errors import UserError
from mlx_wan.formats import FORMATS, output_path

if TYPE_CHECKING:
    from mlx_wan.weights.checkpoint import Checkpoint

# What the video calls it -> the flag it came from, and what it may be.
NUMBER = (int, float)
FLAGS: dict[str, tuple[str, type | tuple[type, ...]]] = {
    "prompt": ("prompt", str),
    "negative_prompt": ("negative_prompt", str),
    "num_frames": ("frame_num", int),
    "timesteps": ("sample_timesteps", list),
    "num_inference_steps": ("sample_steps", int),
    "guidance_scale": ("sample_guide_scale", (*NUMBER, list)),
    "shift": ("sample_shift", NUMBER),
    "scheduler": ("sample_solver", str),
    "guidance_interval": ("guidance_interval", list),
    "cache": ("cache", NUMBER),
    "seed": ("base_seed", int),
    "fps": ("fps", NUMBER),
    "dtype": ("dtype", str),
    "extend": ("extend", int),
    "overlap": ("overlap", int),
    "context_scale": ("context_scale", NUMBER),
}
BY_STEPS = ("num_inference_steps", "shift")  # which a list of timesteps takes the place of
# Pictures, and a video that goes on: in the video by name and fingerprint.
FILES = {
    "image": "image",
    "last_image": "last_frame",
    "video": "extend_from",
    "src_video": "src_video",
    "src_mask": "src_mask",
}
REFERENCES = "src_ref_images"  # several pictures: in the video and as a flag
EXTENDED = ("given_prompt", "prompt_extend")  # of a prompt that a language model wrote


def facts(args: argparse.Namespace, checkpoint: "Checkpoint", options: dict[str, Any], **more: Any) -> dict[str, Any]:
    """What is stored in the video: all that is needed to make it again, and nothing that changes from run to run.

    Files and folders are named without where they are, which is nobody's business.
    """
    import mlx_wan
    from mlx_wan.fingerprint import file_fingerprint, model_fingerprint
    from mlx_wan.lora.load import lora_file
    from mlx_wan.weights.hub import file_name

    pictures = {name: getattr(args, flag) for name, flag in FILES.items() if getattr(args, flag)}
    loras = parse_loras(args)
    settings = {name: value for name, value in options.items() if name not in FILES}
    if loras:
        settings |= {"loras": [lora.facts() for lora in loras], "fuse": args.fuse}
    if pictures_of := references(args):
        settings |= {REFERENCES: [Path(file).name for file in pictures_of]}
    prints: dict[str, Any] = {"model": model_fingerprint(checkpoint)}
    prints |= {name: file_fingerprint(file) for name, file in pictures.items()}
    if pictures_of:
        prints[REFERENCES] = [file_fingerprint(file) for file in pictures_of]
    if loras:
        prints["loras"] = [file_fingerprint(lora_file(lora.path)) for lora in loras]
    parts = {part: file_name(getattr(args, part)) for part in PARTS if getattr(args, part)}
    return {
        "prompt": args.prompt,
        **{name: Path(file).name for name, file in pictures.items()},
        **settings,
        **more,
        "model": checkpoint.spec.name,
        **({"parts": parts} if parts else {}),
        **_source(args, parts),
        "fingerprints": prints,
        "mlx_wan": mlx_wan.__version__,
        "mlx": backend.version("mlx"),
        "device": backend.device_name(),
    }


def fill(args: argparse.Namespace, recorded: dict[str, Any] | None = None) -> None:
    """Gives every flag that was not typed the value of the video named by --from, which is kept in `args.recorded`.

    recorded: the settings, if they were read before.

    Raises UserError if the file carries no settings, or names files that are not at hand.
    """
    from mlx_wan.outputs import read_settings

    video = Path(args.replay)
    recorded = read_settings(video) if recorded is None else recorded
    if recorded is None or "prompt" not in recorded:
        raise UserError(f"{video}: carries no settings of mlx-wan; give --prompt and the rest yourself")
    args.recorded = recorded
    if args.use_prompt_extend and args.prompt is None:  # ask once more, about the words that were typed then
        args.prompt = recorded.get("given_prompt")
    if args.prompt is not None:  # another prompt was not written by a language model, and may be extended again
        for name in EXTENDED:
            recorded.pop(name, None)
    elif not args.use_prompt_extend:
        args.extended = {name: recorded[name] for name in EXTENDED if name in recorded}
    by_steps = args.sample_steps is not None or args.sample_shift is not None
    for name, (flag, kind) in FLAGS.items():
        if (name == "timesteps" and by_steps) or (name in BY_STEPS and args.sample_timesteps is not None):
            continue
        if getattr(args, flag) is None and name in recorded:
            value = _checked(video, name, recorded[name], kind)
            setattr(args, flag, tuple(value) if isinstance(value, list) else value)
    if isinstance(args.base_seed, int):
        args.base_seed = [args.base_seed]
    usual = ".png" if args.frame_num == 1 else ".mp4"
    form = FORMATS.get(output_path(args.save_file).suffix.lower() if args.save_file else usual)
    if args.codec is None and form is not None and recorded.get("codec") in form.codecs:
        args.codec = recorded["codec"]
    _fill_files(args, recorded)
    if args.ckpt_dir is None and not any(getattr(args, part) for part in PARTS):
        _fill_model(args, video, recorded)
    if args.size is None and _same_pictures(args, recorded):
        args.size = f"{recorded.get('width')}*{recorded.get('height')}"
        args.exact_size = True


def _source(args: argparse.Namespace, parts: dict[str, str]) -> dict[str, str]:
    """Where the model came from: "tiny", a Hub id, or the name of a folder; nothing if it is single files."""
    if args.ckpt_dir is None:
        return {} if parts else {"ckpt_dir": "tiny"}
    return {"ckpt_dir": Path(args.ckpt_dir).resolve().name if Path(args.ckpt_dir).exists() else args.ckpt_dir}


def _fill_model(args: argparse.Namespace, video: Path, recorded: dict[str, Any]) -> None:
    parts = recorded.get("parts", {})
    for part in PARTS:
        if part in parts:
            setattr(args, part, str(_at_hand(args, parts[part], part)))
    source = recorded.get("ckpt_dir")
    if source is None and not parts:
        raise UserError(f"{video}: was made by the model {recorded.get('model')}; say where it is with --ckpt_dir")
    if source is not None and source != "tiny":
        args.ckpt_dir = source if "/" in source else str(_at_hand(args, source, "ckpt_dir"))


def compare(args: argparse.Namespace, checkpoint: "Checkpoint") -> None:
    """Says what of a recorded run is not as it was, so that the frames may differ."""
    from mlx_wan.fingerprint import model_fingerprint

    recorded = args.recorded
    if recorded is None:
        return
    before, now = _prints(recorded).get("model"), model_fingerprint(checkpoint)
    if before != now and not args.resume:  # a run that goes on is refused
        note(f"{args.replay} was made by another model ({before}, this is {now}): the frames will differ")
    for flag, name, before, now in _changed_files(args, recorded) if not args.resume else ():
        note(f"--{flag} {name}: is another file than {args.replay} was made with ({before}, this is {now})")
    old = {name: recorded.get(name) for name in ("mlx", "device")}
    new = {"mlx": backend.version("mlx"), "device": backend.device_name()}
    if old != new:
        words = "MLX {mlx} on {device}"
        note(f"{args.replay} was made by {words.format(**old)}, this is {words.format(**new)}: digits may differ")


def _fill_files(args: argparse.Namespace, recorded: dict[str, Any]) -> None:
    for name, flag in FILES.items():
        if getattr(args, flag) is None and name in recorded:
            setattr(args, flag, str(_at_hand(args, recorded[name], flag)))
    if recorded.get(REFERENCES) and args.src_ref_images is None:
        args.src_ref_images = ",".join(str(_at_hand(args, name, REFERENCES)) for name in recorded[REFERENCES])
    if recorded.get("loras") and not parse_loras(args):
        for lora in recorded["loras"]:
            flag = f"lora_{lora['expert']}" if "expert" in lora else "lora"
            file = _at_hand(args, lora["file"], flag)
            setattr(args, flag, [*getattr(args, flag), [str(file), str(lora["scale"])]])
        args.fuse = args.fuse or bool(recorded.get("fuse"))


def _at_hand(args: argparse.Namespace, name: str, flag: str) -> str | Path:
    """The file of that name where it was when the run began, in this folder, or beside the video; or on the Hub."""
    from mlx_wan.weights.hub import is_hub_file

    if is_hub_file(name):
        return name
    video, before = Path(args.replay), args.places.get(f"{flag} {name}")
    for file in (*([Path(before)] if before else []), *(folder / Path(name).name for folder in (Path(), video.parent))):
        if file.exists():
            return file
    raise UserError(f"{video}: was made with {name}, which is not here; say where it is with --{flag}")


def _same_pictures(args: argparse.Namespace, recorded: dict[str, Any]) -> bool:
    changed = {flag for flag, *_ in _changed_files(args, recorded)}
    return not changed & set(FILES.values()) and all(
        (name in recorded) == bool(getattr(args, flag)) for name, flag in FILES.items()
    )


def _changed_files(args: argparse.Namespace, recorded: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(flag, file, fingerprint before, fingerprint now) of every picture and LoRA that is not the recorded one."""
    from mlx_wan.fingerprint import file_fingerprint
    from mlx_wan.lora.load import lora_file

    prints = _prints(recorded)
    pairs = [(flag, getattr(args, flag), prints.get(name)) for name, flag in FILES.items()]
    pairs += [
        ("lora", str(lora_file(lora.path)), before)
        for lora, before in zip(parse_loras(args), prints.get("loras", ()), strict=False)
    ]
    pairs += [
        (REFERENCES, file, before) for file, before in zip(references(args), prints.get(REFERENCES, ()), strict=False)
    ]
    found = [(flag, file, before, file_fingerprint(file)) for flag, file, before in pairs if file and before]
    return [(flag, file, before, now) for flag, file, before, now in found if before != now]


def _prints(recorded: dict[str, Any]) -> dict[str, Any]:
    prints = recorded.get("fingerprints")
    return prints if isinstance(prints, dict) else {}


def _checked(video: Path, name: str, value: Any, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{video}: its {name} is {value!r}, which cannot be; give --{FLAGS[name][0]}")
    return value
