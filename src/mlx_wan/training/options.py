"""The options of fine-tuning: one dataclass, whose fields are the keys of a recipe and the flags of `mlx-wan train`.

Names are those of mlx_lm.lora where it has them. Importing this is cheap: the command line makes its flags of it.
"""

from dataclasses import dataclass, field
from typing import Any

from mlx_wan.errors import UserError

TARGETS = ("q", "k", "v", "o", "ffn.0", "ffn.2")
CHOICES = {
    "fine_tune_type": ("lora", "dora", "full"),
    "expert": ("high", "low", "both", None),
    "optimizer": ("adamw", "adam", "muon", "lion", "adafactor", "sgd"),
    "lr_schedule": ("constant", "cosine", "linear"),
    "dtype": ("float32", "bfloat16", "float16", None),
    "frame_sampling": ("head", "uniform", "slide"),
    "sigma_sampling": ("uniform", "logit-normal", "sigmoid"),
    "weighting": ("none", "bell", "cosmap"),
}
REPORTERS = ("csv", "tensorboard")
# What may change from one part of an interrupted run to the next: it decides no weights.
FREE_OPTIONS = (
    "steps_per_report", "steps_per_eval", "val_batches", "save_every", "keep", "report_to", "adapter_path", "cache",
    "preview_prompts", "preview_every", "preview_seed", "preview_steps", "data", "model", "shard_optimizer",
    "keep_both_experts",
)  # fmt: skip


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class FinetuneRecipe:
    """How a model is fine-tuned on clips of one's own. None means the model's own value, or what the device is for.

    UserError for a value that cannot be; what depends on the model is checked when it is known.
    """

    model: str | None = _option(None, "checkpoint folder, Hub id or tiny; quantized: QLoRA")
    data: str | None = _option(None, "folder of clips, .jsonl, .csv, or a data set of the Hub: OWNER/NAME")
    adapter_path: str = _option("adapters", "folder of the run: adapters, states, log")

    fine_tune_type: str = _option("lora", "lora, dora or full")
    expert: str | None = _option(None, "high, low or both: which of an A14B model's two is trained")
    switch_every: int = _option(50, "expert both: steps of one before it is the other's turn")
    keep_both_experts: bool = _option(False, "expert both: keep both in memory, instead of loading each for its turn")
    rank: int = _option(32, "of the adapters")
    alpha: float | None = _option(None, "adapters are scaled by alpha/rank; rank, a scale of 1, if left out")
    targets: tuple[str, ...] = _option(TARGETS, "which matrices get adapters, by the ends of their official names")
    num_layers: int = _option(-1, "how many blocks, counted from the last, get adapters or are trained; -1: all")
    resume_adapter_file: str | None = _option(None, "adapters.safetensors to start from")

    batch_size: int = _option(1, "clips of a batch")
    grad_accumulation_steps: int = _option(1, "batches of a step")
    iters: int = _option(1000, "optimizer steps in all")
    learning_rate: float = _option(1e-4, "after the warm-up")
    lr_schedule: str = _option("constant", "constant, cosine or linear")
    warmup_steps: int = _option(10, "steps of linear rise")
    optimizer: str = _option("adamw", "adamw, adam, muon, lion, adafactor or sgd")
    weight_decay: float = _option(0.01, "of the optimizer")
    beta2: float = _option(0.99, "second decay of adamw and adam")
    grad_clip: float = _option(1.0, "largest norm of all gradients together")
    ema_decay: float = _option(0.0, "of a moving average of the trained weights, which is then saved; 0: none")
    grad_checkpoint: bool = _option(False, "compute blocks twice, to keep less in memory")
    dtype: str | None = _option(None, "of computing: float32, bfloat16 or float16; trained weights are float32")
    compile: bool | None = _option(None, "one compiled step for each bucket; on Metal unless told otherwise")
    shard_optimizer: bool = _option(False, "of several processes each keeps its share of the optimizer's state alone")
    seed: int = _option(0, "of weights, order and noise")
    spike_factor: float = _option(10.0, "stop if a loss is so many times the running mean; 0: never")

    num_frames: tuple[int, ...] = _option((), "lengths of clips; a video gets the longest it fills")
    width: int | None = _option(None, "with height: area of a clip")
    height: int | None = _option(None, "with width: area of a clip")
    fps: float | None = _option(None, "frames a second to which videos are resampled")
    frame_sampling: str = _option("head", "head, uniform or slide: which clips of a long video")
    windows: int = _option(4, "clips of a video with frame_sampling uniform")
    window_stride: int = _option(0, "frames from clip to clip with frame_sampling slide; 0: their length")
    aspect_buckets: bool = _option(True, "keep aspect ratios, instead of cropping to width x height")
    flip: bool = _option(False, "show every clip mirrored too")
    hold_out: float = _option(0.0, "share of the files that are kept for validation where the data has no valid set")
    cache: str | None = _option(None, "folder of encoded clips and texts; beside the data if left out")

    sigma_sampling: str = _option("uniform", "uniform, logit-normal or sigmoid, before the shift")
    shift: float | None = _option(None, "of the noise levels")
    logit_mean: float = _option(0.0, "of sigma_sampling logit-normal")
    logit_std: float = _option(1.0, "of sigma_sampling logit-normal")
    weighting: str = _option("none", "of losses by noise level: none, bell or cosmap")
    caption_dropout: float = _option(0.1, "share of samples without a caption")
    image_to_video: float = _option(0.2, "share of samples whose first frame is given; of TI2V models alone")

    steps_per_report: int = _option(10, "steps between two rows of the log")
    steps_per_eval: int = _option(200, "steps between two validations")
    val_batches: int = _option(25, "batches of a validation; -1: all")
    save_every: int = _option(100, "steps between two checkpoints")
    keep: int = _option(2, "checkpoints on disk")
    report_to: tuple[str, ...] = _option((), "csv, tensorboard: besides log.jsonl")
    preview_prompts: tuple[str, ...] = _option((), "what to make previews of")
    preview_every: int = _option(500, "steps between two previews")
    preview_seed: int = _option(0, "of the previews' noise")
    preview_steps: int | None = _option(None, "denoising steps of a preview")

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                choose = ", ".join(filter(None, known))
                raise UserError(f"{name} is {getattr(self, name)!r}; choose one of {choose}")
        if unknown := [name for name in self.report_to if name not in REPORTERS]:
            raise UserError(f"report_to is {unknown[0]!r}; choose of {', '.join(REPORTERS)}")
        if self.model is None:
            raise UserError("model is missing: a checkpoint folder, a Hub id, or tiny")
        if self.data is None:
            raise UserError("data is missing: a folder of clips, a .jsonl or a .csv")
        for name in ("val_batches", "num_layers"):
            if getattr(self, name) < 1 and getattr(self, name) != -1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least 1, or -1 for all")
        self._at_least(1, "rank", "windows", "steps_per_report", "steps_per_eval", "save_every", "keep")
        self._at_least(1, "switch_every", "preview_every", "preview_steps", "width", "height", "iters")
        self._at_least(0, "window_stride", "preview_seed")
        self._above_0("alpha", "fps", "shift", "logit_std")
        self._share("caption_dropout", "image_to_video")
        if not 0 <= self.hold_out < 1:
            raise UserError(f"hold_out is {self.hold_out}; it must be from 0 to below 1")
        if any(length < 1 for length in self.num_frames):
            raise UserError(f"num_frames is {list(self.num_frames)}; lengths must be at least 1")
        if not self.targets:
            raise UserError("targets is empty; name at least one matrix, such as q")
        if (self.width is None) != (self.height is None):
            raise UserError("give both width and height, or neither")
        if self.fine_tune_type == "full" and self.resume_adapter_file:
            raise UserError("resume_adapter_file is for lora and dora; give the model itself as model")

        if self.expert == "both":
            self._check_turns()

    def _check_turns(self) -> None:
        if self.iters <= self.switch_every:
            raise UserError(
                f"iters is {self.iters} and switch_every {self.switch_every}: the second expert would have no turn"
            )
        if self.fine_tune_type == "full" and not self.keep_both_experts:
            raise UserError("full fine-tuning of both experts has both in memory; add keep_both_experts, or train one")

    @property
    def experts(self) -> tuple[str | None, ...]:
        """Whom it trains: "high" and "low" in the order of their turns, or one; None: a model without experts."""
        return ("high", "low") if self.expert == "both" else (self.expert,)

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} is {value}; it must be at least {least}")

    def _above_0(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name} is {value}; it must be above 0")

    def _share(self, *names: str) -> None:
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")
