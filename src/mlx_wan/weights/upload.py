"""A converted model to a repository of the Hugging Face Hub."""

from pathlib import Path

from mlx_wan import backend
from mlx_wan.errors import UserError
from mlx_wan.weights.hub import HUB_ID
from mlx_wan.weights.save import replacing

CARD = """---
library_name: mlx-wan
tags:
- mlx
- {pipeline}
pipeline_tag: {pipeline}
{base}---

# {name}

{what}, written by `mlx-wan convert` {version}. The licence is that of the model it was made from.

```bash
mlx-wan generate --ckpt_dir {hub_id} --prompt "..."
```
"""


def check_upload(hub_id: str) -> None:
    """Raises UserError for a name that no repository has, and where nobody is logged in: before the work."""
    from huggingface_hub import get_token

    if not HUB_ID.fullmatch(hub_id):
        raise UserError(f"--upload-repo {hub_id}: must be OWNER/NAME, as on the Hugging Face Hub")
    if get_token() is None:
        raise UserError(f"--upload-repo {hub_id}: nobody is logged in; run `hf auth login`, or set HF_TOKEN")


def model_card(hub_id: str, source: str, task: str) -> str:
    """The README.md of a repository. source: what was converted; task: `ModelSpec.task`."""
    is_hub = HUB_ID.fullmatch(source) and not Path(source).exists()
    return CARD.format(
        pipeline="image-to-video" if task in ("i2v", "flf2v") else "text-to-video",
        base=f"base_model: {source}\n" if is_hub else "",
        name=hub_id.partition("/")[2],
        what=f"[{source}](https://huggingface.co/{source})" if is_hub else "A Wan model",
        version=backend.version("mlx-wan"),
        hub_id=hub_id,
    )


def upload(folder: Path, hub_id: str, card: str) -> str:
    """Sends a folder to the Hub, whose address is HF_ENDPOINT's, and returns the repository's.

    A repository that is not there is made, private; of one that is there the files of these names are replaced. What
    has arrived is not sent again. card: for a README.md, if the folder has none.

    Raises:
        UserError: the Hub cannot be reached, or does not let the user write there.
    """
    from huggingface_hub import HfApi

    if not (folder / "README.md").exists():
        with replacing(folder / "README.md") as partial:
            partial.write_text(card, encoding="utf-8")
    api = HfApi()
    try:
        address = api.create_repo(hub_id, private=True, exist_ok=True)
        api.upload_folder(repo_id=hub_id, folder_path=folder, commit_message=f"mlx-wan {backend.version('mlx-wan')}")
    except Exception as error:  # which ones a lost connection raises depends on the HTTP client of this version
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"--upload-repo {hub_id}: {folder} is written, but the Hugging Face Hub did not take it ({reason}); "
            f"`hf upload {hub_id} {folder}` tries again"
        ) from error
    return str(address)
