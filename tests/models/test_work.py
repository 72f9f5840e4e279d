"""What a call may cost, counted and not timed: passes over memory, operations, products, bytes."""

from collections import Counter

import mlx.core as mx
import pytest

from mlx_wan.memory.liveness import trace
from mlx_wan.models import fused, layers, vae_passes
from mlx_wan.models.autoencoder import FeatureCache
from mlx_wan.models.layers import Pace
from mlx_wan.models.transformer import TransformerConfig, WanTransformer, rope_table
from mlx_wan.models.umt5 import TextEncoderConfig, UMT5Encoder
from mlx_wan.models.vae22 import VAEConfig, WanVAE22

DIMS = {"dim": 64, "ffn_dim": 128, "num_heads": 4, "freq_dim": 16, "text_dim": 24, "text_len": 8}
DIMS |= {"in_dim": 4, "out_dim": 4}
CONTEXT = mx.ones((1, 8, 24))


def transformer(number, dtype=mx.float32, **dims):
    model = WanTransformer(TransformerConfig(num_layers=number, **DIMS | dims), dtype)
    model.init_weights()
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model


def latents(frames=3, side=8):
    return mx.ones((1, frames, side, side, 4))


def operations(call, *arrays):
    return Counter(operation.name for operation in trace(call, arrays).operations)


def test_a_block_passes_eight_times_over_its_tokens(monkeypatch):
    """On CUDA each is one kernel. Keys of the text come once a run."""
    passes = []

    def counted(plain):
        def kernel(*arguments):
            passes.append(plain.__name__.removeprefix("_plain_"))
            return plain(*arguments)

        return kernel

    monkeypatch.setattr(fused, "target", lambda: "CUDA")
    monkeypatch.setattr(fused, "KERNELS", {plain: counted(plain) for plain in fused.KERNELS})
    fused.differentiable.cache_clear()
    model, x = transformer(1, mx.bfloat16), latents()
    text = model.read(CONTEXT)
    block = ["norm", "rms", "rms", "add_norm", "rms", "add_norm", "gelu", "add"]
    for first in (True, False):
        passes.clear()
        mx.eval(model(x, mx.array([500.0]), text))
        assert Counter(passes) == Counter(block + ["norm"] + ["rms"] * first), "and the head's norm"
    fused.differentiable.cache_clear()


@pytest.mark.parametrize(("groups", "most"), [(1, 253), (3, 258)])
def test_operations_of_a_block(groups, most, monkeypatch):
    """Of the plain form as the CPU has it, where a norm is several: what there were on 2026-11-24."""
    monkeypatch.setattr(layers, "FEW_SCORES", 0)  # MLX's softmax is one
    times = mx.full((1, groups), 500.0)
    one, two = (operations(transformer(n), latents(), times, CONTEXT) for n in (1, 2))
    assert sum((two - one).values()) <= most
    assert (two - one)["AddMM"] == 10, "the products of a block"


def test_a_text_that_was_read_costs_no_product_again():
    model, x, t = transformer(2), latents(), mx.array([500.0])
    text = model.read(CONTEXT)
    first = model(x, t, text)
    mx.eval(first)
    raw = operations(model, x, t, CONTEXT)
    kept = operations(lambda x, t: model(x, t, text), x, t)
    assert raw["AddMM"] - kept["AddMM"] == 2 + 2 * 2, "two of the embedding, and keys and values of each block"
    assert mx.array_equal(first, model(x, t, text))
    assert mx.array_equal(first, model(x, t, CONTEXT))


def test_rotary_tables_are_made_once():
    assert rope_table((3, 4, 4), 16)[0] is rope_table((3, 4, 4), 16)[0]


@pytest.mark.parametrize("groups", [1, 8])
def test_bytes_of_a_call(groups):
    """Most of it the scores of CPU attention: 64 MiB. One array of a token's modulation more would be 12 MiB."""
    model, x, text = transformer(2), latents(8, 32), mx.ones((1, 8, 24))
    model.eval()
    mx.eval(x, text)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(model(x, mx.full((1, groups), 500.0), text))
    assert mx.get_peak_memory() - before < 78 * 2**20, "74.2 on 2026-11-24"


def test_works_ahead_by_half_a_block(monkeypatch):
    done = []
    monkeypatch.setattr(mx, "async_eval", lambda x, *_: done.append(("begin", x.item())))
    monkeypatch.setattr(mx, "eval", lambda x: done.append(("wait", x.item())))
    pace = Pace()
    for part in range(3):
        pace(mx.array(part))
    assert done == [("begin", 0), ("begin", 1), ("wait", 0), ("begin", 2), ("wait", 1)]
    with layers.traceable("CPU"):
        pace(mx.array(3))
    assert len(done) == 5


def test_pace_is_kept_five_times_a_block_of_large_arrays(monkeypatch):
    """Queries and keys; attention; the text's; the wide arrays of the feed-forward, which are the largest; the sum."""
    kept = []
    monkeypatch.setattr(Pace, "__call__", lambda self, x, *_: kept.append(x.shape[-1]) or x)
    monkeypatch.setattr(layers, "LARGE", 1)
    model = transformer(1)
    model.eval()
    mx.eval(model(latents(), mx.array([500.0]), CONTEXT))
    assert kept == [64, 64, 64, 128, 64]


@pytest.mark.parametrize("training", [False, True])
def test_pace_is_kept_twice_a_block_and_not_in_training(monkeypatch, training):
    kept = []
    monkeypatch.setattr(Pace, "__call__", lambda self, x: kept.append(x.shape) or x)
    model = transformer(3).train(training)
    mx.eval(model(latents(), mx.array([500.0]), CONTEXT))
    assert kept == [(1, 48, 64)] * (0 if training else 6)


def test_text_encoder_looks_its_buckets_up_once():
    config = TextEncoderConfig(vocab_size=16, dim=16, dim_attn=16, dim_ffn=32, num_heads=2, num_layers=3)
    model = UMT5Encoder(config)
    model.init_weights()
    mx.eval(model.parameters())
    ids, mask = mx.zeros((1, 6), mx.int32), mx.ones((1, 6), mx.int32)
    graph = trace(model, [ids])
    tables = {
        op.inputs[1] for op in graph.operations if op.name == "Gather" and graph.shapes[op.outputs[0]][:2] == (6, 6)
    }
    assert len(tables) == 1, "one array of buckets for every block"
    assert operations(model, ids)["Select"] == 0, "no mask where none is given"
    assert operations(model, ids, mask)["Select"] == 3


@pytest.mark.parametrize("strips", [1, 3])
def test_kernels_between_the_convolutions_of_a_piece(monkeypatch, strips):
    """Of the VAE on CUDA: a norm before each convolution, a sum after each block, one pass around each doubling."""
    passes, kernel = Counter(), vae_passes.cuda_kernel
    monkeypatch.setattr(vae_passes, "cuda_kernel", lambda name, *text: passes.update([name]) or kernel(name, *text))
    monkeypatch.setattr(FeatureCache, "strip_count", lambda *_: strips)
    vae = WanVAE22(VAEConfig(dim=4, dec_dim=4, z_dim=4, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4))
    with layers.traceable("CUDA"):
        vae.pixels(mx.zeros((1, 1, 16, 2, 4)), FeatureCache(streaming=True))
        whole, wide = 2 + 2 * 3, 2 * 3  # blocks before the last doubling of time, and after it
        blocks = whole + wide * strips
        assert passes == {
            "wan_norm_silu": 2 * blocks + strips,
            "wan_add": blocks,
            "wan_interleave": 1 + 2 * strips,
        }
        passes.clear()
        vae.moments(mx.zeros((1, 1, 64, 32, 3)), FeatureCache(streaming=True))
        assert passes == {"wan_norm_silu": 2 * 10 + 1, "wan_add": 10, "wan_add_averages": 4}


def test_a_piece_waits_for_convolutions_and_doublings_alone(monkeypatch):
    """A block's sum is a short pass: waiting for it would leave the device idle."""
    monkeypatch.setattr(layers, "LARGE", 1)
    vae = WanVAE22(VAEConfig(dim=4, dec_dim=4, z_dim=4, latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4))
    done = operations(lambda z: vae.pixels(z, FeatureCache(streaming=True)), mx.zeros((1, 1, 2, 2, 4)))
    blocks, doublings = 2 + 4 * 3, 3
    assert done["Depends"] == 2 * blocks + 2 * doublings
