"""A language model on this machine through mlx-lm, the optional extra `prompts`; imported only when it is used."""

from importlib.util import find_spec
from typing import Any

from mlx_wan.errors import UserError, WanError

MODEL = "mlx-community/Qwen2.5-7B-Instruct-4bit"
MAX_TOKENS = 512


def check() -> None:
    """UserError if mlx-lm is not installed."""
    if find_spec("mlx_lm") is None:
        raise UserError("--prompt_extend_method local_qwen: needs mlx-lm; install it with: uv pip install mlx-lm")


def ask(model: str | None, messages: list[dict[str, str]], max_tokens: int = MAX_TOKENS) -> str:
    """A model's answer to a conversation, by always taking the likeliest token.

    Args:
        model: a folder that mlx-lm reads, or a Hub id; None takes a 4-bit Qwen2.5 7B.

    Raises WanError if it cannot be loaded. The model has left memory when this returns.
    """
    import mlx.core as mx
    import mlx_lm  # pyright: ignore[reportMissingImports]  # an extra

    try:
        network, tokenizer, *_ = mlx_lm.load(model or MODEL)
        prompt: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        return mlx_lm.generate(network, tokenizer, prompt=prompt, max_tokens=max_tokens)
    except Exception as error:  # mlx-lm, the Hub and the tokenizer each have errors of their own
        raise WanError(f"{model or MODEL}: {type(error).__name__}: {error}") from error
    finally:
        network = None
        mx.clear_cache()
