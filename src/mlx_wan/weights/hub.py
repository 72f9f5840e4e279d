"""A repository of the Hugging Face Hub -> its folder in the local cache, with the files a model needs and no others.

huggingface_hub finds the files and keeps the cache. The large ones are fetched here: it (2.4) begins a file anew when
its process has ended, and compares sizes alone.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlparse

from mlx_wan.errors import CheckpointError, UserError, WanError
from mlx_wan.weights.checkpoint import Layout, layout_for
from mlx_wan.weights.diffusers import INDEX
from mlx_wan.weights.files import INDEX_SUFFIX, read_index

SMALL = ("config.json", INDEX, "*/config.json", f"*{INDEX_SUFFIX}")  # what tells which files there must be


class Remote(NamedTuple):
    """A file of a repository. sha256: of large ones (LFS). git_hash: of small ones."""

    name: str
    size: int
    sha256: str | None
    git_hash: str | None


def download(hub_id: str, check: Callable[[Path], Any]) -> Path:
    """The folder of a Hub repository in the local cache. What is there is not asked for again.

    A file that was cut off goes on where it stopped, also in another process. Hashes of all new files are compared. The
    address is HF_ENDPOINT's, the place HF_HOME's; without a connection what is in the cache has to do.

    Args:
        check: raises if the folder, of which only `SMALL` files are there, is of a model that does not run.

    Raises:
        UserError: no such repository, no connection, no room.
        CheckpointError: no model in it, or a file that arrived damaged.
    """
    import huggingface_hub  # slow to import, and only needed here

    try:
        folder = Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(SMALL)))
        files = _listing(hub_id, folder.name)
        if files is None:  # no connection: the folder is as it is
            return folder
        layout = layout_for(files, _config(folder))
        if layout is None:
            raise CheckpointError(
                f"{hub_id}: holds no model in a layout that loads from the Hub; download its files and give them one "
                "by one (--transformer, --text_encoder, --vae)"
            )
        check(folder)
        wanted = [files[name] for name in needed(layout, files, folder)]
        _fetch_large(hub_id, folder, wanted)
        names = [file.name for file in wanted]
        folder = Path(huggingface_hub.snapshot_download(hub_id, revision=folder.name, allow_patterns=[*SMALL, *names]))
        _check_small(hub_id, folder, files.values())
        return folder
    except WanError:
        raise
    except Exception as error:  # which ones a lost connection raises depends on the HTTP client of this version
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{hub_id}: no such folder here, and the Hugging Face Hub did not provide it ({reason}); "
            "check the name and the connection and start again (what has arrived is kept), or give a folder"
        ) from error


def needed(layout: Layout, names: Iterable[str], folder: Path) -> list[str]:
    """The files of a layout among `names`: of each part the first choice, and the shards that its index names.

    folder: where the indexes are.
    """
    names, found = set(names), list(layout.configs.values())
    for choices in layout.files.values():
        name = next((choice for choice in choices if choice in names), None)
        if name is None:
            continue
        found.append(name)
        if name.endswith(INDEX_SUFFIX):
            shards = {file.name for file in read_index(folder / name, must_exist=False).values()}
            found += sorted(str(PurePosixPath(name).with_name(shard)) for shard in shards)
    return [name for name in dict.fromkeys(found) if name in names]


def _config(folder: Path) -> Mapping[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}  # `check` has the words for it
    return config if isinstance(config, dict) else {}


def _listing(hub_id: str, commit: str) -> dict[str, Remote] | None:
    """The files of a repository by name; None if the Hub cannot be asked."""
    from huggingface_hub import HfApi

    try:
        siblings = HfApi().model_info(hub_id, revision=commit, files_metadata=True).siblings
    except Exception:  # as in `download`; the snapshot was there without asking
        return None
    files = {}
    for file in siblings or ():
        hashes = (file.lfs.sha256, None) if file.lfs else (None, file.blob_id)
        files[file.rfilename] = Remote(file.rfilename, file.size or 0, *hashes)
    return files


def _fetch_large(hub_id: str, folder: Path, files: Iterable[Remote]) -> None:
    """Puts large files that are missing into the cache, where huggingface_hub finds them."""
    blobs = folder.parent.parent / "blobs"
    absent = [file for file in files if file.sha256 and not (folder / file.name).exists()]
    missing = [file for file in absent if not (blobs / str(file.sha256)).exists()]
    room, size = shutil.disk_usage(folder).free, sum(file.size - _arrived(blobs, file) for file in missing)
    if size > room:
        raise UserError(
            f"{hub_id}: {size / 1e9:.1f} GB are to be downloaded, and {blobs} has room for {room / 1e9:.1f}; "
            "make room, or set HF_HOME to a folder on a larger disk"
        )
    for file in missing:
        _fetch(hub_id, folder.name, file, blobs)


def _partial(blobs: Path, file: Remote) -> Path:
    return blobs / f"{file.sha256}.incomplete"  # `hf cache prune` knows such names


def _arrived(blobs: Path, file: Remote) -> int:
    partial = _partial(blobs, file)
    return min(partial.stat().st_size, file.size) if partial.exists() else 0


def _fetch(hub_id: str, commit: str, file: Remote, blobs: Path) -> None:
    """One file, from where it was cut off; again from the start if that part of it was damaged."""
    assert file.sha256 is not None
    partial, blob = _partial(blobs, file), blobs / file.sha256
    blobs.mkdir(parents=True, exist_ok=True)
    with partial.open("ab") as out:
        fcntl.flock(out, fcntl.LOCK_EX)  # another process may be at it
        if blob.exists():
            partial.unlink(missing_ok=True)
            return
        while True:
            before = out.seek(0, os.SEEK_END)
            if before > file.size:
                before = out.truncate(0)
            _append(hub_id, commit, file, out, before)
            out.flush()
            os.fsync(out.fileno())
            with partial.open("rb") as whole:
                if hashlib.file_digest(whole, "sha256").hexdigest() == file.sha256:
                    os.replace(partial, blob)
                    return
            out.truncate(0)
            if not before:
                raise CheckpointError(
                    f"{hub_id}: {file.name} arrived damaged: its SHA-256 is not the one that the Hub names; it was "
                    "removed: start again"
                )


def _append(hub_id: str, commit: str, file: Remote, out: Any, before: int) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    url, headers = hf_hub_url(hub_id, file.name, revision=commit), build_hf_headers()
    location = get_hf_file_metadata(url).location
    if urlparse(location).netloc != urlparse(url).netloc:
        headers.pop("authorization", None)  # a token is for the Hub, not for where it keeps its files
    http_get(location, out, resume_size=before, headers=headers, expected_size=file.size, displayed_filename=file.name)


def _check_small(hub_id: str, folder: Path, files: Iterable[Remote]) -> None:
    for file in files:
        if file.git_hash and (path := folder / file.name).is_file():
            data = path.read_bytes()
            if hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() != file.git_hash:
                path.resolve().unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                raise CheckpointError(
                    f"{hub_id}: {file.name} is damaged: its hash is not the one that the Hub names; it was removed: "
                    "start again"
                )
