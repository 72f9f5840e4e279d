# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "diffusers==0.42.1", "transformers==5.24.0", "numpy>=2", "safetensors", "pillow"]
# ///
"""What diffusers and transformers write of the small I2V and FLF2V models of Wan2.1, and what they compute:
tests/golden/diffusers_image.json.

    uv run parity/make_i2v_layout.py

The configs, and every tensor of the files with the official name whose numbers it holds ("q", "k" or "v" behind that of
the matrix whose third it is). It fails if the image tokens are not the official code's (tests/golden/runs21.npz).
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from diffusers_names import TRANSFORMER_NAMES
from safetensors.numpy import load_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import small

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
OFFICIAL = json.loads((GOLDEN / "names.json").read_text())
NAMES = [
    (r"^img_emb\.emb_pos", "condition_embedder.image_embedder.pos_embed"),
    (r"^img_emb\.proj\.0", "condition_embedder.image_embedder.norm1"),
    (r"^img_emb\.proj\.1", "condition_embedder.image_embedder.ff.net.0.proj"),
    (r"^img_emb\.proj\.3", "condition_embedder.image_embedder.ff.net.2"),
    (r"^img_emb\.proj\.4", "condition_embedder.image_embedder.norm2"),
    (r"cross_attn\.norm_k_img", "attn2.norm_added_k"),
    (r"cross_attn\.([kv])_img", r"attn2.add_\1_proj"),
    *TRANSFORMER_NAMES,
]
CLIP_NAMES = [
    (r"^cls_embedding", "embeddings.class_embedding"),
    (r"^patch_embedding", "embeddings.patch_embedding"),
    (r"^pos_embedding", "embeddings.position_embedding.weight"),
    (r"^pre_norm", "pre_layrnorm"),
    (r"^post_norm", "post_layernorm"),
    (r"^transformer\.", "encoder.layers."),
    (r"\.norm([12])\.", r".layer_norm\1."),
    (r"attn\.to_qkv\.([qkv])", r"self_attn.\1_proj"),
    (r"attn\.proj", "self_attn.out_proj"),
    (r"mlp\.0", "mlp.fc1"),
    (r"mlp\.2", "mlp.fc2"),
]


def renamed(name, table):
    for pattern, new in table:
        name = re.sub(pattern, new, name)
    return name


def official(part, model):
    return {n: small.weight(part, n, tuple(shape)) for n, shape in OFFICIAL[model][part].items()}


def transformer(config, model):
    image = config["image_dim"]
    module = WanTransformer3DModel(
        patch_size=config["patch_size"], num_attention_heads=config["num_heads"],
        attention_head_dim=config["dim"] // config["num_heads"], in_channels=config["in_dim"],
        out_channels=config["out_dim"], text_dim=config["text_dim"], freq_dim=config["freq_dim"],
        ffn_dim=config["ffn_dim"], num_layers=config["num_layers"], image_dim=image, added_kv_proj_dim=config["dim"],
        pos_embed_seq_len=config.get("image_positions"),
    )  # fmt: skip
    weights = official("transformer", model)
    module.load_state_dict({renamed(n, NAMES): torch.from_numpy(w) for n, w in weights.items()}, strict=True)
    return module, weights


def separated(weights):
    """The official weights of the image encoder in the shapes of transformers."""
    found = {}
    for name, array in weights.items():
        if ".to_qkv." in name:
            for which, third in zip("qkv", np.split(array, 3), strict=True):
                found[name.replace(".to_qkv.", f".to_qkv.{which}.")] = third
        else:
            found[name] = {"cls_embedding": lambda a: a[0, 0], "pos_embedding": lambda a: a[0]}.get(name, lambda a: a)(
                array
            )
    return found


def image_encoder():
    c, weights = small.IMAGE_ENCODER, separated(official("image_encoder", "small-i2v-14B"))
    config = CLIPVisionConfig(
        hidden_size=c["dim"], intermediate_size=c["ffn_dim"], num_hidden_layers=c["num_layers"],
        num_attention_heads=c["num_heads"], image_size=c["image_size"], patch_size=c["patch_size"], hidden_act="gelu",
        layer_norm_eps=c["eps"], projection_dim=c["out_dim"],
    )  # fmt: skip
    state = {renamed(n, CLIP_NAMES): torch.from_numpy(w.copy()) for n, w in weights.items() if n != "head"}
    module, whole = CLIPVisionModel(config).eval(), CLIPVisionModelWithProjection(config)
    module.load_state_dict(state, strict=True)
    head = {"visual_projection.weight": torch.from_numpy(weights["head"].T.copy())}
    whole.load_state_dict({f"vision_model.{n}": w for n, w in state.items()} | head, strict=True)
    return module, whole, weights


def check_tokens(module):
    """Its numbers for the small picture, scaled as the official code does."""
    size = small.IMAGE_ENCODER["image_size"]
    picture = torch.from_numpy(small.picture().astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    square = torch.nn.functional.interpolate(picture, (size, size), mode="bicubic", align_corners=False)
    processor = CLIPImageProcessor()
    mean, std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    with torch.no_grad():
        tokens = module((square * 0.5 + 0.5 - mean) / std, output_hidden_states=True).hidden_states[-2]
    want = np.load(GOLDEN / "runs21.npz")["image_tokens"]
    error = np.linalg.norm(tokens[:, ::8, ::16].numpy() - want) / np.linalg.norm(want)
    print(f"transformers is {error:.1e} from the official code")
    assert error < 1e-5


def stored(folder, weights):
    """The config of a part, and its tensors by the official names of the very same numbers."""
    (file,) = folder.glob("*.safetensors")
    turned = {**weights, **({"head": weights["head"].T} if "head" in weights else {})}
    tensors = {
        own: next(n for n, w in turned.items() if w.shape == array.shape and np.array_equal(w, array))
        for own, array in load_file(file).items()
    }
    return {"file": file.name, "config": json.loads((folder / "config.json").read_text()), "tensors": tensors}


def main():
    clip, whole, clip_weights = image_encoder()
    check_tokens(clip)
    found = {}
    for kind, config in (("i2v", small.I2V21), ("flf2v", small.FLF2V21)):
        module, weights = transformer(config, f"small-{kind}-14B")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            WanImageToVideoPipeline(
                tokenizer=None, text_encoder=None, vae=None, scheduler=None, image_processor=CLIPImageProcessor(),
                image_encoder=clip, transformer=module,
            ).save_pretrained(folder)  # fmt: skip
            found[kind] = {
                "model_index": json.loads((folder / "model_index.json").read_text()),
                "transformer": stored(folder / "transformer", weights),
                "image_encoder": stored(folder / "image_encoder", clip_weights),
            }
            processor = folder / "image_processor" / "preprocessor_config.json"
            found[kind]["image_processor"] = json.loads(processor.read_text())
        assert set(found[kind]["transformer"]["tensors"].values()) == set(weights)
    del found["flf2v"]["image_encoder"], found["flf2v"]["image_processor"]  # the same
    with tempfile.TemporaryDirectory() as name:
        whole.save_pretrained(name)
        found["with_projection"] = stored(Path(name), clip_weights)
    path = GOLDEN / "diffusers_image.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
