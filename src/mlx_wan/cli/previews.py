"""Previews while a model trains: the same prompts and seeds each time, a contact sheet and the videos."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import mlx.core as mx

    from mlx_wan.models.transformer import WanTransformer
    from mlx_wan.sampling import Condition
    from mlx_wan.training.plan import Plan


class Previews:
    """Makes clips of the plan's preview_prompts with the model as it is, and keeps them in RUN/previews.

    One contact sheet a time, `0000500.png`, a row for each prompt. The VAE is loaded for that and leaves again.
    """

    def __init__(self, plan: "Plan"):
        self.plan = plan

    def __call__(
        self,
        transformer_at: "Callable[[float], WanTransformer]",
        step: int,
        texts: "dict[str, mx.array]",
        shown: "list[Condition]",
    ) -> None:
        """texts: embedding (1, text_len, text_dim) of each prompt and of the model's negative prompt. shown: for each
        prompt, the frames that a model of pictures goes on from."""
        import mlx.core as mx

        from mlx_wan.conditioning import to_uint8
        from mlx_wan.video import write_sheet
        from mlx_wan.weights.load import load_vae

        recipe = self.plan.recipe
        latents = [self._denoised(transformer_at, texts, i, known) for i, known in enumerate(shown)]
        vae = load_vae(self.plan.checkpoint)
        folder = Path(recipe.adapter_path) / "previews"
        folder.mkdir(parents=True, exist_ok=True)
        write_sheet(folder / f"{step:07d}.png", (to_uint8(vae.decode(each)[0]) for each in latents))
        del vae
        mx.clear_cache()

    def _denoised(
        self,
        transformer_at: "Callable[[float], WanTransformer]",
        texts: "dict[str, mx.array]",
        i: int,
        known: "Condition",
    ) -> "mx.array":
        """Latents of prompt number i."""
        from mlx_wan.sampling import Expert, denoise, initial_noise
        from mlx_wan.schedulers import make_scheduler
        from mlx_wan.schedulers.flow import TRAIN_TIMESTEPS

        recipe, spec, checkpoint = self.plan.recipe, self.plan.checkpoint.spec, self.plan.checkpoint
        stride_t, stride_h, stride_w = checkpoint.vae_config.stride
        assert recipe.width and recipe.height and recipe.preview_steps and recipe.shift  # noqa: PT018  resolved
        frames = (max(recipe.num_frames) - 1) // stride_t + 1
        size = (frames, recipe.height // stride_h, recipe.width // stride_w)
        if known.channels is not None:
            size = known.channels.shape[1:4]
        scale = spec.guidance_scale

        def expert_at(timestep: float) -> Expert:
            low = spec.boundary is not None and timestep < spec.boundary * TRAIN_TIMESTEPS
            here = scale[0 if low else 1] if isinstance(scale, tuple) else scale  # (low noise, high noise)
            return Expert(transformer_at(timestep), here)

        steps = denoise(
            expert_at,
            make_scheduler(spec.scheduler, recipe.preview_steps, spec.shift),
            initial_noise((1, *size, checkpoint.vae_config.z_dim), recipe.preview_seed + i),
            texts[recipe.preview_prompts[i]],
            texts[spec.negative_prompt],
            known,
        )
        return list(steps)[-1].latents
