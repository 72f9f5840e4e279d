"""How the processes of a run share one video: by tokens, by the two passes of guidance, and by weights."""

from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx

from mlx_wan.errors import UserError
from mlx_wan.models.autoencoder import WanVAE
from mlx_wan.models.transformer import WanTransformer
from mlx_wan.models.umt5 import UMT5Encoder
from mlx_wan.parallel.pulse import PATIENCE, PULSE
from mlx_wan.parallel.rows import encode, stream_decode
from mlx_wan.parallel.spread import Spread
from mlx_wan.parallel.team import Team
from mlx_wan.parallel.tokens import TokenShare
from mlx_wan.sampling import Context, one_after_the_other
from mlx_wan.weights.checkpoint import Checkpoint
from mlx_wan.weights.fit import fit_tensors
from mlx_wan.weights.load import fill, load_text_encoder, load_transformer


class Parallel:
    """This process's part of the work.

    Rank r is member r % ulysses_size of the group r // ulysses_size; two groups take the two passes of guidance.

    Args:
        world: the group of all ranks, `mx.distributed.init()`; None is one process alone.
        ulysses_size: how many ranks share the tokens of a transformer call.
        cfg_parallel: whether prompt and negative prompt are computed at the same time, each by half of the ranks.
        dit_fsdp, t5_fsdp: whether the transformer's, the text encoder's weights are spread over all ranks.

    Raises UserError if the world has another number of ranks.
    """

    def __init__(
        self,
        world: mx.distributed.Group | None = None,
        ulysses_size: int = 1,
        cfg_parallel: bool = False,
        dit_fsdp: bool = False,
        t5_fsdp: bool = False,
    ):
        self.size, self.rank = (1, 0) if world is None else (world.size(), world.rank())
        groups = 2 if cfg_parallel else 1
        if ulysses_size * groups != self.size:
            use = f": give --ulysses_size {self.size}" if self.size > 1 else ""
            needed = f"--ulysses_size {ulysses_size}{' --cfg_parallel' if cfg_parallel else ''}"
            raise UserError(
                f"{needed} is for {ulysses_size * groups} processes (mlx.launch -n {ulysses_size * groups}) and there "
                f"{'is' if self.size == 1 else 'are'} {self.size}: processes that share tokens, times two with "
                f"--cfg_parallel, must be as many as there are{use}"
            )
        group, member = divmod(self.rank, ulysses_size)
        self._everybody = everybody = Team(world)
        self._tokens = Team(world, range(group * ulysses_size, (group + 1) * ulysses_size))
        self._passes = Team(world, range(member, self.size, ulysses_size))
        self._transformer = Spread(everybody) if dit_fsdp and self.size > 1 else None
        self._text_encoder = Spread(everybody) if t5_fsdp and self.size > 1 else None

    @property
    def is_first(self) -> bool:
        """Whether this process hands out frames, writes and prints."""
        return self.rank == 0

    def from_first(self, array: mx.array) -> mx.array:
        """The array that the first process has, to the bit; the others give one of its shape and type."""
        return self._everybody.all_gather(array)[0]

    @property
    def share_of_transformer(self) -> float:
        """About which share of the transformer's weights this process holds."""
        return 1 if self._transformer is None else 1 / self.size

    @property
    def share_of_text_encoder(self) -> float:
        """The same of the text encoder's."""
        return 1 if self._text_encoder is None else 1 / self.size

    def passes(
        self, velocity_for: Callable[[Context], mx.array], context: Context, negative_context: Context
    ) -> tuple[mx.array, mx.array]:
        """The velocities for prompt and negative prompt, as `sampling.one_after_the_other`."""
        if self._passes.size == 1:
            return one_after_the_other(velocity_for, context, negative_context)
        own = velocity_for(context if self._passes.rank == 0 else negative_context)
        both = self._passes.all_gather(own)
        return both[0], both[1]

    def agree(self, decision: bool) -> bool:
        """What the first process decides, for all: numbers may differ in their last digits between machines."""
        # As a number: NCCL has no booleans.
        return decision if self.size == 1 else bool(self.from_first(mx.array([int(decision)])).item())

    def encode(self, vae: WanVAE, video: mx.array) -> mx.array:
        """As `WanVAE.encode`, shared by all processes; each gets the whole latents."""
        return encode(vae, video, self._everybody)

    def stream_decode(self, vae: WanVAE, latents: mx.array) -> Iterator[mx.array]:
        """As `WanVAE.stream_decode`, shared by all processes; at least the first one gets the pieces."""
        return stream_decode(vae, latents, self._everybody)

    def load_transformer(self, checkpoint: Checkpoint, dtype: mx.Dtype, part: str) -> WanTransformer:
        """As `weights.load.load_transformer`; it computes this process's tokens, with this process's weights."""
        with PULSE.taking(PATIENCE):  # in the middle of the steps too, where a model has two
            if self._transformer is None:
                model = load_transformer(checkpoint, dtype, part)
            else:
                model = WanTransformer(checkpoint.transformer_config, dtype)
                self._fill(self._transformer, checkpoint, part, model, dtype)
        if self._tokens.size > 1:
            model.share_of = partial(TokenShare, self._tokens)
        return model

    def load_text_encoder(self, checkpoint: Checkpoint, dtype: mx.Dtype) -> UMT5Encoder:
        """As `weights.load.load_text_encoder`."""
        if self._text_encoder is None:
            return load_text_encoder(checkpoint, dtype)
        model = UMT5Encoder(checkpoint.text_encoder_config)
        self._fill(self._text_encoder, checkpoint, "text_encoder", model, dtype)
        return model

    @staticmethod
    def _fill(
        spread: Spread, checkpoint: Checkpoint, part: str, model: WanTransformer | UMT5Encoder, dtype: mx.Dtype
    ) -> None:
        tensors = fit_tensors(checkpoint, part, model, dtype)
        fill(model, tensors, spread.read)
        spread.wrap(model, tensors)


ALONE = Parallel()
