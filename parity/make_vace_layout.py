# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "diffusers==0.42.1", "transformers==5.23.0", "numpy>=2", "safetensors"]
# ///
"""What diffusers writes of VACE's small transformer, and what it computes: tests/golden/diffusers_vace.json.

    uv run parity/make_vace_layout.py

Its config.json, and every tensor of its file with the official name whose numbers it holds. It fails if its velocity is
not the official code's (tests/golden/vace.npz): that proves the renaming.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import WanVACEPipeline, WanVACETransformer3DModel
from diffusers_names import TRANSFORMER_NAMES
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import small

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
NAMES = [*TRANSFORMER_NAMES, (r"before_proj", "proj_in"), (r"after_proj", "proj_out")]


def renamed(name):
    for pattern, new in NAMES:
        name = re.sub(pattern, new, name)
    return name


def first(array):
    """(1, t, h, w, C) -> (1, C, t, h, w)."""
    return torch.from_numpy(np.moveaxis(array, -1, 1).copy())


def main():
    c = small.VACE
    model = WanVACETransformer3DModel(
        patch_size=c["patch_size"], num_attention_heads=c["num_heads"], attention_head_dim=c["dim"] // c["num_heads"],
        in_channels=c["in_dim"], out_channels=c["out_dim"], text_dim=c["text_dim"], freq_dim=c["freq_dim"],
        ffn_dim=c["ffn_dim"], num_layers=c["num_layers"], vace_layers=list(c["vace_layers"]),
        vace_in_channels=c["vace_in_dim"],
    )  # fmt: skip
    shapes = json.loads((GOLDEN / "names.json").read_text())["small-vace-14B"]["transformer"]
    weights = {n: small.weight("transformer", n, tuple(shape)) for n, shape in shapes.items()}
    model.load_state_dict({renamed(n): torch.from_numpy(w) for n, w in weights.items()}, strict=True)
    context = np.zeros((1, c["text_len"], c["text_dim"]), np.float32)
    context[0, :11] = small.random("vace/context", (11, c["text_dim"]))
    latents, control = (small.random(f"vace/{k}", (1, 3, 4, 6, n)) for k, n in (("latents", 16), ("control", 96)))
    with torch.no_grad():
        velocity = model.eval()(
            first(latents), torch.tensor([640.0]), torch.from_numpy(context), control_hidden_states=first(control),
            control_hidden_states_scale=torch.full((len(c["vace_layers"]),), 0.7),
        ).sample  # fmt: skip
    want = np.load(GOLDEN / "vace.npz")["velocity"]
    got = np.moveaxis(velocity.numpy(), 1, -1)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    print(f"diffusers is {error:.1e} from the official code")
    assert error < 1e-5
    with tempfile.TemporaryDirectory() as folder:
        pipe = WanVACEPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=model)
        pipe.save_pretrained(folder)
        index = json.loads((Path(folder) / "model_index.json").read_text())
        config = json.loads((Path(folder) / "transformer" / "config.json").read_text())
        (file,) = (Path(folder) / "transformer").glob("*.safetensors")
        tensors = {
            own: next(n for n, w in weights.items() if w.shape == a.shape and np.array_equal(w, a))
            for own, a in load_file(file).items()
        }
    assert set(tensors.values()) == set(weights)
    path = GOLDEN / "diffusers_vace.json"
    path.write_text(json.dumps({"model_index": index, "config": config, "tensors": tensors}, indent=1) + "\n")
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
