# /// script
# requires-python = ">=3.11"
# dependencies = ["gguf==0.19.0", "sentencepiece", "numpy>=2"]
# ///
"""A GGUF file by the gguf package, and what that package makes of every block format.

    uv run parity/make_gguf_fixtures.py

Writes tests/weights/fixtures/wan.gguf and tests/golden/gguf.npz. Formats that gguf does not write (K and IQ) are
random blocks with tame scales; what counts is that both read the same values out of them.

And fixtures/umt5.gguf: the small text encoder under the names that gguf has for it, with the pieces of
fixtures/spiece.model, as llama.cpp's converter stores a T5 encoder.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import sentencepiece

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path.insert(0, str(TESTS))
import small  # noqa: E402

TYPES = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ4_NL", "IQ4_XS"),
)
# Where a block of those that are not written keeps its float16 scales.
HALVES = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip
ROWS, COLUMNS = 3, 512


def blocks(name, rng):
    """(rows, bytes) uint8: quantized normal numbers, or random blocks."""
    kind = gguf.GGMLQuantizationType[name]
    if name not in HALVES:
        return gguf.quants.quantize(rng.standard_normal((ROWS, COLUMNS)).astype(np.float32), kind)
    values, nbytes = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (ROWS * COLUMNS // values, nbytes), np.uint8)
    for at in HALVES[name]:
        halves = rng.standard_normal((len(raw), 1)).astype(np.float16)
        raw[:, at : at + 2] = halves.view(np.uint8).reshape(-1, 2)
    return raw.reshape(ROWS, -1)


def text_encoder():
    writer = gguf.GGUFWriter(TESTS / "weights" / "fixtures" / "umt5.gguf", "t5encoder")
    names = json.loads((TESTS / "golden" / "diffusers.json").read_text())["text_encoder"]["tensors"]
    shapes = json.loads((TESTS / "golden" / "names.json").read_text())["small"]["text_encoder"]
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, small.TEXT_ENCODER["num_layers"])
    for own, official in names.items():
        name = table.get_name(own, try_suffixes=(".weight",))
        if name is not None:  # the tied copy of the embeddings has none
            array = small.weight("text_encoder", official, tuple(shapes[official]))
            if array.ndim == 2 and array.shape[1] % 32 == 0:
                kind = gguf.GGMLQuantizationType.Q4_0
                writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, array.astype(np.float16) if array.ndim == 2 else array)
    model = sentencepiece.SentencePieceProcessor(model_file=str(TESTS / "weights" / "fixtures" / "spiece.model"))
    ids = range(model.get_piece_size())
    kinds = ((model.is_unknown, 2), (model.is_control, 3), (model.is_unused, 5), (model.is_byte, 6))
    writer.add_tokenizer_model("t5")
    writer.add_token_list([model.id_to_piece(i).encode() for i in ids])
    writer.add_token_scores([model.get_score(i) for i in ids])
    writer.add_token_types([next((kind for is_it, kind in kinds if is_it(i)), 1) for i in ids])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main():
    rng, arrays = np.random.default_rng(0), {}
    path = TESTS / "weights" / "fixtures" / "wan.gguf"
    writer = gguf.GGUFWriter(path, "wan")
    writer.add_string("general.name", "small")
    writer.add_array("comfy.gguf.orig_shape.patch_embedding.weight", [4, 8, 1, 2, 2])
    for name in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        raw = blocks(name, rng)
        writer.add_tensor(f"{name}.weight", raw, raw_dtype=kind)
        arrays[name] = gguf.quants.dequantize(raw, kind)
    plain = rng.standard_normal((4, 32)).astype(np.float32)
    writer.add_tensor("patch_embedding.weight", plain)
    writer.add_tensor("half", plain.astype(np.float16))
    bits = gguf.quants.quantize(plain, gguf.GGMLQuantizationType.BF16)
    writer.add_tensor("brain", bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
    arrays |= {"plain": plain, "brain": gguf.quants.dequantize(bits, gguf.GGMLQuantizationType.BF16)}
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.savez_compressed(TESTS / "golden" / "gguf.npz", **arrays)
    text_encoder()
    print(path.stat().st_size, (TESTS / "golden" / "gguf.npz").stat().st_size)


if __name__ == "__main__":
    main()
