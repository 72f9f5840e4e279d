"""A language model on this machine: mlx-lm, or mlx-vlm where there is a picture. Extras, imported when used."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mlx_wan.errors import UserError, WanError

if TYPE_CHECKING:
    from PIL.Image import Image

MODEL = "mlx-community/Qwen2.5-7B-Instruct-4bit"
PICTURE_MODEL = "mlx-community/Qwen2.5-VL-7B-Instruct-4bit"
MAX_TOKENS = 512


def check(with_picture: bool) -> None:
    """UserError if the package is not installed."""
    package = "mlx-vlm" if with_picture else "mlx-lm"
    if find_spec(package.replace("-", "_")) is None:
        why = " to see the picture" if with_picture else ""
        raise UserError(
            f"--prompt_extend_method local_qwen: needs {package}{why}; install it with: uv pip install {package}"
        )


def ask(
    model: str | None, messages: list[dict[str, str]], picture: "Image | None" = None, max_tokens: int = MAX_TOKENS
) -> str:
    """A model's answer to a conversation, by always taking the likeliest token.

    Args:
        model: a folder that the package reads, or a Hub id; None takes a 4-bit Qwen2.5 7B, or its VL sibling.
        picture: shown with the last message.

    Raises WanError if it cannot be loaded, or sees no pictures. The model has left memory when this returns.
    """
    import mlx.core as mx

    model = model or (MODEL if picture is None else PICTURE_MODEL)
    try:
        return _words(model, messages, max_tokens) if picture is None else _look(model, messages, picture, max_tokens)
    except WanError:
        raise
    except Exception as error:  # the packages, the Hub and the tokenizer each have errors of their own
        raise WanError(f"{model}: {type(error).__name__}: {error}") from error
    finally:
        mx.clear_cache()


def _words(model: str, messages: list[dict[str, str]], max_tokens: int) -> str:
    import mlx_lm  # pyright: ignore[reportMissingImports]  # an extra

    network, tokenizer, *_ = mlx_lm.load(model)
    prompt: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return mlx_lm.generate(network, tokenizer, prompt=prompt, max_tokens=max_tokens)


def _look(model: str, messages: list[dict[str, str]], picture: "Image", max_tokens: int) -> str:
    import mlx_vlm  # pyright: ignore[reportMissingImports]  # an extra

    network, processor = mlx_vlm.load(model)
    if not getattr(network.config, "vision_config", None):
        raise WanError(f"{model}: sees no pictures; use a vision-language model")
    prompt = mlx_vlm.apply_chat_template(processor, network.config, messages, num_images=1)
    generate: Callable[..., Any] = mlx_vlm.generate
    return generate(network, processor, prompt, image=[picture], max_tokens=max_tokens, temperature=0.0).text
