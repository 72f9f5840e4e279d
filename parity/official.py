"""The official Wan2.2 code, or Wan2.1's, imported on a machine without a GPU and computing in float32.

Its modules are used as they are. Replaced are only: flash attention, which needs CUDA and bfloat16, by torch's
scaled_dot_product_attention in the dtype it is given; and torchvision and imageio, of which nothing but the
conversion of a picture to a tensor is reached.
"""

import importlib
import json
import shutil
import sys
import tempfile
import types
from pathlib import Path

import diffusers  # before torchvision is replaced: it and transformers look whether it is there
import numpy as np
import PIL.Image
import torch
import transformers  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import small

# Of clip.py's _clip, for the released model.
CLIP_STATISTICS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def attention(q, k, v, q_lens=None, k_lens=None, window_size=(-1, -1), **_):
    """Full-precision stand-in for flash_attention: (B, L, heads, head_dim), keys beyond k_lens hidden."""
    mask = None
    if k_lens is not None:
        mask = (torch.arange(k.size(1))[None] < k_lens[:, None])[:, None, None]
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def to_tensor(picture):
    """torchvision's: PIL RGB -> (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div(255)


def _package(name, folder=None):
    module = types.ModuleType(name)
    module.__path__ = [str(folder)] if folder else []
    sys.modules[name] = module
    return module


def load(folder):
    """Modules of the official repository in `folder`, by short names; Wan2.2's or Wan2.1's, not both in one process."""
    root = Path(folder) / "wan"
    is_21 = (root / "first_last_frame2video.py").is_file()
    if not (is_21 or (root / "textimage2video.py").is_file()):
        raise SystemExit(f"{folder}: not the Wan2.2 repository; clone https://github.com/Wan-Video/Wan2.2")
    torch.cuda.current_device = lambda: 0  # asked for when t5.py is imported
    for name in ("", ".modules", ".utils", ".distributed"):  # their __init__ import what is not needed here
        _package(f"wan{name}", root / name.strip("."))
    _package("wan.modules.attention").flash_attention = attention
    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "imageio"):
        _package(name)
    sys.modules["torchvision.transforms.functional"].to_tensor = to_tensor
    parts = {
        "model": "wan.modules.model",
        "t5": "wan.modules.t5",
        "tokenizers": "wan.modules.tokenizers",
        "vae": "wan.modules.vae2_2",
        "vae21": "wan.modules.vae2_1",
        "unipc": "wan.utils.fm_solvers_unipc",
        "dpmpp": "wan.utils.fm_solvers",
        "ti2v": "wan.textimage2video",
        "t2v": "wan.text2video",
        "i2v": "wan.image2video",
        "configs": "wan.configs",
    }
    if is_21:
        del parts["vae"], parts["ti2v"]
        parts |= {"vae21": "wan.modules.vae", "clip": "wan.modules.clip", "flf2v": "wan.first_last_frame2video"}
        parts |= {"vace_model": "wan.modules.vace_model", "vace": "wan.vace"}
    modules = {short: importlib.import_module(name) for short, name in parts.items()}
    return types.SimpleNamespace(is_21=is_21, **modules)


def build(wan, model):
    """The networks of one of `small.MODELS`, without weights."""
    return {part: build_one(wan, part, configuration) for part, configuration in small.MODELS[model].items()}


def build_one(wan, part, configuration):
    """One network, without weights, from our words for its dimensions."""
    c = dict(configuration)
    with torch.device("meta"):
        if c.get("vace_layers"):
            return wan.vace_model.VaceWanModel(**c | {"vace_layers": list(c["vace_layers"])})
        if part.startswith("transformer"):
            return wan.model.WanModel(**{k: v for k, v in c.items() if not k.startswith("image_")})
        if part == "image_encoder":
            ratio, eps = c.pop("ffn_dim") / c["dim"], c.pop("eps")
            return wan.clip.VisionTransformer(mlp_ratio=ratio, norm_eps=eps, activation="gelu", **c)
        if part == "text_encoder":
            return wan.t5.T5Encoder(vocab=c.pop("vocab_size"), shared_pos=False, dropout=0.1, **c)
        strides = list(c.pop("temporal_downsample"))
        module = wan.vae if "dec_dim" in c else wan.vae21  # the same file in both repositories
        return module.WanVAE_(**c | {"temperal_downsample": strides, "dim_mult": list(c["dim_mult"])})


def with_weights(part, model):
    """The network with the weights of tests/small.py, in evaluation mode."""
    state = {k: torch.from_numpy(small.weight(part, k, tuple(p.shape))) for k, p in model.named_parameters()}
    model.load_state_dict(state, assign=True)
    if part.startswith("transformer"):  # its rotary table is no parameter: make it off "meta"
        rope_params = sys.modules["wan.modules.model"].rope_params
        width = model.dim // model.num_heads
        third = 2 * (width // 6)
        model.freqs = torch.cat([rope_params(1024, w) for w in (width - 2 * third, third, third)], dim=1)
    return model.eval().requires_grad_(False)


def small_models(wan, model="small"):
    """The networks of a small model with their weights."""
    return {part: with_weights(part, network) for part, network in build(wan, model).items()}


def small_vae(wan, model="small"):
    """The VAE's class around the small network, with its own means and deviations."""
    network = with_weights("vae", build_one(wan, "vae", small.MODELS[model]["vae"]))
    module = sys.modules[type(network).__module__]
    original, module._video_vae = module._video_vae, lambda **_: network
    try:
        kind = next(name for name in ("Wan2_2_VAE", "Wan2_1_VAE", "WanVAE") if hasattr(module, name))
        return getattr(module, kind)(device="cpu")
    finally:
        module._video_vae = original


def small_clip(wan, network):
    """CLIPModel around the small network; of its transforms it uses torchvision's Normalize, the last."""
    clip = object.__new__(wan.clip.CLIPModel)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in CLIP_STATISTICS)
    clip.transforms = types.SimpleNamespace(transforms=[lambda pixels: (pixels - mean) / std])
    clip.model = torch.nn.Module()
    clip.model.visual, clip.model.image_size = network, network.image_size
    clip.dtype = torch.float32
    return clip


def tokenizer(wan, path, length):
    """The official HuggingfaceTokenizer over transformers' fast tokenizer of a tokenizer.json."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(path, folder)
        kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
        special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(kind | special))
        return wan.tokenizers.HuggingfaceTokenizer(folder, seq_len=length, clean="whitespace")


def scheduler(wan, name, steps, shift):
    """A sampler and its timesteps, set up as WanTI2V does; Euler on the grid of schedulers/euler.py."""
    fixed = {"num_train_timesteps": 1000, "shift": 1, "use_dynamic_shifting": False}
    if name == "unipc":
        sampler = wan.unipc.FlowUniPCMultistepScheduler(**fixed)
        sampler.set_timesteps(steps, device="cpu", shift=shift)
    elif name == "dpm++":
        sampler = wan.dpmpp.FlowDPMSolverMultistepScheduler(**fixed)
        sigmas = wan.dpmpp.get_sampling_sigmas(steps, shift)
        wan.dpmpp.retrieve_timesteps(sampler, device="cpu", sigmas=sigmas)
    else:
        sampler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
        sampler.set_timesteps(sigmas=wan.dpmpp.get_sampling_sigmas(steps, 1))
    return sampler, sampler.timesteps


def _pipe(wan, model, tokenizer_json):
    """An official pipeline around the small networks, made without its loading __init__; the task's name in `model`."""
    models = small_models(wan, model)
    encoder = object.__new__(wan.t5.T5EncoderModel)
    encoder.model, encoder.tokenizer = models["text_encoder"], tokenizer(wan, tokenizer_json, 512)
    task = "ti2v-5B" if model == "small" else model.removeprefix("small-")
    kind = {"ti2v": "WanTI2V", "t2v": "WanT2V", "i2v": "WanI2V", "flf2v": "WanFLF2V", "vace": "WanVace"}[
        task.split("-")[0]
    ]
    pipe = object.__new__(getattr(getattr(wan, task.split("-")[0]), kind))
    config = wan.configs.WAN_CONFIGS[task]
    vars(pipe).update(
        device=torch.device("cpu"), rank=0, sp_size=1, t5_cpu=True, init_on_cpu=False, param_dtype=torch.float32,
        num_train_timesteps=config.num_train_timesteps, sample_neg_prompt=config.sample_neg_prompt,
        vae_stride=config.vae_stride, patch_size=config.patch_size,
        text_encoder=encoder, vae=small_vae(wan, model),
    )  # fmt: skip
    if "image_encoder" in models:
        pipe.clip = small_clip(wan, models["image_encoder"])
    if "transformer_2" in models:
        vars(pipe).update(boundary=config.boundary)
        vars(pipe).update(high_noise_model=models["transformer"], low_noise_model=models["transformer_2"])
        return pipe, [pipe.high_noise_model, pipe.low_noise_model]
    pipe.model = models["transformer"]
    return pipe, [pipe.model]


def _vace_source(pipe, case):
    """What WanVace.generate takes, as its own prepare_source leaves it; that reads videos with decord, so not here."""
    clip, mask, references = small.vace_source()
    if case == "text":
        return [torch.zeros(3, 9, 48, 64)], [torch.ones(1, 9, 48, 64)], [None]
    video = torch.from_numpy(clip).permute(3, 0, 1, 2).float().div_(127.5).sub_(1.0)
    masks = torch.clamp((torch.from_numpy(mask)[None].float().div_(127.5).sub_(1.0) + 1) / 2, min=0, max=1)
    with tempfile.TemporaryDirectory() as folder:
        files = [f"{folder}/{i}.png" for i in range(len(references))]
        for file, reference in zip(files, references, strict=True):
            PIL.Image.fromarray(reference).save(file)
        size = types.SimpleNamespace(set_area=lambda _: None, set_seq_len=lambda _: None)
        pipe.vid_proc = size
        frames = types.SimpleNamespace(load_video_pair=lambda *_: (video, masks * 2 - 1, None, None, None))
        pipe.vid_proc = types.SimpleNamespace(**vars(size), **vars(frames))
        # Its sizes are the released ones; what follows does not look at them.
        return pipe.prepare_source([clip], [mask], [files], 9, (1280, 720), "cpu")


def run(wan, model, task, solver, tokenizer_json, case=None):
    """One whole run of a small model, "t2v", "i2v", "flf2v" or "vace" (`small.VACE_CASES`).

    Returns latents after every step, noise, text embeddings, which transformer each step took, and the video in
    [-1, 1].
    """
    pipe, experts = _pipe(wan, model, tokenizer_json)
    seen = types.SimpleNamespace(latents=[], contexts=[], experts=[], noise=None)
    known = {"": small.RUN} | small.EXPERT_RUNS | small.RUNS21 | {"vace-14B": small.VACE_RUN}
    settings = dict(known[model.removeprefix("small").removeprefix("-")])
    width, height = settings.pop("width"), settings.pop("height")
    common = {
        "frame_num": settings["num_frames"], "shift": settings["shift"], "sample_solver": solver,
        "sampling_steps": settings["num_inference_steps"], "guide_scale": settings["guidance_scale"],
        "seed": 7, "offload_model": False,
    }  # fmt: skip

    def spy(function, note):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            note(args, result)
            return result

        return call

    def note_call(number):
        def note(args, _):
            seen.latents.append(args[0][0])
            seen.experts.append(number)

        return note

    for number, transformer in enumerate(experts):
        transformer.forward = spy(transformer.forward, note_call(number))
    pipe.text_encoder = spy(pipe.text_encoder, lambda _, result: seen.contexts.append(result[0]))
    pipe.vae.decode = spy(pipe.vae.decode, lambda args, _: seen.latents.append(args[0][0]))
    randn = torch.randn
    torch.randn = spy(randn, lambda _, noise: setattr(seen, "noise", noise))
    try:
        if task == "t2v":
            seen.video = pipe.generate(small.RUN_PROMPT, size=(width, height), **common)
        elif task == "vace":
            common["context_scale"] = small.VACE_CASES[case]
            seen.video = pipe.generate(small.RUN_PROMPT, *_vace_source(pipe, case), size=(width, height), **common)
        else:
            picture, last = (PIL.Image.fromarray(small.picture(name=name)) for name in ("picture", "last"))
            pictures = {"first_frame": picture, "last_frame": last} if task == "flf2v" else {"img": picture}
            common |= pictures | {"max_area": width * height, "n_prompt": small.I2V_NEGATIVE_PROMPT}
            seen.video = pipe.generate(small.RUN_PROMPT, **common)
    finally:
        torch.randn = randn
    # The model is asked twice a step, both times with the same latents; what it is asked first is the start.
    seen.latents = [*seen.latents[:-1:2][1:], seen.latents[-1]]
    seen.experts = seen.experts[::2]
    return seen
