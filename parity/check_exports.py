# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "diffusers==0.42.1", "transformers==5.23.0", "numpy>=2", "safetensors", "einops", "easydict",
#   "ftfy==6.3.1", "regex", "tqdm", "pillow",
# ]
# ///
"""Loads what `mlx-wan convert --to official` and `--to diffusers` wrote with the programs they are meant for.

    uv run python -c "import sys; sys.path.insert(0, 'tests'); import pathlib, checkpoint; \
        checkpoint.write_official(pathlib.Path('runs/small'))"
    uv run mlx-wan convert runs/small runs/native
    uv run mlx-wan convert runs/native runs/official --to official
    uv run mlx-wan convert runs/native runs/diffusers --to diffusers
    uv run parity/check_exports.py runs/official runs/diffusers

Every tensor must be there, under the right name, with the very numbers of tests/small.py. Further folders are Diffusers
repositories of other small models (checkpoint.write_official(folder, "small-t2v-A14B"), converted): what diffusers and
transformers load of each must be the numbers of its files, all of them and nothing else.
"""

import json
import sys
from pathlib import Path

import cross_check
import small
import torch
from diffusers import DiffusionPipeline, WanPipeline
from safetensors.torch import load_file


def check_loaded(folder):
    """Each network that the pipeline's class loads against the files it came from."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    print(f"{folder}: {type(pipe).__name__}, boundary {pipe.config.get('boundary_ratio')}")
    for part in ("transformer", "transformer_2", "text_encoder", "image_encoder", "vae"):
        module = getattr(pipe, part, None)
        files = sorted((folder / part).glob("*.safetensors"))
        assert (module is not None) == bool(files), part
        if module is None:
            continue
        stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
        state = module.state_dict()
        tied = {"encoder.embed_tokens.weight"} if part == "text_encoder" else set()
        prefix = "vision_model." if part == "image_encoder" and "vision_model." not in next(iter(state)) else ""
        state = {name if name.startswith("visual_") else prefix + name: tensor for name, tensor in state.items()}
        assert state.keys() - tied == stored.keys() - tied, (part, state.keys() ^ stored.keys())
        assert all(torch.equal(state[name], stored[name]) for name in stored), part
        print(f"  {part}, {type(module).__name__}: {len(stored)} tensors equal")
    for part in ("tokenizer", "image_processor", "scheduler"):
        print(f"  {part}: {type(getattr(pipe, part, None)).__name__}")


def main(official, diffusers, *others):
    for folder in others:
        check_loaded(folder)
    names = json.loads((cross_check.GOLDEN / "names.json").read_text())["small"]
    files = {"text_encoder": "models_t5_umt5-xxl-enc-bf16.pth", "vae": "Wan2.2_VAE.pth"}
    for part in ("transformer", *files):
        if part in files:
            stored = torch.load(official / files[part], weights_only=True)
        else:
            stored = {k: v for f in official.glob("*.safetensors") for k, v in load_file(f).items()}
        want = {name: torch.from_numpy(small.weight(part, name, tuple(s))) for name, s in names[part].items()}
        assert stored.keys() == want.keys(), part
        assert all(torch.equal(stored[name], want[name]) for name in want), part
        print(f"official {part}: {len(want)} tensors equal")
    pipe = WanPipeline.from_pretrained(diffusers)
    assert pipe.config.expand_timesteps
    tables = {
        "transformer": cross_check.TRANSFORMER_NAMES,
        "text_encoder": cross_check.TEXT_NAMES,
        "vae": cross_check.VAE_NAMES,
    }
    for part, table in tables.items():
        got = {name: tensor.clone() for name, tensor in getattr(pipe, part).state_dict().items()}
        want = cross_check.fill(getattr(pipe, part), part, table).state_dict()
        assert all(torch.equal(got[name], want[name]) for name in want), part
        print(f"diffusers {part}: {len(want)} tensors equal")
    ids = pipe.tokenizer("a red circle").input_ids
    print("tokenizer:", ids)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
