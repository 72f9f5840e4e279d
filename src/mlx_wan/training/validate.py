"""The validation loss: fixed noise and fixed noise levels, for each band of timesteps."""

from collections.abc import Callable

import mlx.core as mx

from mlx_wan.models.transformer import WanTransformer
from mlx_wan.training.objective import TRAIN_TIMESTEPS, flow_loss

BANDS = 4
_SEED = 0x57414E  # of the noise; never that of training


def band_losses(
    transformer: WanTransformer,
    count: int,
    example: Callable[[int], tuple[dict[str, mx.array], mx.array]],
    within: tuple[float, float] = (0.0, 1.0),
) -> dict[str, float]:
    """Mean losses over `count` clips in all and in each of four equal bands of timesteps, without a first frame for
    TI2V.

    Every clip is asked about once in every band, at a level that moves through the band from clip to clip. Levels and
    noise depend on a clip's number alone, so that two models, or two steps of one, can be compared.

    Args:
        transformer: takes latents (1, t, h, w, C) and a context (1, n, text_dim).
        example: number of a clip -> what `cache.load_clip` gives of it, and its context (n, text_dim).
        within: noise levels that the bands divide: those of one expert.

    Returns:
        {"val_loss": ..., "val_loss_0_250": ..., "val_loss_250_500": ..., ...}
    """
    sums, (low, high) = [0.0] * BANDS, within
    for i in range(count):
        clip, context = example(i)
        given = {name: array[None] for name, array in clip.items()}
        latents = given.pop("latents").astype(mx.float32)
        keys = mx.random.split(mx.random.key(_SEED + i), BANDS)
        for band in range(BANDS):
            sigma = mx.array([low + (high - low) * (band + (i + 0.5) / count) / BANDS])
            noise = mx.random.normal(latents.shape, key=keys[band])
            loss = flow_loss(transformer, latents, context[None], noise, sigma, mx.array([False]), **given)
            sums[band] += loss.item()  # type: ignore[operator]  one pass's activations in memory at a time
    edges = [round(TRAIN_TIMESTEPS * (low + (high - low) * i / BANDS)) for i in range(BANDS + 1)]
    means = {f"val_loss_{edges[i]}_{edges[i + 1]}": total / count for i, total in enumerate(sums)}
    return {"val_loss": sum(means.values()) / BANDS, **means}
