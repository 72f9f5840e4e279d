"""The pictures of `generate --preview DIR`."""

from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from mlx_wan.formats import FRAMES_IN_FOLDER
from mlx_wan.preview import clips_for, contact_sheet, fit_colours
from mlx_wan.weights.save import replacing

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_wan.pipeline import WanPipeline


class StepPictures:
    """Writes DIR/NAME_step_0001.png, ... where NAME is that of the video; the colours are fitted when this is made."""

    def __init__(self, folder: Path, video: Path, pipe: "WanPipeline") -> None:
        name = video.parent.name if video.name == FRAMES_IN_FOLDER else video.stem.replace("%", "")
        self._folder, self._name = folder, name
        self._colours = fit_colours(pipe.vae, clips_for(pipe.checkpoint))

    def write(self, step: int, latents: "mx.array") -> None:
        with replacing(self._folder / f"{self._name}_step_{step:04d}.png") as partial:
            Image.fromarray(contact_sheet(latents, self._colours)).save(partial, "PNG")
