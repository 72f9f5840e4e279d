"""A VAE shared: every rank computes some rows of each frame, and asks its neighbours for those beside them.

A 3×3 convolution needs one row more above and below; attention, among the pixels of a frame, needs everybody's keys and
values. Both are exchanged when they are due, so the result is that of one process.
"""

from collections.abc import Iterator

import mlx.core as mx

from mlx_wan.models.autoencoder import WanVAE
from mlx_wan.models.share import Rows
from mlx_wan.parallel.team import Team


class RowShare(Rows):
    """One rank's rows of frames that have `height` of them as latents; at least one for each rank."""

    def __init__(self, team: Team, height: int):
        self._team, self._height = team, height
        self._start, self._stop = team.bounds(height)[team.rank :][:2]

    def take(self, x: mx.array) -> mx.array:
        start, stop = (bound * x.shape[2] // self._height for bound in (self._start, self._stop))
        return x[:, :, start:stop]

    def border(self, x: mx.array) -> mx.array:
        rank, last = self._team.rank, self._team.size - 1
        edges = self._team.all_gather(mx.stack([x[:, :, :1], x[:, :, -1:]]))  # (ranks, 2, B, T, 1, W, C)
        nothing = mx.zeros_like(x[:, :, :1])
        above = edges[rank - 1, 1] if rank > 0 else nothing
        below = edges[rank + 1, 0] if rank < last else nothing
        return mx.concatenate([above, x, below], axis=2)

    def gather(self, x: mx.array) -> mx.array:
        # A latent's row is several rows of pixels, and half as many between: own rows tell how many.
        counts = [count * x.shape[2] // (self._stop - self._start) for count in self._team.counts(self._height)]
        return self._team.gather_rows(x.moveaxis(2, 0), counts).moveaxis(0, 2)


def encode(vae: WanVAE, video: mx.array, team: Team) -> mx.array:
    """As `WanVAE.encode`, by all of a team, which must call it alike; by each alone where there are too few rows."""
    height = video.shape[2] // vae.config.stride[1]
    if not 1 < team.size <= height:
        return vae.encode(video)
    rows = RowShare(team, height)
    return mx.concatenate([rows.gather(piece) for piece in vae.stream_encode(video, rows)], axis=1)


def stream_decode(vae: WanVAE, latents: mx.array, team: Team) -> Iterator[mx.array]:
    """As `WanVAE.stream_decode`, by all of a team, which must call it alike; each gets the whole frames.

    Where latents have fewer rows than the team has ranks, the first works alone and the others get nothing.
    """
    height = latents.shape[2]
    if not 1 < team.size <= height:
        if team.rank == 0:
            yield from vae.stream_decode(latents)
        return
    rows = RowShare(team, height)
    for piece in vae.stream_decode(latents, rows):
        whole = rows.gather(piece)
        mx.eval(whole)
        yield whole
