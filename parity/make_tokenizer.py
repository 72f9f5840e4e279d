# /// script
# requires-python = ">=3.11"
# dependencies = ["tokenizers==0.23.3"]
# ///
"""Makes tests/golden/tokenizer.json: a UMT5-style unigram tokenizer of 640 pieces that spells what it lacks in bytes.

uv run parity/make_tokenizer.py
"""

import math
from collections import Counter
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

GOLDEN = Path(__file__).resolve().parent.parent / "tests" / "golden"
SIZE = 640
SPECIAL = ["<pad>", "</s>", "<s>", "<unk>"]
CORPUS = [
    f"{size} {colour} {shape} {motion} on a {ground} background, slowly & quietly."
    for size in ("a small", "a large", "the", "two tiny")
    for colour in ("red", "green", "blue", "yellow", "white", "orange")
    for shape in ("circle", "square", "triangle", "star", "ring", "cat")
    for motion in ("moves right", "moves left", "turns around", "bounces up and down", "grows", "stays still")
    for ground in ("black", "grey", "purple")
] + [
    "一只猫在草地上跑，镜头慢慢向右移动。",
    "红色的圆形在黑色背景上移动，静止，整体发灰，最差质量，低质量",
    "The café's “fine” quotes… 1/2 of (3 + 4) = 3.5; x2!",
]


def pieces():
    """The commonest parts of words with the logarithm of their frequency; every single character is among them."""
    counts = Counter()
    for word in " ".join(CORPUS).split():
        marked = "▁" + word
        for i in range(len(marked)):
            counts.update(marked[i:j] for j in range(i + 1, len(marked) + 1) if "▁" not in marked[i + 1 : j])
    single = [p for p in counts if len(p) == 1]
    longer = sorted((p for p in counts if len(p) > 1), key=lambda p: (-counts[p] * len(p), p))
    chosen = sorted({*single, *longer[: SIZE - len(SPECIAL) - 256 - len(single)]}, key=lambda p: (-counts[p], p))
    total = sum(counts.values())
    return [(p, math.log(counts[p] / total)) for p in chosen]


def main():
    scores = [(piece, 0.0) for piece in SPECIAL] + [(f"<0x{byte:02X}>", 0.0) for byte in range(256)] + pieces()
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=SPECIAL.index("<unk>"), byte_fallback=True))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.save(str(GOLDEN / "tokenizer.json"))
    print(tokenizer.get_vocab_size(), "pieces;", tokenizer.encode("a red circle moves right, 猫").tokens)


if __name__ == "__main__":
    main()
