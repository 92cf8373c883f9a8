"""Published checkpoints: what the manifests say of them, and how a file of theirs comes into the cache.

A manifest is ``weights/<family>.toml``: a ``[defaults]`` table and a ``[[checkpoint]]`` for each file. A download is resumed,
checked and renamed into place as a whole, so that the cache holds complete files only; two processes that want the same one
wait for each other. What a host does not give to programs is asked of the reader, with the page and the command that takes
the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import logging
import os
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Checkpoint", "cache_folder", "cached", "fetch", "folder", "manifest"]

_log = logging.getLogger(__name__)
_TIMEOUT = 30.0  # seconds without an answer
_TRIES = 3  # connections in a row that end too early
_BLOCK = 1 << 20

# hosts that answer a program with a page, and what people call them
_BY_HAND = {
    "drive.google.com": "Google Drive",
    "drive.usercontent.google.com": "Google Drive",
    "cloud.tsinghua.edu.cn": "Tsinghua cloud",
    "pan.baidu.com": "Baidu",
    "1drv.ms": "OneDrive",
    "onedrive.live.com": "OneDrive",
    "api.onedrive.com": "OneDrive",
}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One published checkpoint, a row of a manifest.

    Attributes:
        name: of the model, with a tag where it has several checkpoints.
        source: repository of its authors.
        license: of the weights, in words.
        img_size: pixels on a side that it was trained or tuned at.
        url: of the file, or of the page that leads to it.
        file: name in ``weights/``, where the file is shipped with the package.
        hf_hub_id: repository of the Hugging Face hub, where timm has published the file.
        params: learned numbers with the published classifier.
        top1: ImageNet-1k top-1 in percent, or the metric that ``metric`` names.
        metric: what ``top1`` is where it is something else, and how it was measured.
        gmacs: multiply-adds at ``img_size`` that its authors report, in billions.
        sha256: of the file, or its first digits; None where nobody has published it.
        num_classes: of its classifier.
        classes: names of its classes, where they are few.
        crop_pct: part of the picture that evaluation looks at.
        crop_mode: "squash" where the resize before does not keep the proportions.
        interpolation: of the resize.
        mean: of the pixel values, subtracted.
        std: of the pixel values, divided by.
        command: that trained it, for those of ours.
        commit: that the command ran at.
    """

    name: str
    source: str
    license: str
    img_size: int
    url: str = ""
    file: str | None = None
    hf_hub_id: str | None = None
    params: int | None = None
    top1: float | None = None
    metric: str | None = None
    gmacs: float | None = None
    sha256: str | None = None
    num_classes: int = 1000
    classes: tuple[str, ...] = ()
    crop_pct: float | None = None
    crop_mode: str | None = None
    interpolation: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    command: str | None = None
    commit: str | None = None

    @property
    def noncommercial(self) -> bool:
        """Whether its licence forbids commercial use."""
        return re.search(r"\bnc\b|non-?commercial", self.license, re.IGNORECASE) is not None

    @property
    def host(self) -> str | None:
        """Whose page has to be opened by hand; None where a program may fetch the file."""
        if self.file or self.hf_hub_id:
            return None
        parts = urllib.parse.urlsplit(self.url)
        if parts.hostname == "huggingface.co" and "/resolve/" not in parts.path:
            return "A page of Hugging Face"
        return _BY_HAND.get(parts.hostname or "")

    @property
    def page(self) -> str:
        """What to open in a browser."""
        parts = urllib.parse.urlsplit(self.url)
        if parts.hostname == "drive.usercontent.google.com":
            return f"https://drive.google.com/file/d/{urllib.parse.parse_qs(parts.query)['id'][0]}/view"
        return self.url.replace("?dl=1", "")


@cache
def folder() -> Path:
    """Where manifests and shipped weights lie: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return next((f for f in (package / "weights", package.parent / "weights") if f.is_dir()), package / "weights")


@cache
def manifest(family: str) -> Mapping[str, Checkpoint]:
    """The checkpoints of a family.

    Args:
        family: of ``vitzoo.list_families()``.

    Returns:
        Rows by name; none where the family has no manifest.

    Raises:
        TypeError: a row has a key that ``Checkpoint`` has not.
    """
    path = folder() / f"{family}.toml"
    if not path.is_file():
        return {}
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = [{**content.get("defaults", {}), **row} for row in content["checkpoint"]]
    for row in rows:
        row |= {key: tuple(value) for key, value in row.items() if isinstance(value, list)}
    return {row["name"]: Checkpoint(**row) for row in rows}


def cache_folder() -> Path:
    """Where downloads lie: torch hub's checkpoints (``TORCH_HOME`` moves it)."""
    from torch import hub

    return Path(hub.get_dir()) / "checkpoints"


def cached(row: Checkpoint) -> Path | None:
    """The file of a checkpoint that needs no download: shipped, converted by ``vitzoo convert``, or downloaded before.

    Args:
        row: the checkpoint.

    Returns:
        Its path, or None.
    """
    if row.file:
        return folder() / row.file
    return next((path for path in (converted(row), _target(row)) if path.is_file()), None)


def converted(row: Checkpoint) -> Path:
    """Where ``vitzoo convert`` puts the file of a checkpoint. Named after the row: a host's own names collide."""
    return cache_folder() / f"vitzoo-{row.name}.converted.safetensors"


def _target(row: Checkpoint) -> Path:
    suffix = ".safetensors" if urllib.parse.urlsplit(row.url).path.endswith(".safetensors") else ".pth"
    return cache_folder() / f"vitzoo-{row.name}{suffix}"


def fetch(row: Checkpoint, check: Callable[[Path], object] | None = None, progress: bool = True) -> Path:
    """The file of a checkpoint, downloaded where it is not in the cache.

    Args:
        row: the checkpoint.
        check: called with the complete download before it becomes part of the cache; what it raises ends the download.
        progress: show a bar.

    Returns:
        Path of a complete file.

    Raises:
        ValueError: the host gives the file to browsers only (with the page and the command that takes the file), cannot be
            reached, answers with an error or with something else; the cache cannot be written. One sentence each.
    """
    known = cached(row)
    if known is not None:
        return known
    if row.hf_hub_id:
        return _from_hub(row, row.hf_hub_id)
    by_hand = f"vitzoo convert {row.name} FILE"
    if row.host:
        raise ValueError(
            f"{row.host} does not give the weights of {row.name} to programs. Open {row.page} in a browser, "
            f"save the file, and run `{by_hand}`; from then on pretrained=True finds them."
        )
    path = _target(row)
    part = path.with_name(path.name + ".part")
    with _alone(path):
        if path.is_file():  # another process has fetched it meanwhile
            return path
        try:
            _download(row, part, progress)
        except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
            reason = f"answers {error.code} {error.reason}" if isinstance(error, urllib.error.HTTPError) else _cause(error)
            raise ValueError(
                f"The weights of {row.name} could not be fetched: {row.url} {reason}. "
                f"Try again with a connection, or bring the file from elsewhere and run `{by_hand}`."
            ) from error
        _verify(row, part, check)
        os.replace(part, path)
        _tag_of(part).unlink(missing_ok=True)
    return path


def _cause(error: BaseException) -> str:
    return f"cannot be reached ({getattr(error, 'reason', '') or str(error) or type(error).__name__})"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time for a file; whatever of the file system stands in the way becomes a sentence."""
    from filelock import FileLock, Timeout

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _log.warning("%s: waiting for another process that fetches it", path.name)
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        raise ValueError(_unwritable(path, error)) from error
    try:
        yield
    except (urllib.error.URLError, ValueError):
        raise
    except OSError as error:
        raise ValueError(_unwritable(path, error)) from error
    finally:
        lock.release()


def _unwritable(path: Path, error: BaseException) -> str:
    reason = getattr(error, "strerror", None) or str(error)
    return f"The cache {path.parent} cannot be written ({reason}). Set TORCH_HOME to a folder that can."


def _tag_of(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _download(row: Checkpoint, part: Path, progress: bool) -> None:
    """Bring the whole file to ``part``; goes on where an earlier attempt ended, if the server still has the same file."""
    for attempt in range(_TRIES):
        have = part.stat().st_size if part.is_file() else 0
        tag = _tag_of(part).read_text() if have and _tag_of(part).is_file() else ""
        headers = {"User-Agent": "vitzoo"}
        if have and tag:
            headers |= {"Range": f"bytes={have}-", "If-Range": tag}
        try:
            answer = urllib.request.urlopen(urllib.request.Request(row.url, headers=headers), timeout=_TIMEOUT)  # noqa: S310
        except urllib.error.HTTPError as error:
            if error.code != 416:
                raise
            part.unlink()  # longer than the file: begin again
            continue
        with answer:
            resumed = answer.status == 206
            length = answer.headers.get("Content-Length")
            total = None if length is None else int(length) + (have if resumed else 0)
            _tag_of(part).write_text(answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "")
            with part.open("ab" if resumed else "wb") as file:
                done = _copy(answer, file, have if resumed else 0, total, row.name if progress else "")
        if total is None or done == total:
            return
        _log.warning("%s: the connection ended after %d of %d bytes (attempt %d)", row.name, done, total, attempt + 1)
    raise ValueError(
        f"The download of {row.name} ended early, after {done} of {total} bytes, {_TRIES} times. "
        "Run it again: it goes on from there."
    )


def _copy(answer: Any, file: Any, done: int, total: int | None, name: str) -> int:
    """Copy what the server sends; returns how many bytes the file has then. A broken connection only ends it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    if name and not console.is_terminal:
        print(f"fetching {name}{f', {total / 1e6:.0f} MB' if total else ''}", file=sys.stderr)  # noqa: T201
    with Progress(*columns, console=console, disable=not (name and console.is_terminal), transient=True) as bar:
        task = bar.add_task(name, completed=done, total=total)
        while True:
            try:
                block = answer.read(_BLOCK)
            except http.client.IncompleteRead as error:
                block = error.partial
                file.write(block)
                return done + len(block)
            except (TimeoutError, ConnectionError):
                return done
            if not block:
                return done
            file.write(block)
            done += len(block)
            bar.update(task, completed=done)


def _verify(row: Checkpoint, part: Path, check: Callable[[Path], object] | None) -> None:
    """The hash where one is published, then ``check``; a file that fails is deleted."""
    try:
        if row.sha256:
            with part.open("rb") as file:
                digest = hashlib.sha256()
                while block := file.read(_BLOCK):
                    digest.update(block)
            found = digest.hexdigest()
            if not found.startswith(row.sha256):
                raise ValueError(
                    f"What {row.url} sends is not the published file of {row.name}: its SHA-256 is {found[:12]}..., "
                    f"not {row.sha256[:12]}...; it was deleted."
                )
        if check is not None:
            check(part)
    except ValueError as error:
        part.unlink()
        _tag_of(part).unlink(missing_ok=True)
        if "SHA-256" in str(error):
            raise
        raise ValueError(
            f"What {row.url} sends is no checkpoint of {row.name}, and was deleted: {str(error).replace(str(part), 'the file')}"
        ) from error


def _from_hub(row: Checkpoint, repository: str) -> Path:
    """timm's file of a checkpoint, through the hub's own cache, locks and hashes."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        try:
            return Path(hf_hub_download(repository, "model.safetensors"))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:  # read with weights_only, as every file of this format
            return Path(hf_hub_download(repository, "pytorch_model.bin"))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"The weights of {row.name} could not be fetched from https://huggingface.co/{repository} "
            f"({type(error).__name__}). Try again with a connection, or bring the file from elsewhere and run "
            f"`vitzoo convert {row.name} FILE`."
        ) from error
