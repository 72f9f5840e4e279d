"""Previews while a model trains: the same prompts and seeds each time, a contact sheet and the videos."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_wan.models.transformer import WanTransformer
    from mlx_wan.training.plan import Plan


class Previews:
    """Makes clips of the plan's preview_prompts with the model as it is, and keeps them in RUN/previews.

    One contact sheet a time, `0000500.png`, a row for each prompt. The VAE is loaded for that and leaves again.
    """

    def __init__(self, plan: "Plan"):
        self.plan = plan

    def __call__(self, transformer: "WanTransformer", step: int, texts: dict[str, "mx.array"]) -> None:
        """texts: embedding (1, text_len, text_dim) of each prompt and of the model's negative prompt."""
        import mlx.core as mx

        from mlx_wan.conditioning import to_uint8
        from mlx_wan.video import write_sheet
        from mlx_wan.weights.load import load_vae

        recipe = self.plan.recipe
        transformer.save_memory(False)
        latents = [self._denoised(transformer, texts, i) for i in range(len(recipe.preview_prompts))]
        transformer.save_memory(recipe.grad_checkpoint)
        vae = load_vae(self.plan.checkpoint)
        folder = Path(recipe.adapter_path) / "previews"
        folder.mkdir(parents=True, exist_ok=True)
        write_sheet(folder / f"{step:07d}.png", (to_uint8(vae.decode(each)[0]) for each in latents))
        del vae
        mx.clear_cache()

    def _denoised(self, transformer: "WanTransformer", texts: dict[str, "mx.array"], i: int) -> "mx.array":
        """Latents of prompt number i."""
        from mlx_wan.sampling import Expert, denoise, initial_noise
        from mlx_wan.schedulers import make_scheduler

        recipe, spec, checkpoint = self.plan.recipe, self.plan.checkpoint.spec, self.plan.checkpoint
        stride_t, stride_h, stride_w = checkpoint.vae_config.stride
        assert recipe.width and recipe.height and recipe.preview_steps and recipe.shift  # noqa: PT018  resolved
        frames = (max(recipe.num_frames) - 1) // stride_t + 1
        shape = (1, frames, recipe.height // stride_h, recipe.width // stride_w, checkpoint.vae_config.z_dim)
        scale = spec.guidance_scale
        assert isinstance(scale, float | int)  # a pair is of models with two experts
        steps = denoise(
            lambda timestep: Expert(transformer, scale),
            make_scheduler(spec.scheduler, recipe.preview_steps, spec.shift),
            initial_noise(shape, recipe.preview_seed + i),
            texts[recipe.preview_prompts[i]],
            texts[spec.negative_prompt],
        )
        return list(steps)[-1].latents
