# /// script
# requires-python = ">=3.11"
# dependencies = ["torch==2.13.0", "sentencepiece", "numpy>=2", "ftfy==6.3.1"]
# ///
"""What ComfyUI's files are made of, by the libraries that make them: a SentencePiece model and 8-bit floats.

    uv run parity/make_comfy_fixtures.py

Writes tests/weights/fixtures/spiece.model and tests/golden/comfy.npz: the ids sentencepiece gives the prompts of
tests/small.py, once cleaned, and what torch says each byte of its 8-bit types is worth.
"""

import html
import io
import re
import sys
from pathlib import Path

import ftfy
import numpy as np
import sentencepiece
import torch

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))
import small  # noqa: E402


def cleaned(text):
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


def main():
    prompts = [cleaned(text) for text in small.PROMPTS]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in prompts if text] + [prompts[0]] * 20),
        model_writer=model, vocab_size=400, model_type="unigram", pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        normalization_rule_name="identity", hard_vocab_limit=False, byte_fallback=True, character_coverage=1.0,
    )  # fmt: skip
    (TESTS / "weights" / "fixtures" / "spiece.model").write_bytes(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    arrays = {f"ids/{i}": np.array(processor.encode(text), np.int32) for i, text in enumerate(prompts)}
    every_byte = torch.arange(256, dtype=torch.uint8)
    for kind in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu):
        arrays[str(kind).removeprefix("torch.").rstrip("fnu")] = every_byte.view(kind).float().numpy()
    np.savez_compressed(TESTS / "golden" / "comfy.npz", **arrays)


if __name__ == "__main__":
    main()
