# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "diffusers==0.42.1", "transformers==5.23.0", "tokenizers==0.23.3", "numpy>=2", "einops",
#   "easydict", "ftfy==6.3.1", "regex", "tqdm", "pillow",
# ]
# ///
"""Runs of three and four steps in PyTorch: writes tests/golden/few_steps.npz.

    uv run parity/make_few_step_goldens.py --official Wan2.2

Euler is diffusers' FlowMatchEulerDiscreteScheduler and DPM++ the official one, both given levels. DMD is written out
below after the formulas of FastVideo's DmdDenoisingStage, with float64 between the steps: x0 = x - sigma v, then
(1 - sigma') x0 + sigma' noise. FastVideo looks sigma up in a table of 1000 shifted levels, nearest to t; here it is
t / 1000, at most 0.0005 from that. The networks are the official ones with the weights of tests/small.py; noise is
drawn from names on both sides.
"""

import argparse
import sys
from pathlib import Path

import diffusers
import numpy as np
import official
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import small  # noqa: E402


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--official", required=True, type=Path)
    wan = official.load(parser.parse_args().official)
    torch.set_grad_enabled(False)
    arrays = dict(samplers(wan)) | dict(distilled(wan)) | dict(experts(wan))
    path = ROOT / "tests" / "golden" / "few_steps.npz"
    np.savez_compressed(path, **arrays)
    print(f"{path.relative_to(ROOT)}: {len(arrays)} arrays, {path.stat().st_size / 1024:.0f} KiB")


def dmd(velocity, x, timesteps, noise):
    """Latents after each step; velocity(x, t) and noise(i) give float32."""
    levels = [t / 1000 for t in timesteps] + [0.0]
    for i, t in enumerate(timesteps):
        clean = x.double() - levels[i] * velocity(x, t).double()
        if levels[i + 1]:
            clean = (1 - levels[i + 1]) * clean + levels[i + 1] * noise(i).double()
        x = clean.float()
        yield x


def samplers(wan):
    """A fixed function in the model's place, and timesteps that are given."""
    start = torch.from_numpy(small.random("schedulers", (1, 2, 3, 4, 5)))

    def velocity(x, t):
        return torch.sin(1.7 * x + float(t) / 500) - 0.3 * x

    for timesteps in small.FEW_STEPS["dmd"]:
        noise = lambda i: torch.from_numpy(small.random(f"few_steps/noise/{i}", tuple(start.shape)))  # noqa: E731
        steps = dmd(velocity, start, timesteps, noise)
        yield f"dmd/{key(timesteps)}", np.stack([x.numpy() for x in steps])
    for name in ("euler", "dpm++"):
        for timesteps in small.FEW_STEPS[name]:
            sigmas = [t / 1000 for t in timesteps]
            if name == "euler":
                sampler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1)
                sampler.set_timesteps(sigmas=sigmas)
            else:
                sampler = wan.dpmpp.FlowDPMSolverMultistepScheduler(
                    num_train_timesteps=1000, shift=1, use_dynamic_shifting=False
                )
                wan.dpmpp.retrieve_timesteps(sampler, device="cpu", sigmas=np.array(sigmas))
            x, after = start, []
            for t in sampler.timesteps:
                x = sampler.step(velocity(x, t), t, x, return_dict=False)[0]
                after.append(x.numpy())
            yield f"{name}/{key(timesteps)}", np.stack(after)


def key(timesteps):
    return ",".join(map(str, timesteps))


def first(array):
    """(1, t, h, w, C) -> the reference's (C, t, h, w)."""
    return torch.from_numpy(np.moveaxis(array[0], -1, 0).copy())


def text():
    """(n, text_dim)."""
    return torch.from_numpy(small.few_step_input("context"))


def last(tensor):
    return np.moveaxis(tensor.numpy(), 0, -1)


def distilled(wan):
    """The small TI2V model as FastWan is sampled, one pass a step; from text, and from a first frame."""
    model = official.small_models(wan)["transformer"]
    x, frame, context = first(small.few_step_input("latents")), first(small.few_step_input("frame")), text()
    tokens = x.shape[1] * (x.shape[2] // 2) * (x.shape[3] // 2)
    for task in ("t2v", "i2v"):

        def put(x, given=task == "i2v"):
            return torch.cat([frame, x[:, 1:]], dim=1) if given else x

        def velocity(x, t, given=task == "i2v"):
            times = torch.full((1, tokens), float(t))
            if given:
                times[:, : tokens // x.shape[1]] = 0
            return model([x], t=times, context=[context], seq_len=tokens)[0]

        after, latents = [], put(x)
        timesteps = small.FEW_STEPS["dmd"][0]
        levels = [t / 1000 for t in timesteps]
        for i, t in enumerate(timesteps):  # one step at a time, since the first frame is put back between them
            pair = [t] if i + 1 == len(levels) else [t, timesteps[i + 1]]
            latents = put(next(dmd(velocity, latents, pair, lambda _, i=i: first(small.few_step_noise(i, 48)))))
            after.append(last(latents))
        yield f"{task}/latents", np.stack(after)


def experts(wan):
    """The small T2V-A14B model as Lightning's LoRAs are sampled: four Euler steps of shift 5, guidance 1."""
    models = official.small_models(wan, "small-t2v-A14B")
    x, context = first(small.few_step_input("latents", 16)), text()
    tokens = x.shape[1] * (x.shape[2] // 2) * (x.shape[3] // 2)
    sampler = diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=5)
    sampler.set_timesteps(sigmas=wan.dpmpp.get_sampling_sigmas(4, 1))
    after, used = [], []
    for t in sampler.timesteps:
        part = "transformer" if t >= 875 else "transformer_2"
        velocity = models[part]([x], t=t[None], context=[context], seq_len=tokens)[0]
        x = sampler.step(velocity[None], t, x[None], return_dict=False)[0][0]
        after.append(last(x))
        used.append(part == "transformer_2")
    yield "experts/latents", np.stack(after)
    yield "experts/used", np.array(used)


if __name__ == "__main__":
    main()
