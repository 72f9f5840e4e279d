# /// script
# requires-python = ">=3.11"
# dependencies = [
#   "torch==2.13.0", "diffusers==0.42.1", "transformers==5.23.0", "peft==0.21.2", "lycoris-lora==4.1.3", "accelerate",
#   "toml", "safetensors", "numpy>=2",
# ]
# ///
"""Adapters as their real writers write them, and what diffusers and PEFT compute with them.

Writes tests/golden/lora/: files by diffusers, PEFT and LyCORIS for the small transformer, a kohya file and a lightx2v
file as those projects name things (no package writes them), and velocities.npz, what diffusers makes of each.

    uv run parity/make_lora_goldens.py
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import small  # noqa: E402

OUT = ROOT / "tests" / "golden" / "lora"
NAMES = json.loads((ROOT / "tests" / "golden" / "names.json").read_text())["small"]["transformer"]
GRID = (2, 4, 4)
RANK = 2
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
FFN = ["ffn.net.0.proj", "ffn.net.2"]


def diffusers_transformer():
    """The small transformer as diffusers has it, converted from official names by diffusers itself."""
    c = small.TRANSFORMER
    model = WanTransformer3DModel(
        patch_size=c["patch_size"], num_attention_heads=c["num_heads"], attention_head_dim=c["dim"] // c["num_heads"],
        in_channels=c["in_dim"], out_channels=c["out_dim"], text_dim=c["text_dim"], freq_dim=c["freq_dim"],
        ffn_dim=c["ffn_dim"], num_layers=c["num_layers"], eps=c["eps"],
    )  # fmt: skip
    official = {name: torch.from_numpy(small.weight("transformer", name, tuple(s))) for name, s in NAMES.items()}
    model.load_state_dict(convert_wan_transformer_to_diffusers(official), strict=True)
    return model.eval().requires_grad_(False)


def velocity(model):
    """(t, h, w, C) at timestep 500, for the inputs of tests/lora."""
    latents = torch.from_numpy(small.random("transformer/lora/0", (*GRID, 48))).permute(3, 0, 1, 2)[None]
    context = torch.zeros(1, small.TRANSFORMER["text_len"], 64)
    context[0, :9] = torch.from_numpy(small.random("context/lora/0", (9, 64)))
    with torch.no_grad():
        out = model(latents, torch.tensor([500.0]), context, return_dict=False)[0]
    return out[0].permute(1, 2, 3, 0).numpy()


def fill(model, seed):
    """Numbers from names alone in every parameter of an adapter; B is not zero, so that it acts."""
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in ("lora_", "lokr_", "hada_")):
            values = small.random(f"{seed}/{name}", tuple(parameter.shape)) / parameter.shape[-1] ** 0.5
            parameter.data = torch.from_numpy(values)


def by_diffusers(out, velocities):
    """WanPipeline.save_lora_weights: `transformer.` names, and rank and alpha in the header alone."""
    model = diffusers_transformer()
    model.add_adapter(LoraConfig(r=RANK, lora_alpha=3, target_modules=ATTENTION + FFN, init_lora_weights=False))
    fill(model, "diffusers")
    layers = {k.replace(".default", ""): v for k, v in model.state_dict().items() if "lora_" in k}
    config = model.peft_config["default"].to_dict()
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    WanPipeline.save_lora_weights(
        out, layers, weight_name="diffusers.safetensors", transformer_lora_adapter_metadata=config
    )
    velocities["diffusers"] = velocity(model)


def by_peft(out, velocities):
    """PeftModel.save_pretrained: `base_model.model.` names, biases of B, alpha per layer, adapter_config.json."""
    config = LoraConfig(
        r=RANK, lora_alpha=1, alpha_pattern={"attn1.to_q": 5}, lora_bias=True, init_lora_weights=False,
        target_modules=["attn1.to_q", "attn2.to_v", "proj_out", "condition_embedder.time_proj",
                        "condition_embedder.text_embedder.linear_1", "condition_embedder.time_embedder.linear_2"],
    )  # fmt: skip
    model = get_peft_model(diffusers_transformer(), config)
    fill(model, "peft")
    model.save_pretrained(out / "peft")
    (out / "peft" / "README.md").unlink()
    velocities["peft"] = velocity(model)


def by_lycoris(out, velocities):
    """LyCORIS on official names: LoKr with and without a low-rank second factor, LoHa."""
    from lycoris import LycorisNetwork, create_lycoris

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList()
            for _ in range(small.TRANSFORMER["num_layers"]):
                block = torch.nn.Module()
                block.self_attn = torch.nn.ModuleDict({n: torch.nn.Linear(96, 96) for n in "qv"})
                block.ffn = torch.nn.ModuleList([torch.nn.Linear(96, 160), torch.nn.GELU(), torch.nn.Linear(160, 96)])
                self.blocks.append(block)

    deltas = {}
    for name, settings in {
        "lokr": {"algo": "lokr", "linear_dim": 2, "linear_alpha": 3, "factor": 4},
        "lokr_full": {"algo": "lokr", "linear_dim": 100000, "linear_alpha": 1, "factor": 8},
        "loha": {"algo": "loha", "linear_dim": 2, "linear_alpha": 1},
    }.items():
        LycorisNetwork.apply_preset({"target_module": ["Block"], "target_name": [".*"]})
        network = create_lycoris(Block(), 1.0, **settings)
        network.apply_to()
        fill(network, name)
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, out / f"{name}.safetensors")
        for lora in network.loras:
            weight = lora.get_weight(lora.org_module[0].weight.shape)  # what its forward pass adds
            deltas[f"{name}/{lora.lora_name}"] = small.spread(weight.detach().numpy(), 64)
    velocities |= deltas


def spelled(layers, style):
    """Factors for official layer names under the keys of kohya's scripts or of lightx2v."""
    tensors = {}
    for layer in layers:
        out_dim, in_dim = NAMES[f"{layer}.weight"]
        a = small.random(f"{style}/{layer}/a", (RANK, in_dim)) / in_dim**0.5
        b = small.random(f"{style}/{layer}/b", (out_dim, RANK))
        base = f"lora_unet_{layer.replace('.', '_')}" if style == "kohya" else f"diffusion_model.{layer}"
        tensors |= {f"{base}.lora_down.weight": a, f"{base}.lora_up.weight": b}
        if style == "kohya":
            tensors[f"{base}.alpha"] = np.float32(1.0)
        else:
            tensors[f"{base}.diff_b"] = 0.1 * small.random(f"{style}/{layer}/bias", (out_dim,))
    return {k: torch.from_numpy(np.array(v, np.float32)) for k, v in tensors.items()}


def by_hand(out, velocities):
    """kohya and lightx2v names, loaded by diffusers' own converters."""
    blocks = range(small.TRANSFORMER["num_layers"])
    layers = [f"blocks.{i}.{a}_attn.{x}" for i in blocks for a in ("self", "cross") for x in "qkvo"]
    layers += [f"blocks.{i}.ffn.{x}" for i in blocks for x in (0, 2)]
    for style in ("kohya", "lightx2v"):
        more = [] if style == "kohya" else ["head.head", "time_projection.1", "text_embedding.0", "text_embedding.2"]
        tensors = spelled(layers + more, style)
        save_file(tensors, out / f"{style}.safetensors")
        pipe = object.__new__(WanPipeline)
        model = diffusers_transformer()
        state, metadata = WanPipeline.lora_state_dict(dict(tensors), return_lora_metadata=True)
        WanPipeline.load_lora_into_transformer(state, model, adapter_name="x", metadata=metadata)
        velocities[style] = velocity(model)
        del pipe


def together(out, velocities):
    """Two adapters with strengths, through set_adapters."""
    model = diffusers_transformer()
    for name in ("diffusers", "kohya"):
        state, metadata = WanPipeline.lora_state_dict(out / f"{name}.safetensors", return_lora_metadata=True)
        WanPipeline.load_lora_into_transformer(state, model, adapter_name=name, metadata=metadata)
    model.set_adapters(["diffusers", "kohya"], [0.7, -0.4])
    velocities["together"] = velocity(model)


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    velocities = {"plain": velocity(diffusers_transformer())}
    for write in (by_diffusers, by_peft, by_lycoris, by_hand, together):
        write(OUT, velocities)
    np.savez_compressed(OUT / "velocities.npz", **velocities)
    for file in sorted(OUT.rglob("*.safetensors")):
        file.chmod(0o644)
        print(file.relative_to(OUT), file.stat().st_size, len(load_file(file)))


if __name__ == "__main__":
    main()
