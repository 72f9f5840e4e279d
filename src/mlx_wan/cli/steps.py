"""The pictures of `generate --preview DIR`."""

from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from mlx_wan.formats import FRAMES_IN_FOLDER
from mlx_wan.preview import clips_for, contact_sheet, fit_colours
from mlx_wan.weights.save import replacing

if TYPE_CHECKING:
    from mlx_wan.pipeline import Event, WanPipeline


class StepPictures:
    """Writes DIR/NAME_step_0001.png, ... where NAME is that of the video; the colours are fitted when this is made.

    Of a video of several parts NAME_part_01_step_0001.png, ...
    """

    def __init__(self, folder: Path, video: Path, pipe: "WanPipeline", parts: int = 1) -> None:
        name = video.parent.name if video.name == FRAMES_IN_FOLDER else video.stem.replace("%", "")
        self._folder, self._name, self._parts, self._part = folder, name, parts, 1
        self._colours = fit_colours(pipe.vae, clips_for(pipe.checkpoint))

    def saw(self, event: "Event") -> None:
        """Something is finished: a step has its picture, and the latents of a part end it."""
        if event.stage == "latents":
            self._part += 1
        if event.stage != "denoise":
            return
        part = f"_part_{self._part:02d}" if self._parts > 1 else ""
        with replacing(self._folder / f"{self._name}{part}_step_{event.index:04d}.png") as partial:
            Image.fromarray(contact_sheet(event.value, self._colours)).save(partial, "PNG")
