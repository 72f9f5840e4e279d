"""Adapter files of every dialect, against what their own projects compute with them."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
import small
from cases import GOLDEN, load_small, native, official_names, relative_error, transformer_inputs

from mlx_wan.errors import CheckpointError, UserError
from mlx_wan.lora import dialects
from mlx_wan.lora.fuse import Adapters, merge
from mlx_wan.lora.layers import LoRALinear, attach, linear_layers
from mlx_wan.lora.load import read_lora, transformer_shapes
from mlx_wan.lora.save import save_lora
from mlx_wan.models.transformer import TransformerConfig
from mlx_wan.weights.layouts import DIFFUSERS_TRANSFORMER
from mlx_wan.weights.save import array_tensor, write_safetensors

FILES = GOLDEN / "lora"
SHAPES = transformer_shapes(TransformerConfig(**small.TRANSFORMER))
WRITERS = {"diffusers": "Diffusers", "kohya": "kohya", "lightx2v": "ComfyUI", "peft": "PEFT"}


@pytest.fixture(scope="module")
def velocities():
    with np.load(FILES / "velocities.npz") as arrays:
        return dict(arrays)


def file(name: str):
    return FILES / name if name == "peft" else FILES / f"{name}.safetensors"


def velocity(model) -> np.ndarray:
    latents, context = transformer_inputs("lora", 1, (2, 4, 4))
    return np.array(model(latents, mx.array([500.0]), context))[0]


def with_loras(**strengths: float):
    adapters, model = Adapters(), load_small("transformer")
    for name, strength in strengths.items():
        adapters.add(read_lora(file(name), SHAPES), name, strength)
    adapters.install(model)
    return model


def write(path, tensors):
    write_safetensors(path, [array_tensor(name, mx.array(array)) for name, array in tensors.items()], {})
    return path


def stored(name: str) -> dict[str, mx.array]:
    return dict(mx.load(str(file(name))))


# --- numbers -------------------------------------------------------------------------------------------------


def test_without_adapters_ours_is_diffusers_transformer(velocities):
    assert relative_error(velocity(load_small("transformer")), velocities["plain"]) < 1e-5


@pytest.mark.parametrize("name", WRITERS)
def test_what_diffusers_and_peft_compute(velocities, name):
    lora = read_lora(file(name), SHAPES)
    assert (lora.writer, lora.unmatched, lora.note) == (WRITERS[name], (), None)
    got = velocity(with_loras(**{name: 1.0}))
    assert relative_error(got, velocities[name]) < 1e-5
    assert relative_error(got, velocities["plain"]) > 0.01


def test_videox_fun_writes_kohya_s_keys_with_another_blank(tmp_path):
    tensors = {f"lora_unet__{name.removeprefix('lora_unet_')}": array for name, array in stored("kohya").items()}
    write(tmp_path / "fun.safetensors", tensors)
    lora = read_lora(tmp_path / "fun.safetensors", SHAPES)
    assert (lora.writer, lora.unmatched) == ("kohya", ())
    assert lora.layers.keys() == read_lora(file("kohya"), SHAPES).layers.keys()


def test_two_with_strengths(velocities):
    assert relative_error(velocity(with_loras(diffusers=0.7, kohya=-0.4)), velocities["together"]) < 1e-5


@pytest.mark.parametrize("name", ["lokr", "lokr_full", "loha"])
def test_what_lycoris_adds_to_the_weights(velocities, name):
    lora = read_lora(file(name), SHAPES)
    assert (lora.writer, len(lora.layers)) == ("LyCORIS", 8)
    for layer in lora.layers:
        want = velocities[f"{name}/lycoris_{layer.replace('.', '_')}"]
        assert relative_error(small.spread(np.array(lora.adapter(layer).delta()), 64), want) < 1e-6


@pytest.mark.parametrize("name", [*WRITERS, "lokr", "lokr_full", "loha"])
def test_merged_is_as_beside(name):
    model = with_loras(**{name: 0.6})
    beside = velocity(model)
    merge(model)
    assert not any(isinstance(module, LoRALinear) for module in model.modules())
    assert relative_error(velocity(model), beside) < 3e-6


# --- dialects ------------------------------------------------------------------------------------------------

LAYERS = sorted(linear_layers(load_small("transformer")))


def spelled(style: str) -> dict[str, mx.array]:
    """The factors of diffusers.safetensors under the keys of another dialect, alpha / rank = 1.5."""
    tensors = {}
    for name, array in stored("diffusers").items():
        own, _, role = name.removeprefix("transformer.").removesuffix(".weight").rpartition(".")
        layer = DIFFUSERS_TRANSFORMER.to_official(f"{own}.weight").removesuffix(".weight")
        up = role == "lora_B"
        flat, kohya = layer.replace(".", "_"), "lora_up" if up else "lora_down"
        keys = {
            "ai-toolkit": (f"diffusion_model.{layer}.{role}.weight", f"diffusion_model.{layer}.alpha"),
            "DiffSynth": (f"{layer}.{role}.default.weight", None),
            "musubi": (f"lora_unet_{flat}.{kohya}.weight", f"lora_unet_{flat}.alpha"),
            "half kohya": (f"lora_unet_{flat.replace('_attn_', '_attn.')}.{kohya}.weight", f"lora_unet_{flat}.alpha"),
            "lightx2v": (f"diffusion_model.{layer}.{kohya}.weight", f"diffusion_model.{layer}.alpha"),
            "old diffusers": (f"transformer.{own}.lora.{'up' if up else 'down'}.weight", None),
            "PEFT": (f"base_model.model.{own}.{role}.weight", None),
        }[style]
        tensors[keys[0]] = array if keys[1] or not up else 1.5 * array
        if keys[1]:
            tensors[keys[1]] = mx.array(3.0)
    return tensors


@pytest.mark.parametrize(
    "style", ["ai-toolkit", "DiffSynth", "musubi", "half kohya", "lightx2v", "old diffusers", "PEFT"]
)
def test_one_lora_in_every_dialect(tmp_path, velocities, style):
    lora = read_lora(write(tmp_path / "a.safetensors", spelled(style)), SHAPES)
    assert (len(lora.layers), lora.unmatched) == (20, ())
    adapters, model = Adapters(), load_small("transformer")
    adapters.add(lora, None, 1.0)
    adapters.install(model)
    assert relative_error(velocity(model), velocities["diffusers"]) < 1e-5


def test_what_we_write_we_read(tmp_path):
    model = load_small("transformer")
    given = read_lora(file("diffusers"), SHAPES)
    attach(model, {layer: given.adapter(layer) for layer in given.layers})
    again = read_lora(save_lora(tmp_path / "ours.safetensors", model), SHAPES)
    assert again.layers.keys() == given.layers.keys()
    for layer in given.layers:
        assert mx.array_equal(again.adapter(layer).delta(), given.adapter(layer).delta())


def test_every_spelling_means_one_layer():
    names = list(official_names("ti2v-5B", "transformer"))
    spellings = dialects.targets(names)
    layers = {name.removesuffix(".weight").removesuffix(".bias") for name in names}
    assert set(spellings.values()) == layers
    for layer in layers:
        assert dialects.resolve(layer, spellings) == dialects.resolve(layer.replace(".", "_"), spellings) == layer


def test_shifts_of_everything_that_is_no_matrix(tmp_path):
    """Norms, biases, modulation and the patch embedding, as lightx2v's files change them; and away again."""
    official = {
        "blocks.0.norm3.diff": "blocks.0.norm3.weight",
        "blocks.0.norm3.diff_b": "blocks.0.norm3.bias",
        "blocks.1.self_attn.norm_q.diff": "blocks.1.self_attn.norm_q.weight",
        "blocks.1.ffn.2.diff_b": "blocks.1.ffn.2.bias",
        "blocks.1.diff_m": "blocks.1.modulation",
        "head.diff_m": "head.modulation",
        "head.head.diff": "head.head.weight",
        "patch_embedding.diff": "patch_embedding.weight",
        "patch_embedding.diff_b": "patch_embedding.bias",
    }
    changes = {
        key: 0.1 * small.random(key, tuple(official_names("small", "transformer")[name]))
        for key, name in official.items()
    }
    path = write(tmp_path / "a.safetensors", {f"diffusion_model.{key}": array for key, array in changes.items()})
    lora = read_lora(path, SHAPES)
    assert lora.summary == "differences beside 1 matrices, 8 shifted parameters"
    model, wanted, adapters = load_small("transformer"), load_small("transformer"), Adapters()
    before = velocity(model)
    adapters.add(lora, "x", 0.5)
    adapters.install(model)
    for key, name in official.items():
        weight = small.weight("transformer", name, changes[key].shape) + 0.5 * changes[key]
        wanted.load_weights([(name, mx.array(native(name, weight)))], strict=False)
    assert relative_error(velocity(model), velocity(wanted)) < 2e-6
    assert relative_error(velocity(model), before) > 0.01
    adapters.set([], [])
    adapters.update(model)
    assert np.array_equal(velocity(model), before)
    adapters.remove(["x"])
    adapters.update(model)
    assert np.array_equal(velocity(model), before)


def test_a_lora_of_the_patch_embedding(tmp_path):
    a, b = small.random("patch/a", (2, 48, 1, 2, 2)), small.random("patch/b", (96, 2, 1, 1, 1))
    key = "lora_unet_patch_embedding"
    tensors = {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": np.float32(1)}
    lora = read_lora(write(tmp_path / "a.safetensors", tensors), SHAPES)
    torch_order = 0.5 * (b.reshape(96, 2) @ a.reshape(2, -1)).reshape(96, 48, 1, 2, 2)
    got = np.array(lora.shift("patch_embedding.weight"))
    assert relative_error(got, np.moveaxis(torch_order, 1, -1)) < 1e-6


def test_rank_stabilised_scales(tmp_path):
    folder = tmp_path / "peft"
    shutil.copytree(file("peft"), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    lora = read_lora(folder, SHAPES)
    assert lora.adapter("blocks.0.self_attn.q").scale == pytest.approx(5 / 2**0.5)
    assert lora.adapter("head.head").scale == pytest.approx(1 / 2**0.5)


# --- what is refused -----------------------------------------------------------------------------------------


def test_unmatched_keys_are_counted(tmp_path):
    strange = {"lora_te_layer.lora_down.weight": np.ones((2, 4)), "lora_unet_blocks_9_ffn_0.alpha": np.float32(1)}
    lora = read_lora(write(tmp_path / "a.safetensors", stored("kohya") | strange), SHAPES)
    assert len(lora.layers) == 20
    assert lora.note is not None
    assert "2 tensors belong to no part of this model, left out: lora_te_layer.lora_down.weight" in lora.note


def renamed(**changes):
    """The kohya file with tensors of one layer replaced, or removed where the value is None."""
    base = "lora_unet_blocks_0_ffn_0."
    tensors = stored("kohya") | {base + name.replace("__", "."): array for name, array in changes.items()}
    return {name: array for name, array in tensors.items() if array is not None}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda: {"lora_unet_x.lora_down.weight": np.ones((2, 3))}, "none of its 1 tensors belongs to this model"),
        (lambda: renamed(lora_up__weight=None), "blocks_0_ffn_0 has alpha, lora_a, which is no whole adapter"),
        (lambda: renamed(lora_up__weight=np.ones((99, 2))), "do not make the 160×96 matrix of this model"),
        (lambda: renamed(lora_up__weight=np.ones((160, 3))), "do not make the 160×96 matrix of this model"),
        (lambda: renamed(lora_up__weight=np.ones((160,))), "do not make the 160×96 matrix of this model"),
        (lambda: renamed(alpha=np.ones((2,))), "is not one number"),
        (lambda: renamed(alpha=np.float32("nan")), "alpha of blocks_0_ffn_0 is nan"),
        (lambda: renamed(dora_scale=np.ones((1, 96))), "do not make the 160×96 matrix of this model"),
        (lambda: renamed(lora_mid__weight=np.ones((2, 2))), "Tucker is not supported"),
        (lambda: renamed(diff_b=np.ones((7,))), r"diff_b \(7,\) does not fit this model, where it is \(160,\)"),
        (lambda: renamed(diff=np.ones((160, 96))), "which is no whole adapter"),
        (lambda: renamed(lora_up__weight=np.ones((160, 2), np.int32)), "is int32; a LoRA must be of floats"),
        (
            lambda: renamed() | {"diffusion_model.blocks.0.ffn.0.lora_down.weight": np.ones((2, 96))},
            "holds blocks.0.ffn.0 twice",
        ),
        (
            lambda: {"a.lora_A.weight": np.ones(2), "blocks.0.norm3.lora_A.weight": np.ones((2, 1)),
                     "blocks.0.norm3.lora_B.weight": np.ones((96, 2))},
            "which blocks.0.norm3 cannot take",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit(tmp_path, tensors, message):
    path = write(tmp_path / "a.safetensors", tensors())
    with pytest.raises(CheckpointError, match=message) as error:
        read_lora(path, SHAPES)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[]", "not a JSON object"),
        ("{", "not JSON"),
        ('{"r": 0, "lora_alpha": 1}', "must be positive numbers"),
        ('{"r": 2, "lora_alpha": "x"}', "must be positive numbers"),
        ('{"r": 2, "lora_alpha": 1, "use_dora": true}', "is a DoRA without the magnitudes"),
        ('{"r": 2, "lora_alpha": 1, "alpha_pattern": {"(": 1}}', "is not a pattern"),
    ],
)
def test_bad_peft_configurations(tmp_path, config, message):
    shutil.copytree(file("peft"), tmp_path / "peft")
    (tmp_path / "peft" / "adapter_config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        read_lora(tmp_path / "peft", SHAPES)


def test_a_model_is_no_lora(tmp_path):
    weights = {name: small.weight("vae", name, tuple(s)) for name, s in official_names("small", "vae").items()}
    path = write(tmp_path / "vae.safetensors", weights)
    with pytest.raises(UserError, match=r"is Wan2\.2-type VAE of an unreleased size, not a LoRA"):
        read_lora(path, SHAPES)
    with pytest.raises(UserError, match="no such LoRA file"):
        read_lora(tmp_path / "nothing.safetensors", SHAPES)
    (tmp_path / "several").mkdir()
    with pytest.raises(UserError, match="give the LoRA file itself"):
        read_lora(tmp_path / "several", SHAPES)
    for name in ("style", "other"):
        shutil.copy(file("kohya"), tmp_path / "several" / f"{name}.safetensors")
        if name == "style":
            assert read_lora(tmp_path / "several", SHAPES).path.name == "style.safetensors"
    with pytest.raises(UserError, match="give the LoRA file itself"):
        read_lora(tmp_path / "several", SHAPES)


def test_names_and_strengths():
    adapters = Adapters()
    lora = read_lora(file("kohya"), SHAPES)
    assert [adapters.add(lora, None, 1) for _ in range(2)] == ["kohya", "kohya_2"]
    for wrong, message in (
        (lambda: adapters.add(lora, "kohya", 1), "there is an adapter called 'kohya' already"),
        (lambda: adapters.add(lora, "x", float("inf")), "strength of a LoRA is inf"),
        (lambda: adapters.set(["y"], [1.0]), "no adapter called 'y'; there is kohya, kohya_2"),
        (lambda: adapters.set(["kohya"], []), "1 adapters and 0 weights"),
        (lambda: adapters.remove(["y"]), "no adapter called 'y'"),
    ):
        with pytest.raises(UserError, match=message):
            wrong()
    adapters.set(["kohya_2"], [0.5])
    assert adapters.strengths == {"kohya": 0.0, "kohya_2": 0.5}
