import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from mlx_wan.errors import CheckpointError, UserError
from mlx_wan.text import Tokenizer, clean_prompt


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("  a red\tcircle \r\n moves\u3000right ", "a red circle moves right"),
        ("bread &amp;amp; butter", "bread & butter"),
        ("&amp;lt;b&amp;gt;", "<b>"),
        ("a cafÃ© at night", "a café at night"),
        ("“quoted” text", '"quoted" text'),
        ("一只猫，在跑", "一只猫,在跑"),
        (" \n ", ""),
    ],
)
def test_prompts_are_cleaned_as_the_official_code_cleans_them(raw, clean):
    assert clean_prompt(raw) == clean


PIECES = ["<pad>", "</s>", "<unk>", "▁", "▁a", "▁red", "▁circle", "▁moves", "c", "r", "e", "d", "s", "."]


def unigram() -> tokenizers.Tokenizer:
    """A tokenizer built as T5's tokenizer.json is: unigram pieces, blanks as ▁, `</s>` added at the end."""
    tokenizer = tokenizers.Tokenizer(models.Unigram([(p, -float(i)) for i, p in enumerate(PIECES)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "tokenizer.json"
    unigram().save(str(file))
    return file


@pytest.mark.parametrize("text", ["a red circle moves.", "", "red", "a</s>red", "zebra red " * 9])
@pytest.mark.parametrize("text_len", [2, 8, 32])
def test_padding_and_truncation_are_those_of_the_tokenizers_library(path, text, text_len):
    expected = unigram()
    expected.enable_truncation(text_len)
    expected.enable_padding(length=text_len, pad_id=0)
    encoding = expected.encode(text)

    ids, mask = Tokenizer(path, text_len)(text)

    assert ids.dtype == mask.dtype == np.int32
    np.testing.assert_array_equal(ids, [encoding.ids])
    np.testing.assert_array_equal(mask, [encoding.attention_mask])


def test_known_ids(path):
    ids, mask = Tokenizer(path, 6)("a red circle")
    assert ids.tolist() == [[4, 5, 6, 1, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0]]
    assert Tokenizer(path).text_len == 512
    assert Tokenizer(path).vocab_size == len(PIECES)


def test_a_length_stored_in_the_file_does_not_count(tmp_path):
    tokenizer = unigram()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=5, pad_id=2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ids, _ = Tokenizer(tmp_path / "tokenizer.json", 8)("a red circle moves")
    assert ids.tolist() == [[4, 5, 6, 7, 1, 0, 0, 0]]


def test_bad_files_name_themselves(tmp_path):
    with pytest.raises(UserError, match=r"absent\.json: no such"):
        Tokenizer(tmp_path / "absent.json")
    half = tmp_path / "half.json"
    half.write_text('{"version": "1.0", "model"')
    with pytest.raises(CheckpointError, match=r"half\.json"):
        Tokenizer(half)
    other = tmp_path / "other.json"
    tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(other))
    assert json.loads(other.read_text())["model"]["type"] == "WordLevel"
    with pytest.raises(CheckpointError, match=r"other\.json: has no </s>"):
        Tokenizer(other)
