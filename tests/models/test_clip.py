import cases
import mlx.core as mx
import numpy as np
import pytest
import small
from mlx.utils import tree_flatten

from mlx_wan.models.clip import ImageEncoder, ImageEncoderConfig


def test_official_code_agrees():
    ((label, got, want),) = cases.image_encoder()
    assert label == "257 tokens of a picture"
    assert cases.relative_error(got, want) < 1e-5


def test_released_model_has_the_official_names_and_shapes():
    model = ImageEncoder(ImageEncoderConfig())
    assert model.config == ImageEncoderConfig(**small.MODELS["i2v-14B"]["image_encoder"])
    want = {
        name: (shape[0], *shape[2:], shape[1]) if len(shape) == 4 else tuple(shape)
        for name, shape in cases.official_names("i2v-14B", "image_encoder").items()
    }
    assert {name: p.shape for name, p in tree_flatten(model.parameters())} == want


def test_the_last_block_has_no_say():
    model = ImageEncoder(ImageEncoderConfig(28, 14, 16, 32, 8, 2, 3))
    pictures = mx.random.uniform(-1, 1, (2, 28, 28, 3))
    before = np.array(model(pictures))
    assert before.shape == (2, 5, 16)
    model.transformer[2].mlp[2].bias = model.transformer[2].mlp[2].bias + 1
    assert np.array_equal(np.array(model(pictures)), before)
    model.transformer[1].mlp[2].bias = model.transformer[1].mlp[2].bias + 1
    assert not np.array_equal(np.array(model(pictures)), before)


def test_pictures_of_another_size():
    with pytest.raises(ValueError, match=r"pictures \(1, 30, 28, 3\) must be \(B, 28, 28, 3\)"):
        ImageEncoder(ImageEncoderConfig(28, 14, 16, 32, 8, 2, 3))(mx.zeros((1, 30, 28, 3)))
