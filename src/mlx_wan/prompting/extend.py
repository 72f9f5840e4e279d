"""From a short prompt, and perhaps a picture, to one that says what Wan's models want to be told."""

import base64
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_wan.errors import UserError, WanError
from mlx_wan.prompting import LANGUAGES, METHODS, chat, local
from mlx_wan.prompting.instructions import ONLY_A_PICTURE, system_prompt

if TYPE_CHECKING:
    from PIL.Image import Image

PICTURE_SIDE = 1024  # pixels; a larger picture is sent smaller
_THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)
_QUOTES = (('"', '"'), ("“", "”"), ("「", "」"), ("'", "'"))


def check(method: str, model: str | None, prompt: str, image: str | Path | None) -> None:
    """UserError if `extend` could not even begin: no key, a package missing, nothing to extend."""
    if method not in METHODS:
        raise UserError(f"prompt extension by {method!r}: choose one of {', '.join(METHODS)}")
    if not prompt.strip() and image is None:
        raise UserError("--use_prompt_extend: the prompt is empty, and there is no picture that could be described")
    if method == "local_qwen":
        local.check(image is not None)
    else:
        chat.server(method, model, image is not None)


def extend(
    prompt: str, *, method: str, model: str | None = None, language: str = "zh", image: str | Path | None = None
) -> str:
    """The prompt as a language model would write it.

    Args:
        prompt: what to show; may be empty if there is a picture.
        method: "local_qwen" (mlx-lm on this machine, mlx-vlm if there is a picture), "dashscope" or "openai" (any
            server with OpenAI's HTTP interface, OPENAI_BASE_URL says where). Keys come from the environment.
        model: its name; None is the method's own.
        language: "zh" or "en", to write in.
        image: a picture file to describe, the video's first frame.

    Raises:
        UserError: the request cannot be made, see `check`.
        WanError: there was no answer, or an empty one.
    """
    if language not in LANGUAGES:
        raise UserError(f"language is {language!r}; choose one of {', '.join(LANGUAGES)}")
    check(method, model, prompt, image)
    system = {"role": "system", "content": system_prompt(language, image is not None)}
    words = prompt if prompt.strip() else ONLY_A_PICTURE
    picture = None if image is None else _picture(image)
    if method == "local_qwen":
        answer = local.ask(model, [system, {"role": "user", "content": words}], picture)
    else:
        where = chat.server(method, model, image is not None)
        answer = chat.ask(where, [system, {"role": "user", "content": _content(words, picture)}])
    text = _tidy(answer)
    if not text:
        raise WanError(f"{method}: the answer is empty")
    return text


def _content(words: str, picture: "Image | None") -> str | list[dict[str, Any]]:
    if picture is None:
        return words
    return [{"type": "image_url", "image_url": {"url": data_url(picture)}}, {"type": "text", "text": words}]


def _picture(image: str | Path) -> "Image":
    """A picture file, its longer side 1024 pixels at most."""
    from mlx_wan.video import read_image

    picture = read_image(image)
    picture.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    return picture


def data_url(picture: "Image") -> str:
    """A picture as a JPEG inside a URL."""
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def _tidy(answer: str) -> str:
    """One line, without what a reasoning model thought aloud and without quotation marks around it all."""
    text = " ".join(_THOUGHTS.sub(" ", answer).split())
    for opening, closing in _QUOTES:
        inner = text[1:-1]
        if len(text) > 1 and text[0] == opening and text[-1] == closing and not {opening, closing} & set(inner):
            text = inner.strip()
    return text
