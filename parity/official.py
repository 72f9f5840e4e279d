"""The official Wan2.2 code, imported on a machine without a GPU and computing in float32.

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


def attention(q, k, v, q_lens=None, k_lens=None, window_size=(-1, -1)):
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
    """Modules of the official repository in `folder`, by short names."""
    root = Path(folder) / "wan"
    if not (root / "textimage2video.py").is_file():
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
        "unipc": "wan.utils.fm_solvers_unipc",
        "dpmpp": "wan.utils.fm_solvers",
        "ti2v": "wan.textimage2video",
        "configs": "wan.configs",
    }
    return types.SimpleNamespace(**{short: importlib.import_module(name) for short, name in parts.items()})


def build(wan, size):
    """The three networks, without weights: "small" or "ti2v-5B"."""
    configurations = small.SMALL if size == "small" else small.RELEASED
    return {part: build_one(wan, part, configuration) for part, configuration in configurations.items()}


def build_one(wan, part, configuration):
    """One network, without weights, from our words for its dimensions."""
    c = dict(configuration)
    with torch.device("meta"):
        if part == "transformer":
            return wan.model.WanModel(**c)
        if part == "text_encoder":
            return wan.t5.T5Encoder(vocab=c.pop("vocab_size"), shared_pos=False, dropout=0.1, **c)
        strides = list(c.pop("temporal_downsample"))
        return wan.vae.WanVAE_(**c | {"temperal_downsample": strides, "dim_mult": list(c["dim_mult"])})


def with_weights(part, model):
    """The network with the weights of tests/small.py, in evaluation mode."""
    state = {k: torch.from_numpy(small.weight(part, k, tuple(p.shape))) for k, p in model.named_parameters()}
    model.load_state_dict(state, assign=True)
    if part == "transformer":  # its rotary table is no parameter: make it off "meta"
        rope_params = sys.modules[type(model).__module__].rope_params
        width = model.dim // model.num_heads
        third = 2 * (width // 6)
        model.freqs = torch.cat([rope_params(1024, w) for w in (width - 2 * third, third, third)], dim=1)
    return model.eval().requires_grad_(False)


def small_models(wan):
    """The small networks with their weights."""
    return {part: with_weights(part, model) for part, model in build(wan, "small").items()}


def small_vae(wan):
    """Wan2_2_VAE around the small network, with the class's own means and deviations."""
    network = small_models(wan)["vae"]
    original, wan.vae._video_vae = wan.vae._video_vae, lambda **_: network
    try:
        return wan.vae.Wan2_2_VAE(device="cpu")
    finally:
        wan.vae._video_vae = original


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


def ti2v(wan, tokenizer_json):
    """WanTI2V around the small networks, made without its loading __init__."""
    models = small_models(wan)
    encoder = object.__new__(wan.t5.T5EncoderModel)
    encoder.model, encoder.tokenizer = models["text_encoder"], tokenizer(wan, tokenizer_json, 512)
    pipe = object.__new__(wan.ti2v.WanTI2V)
    config = wan.configs.WAN_CONFIGS["ti2v-5B"]
    vars(pipe).update(
        device=torch.device("cpu"), rank=0, sp_size=1, t5_cpu=True, init_on_cpu=False, param_dtype=torch.float32,
        num_train_timesteps=config.num_train_timesteps, sample_neg_prompt=config.sample_neg_prompt,
        vae_stride=config.vae_stride, patch_size=config.patch_size,
        text_encoder=encoder, vae=small_vae(wan), model=models["transformer"],
    )  # fmt: skip
    return pipe


def run(wan, task, solver, tokenizer_json):
    """One whole run of small.RUN; latents after every step, noise, text embeddings, and the video in [-1, 1]."""
    pipe, seen = ti2v(wan, tokenizer_json), types.SimpleNamespace(latents=[], contexts=[], noise=None)
    settings = dict(small.RUN)
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

    forward, encode, decode = pipe.model.forward, pipe.text_encoder, pipe.vae.decode
    pipe.model.forward = spy(forward, lambda args, _: seen.latents.append(args[0][0]))
    pipe.text_encoder = spy(encode, lambda _, result: seen.contexts.append(result[0]))
    pipe.vae.decode = spy(decode, lambda args, _: seen.latents.append(args[0][0]))
    randn = torch.randn
    torch.randn = spy(randn, lambda _, noise: setattr(seen, "noise", noise))
    try:
        if task == "t2v":
            seen.video = pipe.generate(small.RUN_PROMPT, size=(width, height), **common)
        else:
            picture = PIL.Image.fromarray(small.picture())
            seen.video = pipe.generate(
                small.RUN_PROMPT, img=picture, max_area=width * height, n_prompt=small.I2V_NEGATIVE_PROMPT, **common
            )
    finally:
        torch.randn = randn
    # The model is asked twice a step, both times with the same latents; what it is asked first is the start.
    seen.latents = [*seen.latents[:-1:2][1:], seen.latents[-1]]
    return seen
