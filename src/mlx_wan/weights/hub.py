"""A repository of the Hugging Face Hub -> its folder in the local cache, with the files that are needed and no others.

huggingface_hub finds the files and keeps the cache. The large ones are fetched here: it (2.4) begins a file anew when
its process has ended, and compares sizes alone.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlparse

from mlx_wan.errors import CheckpointError, UserError, WanError
from mlx_wan.weights.checkpoint import Layout, layout_for
from mlx_wan.weights.diffusers import INDEX
from mlx_wan.weights.files import INDEX_SUFFIX, TENSOR_SUFFIXES, read_index

SMALL = ("config.json", INDEX, "*/config.json", f"*{INDEX_SUFFIX}")  # what tells which files there must be
OF_A_FILE = (".gitattributes", f"*{INDEX_SUFFIX}")  # the same; the first, which every repository has, makes its folder
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")  # OWNER/NAME
FILE_ID = re.compile(rf"({HUB_ID.pattern})(?:/(.+))?")  # OWNER/NAME, OWNER/NAME/PATH
SHARD = re.compile(r"-\d+-of-\d+\.\w+$")
LORA_CONFIG = "adapter_config.json"  # PEFT's, without which its file is only half
SHOWN = 8  # names listed in an error


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

    def wanted(files: Collection[str], folder: Path) -> list[str]:
        layout = layout_for(files, _config(folder))
        if layout is None:
            raise CheckpointError(
                f"{hub_id}: holds no model in a layout that loads as a whole; give its files one by one, such as "
                f"--transformer {hub_id}/{next(iter(_candidates(files)), 'FILE')}"
            )
        check(folder)
        return needed(layout, files, folder)

    return _provided(hub_id, SMALL, wanted, hub_id)


def is_hub_file(where: str | Path) -> bool:
    """Whether this names a file or a repository on the Hub: it may be an id, and nothing here is called so.

    "loras/style.safetensors" is none: no repository has such a name, but many a file that is not there. Nor is what
    would be in a folder that is here.
    """
    match, path = FILE_ID.fullmatch(str(where)), Path(where)
    if match is None or path.exists() or path.parent.is_dir():
        return False
    return match[2] is not None or not match[1].endswith(TENSOR_SUFFIXES)


def file_name(where: str | Path) -> str:
    """What a file is called, without where it is on this machine: its name, or all of what names it on the Hub."""
    return str(where) if is_hub_file(where) else Path(where).name


def local_file(where: str | Path, usual: tuple[str, ...] = ()) -> Path:
    """The path of a file: itself, or of one on the Hub ("OWNER/NAME/PATH") that of the copy in the local cache.

    What is in the cache is not asked for again. Of "OWNER/NAME", or a folder in it, the file is meant that has one of
    the `usual` names, else the only file of tensors.

    Raises:
        UserError: no such file on the Hub, several that may be meant, no connection, no room.
        CheckpointError: the file arrived damaged.
    """
    return _downloaded(str(where), usual) if is_hub_file(where) else Path(where).expanduser()


@cache  # a command looks at a file several times, and asks once
def _downloaded(where: str, usual: tuple[str, ...]) -> Path:
    match = FILE_ID.fullmatch(where)
    assert match is not None
    hub_id, path = match[1], match[2] or ""
    chosen: list[str] = []

    def wanted(files: Collection[str], folder: Path) -> list[str]:
        file = _choice(hub_id, path.rstrip("/"), files, usual)
        chosen.append(file)
        beside = [*_shards(file, folder), str(PurePosixPath(file).with_name(LORA_CONFIG))]
        return [file, *(name for name in beside if name in files)]

    folder = _provided(hub_id, OF_A_FILE, wanted, where)
    if not chosen:  # the Hub cannot be asked
        there = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
        try:
            chosen.append(_choice(hub_id, path.rstrip("/"), there, usual))
        except UserError as error:
            raise UserError(f"{where}: is not in the cache, and the Hugging Face Hub cannot be asked") from error
    return folder / chosen[0]


def _choice(hub_id: str, path: str, files: Collection[str], usual: tuple[str, ...]) -> str:
    """The one of a repository's files that is meant by a path in it, which may be a folder's."""
    if path in files:
        return path
    inside = [name for name in files if not path or name.startswith(f"{path}/")]
    for name in usual:
        if (direct := f"{path}/{name}" if path else name) in inside:
            return direct
    found = _candidates(inside)
    if len(found) == 1:
        return found[0]
    names = found or _candidates(files)
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    listed = f"{', '.join(names[:SHOWN])}{more}" if names else "no file of tensors"
    lacking = f"has no {path}, but" if path else "has"
    raise UserError(f"{hub_id}: {f'say which file, as {hub_id}/FILE: it has' if found else lacking} {listed}")


def _candidates(files: Iterable[str]) -> list[str]:
    """Whole files of tensors, and the indexes of those in pieces."""
    return [f for f in sorted(files) if f.endswith((*TENSOR_SUFFIXES, INDEX_SUFFIX)) and not SHARD.search(f)]


def _provided(
    hub_id: str, small: tuple[str, ...], wanted: Callable[[Collection[str], Path], list[str]], where: str
) -> Path:
    """The folder of a repository in the cache, with the files that are `wanted`, whole.

    wanted: told the names of all files, and the folder, where those that match `small` are. Without a connection it is
    not asked, and the folder has what it has. where: what the user wrote, for messages.
    """
    import huggingface_hub  # slow to import, and only needed here

    try:
        folder = Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(small)))
        files = _listing(hub_id, folder.name)
        if files is None:
            return folder
        folder.mkdir(parents=True, exist_ok=True)  # nothing may have been in it
        names = wanted(files, folder)
        _fetch_large(hub_id, folder, [files[name] for name in names])
        folder = Path(huggingface_hub.snapshot_download(hub_id, revision=folder.name, allow_patterns=[*small, *names]))
        _check_small(hub_id, folder, files.values())
        return folder
    except WanError:
        raise
    except Exception as error:  # which ones a lost connection raises depends on the HTTP client of this version
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{where}: not here, and the Hugging Face Hub did not provide it ({reason}); "
            "check the name and the connection and start again (what has arrived is kept), or give a file or folder"
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
        found += [name, *_shards(name, folder)]
    return [name for name in dict.fromkeys(found) if name in names]


def _shards(name: str, folder: Path) -> list[str]:
    """Of an index the files it names; nothing of others."""
    if not name.endswith(INDEX_SUFFIX):
        return []
    shards = {file.name for file in read_index(folder / name, must_exist=False).values()}
    return sorted(str(PurePosixPath(name).with_name(shard)) for shard in shards)


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
