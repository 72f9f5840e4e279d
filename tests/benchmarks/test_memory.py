"""benchmarks/memory.py: that it tells growth from none, and that the package has none."""

import sys
from pathlib import Path

import mlx.core as mx
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
import memory


def test_the_vae_holds_no_more_for_a_longer_clip():
    (_, decode, encode), (_, decode_long, encode_long) = memory.vae_peaks(memory.small_vae(), 32, (13, 61))
    assert decode > 0
    assert encode > 0
    # MLX runs ahead by a few operations, how many depends on timing; 12 pieces more would be several times this.
    assert decode_long <= 1.15 * decode
    assert encode_long <= 1.15 * encode


def test_growth_would_be_seen():
    def hoarding(pieces):
        kept = []
        for _ in range(pieces):
            kept.append(mx.ones((1 << 18,)))
            mx.eval(kept)
            yield kept[-1]

    peaks = [memory._peak(hoarding(pieces)) for pieces in (4, 16)]
    assert peaks == pytest.approx([4 << 20, 16 << 20], rel=1e-3)


@pytest.mark.parametrize("low_memory", [True, False])
def test_low_memory_lets_the_text_encoder_go_before_the_transformer_comes(tmp_path, low_memory):
    sizes = memory.write_model(tmp_path)
    held = {stage: held for stage, held, _ in memory.pipeline_memory(tmp_path, low_memory)}
    text_encoder, transformer, vae = sizes["text encoder"], sizes["transformer"], sizes["VAE"]
    extra = 60 << 20  # latents, embeddings, the VAE's caches
    assert text_encoder <= held["text"] < text_encoder + extra
    if low_memory:
        assert transformer <= held["denoise"] < transformer + extra
        assert held["latents"] < extra
        assert vae <= held["frames"] < vae + extra
    else:
        assert held["denoise"] >= text_encoder + transformer
        assert held["frames"] >= text_encoder + transformer + vae
