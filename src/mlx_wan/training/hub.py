"""Data sets as the Hugging Face Hub has them -> a folder of clips and captions, which dataset.py reads.

A Hub id is downloaded; rows of parquet files and samples of WebDataset's .tar files are written out as files, once.
What is inside them is data: names are made anew, nothing is unpacked to where it asks to be.
"""

import hashlib
import json
import re
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_wan.errors import UserError
from mlx_wan.training.dataset import IMAGES, MEDIA, TEXT, VIDEOS

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_WANTED = [f"*{suffix}" for suffix in (*VIDEOS, *IMAGES, ".txt", ".jsonl", ".csv", ".json", ".parquet", ".tar")]
_VALID = re.compile(r"(^|[/_-])(valid|validation|val|test|dev)([/_.-]|$)")
# First bytes of a file, from a place on -> how its name should end.
_SIGNS = (
    (0, b"\x89PNG", ".png"),
    (0, b"\xff\xd8\xff", ".jpg"),
    (0, b"GIF8", ".gif"),
    (8, b"WEBP", ".webp"),
    (8, b"AVI ", ".avi"),
    (4, b"ftyp", ".mp4"),
    (0, b"\x1aE\xdf\xa3", ".mkv"),
)
Sample = tuple[bytes, str, str | None]  # a file, its ending, its caption


def default_cache(data: str) -> Path:
    """Where what is made of a data set is kept unless told otherwise: beside it; of one on the Hub in its own cache."""
    path = Path(data)
    if _is_hub_id(data):
        from huggingface_hub.constants import HF_HOME

        return Path(HF_HOME) / "mlx-wan" / data.replace("/", "--")
    return (path if path.is_dir() else path.parent) / ".mlx-wan-cache"


def _is_hub_id(data: str) -> bool:
    return _HUB_ID.fullmatch(data) is not None and not Path(data).exists() and not Path(data).parent.exists()


def open_data(data: str, cache: Path) -> Path:
    """The folder or table of clips that `data` names: itself, or what is made of it.

    Args:
        data: a path, or the id of a data set on the Hub.
        cache: where archives are written out.

    Raises:
        UserError: nothing there, or an archive that cannot be read.
    """
    path = Path(data)
    if _is_hub_id(data):
        path = _download(data)
    archives = sorted(file for kind in ("parquet", "tar") for file in path.rglob(f"*.{kind}")) if path.is_dir() else []
    return _written_out(path, archives, cache) if archives else path


def _download(name: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, repo_type="dataset", allow_patterns=_WANTED))
    except Exception as error:  # of the Hub, of the connection or of the disk
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{name}: no such folder or file, nor a data set that the Hub gives: {reason}") from None


def _written_out(data: Path, archives: list[Path], cache: Path) -> Path:
    """The samples of archives as files in train/ and valid/, in the order in which they are there."""
    facts = [[str(file.relative_to(data)), file.stat().st_size, file.stat().st_mtime_ns] for file in archives]
    folder = cache / f"files-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".files-") as name:
        partial = Path(name) / "files"
        for number, file in enumerate(archives):
            split = "valid" if _VALID.search(file.relative_to(data).as_posix()) else "train"
            (partial / split).mkdir(parents=True, exist_ok=True)
            for row, (media, suffix, caption) in enumerate(_READERS[file.suffix](file)):
                target = partial / split / f"{number:04}-{row:06}{suffix}"
                target.write_bytes(media)
                if caption is not None:
                    target.with_suffix(".txt").write_text(caption, encoding="utf-8")
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            if not folder.exists():
                raise
    return folder


def _parquet_samples(file: Path) -> Iterator[Sample]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{file}: reading parquet needs pyarrow: pip install 'mlx-wan[parquet]'") from None
    try:
        table = pyarrow.parquet.ParquetFile(file)
        columns = table.schema_arrow.names
        media, text = _pick(file, columns, MEDIA, "video or picture"), _pick(file, columns, TEXT, "caption")
        for batch in table.iter_batches(batch_size=16, columns=[media, text]):
            for row in batch.to_pylist():
                yield _parquet_sample(file, row[media], row[text])
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: cannot be read as parquet ({str(error).splitlines()[0]})") from None


def _parquet_sample(file: Path, value: Any, caption: Any) -> Sample:
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise UserError(f"{file}: holds no videos or pictures themselves, only where they are; give a folder of them")
    named = Path(str(value.get("path") or "")).suffix.lower() if isinstance(value, dict) else ""
    return content, _suffix(content, named), caption if isinstance(caption, str) else None


def _pick(file: Path, columns: list[str], known: tuple[str, ...], what: str) -> str:
    found = [name for name in known if name in columns]
    if len(found) != 1:
        raise UserError(
            f"{file}: must have exactly one column for the {what}, of {', '.join(known)}; it has {', '.join(columns)}"
        )
    return found[0]


def _tar_samples(file: Path) -> Iterator[Sample]:
    """Members of one stem are a sample: a video or picture, and its caption as .txt or in a .json."""
    try:
        with tarfile.open(file, "r:") as archive:
            parts: dict[str, bytes] = {}
            stem = ""
            for member in archive:
                if not member.isfile():
                    continue
                place, _, name = member.name.rpartition("/")
                first, _, rest = name.partition(".")
                if parts and f"{place}/{first}" != stem:
                    yield from _tar_sample(file, stem, parts)
                    parts = {}
                content, stem = archive.extractfile(member), f"{place}/{first}"
                parts[f".{rest.lower()}"] = content.read() if content is not None else b""
            yield from _tar_sample(file, stem, parts)
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{file}: cannot be read as a .tar ({str(error).splitlines()[0]})") from None


def _tar_sample(file: Path, stem: str, parts: dict[str, bytes]) -> Iterator[Sample]:
    media = [suffix for suffix in parts if suffix in (*VIDEOS, *IMAGES)]
    if not media:
        return
    if len(media) > 1:
        raise UserError(f"{file}: {stem.lstrip('/')} has several videos or pictures: {', '.join(sorted(media))}")
    caption = parts[".txt"].decode(errors="replace") if ".txt" in parts else None
    if caption is None and ".json" in parts:
        try:
            facts = json.loads(parts[".json"])
        except ValueError:
            facts = None
        found = [facts[name] for name in TEXT if isinstance(facts, dict) and isinstance(facts.get(name), str)]
        caption = found[0] if len(found) == 1 else None
    yield parts[media[0]], media[0], caption


def _suffix(content: bytes, named: str) -> str:
    if named in (*VIDEOS, *IMAGES):
        return named
    return next((suffix for start, sign, suffix in _SIGNS if content[start:].startswith(sign)), ".mp4")


_READERS = {".parquet": _parquet_samples, ".tar": _tar_samples}
