"""Prompt cleaning and tokenizing: str -> ids, mask."""

import html
import re
from pathlib import Path

import ftfy
import numpy as np
import tokenizers

from mlx_wan.errors import CheckpointError, UserError

PAD_ID = 0
END_TOKEN = "</s>"


def clean_prompt(text: str) -> str:
    """The prompt as Wan was trained to see it (official `tokenizers.py`, clean="whitespace").

    Mis-encoded text is repaired, HTML entities are decoded twice (training captions were often escaped twice),
    and each run of white space, line breaks included, becomes one blank.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """A Hugging Face `tokenizer.json`, used as transformers' T5TokenizerFast uses it, without transformers.

    Args:
        source: the tokenizer.json, or what is in one. UserError if there is none, CheckpointError if it cannot be
            read.
        text_len: length of every result; longer texts lose their end, but never the closing `</s>`.
    """

    def __init__(self, source: str | Path | bytes, text_len: int = 512) -> None:
        path = "the text encoder's own tokenizer" if isinstance(source, bytes) else Path(source)
        if isinstance(path, Path) and not path.is_file():
            raise UserError(f"{path}: no such tokenizer file")
        try:
            content = source if isinstance(source, bytes) else Path(source).read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the Rust side raises plain Exception
            raise CheckpointError(f"{path}: not a readable tokenizer.json ({error}); get the file again") from None
        end = self._tokenizer.token_to_id(END_TOKEN)
        if end is None:
            raise CheckpointError(f"{path}: has no {END_TOKEN} token, so it is not a T5 tokenizer")
        # The file may carry its own ideas of length; ours hold.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self.end_id: int = end
        self.text_len = text_len

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def __call__(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids (1, text_len) and mask (1, text_len), both int32; the mask is 1 on tokens, `</s>` included.

        The text is taken as it is: call `clean_prompt` first.
        """
        tokens = self._tokenizer.encode(text, add_special_tokens=False).ids[: self.text_len - 1]
        tokens.append(self.end_id)
        ids = np.full((1, self.text_len), PAD_ID, dtype=np.int32)
        ids[0, : len(tokens)] = tokens
        mask = np.zeros((1, self.text_len), dtype=np.int32)
        mask[0, : len(tokens)] = 1
        return ids, mask
