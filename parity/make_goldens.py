# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "diffusers==0.42.1", "transformers==5.23.0", "tokenizers==0.23.3", "numpy>=2", "einops",
#   "easydict", "ftfy==6.3.1", "regex", "tqdm", "pillow", "safetensors", "sentencepiece",
# ]
# ///
"""Runs the official PyTorch code on the small checkpoint of tests/small.py and writes tests/golden/.

    git clone https://github.com/Wan-Video/Wan2.2 && git -C Wan2.2 checkout 42bf4cf
    uv run parity/make_goldens.py --official Wan2.2 [--only tokens schedulers ...]
    git clone https://github.com/Wan-Video/Wan2.1 && git -C Wan2.1 checkout 9737cba
    uv run parity/make_goldens.py --official Wan2.1
    uv run parity/make_goldens.py --official Wan2.2 --at-scale runs/at_scale.npz

float32 on the CPU. Goldens are written channels last, as this project has them. The last command, for
parity/report.py, takes the released widths, a minute and some 8 GB of memory.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import official
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
sys.path.insert(0, str(ROOT / "tests"))
import small  # noqa: E402


def save(name, arrays):
    path = GOLDEN / f"{name}.npz"
    np.savez_compressed(path, **{k: np.asarray(v) for k, v in arrays.items()})
    print(f"{path.relative_to(ROOT)}: {len(arrays)} arrays, {path.stat().st_size / 1024:.0f} KiB")


def channels_first(array):
    """(1, t, h, w, C) -> the reference's (C, t, h, w)."""
    return torch.from_numpy(np.moveaxis(array[0], -1, 0).copy())


def channels_last(tensor):
    """The reference's (C, t, h, w) -> (1, t, h, w, C)."""
    return np.moveaxis(tensor.detach().numpy(), 0, -1)[None]


def names(wan):
    """Every official parameter name and shape of `small.MODELS`; those of the other repository stay as they are."""

    def shapes(module):
        return {name: list(p.shape) for name, p in module.named_parameters()}

    path = GOLDEN / "names.json"
    table = json.loads(path.read_text()) if path.is_file() else {}
    for model in small.MODELS21 if wan.is_21 else small.MODELS.keys() - small.MODELS21.keys():
        table[model] = {part: shapes(module) for part, module in official.build(wan, model).items()}
    table = {model: table[model] for model in small.MODELS if model in table}
    path.write_text(json.dumps(table, separators=(",", ":")) + "\n")
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1024:.0f} KiB")


def tokens(wan):
    """Ids and mask of the official cleaning and tokenizer, at 512 and where 64 cuts texts off."""
    out = {}
    for length in (64, 512):
        tokenizer = official.tokenizer(wan, GOLDEN / "tokenizer.json", length)
        ids, mask = tokenizer(list(small.PROMPTS), return_mask=True, add_special_tokens=True)
        out[f"ids/{length}"], out[f"mask/{length}"] = ids.numpy().astype(np.int32), mask.numpy().astype(np.int32)
    out["cleaned"] = np.array([tokenizer._clean(p) for p in small.PROMPTS])
    out["negative_prompt"] = np.array(wan.configs.WAN_CONFIGS["ti2v-5B"].sample_neg_prompt)
    save("tokens", out)


def text_encoder(wan):
    """Embeddings of padded token rows; 200 long, so that far pairs share the last buckets on both sides.

    And the bucket of every distance there is in 512 tokens.
    """
    model = official.small_models(wan)["text_encoder"]
    ids = np.load(GOLDEN / "tokens.npz")["ids/512"][:, :200]
    mask = np.load(GOLDEN / "tokens.npz")["mask/512"][:, :200]
    with torch.no_grad():
        out = model(torch.from_numpy(ids).long(), torch.from_numpy(mask))
    rows = [u[:n].numpy() for u, n in zip(out, mask.sum(1), strict=True)]
    buckets = model.blocks[0].pos_embedding._relative_position_bucket(torch.arange(-511, 512))
    save("text_encoder", {"ids": ids, "mask": mask, "embeddings": np.concatenate(rows), "buckets": buckets})


def transformer(wan):
    """One call with one timestep a sample; one with a batch of two whose tokens each have their own."""
    model = official.small_models(wan)["transformer"]
    out = {}
    with torch.no_grad():
        for case, grid, time in (("scalar", (2, 4, 10), [875.0]), ("mixed", (3, 6, 4), [999.0, 437.25])):
            latents = [small.random(f"transformer/{case}/{i}", (1, *grid, 48)) for i in range(len(time))]
            context = [small.random(f"context/{case}/{i}", (9 + 20 * i, 64)) for i in range(len(time))]
            count = grid[0] * grid[1] * grid[2] // 4
            t = torch.tensor(time)
            if case == "mixed":  # the first frame clean, and one token of its own
                t = t[:, None].repeat(1, count)
                t[:, : count // grid[0]] = 0
                t[1, -1] = 12.625
            result = model([channels_first(x) for x in latents], t, [torch.from_numpy(c) for c in context], count)
            out[f"{case}/timesteps"] = t.numpy()
            out[f"{case}/velocity"] = np.concatenate([channels_last(x) for x in result])
    save("transformer", out)


def _vae(wan, model, stride, channels):
    """Encode and decode of a 13-frame clip and of one frame, neither square."""
    model = official.small_vae(wan, model)
    mean, inverse_std = model.scale
    out = {"latents_mean": mean.numpy(), "latents_std": (1 / inverse_std).numpy()}
    for case, (frames, height, width) in {"clip": (13, 32, 48), "frame": (1, 64, 32)}.items():
        video = small.video(f"vae/{case}", frames, height, width)
        shape = ((frames + 3) // 4, height // stride, width // stride, channels)
        latents = small.random(f"vae/{case}/latents", shape)[None]
        with torch.no_grad():
            out[f"{case}/encoded"] = channels_last(model.encode([channels_first(video)])[0])
            out[f"{case}/decoded"] = channels_last(model.decode([channels_first(latents)])[0])
    return out


def vae(wan):
    """The Wan2.2 autoencoder."""
    save("vae", _vae(wan, "small", 16, 48))


def vae21(wan):
    """The Wan2.1 autoencoder."""
    save("vae21", _vae(wan, "small-t2v-A14B", 8, 16))


# From small.picture(), 100x70: to less, to more, and to another shape. Some pixels of each are stored.
STRETCHED = ((64, 32), (112, 80), (48, 96))


def pictures(_):
    """A picture stretched as image2video.py does it."""
    picture = official.to_tensor(small.picture()).sub_(0.5).div_(0.5)[None]
    sizes = {f"{w}x{h}": torch.nn.functional.interpolate(picture, size=(h, w), mode="bicubic") for w, h in STRETCHED}
    save("pictures", {name: frame[0].permute(1, 2, 0).numpy()[::3, ::2] for name, frame in sizes.items()})


def schedulers(wan):
    """Every intermediate latent of runs with a fixed function in the model's place."""
    out = {}
    start = torch.from_numpy(small.random("schedulers", (1, 2, 3, 4, 5)))
    runs = [(n, shift) for n in (1, 2, 3, 6, 20, 50) for shift in (5.0,)] + [(6, 1.0), (20, 3.0), (20, 12.0)]
    for name in ("unipc", "dpm++", "euler"):
        for steps, shift in runs:
            scheduler, timesteps = official.scheduler(wan, name, steps, shift)
            x, after = start, []
            for t in timesteps:
                velocity = torch.sin(1.7 * x + t.float() / 500) - 0.3 * x
                x = scheduler.step(velocity, t, x, return_dict=False)[0]
                after.append(x.numpy())
            key = f"{name}/{steps}/{shift:g}"
            out[f"{key}/timesteps"], out[f"{key}/sigmas"] = timesteps.numpy(), scheduler.sigmas.numpy()
            out[f"{key}/latents"] = np.stack(after)
    save("schedulers", out)


def runs(wan):
    """WanTI2V.t2v and .i2v from prompt to frames: six steps, guidance 5, shift 5, both official samplers."""
    out = {}
    for task in ("t2v", "i2v"):
        for solver in ("unipc", "dpm++"):
            result = official.run(wan, "small", task, solver, GOLDEN / "tokenizer.json")
            key = f"{task}/{solver}"
            out[f"{key}/latents"] = np.concatenate([channels_last(x) for x in result.latents])  # after each step
            out[f"{key}/frames"] = channels_last(result.video)[0][:, ::4, ::4]  # every fourth pixel
            out[f"{task}/noise"] = channels_last(result.noise)
            out[f"{key}/context"], out[f"{key}/context_null"] = (c.numpy() for c in result.contexts)
    save("runs", out)


def expert_runs(wan):
    """WanT2V and WanI2V of the A14B models: six steps that cross the boundary, guidance of its own on either side."""
    out = {}
    for model in small.EXPERT_RUNS:
        task = model.split("-")[0]
        for solver in ("unipc", "dpm++"):
            result = official.run(wan, f"small-{model}", task, solver, GOLDEN / "tokenizer.json")
            key = f"{model}/{solver}"
            out[f"{key}/latents"] = np.concatenate([channels_last(x) for x in result.latents])  # after each step
            out[f"{key}/experts"] = np.array(result.experts)  # 0 high noise, 1 low noise
            out[f"{key}/frames"] = channels_last(result.video)[0][:, ::4, ::4]  # every fourth pixel
            out[f"{model}/noise"] = channels_last(result.noise)
        network = official.small_models(wan, f"small-{model}")["transformer_2"]
        latents, channels = (small.random(f"{model}/{k}", (1, 3, 4, 6, n)) for k, n in (("latents", 16), ("y", 20)))
        picture = {"y": [channels_first(channels)]} if task == "i2v" else {}
        context = [torch.from_numpy(small.random(f"{model}/context", (11, 64)))]
        with torch.no_grad():
            (result,) = network([channels_first(latents)], torch.tensor([875.0]), context, 18, **picture)
        out[f"{model}/velocity"] = channels_last(result)
    save("expert_runs", out)


def runs21(wan):
    """WanT2V, WanI2V and WanFLF2V of the Wan2.1 repository, UniPC; and what its image encoder makes of a picture."""
    out = {}
    for model in small.RUNS21:
        task = model.split("-")[0]
        result = official.run(wan, f"small-{model}", task, "unipc", GOLDEN / "tokenizer.json")
        out[f"{model}/latents"] = np.concatenate([channels_last(x) for x in result.latents])  # after each step
        out[f"{model}/frames"] = channels_last(result.video)[0][::4, ::4, ::4]  # every fourth frame and pixel
        out[f"{model}/noise"] = channels_last(result.noise)
    clip = official.small_clip(wan, official.small_models(wan, "small-i2v-14B")["image_encoder"])
    picture = official.to_tensor(small.picture()).sub_(0.5).div_(0.5)
    with torch.no_grad():
        out["image_tokens"] = clip.visual([picture[:, None]])[:, ::8, ::16].numpy()
    save("runs21", out)


def vace(wan):
    """WanVace with and without a source, UniPC; and one call of its transformer."""
    out = {}
    for case in small.VACE_CASES:
        result = official.run(wan, "small-vace-14B", "vace", "unipc", GOLDEN / "tokenizer.json", case)
        *steps, last = (channels_last(x) for x in result.latents)
        out[f"{case}/latents"] = np.concatenate(steps)  # after each step; of the last without those of references
        out[f"{case}/last"] = last
        out[f"{case}/frames"] = channels_last(result.video)[0][::2, ::4, ::4]
        out[f"{case}/noise"] = channels_last(result.noise)
    network = official.small_models(wan, "small-vace-14B")["transformer"]
    latents, control = (small.random(f"vace/{k}", (1, 3, 4, 6, n)) for k, n in (("latents", 16), ("control", 96)))
    context = [torch.from_numpy(small.random("vace/context", (11, 64)))]
    with torch.no_grad():
        told = [channels_first(latents)], torch.tensor([640.0]), [channels_first(control)], context, 18
        out["velocity"] = channels_last(network(*told, vace_context_scale=0.7)[0])
    save("vace", out)


def gradients(wan):
    """Of sum(output * probe) for each network: up to 32 numbers of every parameter's gradient, spread evenly."""
    out = {}

    def note(case, parameters, loss):
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            out[f"{case}/{name}"] = small.spread(gradient.numpy())

    for part, model in official.small_models(wan).items():
        model.requires_grad_(True)
        parameters = dict(model.named_parameters())
        if part == "transformer":
            latents = torch.from_numpy(small.random("gradient/latents", (48, 2, 4, 6))).requires_grad_()
            context = torch.from_numpy(small.random("gradient/context", (512, 64))).requires_grad_()
            t = torch.tensor([[0.0] * 6 + [640.5] * 6])
            (result,) = model([latents], t, [context], 12)
            probe = torch.from_numpy(small.random("gradient/velocity", tuple(result.shape)))
            note(part, parameters | {"latents": latents, "context": context}, (result * probe).sum())
        elif part == "text_encoder":
            ids, mask = (np.load(GOLDEN / "tokens.npz")[f"{k}/64"][2:4] for k in ("ids", "mask"))
            result = model(torch.from_numpy(ids).long(), torch.from_numpy(mask))
            probe = torch.from_numpy(small.random("gradient/text", tuple(result.shape)) * mask[..., None])
            note(part, parameters, (result * probe).sum())
        else:
            scale = official.small_vae(wan).scale
            video = torch.from_numpy(small.random("gradient/video", (1, 3, 9, 32, 48))).requires_grad_()
            mean = model.encode(video, scale)
            probe = torch.from_numpy(small.random("gradient/mean", tuple(mean.shape)))
            used = {k: p for k, p in parameters.items() if k.startswith(("encoder", "conv1"))}
            note("encode", used | {"video": video}, (mean * probe).sum())
            latents = torch.from_numpy(small.random("gradient/codes", (1, 48, 3, 2, 3))).requires_grad_()
            pixels = model.decode(latents, scale)
            probe = torch.from_numpy(small.random("gradient/pixels", tuple(pixels.shape)))
            used = {k: p for k, p in parameters.items() if k.startswith(("decoder", "conv2"))}
            note("decode", used | {"latents": latents}, (pixels * probe).sum())
    save("gradients", out)


def at_scale(wan, path):
    """One call of each network at the released widths, two layers of transformer and text encoder, the VAE whole."""
    out = {}
    for part, configuration in small.at_scale().items():
        model = official.with_weights(part, official.build_one(wan, part, configuration))
        with torch.no_grad():
            if part == "transformer":
                latents, context = (
                    small.random("scale/latents", (48, 2, 4, 6)),
                    small.random("scale/context", (20, 4096)),
                )
                t = torch.tensor([[0.0] * 6 + [500.5] * 6])
                out[part] = model([torch.from_numpy(latents)], t, [torch.from_numpy(context)], 12)[0].numpy()
            elif part == "text_encoder":
                ids = np.load(GOLDEN / "tokens.npz")["ids/64"][2:3]
                out[part] = model(torch.from_numpy(ids).long(), torch.ones(1, 64))[0].numpy()
            else:
                scale = official.small_vae(wan).scale
                out["encode"] = model.encode(channels_first(small.video("scale", 5, 64, 64))[None], scale)[0].numpy()
                codes = torch.from_numpy(small.random("scale/codes", (1, 48, 2, 4, 4)))
                out["decode"] = model.decode(codes, scale)[0].numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **out)


GOLDENS = {
    f.__name__: f
    for f in (names, tokens, text_encoder, transformer, vae, vae21, pictures, schedulers, runs, expert_runs, gradients)
}
GOLDENS21 = {f.__name__: f for f in (names, runs21, vace)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", required=True, help="a clone of the official repository")
    parser.add_argument("--only", nargs="+", choices=GOLDENS | GOLDENS21)
    parser.add_argument("--at-scale", type=Path, metavar="FILE", help="instead: large networks, to this file")
    args = parser.parse_args()
    torch.set_num_threads(2)
    wan = official.load(args.official)
    if args.at_scale:
        return at_scale(wan, args.at_scale)
    goldens = GOLDENS21 if wan.is_21 else GOLDENS
    for name in args.only or goldens:
        goldens[name](wan)


if __name__ == "__main__":
    main()
