"""The validation loss: fixed noise and fixed noise levels, for each band of timesteps."""

from collections.abc import Callable

import mlx.core as mx

from mlx_wan.models.transformer import WanTransformer
from mlx_wan.training.objective import TRAIN_TIMESTEPS, flow_loss

BANDS = 4
_SEED = 0x57414E  # of the noise; never that of training


def band_losses(
    transformer: WanTransformer, count: int, example: Callable[[int], tuple[mx.array, mx.array]]
) -> dict[str, float]:
    """Mean losses over `count` clips, text to video, in all and in each of four bands of 250 timesteps.

    Every clip is asked about once in every band, at a level that moves through the band from clip to clip. Levels and
    noise depend on a clip's number alone, so that two models, or two steps of one, can be compared.

    Args:
        transformer: takes latents (1, t, h, w, C) and a context (1, n, text_dim).
        example: number of a clip -> its latents (t, h, w, C) and context (n, text_dim).

    Returns:
        {"val_loss": ..., "val_loss_0_250": ..., "val_loss_250_500": ..., ...}
    """
    sums = [0.0] * BANDS
    for i in range(count):
        latents, context = example(i)
        latents = latents.astype(mx.float32)[None]
        keys = mx.random.split(mx.random.key(_SEED + i), BANDS)
        for band in range(BANDS):
            sigma = mx.array([(band + (i + 0.5) / count) / BANDS])
            noise = mx.random.normal(latents.shape, key=keys[band])
            loss = flow_loss(transformer, latents, context[None], noise, sigma, mx.array([False]))
            sums[band] += loss.item()  # type: ignore[operator]  one pass's activations in memory at a time
    width = TRAIN_TIMESTEPS // BANDS
    means = {f"val_loss_{i * width}_{(i + 1) * width}": total / count for i, total in enumerate(sums)}
    return {"val_loss": sum(means.values()) / BANDS, **means}
