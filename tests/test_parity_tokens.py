"""Prompts to ids, against the official cleaning and transformers' fast tokenizer."""

import cases
import numpy as np
import pytest
import small

from mlx_wan.text import Tokenizer, clean_prompt
from mlx_wan.zoo import LATENTS_MEAN, LATENTS_STD, MODELS


def test_cleaning():
    assert [clean_prompt(p) for p in small.PROMPTS] == cases.golden("tokens")["cleaned"].tolist()


@pytest.mark.parametrize("length", [64, 512])
def test_ids_and_mask(length):
    tokenizer = Tokenizer(cases.GOLDEN / "tokenizer.json", length)
    got = [tokenizer(clean_prompt(p)) for p in small.PROMPTS]
    assert np.array_equal(np.concatenate([ids for ids, _ in got]), cases.golden("tokens")[f"ids/{length}"])
    assert np.array_equal(np.concatenate([mask for _, mask in got]), cases.golden("tokens")[f"mask/{length}"])


def test_constants():
    assert MODELS["ti2v-5B"].negative_prompt == str(cases.golden("tokens")["negative_prompt"])
    np.testing.assert_allclose(LATENTS_MEAN, cases.golden("vae")["latents_mean"], rtol=1e-6)
    np.testing.assert_allclose(LATENTS_STD, cases.golden("vae")["latents_std"], rtol=1e-6)
