"""Draws the README's picture: prompts, and frames of what the embedded model makes of them.

uv run python benchmarks/showcase.py docs/images/embedded.png [--model tiny] [--seed 1]
"""

import argparse

import numpy as np
from PIL import Image, ImageDraw

import mlx_wan

PROMPTS = (
    "a red circle moves right on a black background",
    "a large blue square grows on a white background",
    "a green star moves down on a black background",
    "a yellow ring stays still on a navy background",
    "a purple triangle moves left on a white background",
    "an orange square bounces and a small cyan triangle moves up on a gray background",
)
FRAMES = (0, 5, 10, 14, 19, 24)
CAPTION_HEIGHT, GAP, SCALE = 18, 4, 2


def row(frames: np.ndarray, prompt: str) -> Image.Image:
    """One prompt's line: the text above some of the frames (T, H, W, 3)."""
    strip = [Image.fromarray(frames[i]).resize((frames.shape[2] * SCALE, frames.shape[1] * SCALE)) for i in FRAMES]
    width, height = strip[0].size
    picture = Image.new("RGB", (len(strip) * (width + GAP), height + CAPTION_HEIGHT + GAP), "white")
    ImageDraw.Draw(picture).text((2, 3), prompt, fill="black")
    for i, frame in enumerate(strip):
        picture.paste(frame, (i * (width + GAP), CAPTION_HEIGHT))
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    pipe = mlx_wan.WanPipeline.from_pretrained(args.model)
    rows = [row(pipe(prompt, seed=args.seed).frames, prompt) for prompt in PROMPTS]
    sheet = Image.new("RGB", (rows[0].width, sum(r.height for r in rows)), "white")
    top = 0
    for picture in rows:
        sheet.paste(picture, (0, top))
        top += picture.height
    sheet.save(args.out, optimize=True)


if __name__ == "__main__":
    main()
