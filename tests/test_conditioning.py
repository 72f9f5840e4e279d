import cases
import numpy as np
import pytest
import small
from PIL import Image

from mlx_wan.conditioning import (
    area_size,
    best_output_size,
    cropped,
    image_to_frame,
    known_frames,
    stretched_frame,
)
from mlx_wan.errors import UserError


@pytest.mark.parametrize(
    ("picture", "video"),
    [  # values of the official best_output_size for the 5B: strides 32, area 704 x 1280
        ((1920, 1080), (1248, 704)),
        ((1080, 1920), (704, 1248)),
        ((1024, 1024), (960, 928)),
        ((4000, 3000), (1088, 800)),
        ((1280, 704), (1280, 704)),
        ((300, 2000), (352, 2432)),
    ],
)
def test_sizes_of_the_official_rule(picture, video):
    assert best_output_size(*picture, 32, 32, 704 * 1280) == video


def test_every_size_fits_the_area_and_the_strides_and_keeps_the_shape():
    for width in range(40, 2000, 97):
        for height in range(40, 2000, 101):
            w, h = best_output_size(width, height, 32, 16, 480 * 832)
            assert w % 32 == 0
            assert h % 16 == 0
            assert 0 < w * h <= 480 * 832
            if 0.5 < width / height < 2:
                assert w / h == pytest.approx(width / height, rel=0.06)


def test_a_sliver_is_refused():
    with pytest.raises(UserError, match="2x4000 picture is too narrow"):
        best_output_size(2, 4000, 32, 32, 128 * 128)


def test_a_picture_of_the_right_size_keeps_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    frame = image_to_frame(Image.fromarray(pixels), 40, 24)
    assert frame.shape == (1, 1, 24, 40, 3)
    assert frame.dtype == np.float32
    np.testing.assert_allclose(frame[0, 0], pixels / 127.5 - 1, atol=1e-6)
    assert frame.min() == -1
    assert frame.max() == 1


@pytest.mark.parametrize(("size", "axis"), [((80, 32), 1), ((32, 80), 0)])
def test_the_crop_is_central(size, axis):
    """Three equal bands along the long side: only the middle one is left, with the edges of its neighbours."""
    width, height = size
    bands = np.zeros((height, width, 3), np.uint8)
    middle = slice(24, 56)  # of 80
    bands[(slice(None), middle) if axis else middle] = 255
    frame = image_to_frame(Image.fromarray(bands), 16, 16)
    assert frame.min() > 0.6  # Lanczos rings at the borders; black would be -1
    np.testing.assert_allclose(frame[0, 0], frame[0, 0, ::-1, ::-1], atol=0.02)


def test_small_and_grey_pictures_are_scaled_up_to_cover():
    frame = image_to_frame(Image.new("L", (7, 5), 255), 64, 32)
    assert frame.shape == (1, 1, 32, 64, 3)
    np.testing.assert_array_equal(frame, 1)


# --- image to video -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("picture", "video"),
    [  # values of the official image2video.py for an area of 720 x 1280
        ((1920, 1080), (1280, 720)),
        ((1080, 1920), (720, 1280)),
        ((1024, 1024), (960, 960)),
        ((4000, 3000), (1104, 816)),
        ((300, 2000), (368, 2464)),
    ],
)
def test_sizes_of_the_image_to_video_rule(picture, video):
    assert area_size(*picture, 16, 16, 720 * 1280) == video


def test_a_sliver_is_refused_there_too():
    with pytest.raises(UserError, match="2x4000 picture is too narrow"):
        area_size(2, 4000, 16, 16, 64 * 64)


@pytest.mark.parametrize("size", cases.golden("pictures"))
def test_stretching_is_that_of_the_official_code(size):
    width, height = map(int, size.split("x"))
    frame = stretched_frame(Image.fromarray(small.picture()), width, height)
    assert (frame.shape, frame.dtype) == ((1, 1, height, width, 3), np.float32)
    assert cases.relative_error(frame[0, 0, ::3, ::2], cases.golden("pictures")[size]) < 1e-6


def test_only_a_picture_of_another_shape_is_cropped():
    picture = Image.fromarray(small.picture())  # 100x70
    for width, height in ((64, 32), (64, 48), (80, 48)):  # what rounding to steps of 16 makes of its shape
        assert cropped(picture, width, height, 16) is picture
    part = cropped(picture, 48, 96, 16)
    np.testing.assert_array_equal(part, picture.crop((32, 0, 67, 70)))


def test_the_official_rule_never_crops():
    for width in range(40, 2000, 97):
        for height in range(40, 2000, 101):
            picture = Image.new("L", (width, height))
            assert cropped(picture, *area_size(width, height, 16, 16, 480 * 832), 16) is picture


def test_frames_that_are_known_and_a_mask_of_them():
    first, last = (np.full((1, 1, 8, 16, 3), value, np.float32) for value in (0.5, -0.5))
    video, mask = known_frames({0: first}, 9, 4)
    assert (video.shape, mask.shape) == ((1, 9, 8, 16, 3), (1, 3, 1, 1, 4))
    assert (video[:, 0] == 0.5).all()
    assert (video[:, 1:] == 0).all()
    np.testing.assert_array_equal(mask.reshape(3, 4), [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]])
    video, mask = known_frames({0: first, 8: last}, 9, 4)
    assert (video[:, 8] == -0.5).all()
    np.testing.assert_array_equal(mask.reshape(3, 4), [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]])
