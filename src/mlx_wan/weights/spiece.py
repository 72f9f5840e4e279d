"""A SentencePiece model, as ComfyUI's text encoder files carry it, to the tokenizer.json that this package reads.

GGUF files carry the parts of one, out of which `model` makes it again. It is a protobuf message; what a Unigram
tokenizer needs of it are the pieces with their scores and the table of character replacements.
"""

import struct
from collections.abc import Iterable, Iterator
from typing import Any

from mlx_wan.errors import CheckpointError

TENSOR = "spiece_model"  # its name in ComfyUI's files: the bytes of the model as a tensor
# Numbers of fields in sentencepiece_model.proto.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
PIECE, SCORE, KIND = 1, 2, 3
MODEL_TYPE, BYTE_FALLBACK, CHARSMAP = 3, 35, 2
UNIGRAM = 1
UNKNOWN, BYTE = 2, 6  # kinds: of the piece for all that no other covers, of one that is a byte
SPECIAL = ("<pad>", "</s>", "<unk>")


def tokenizer_json(model: bytes) -> bytes:
    """The tokenizer.json of a SentencePiece model.

    Raises:
        CheckpointError: not such a model, or not of the Unigram kind.
    """
    try:
        pieces, unknown, charsmap, byte_fallback = _read(model)
        return _build(pieces, unknown, charsmap, byte_fallback)
    except CheckpointError:
        raise
    except Exception as error:  # damaged bytes can end anywhere; the Rust side raises plain Exception
        raise CheckpointError(f"holds a damaged tokenizer ({error}); get the file again") from error


def model(pieces: Iterable[tuple[str, float, int]], charsmap: bytes) -> bytes:
    """A Unigram model of these pieces (text, score, kind) and the table of character replacements."""
    parts: list[bytes] = []
    fallback = False
    for piece, score, kind in pieces:
        text = piece.encode()
        own = _bytes(PIECE, text) + _key(SCORE, 5) + struct.pack("<f", score) + _key(KIND, 0) + _number(kind)
        parts.append(_bytes(PIECES, own))
        fallback = fallback or kind == BYTE
    trainer = _key(MODEL_TYPE, 0) + _number(UNIGRAM) + _key(BYTE_FALLBACK, 0) + _number(int(fallback))
    return b"".join([*parts, _bytes(TRAINER, trainer), _bytes(NORMALIZER, _bytes(CHARSMAP, charsmap))])


def _key(field: int, wire: int) -> bytes:
    return _number(field << 3 | wire)


def _bytes(field: int, value: bytes) -> bytes:
    return _key(field, 2) + _number(len(value)) + value


def _number(value: int) -> bytes:
    found = bytearray()
    value &= (1 << 64) - 1
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _read(model: bytes) -> tuple[list[tuple[str, float]], int, bytes, bool]:
    pieces: list[tuple[str, float]] = []
    unknown, charsmap, byte_fallback, kind = 0, b"", False, UNIGRAM
    for number, value in _fields(model):
        if number == PIECES:
            piece = dict(_fields(value))
            if piece.get(KIND) == UNKNOWN:
                unknown = len(pieces)
            pieces.append((piece[PIECE].decode(), struct.unpack("<f", piece.get(SCORE, bytes(4)))[0]))
        elif number == TRAINER:
            said = dict(_fields(value))
            kind, byte_fallback = said.get(MODEL_TYPE, UNIGRAM), bool(said.get(BYTE_FALLBACK, 0))
        elif number == NORMALIZER:
            charsmap = dict(_fields(value)).get(CHARSMAP, b"")
    if kind != UNIGRAM or not pieces:
        raise CheckpointError("holds a tokenizer that is not a SentencePiece Unigram model")
    return pieces, unknown, charsmap, byte_fallback


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field: whole numbers as int, all else as bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(message, at)
        else:
            if wire == 2:
                size, at = _varint(message, at)
            else:
                size = {1: 8, 5: 4}[wire]
            if size > len(message) - at:
                raise CheckpointError("holds a tokenizer that is cut off; get the file again")
            value, at = message[at : at + size], at + size
        yield key >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise CheckpointError("holds a damaged tokenizer; get the file again")


def _build(pieces: list[tuple[str, float]], unknown: int, charsmap: bytes, byte_fallback: bool) -> bytes:
    """As transformers builds a T5 tokenizer: replacements, runs of blanks to one, a mark before every word."""
    import tokenizers
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=unknown, byte_fallback=byte_fallback))
    steps: list[Any] = [normalizers.Precompiled(charsmap)] if charsmap else []
    steps += [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.Metaspace()  # pyright: ignore[reportAttributeAccessIssue]
    known = {piece for piece, _ in pieces}
    tokenizer.add_special_tokens([token for token in SPECIAL if token in known])
    return tokenizer.to_str().encode()
