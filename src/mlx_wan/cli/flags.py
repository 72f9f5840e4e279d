"""The flags of `mlx-wan generate`: Wan's official names, with shorter ones beside them."""

import argparse

from mlx_wan.cli.fuse import add_lora_flags
from mlx_wan.cli.parts import add_part_flags
from mlx_wan.cli.ranks import add_sharing_flags
from mlx_wan.formats import CODEC_NAMES
from mlx_wan.prompting import LANGUAGES, METHODS
from mlx_wan.zoo import MODELS

TASKS = tuple(name for name, spec in MODELS.items() if spec.hub_id)
SOLVERS = ("unipc", "dpm++", "euler", "dmd")
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Every flag of `generate`, in groups that `--help` shows one by one."""
    what = parser.add_argument_group("video: what to make")
    what.add_argument("--prompt", help="what the video shows")
    what.add_argument("--negative_prompt", "--n_prompt", help="what it must not show (default: the model's own)")
    what.add_argument(
        "--image", "--first_frame", metavar="FILE", help="a picture to start from: the video's first frame"
    )
    what.add_argument("--last_frame", metavar="FILE", help="a picture to end with (flf2v-14B, i2v-A14B)")
    what.add_argument("--extend", type=int, metavar="N", help="N parts more, each of which goes on from the one before")
    what.add_argument("--extend_from", metavar="VIDEO", help="go on with this video, which the new one begins with")
    what.add_argument("--overlap", type=int, metavar="N", help="so many last frames they begin with, 4n+1 (default 1)")
    what.add_argument("--size", metavar="W*H", help="width*height in pixels; with --image only the area counts")
    what.add_argument("--frame_num", "--num_frames", type=int, metavar="N", help="number of frames, 4n+1")
    what.add_argument("--fps", type=float, help="frames a second of the file (default: the model's own)")
    what.add_argument(
        "--save_file",
        "--output",
        "-o",
        metavar="FILE",
        help=".mp4, .mov, .mkv, .webm, .gif, .webp, .png, or DIR/ for PNG frames (default: a telling name here)",
    )
    out = parser.add_argument_group("output: what is written and shown")
    out.add_argument("--codec", choices=CODEC_NAMES, help="default: by the ending; h264 for .mp4, prores for .mov")
    out.add_argument("--save_settings", action="store_true", help="the settings also as JSON beside the video")
    out.add_argument("--preview", metavar="DIR", help="a small picture of every step's latents, into this folder")
    out.add_argument("--progress", choices=("bar", "json"), default="bar", help="json: an object a line on stderr")
    several = parser.add_argument_group("several: more than one run, and runs again")
    several.add_argument("--from", dest="replay", metavar="VIDEO", help="every flag not given is as in this video")
    several.add_argument("--save_every", type=int, metavar="N", help="keep the run beside the video every N steps")
    several.add_argument("--resume", metavar="FILE", help="go on with a run that --save_every has kept")
    several.add_argument("--batch", metavar="FILE", help="JSON objects, one a line: any flag here by its long name")
    extend = parser.add_argument_group("prompts: a language model makes the prompt richer")
    extend.add_argument("--use_prompt_extend", action="store_true", help="ask one; if it fails, the prompt stays")
    extend.add_argument(
        "--prompt_extend_method", choices=METHODS, default=METHODS[0], help="which service (%(default)s)"
    )
    extend.add_argument(
        "--prompt_extend_model", metavar="NAME", help="its name there; a folder or Hub id for local_qwen"
    )
    extend.add_argument(
        "--prompt_extend_target_lang", choices=LANGUAGES, default="zh", help="to write in (%(default)s)"
    )
    vace = parser.add_argument_group("source: what a VACE model works from")
    vace.add_argument("--src_video", metavar="VIDEO", help="a video to change, or to follow (depth, pose, ...)")
    vace.add_argument("--src_mask", metavar="FILE", help="a video or picture, white where it may change")
    vace.add_argument("--src_ref_images", metavar="FILE,FILE", help="pictures of what the video is to show")
    vace.add_argument("--context_scale", type=float, metavar="X", help="how much all of that counts (default 1)")
    model = parser.add_argument_group("model: which one")
    model.add_argument("--task", help=f"which model it must be: {', '.join(TASKS)} (default: what --ckpt_dir holds)")
    model.add_argument(
        "--ckpt_dir", "--model", metavar="DIR", help="model folder or Hub id (default: the small embedded model)"
    )
    add_part_flags(model)
    model.add_argument("--dtype", choices=tuple(DTYPE_BYTES), help="of weights and products (default: by device)")
    add_lora_flags(model)
    model.add_argument("--fuse", action="store_true", help="add the LoRAs to the weights instead of beside them")
    how = parser.add_argument_group("sampling: how (defaults: the model's own)")
    how.add_argument(
        "--base_seed",
        "--seed",
        type=int,
        nargs="+",
        metavar="N",
        help="of the noise; -1 for a random one (default); several make several videos",
    )
    how.add_argument("--sample_solver", "--scheduler", choices=SOLVERS, help="the sampler")
    how.add_argument("--sample_steps", "--steps", type=int, metavar="N", help="denoising steps")
    how.add_argument(
        "--sample_timesteps",
        "--timesteps",
        type=_numbers,
        metavar="T,T,...",
        help="these timesteps instead of steps and shift, such as 1000,757,522",
    )
    how.add_argument("--sample_shift", "--shift", type=float, metavar="X", help="shift of the noise schedule")
    how.add_argument(
        "--sample_guide_scale",
        "--guidance",
        type=_guidance,
        metavar="X",
        help="guidance; 1 is none; LOW,HIGH noise for a model of two experts",
    )
    how.add_argument(
        "--guidance_interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guidance between these noise levels alone, from 0 (clean) to 1 (noise)",
    )
    how.add_argument(
        "--cache",
        type=float,
        metavar="X",
        help="skip the transformer while its answer is expected to change by less, such as 0.1 (default: never)",
    )
    how.add_argument(
        "--keep_both_experts",
        action="store_true",
        help="keep both experts of an A14B model in memory, instead of loading the second when its turn comes",
    )
    how.add_argument(
        "--text_cache", metavar="DIR", help="keep embeddings of prompts there; one that comes again loads no encoder"
    )
    how.add_argument("--ignore_plan", action="store_true", help="run even if `mlx-wan plan` says that it does not fit")
    add_sharing_flags(parser)
    old = parser.add_argument_group("official: accepted from that script, without effect here")
    old.add_argument("--offload_model", nargs="?", const=True, type=_boolean, metavar="BOOL", help="memory is shared")
    old.add_argument("--t5_cpu", action="store_true", help="memory is shared, and the text encoder freed after use")
    old.add_argument("--convert_model_dtype", action="store_true", help="weights are converted as they are loaded")


def _boolean(text: str) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false")
    return words[text.lower()]


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number, or some with commas between them") from None


def _guidance(text: str) -> float | tuple[float, ...]:
    numbers = _numbers(text)
    return numbers[0] if len(numbers) == 1 else numbers
