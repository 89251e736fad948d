"""Model repositories of the Hugging Face hub, fetched into a folder: the only code of Ostro's that uses a network.

`huggingface_hub` (extra `hub`) lists a repository, finds the token and says what a refusal means. The bytes are
streamed here, since its own downloads begin anew after an interruption (seen in 2.4): a file grows beside its place
as `NAME.DIGEST.partial`, goes on where it ended, and gets its name once its checksum is the one in the listing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import fnmatch
import functools
import hashlib
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from ostro.errors import ConfigError, OutOfMemory, WeightsError
from ostro.log import say
from ostro.weights.hf_config import TOKENIZER_FILES

# The first set that a repository has is taken: Mixtral's hold the same weights two and three times.
_WEIGHTS = (
    r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?",
    r"consolidated([-.]\d+(-of-\d+)?)?\.safetensors(\.index\.json)?|params\.json",
    r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?",
    r"consolidated\.\d+\.pth?|params\.json",
    r"adapter_model\.safetensors|adapter_config\.json",
)
_BESIDE = r"(generation_)?config\.json|tokenizer\.model\.v\w+|tekken\.json|chat_template\.json"
_UNSAFE = re.compile(r"(?i)(^|/)(\.{0,2}|\.git)(/|$)|[\x00-\x1f\x7f\\:]")  # leaves the folder, or is no file's name
_CHUNK_BYTES = 1 << 20
_FILES_AT_ONCE = 8  # one connection does not fill a data centre's line
_ATTEMPTS = 5  # in a row that bring no byte
_PAUSE_SECONDS = 0.5  # doubled by every one of them
_PASSING = (None, 408, 429, 500, 502, 503, 504)  # no answer, or one of these, may be another a moment later

Stream = Callable[["HubFile", int], Any]
"""Opens the hub's answer for a file from a byte on."""


@dataclasses.dataclass(frozen=True)
class HubFile:
    """A file of a repository; `digest` is the sha256 of a large one (LFS), else the sha1 of its git blob."""

    name: str
    num_bytes: int
    digest: str

    def is_at(self, path: Path) -> bool:
        """Whether the file at `path` is this one, by its checksum."""
        blob = hashlib.sha1(f"blob {self.num_bytes}\0".encode(), usedforsecurity=False)
        hasher = hashlib.sha256() if len(self.digest) == 64 else blob
        with path.open("rb", buffering=0) as opened:
            while chunk := opened.read(_CHUNK_BYTES):
                hasher.update(chunk)
        return hasher.hexdigest() == self.digest

    def partial(self, directory: Path) -> Path:
        """Return where the file grows; the digest keeps revisions apart."""
        return directory / f"{self.name}.{self.digest[:12]}.partial"


def download(
    repo: str,
    directory: Path | None = None,
    *,
    revision: str = "main",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    token: str | None = None,
) -> Path:
    """Fetch weights, configuration and tokenizer of `repo` into `directory` (./NAME unless given); return it.

    Of several copies of the weights one is taken, safetensors first; `include` (globs) takes what it names instead,
    `exclude` leaves out. `revision` is resolved once, to the commit that all files are of. Files that are there are
    checked, not fetched, and never overwritten. HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are huggingface_hub's.
    Raises ConfigError for a setting, OutOfMemory for a small disk, WeightsError for what the hub refuses or damages.
    """
    hub = _hub()
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or hub.constants.ENDPOINT  # it reads it once, at import
    directory = Path(repo.rpartition("/")[2]) if directory is None else directory
    with _sentences(hub, repo, revision, endpoint, directory):
        if not re.fullmatch(r"[!-~]+", token or hub.get_token() or "-"):  # the HTTP library's error would show it
            raise ConfigError("the token (HF_TOKEN) holds characters that no token has: copy it once more.")
        commit, files = _listing(hub, repo, revision, endpoint, token)
        chosen = _choose(files, include, exclude, repo)
        size = decimal(sum(file.num_bytes for file in chosen))
        say(f"{repo} at {commit}: {len(chosen)} files, {size}, into {directory}")
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            missing = [file for file in pool.map(lambda file: _missing(directory, file), chosen) if file]
        say(f"{len(missing)} files and {decimal(_num_left(directory, missing))} are to be fetched")
        _require_room(directory, missing)
        headers = {**hub.utils.build_hf_headers(token=token), "Accept-Encoding": "identity"}

        def stream(file: HubFile, start: int) -> Any:
            url = hub.hf_hub_url(repo, file.name, revision=commit, endpoint=endpoint)
            asked = {**headers, "Range": f"bytes={start}-"} if start else headers
            timeout = hub.constants.HF_HUB_DOWNLOAD_TIMEOUT
            return hub.get_session().stream("GET", url, headers=asked, timeout=timeout, follow_redirects=True)

        if missing:
            _fetch_all(hub, directory, missing, stream)
    return directory


def _hub() -> Any:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ConfigError("HF_HUB_OFFLINE is set, so nothing can be fetched: unset it.")
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise ConfigError("ostro download needs huggingface_hub: pip install 'ostro[hub]'.") from None
    return huggingface_hub


@contextlib.contextmanager
def _sentences(hub: Any, repo: str, revision: str, endpoint: str, directory: Path) -> Iterator[None]:
    """Say in a sentence what the hub, the network or the disk refused."""
    errors, again = hub.errors, "the same command goes on where this one ended"
    try:
        yield
    except KeyboardInterrupt:
        say(f"what has arrived is kept: {again}.")
        raise
    except errors.GatedRepoError:
        terms = f"accept its terms at {endpoint}/{repo}, then set HF_TOKEN to a token of that account"
        raise WeightsError(f"{repo} is gated: {terms}.") from None
    except errors.RevisionNotFoundError:
        raise WeightsError(f"{repo} has no revision {revision!r}: give a branch, a tag or a commit.") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
            advice = "check the name, or set HF_TOKEN to a token that may read it"
            raise WeightsError(f"{endpoint} has no model {repo} for you (HTTP {status}): {advice}.") from None
        raise WeightsError(
            f"{endpoint} answers HTTP {status} to a request for {repo}: wait a while; {again}."
        ) from None
    except errors.OfflineModeIsEnabled:
        raise ConfigError("huggingface_hub is offline (HF_HUB_OFFLINE): unset it to fetch.") from None
    except errors.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise WeightsError(f"{endpoint} cannot be reached ({reason}): check the network; {again}.") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutOfMemory(f"{directory} is full ({error.strerror}): free some space; {again}.") from None
        reason = error.strerror or str(error)
        raise WeightsError(f"{error.filename or directory} cannot be used ({reason}): choose another place.") from None


def _listing(hub: Any, repo: str, revision: str, endpoint: str, token: str | None) -> tuple[str, list[HubFile]]:
    """Return the commit that `revision` is now and its files, small ones first."""
    try:
        info = hub.HfApi(endpoint, token).model_info(repo, revision=revision, files_metadata=True, timeout=30)
        files = [
            HubFile(str(one.rfilename), int((one.lfs or one).size), one.lfs.sha256 if one.lfs else one.blob_id)
            for one in info.siblings
        ]
        digests = [info.sha, *(file.digest for file in files)]
        is_sound = all(re.fullmatch("[0-9a-f]{40}([0-9a-f]{24})?", digest) for digest in digests)
        is_sound = is_sound and min((file.num_bytes for file in files), default=0) >= 0
    except hub.errors.HFValidationError:
        raise ConfigError(f"{repo!r} cannot be a repository: write OWNER/NAME.") from None
    except (hub.errors.HTTPError, OSError):
        raise
    except Exception:  # whatever reading a stranger's answer, or his address, can raise
        info, files, is_sound = None, [], False
    if info is None or not is_sound:
        raise WeightsError(f"{endpoint} does not list {repo} as a Hugging Face hub does: check HF_ENDPOINT.")
    for file in files:
        if _UNSAFE.search(file.name):
            raise WeightsError(f"{repo} lists {file.name!r}, which could be written anywhere: do not trust it.")
    return info.sha, sorted(files, key=lambda file: (file.num_bytes, file.name))


def _choose(files: list[HubFile], include: Sequence[str], exclude: Sequence[str], repo: str) -> list[HubFile]:
    names = [file.name for file in files]
    sets = ([name for name in names if re.fullmatch(pattern, name)] for pattern in _WEIGHTS)
    weights = next((found for found in sets if any(not name.endswith(".json") for name in found)), [])
    if not weights and not include:
        raise WeightsError(f"{repo} holds no weights that Ostro reads: --include names files to fetch.")
    beside = [name for name in names if name in TOKENIZER_FILES or re.fullmatch(_BESIDE, name)]
    wanted = {name for glob in include for name in fnmatch.filter(names, glob)} if include else {*weights, *beside}
    wanted -= {name for glob in exclude for name in fnmatch.filter(names, glob)}
    if not wanted:
        raise WeightsError(f"none of the {len(files)} files of {repo} is asked for: change --include or --exclude.")
    return [file for file in files if file.name in wanted]


def _missing(directory: Path, file: HubFile) -> HubFile | None:
    """Return `file` if it is not there; WeightsError if another is in its place."""
    path = directory / file.name
    if not os.path.lexists(path):
        return file
    if path.is_file() and path.stat().st_size == file.num_bytes and file.is_at(path):
        return None
    raise WeightsError(f"{path} exists and is not the hub's: remove it, or choose another folder.")


def _num_left(directory: Path, missing: list[HubFile]) -> int:
    partials = [(file, file.partial(directory)) for file in missing]
    return sum(file.num_bytes - (path.stat().st_size if path.is_file() else 0) for file, path in partials)


def _require_room(directory: Path, missing: list[HubFile]) -> None:
    folder = next(folder for folder in (directory.absolute(), *directory.absolute().parents) if folder.exists())
    needed_bytes, free_bytes = _num_left(directory, missing), shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        needs = f"{directory} needs {decimal(needed_bytes)} more, its disk has {decimal(free_bytes)} free"
        raise OutOfMemory(f"{needs}: free some space or choose another disk.")


def _fetch_all(hub: Any, directory: Path, missing: list[HubFile], stream: Stream) -> None:
    """Fetch several files at once, under a progress line on a terminal, with a line a file elsewhere."""
    from rich import progress

    is_terminal, stop = sys.stdout.isatty(), threading.Event()
    columns = (progress.BarColumn(), progress.DownloadColumn(), progress.TransferSpeedColumn())
    total = sum(file.num_bytes for file in missing)
    with (
        progress.Progress(*columns, progress.TimeRemainingColumn(), disable=not is_terminal) as line,
        ThreadPoolExecutor(_FILES_AT_ONCE) as pool,
    ):
        task = line.add_task("", total=total, completed=total - _num_left(directory, missing))
        tick = functools.partial(line.advance, task)
        jobs = {pool.submit(_fetch, hub, directory, file, stream, tick, stop): file for file in missing}
        try:
            for number, job in enumerate(as_completed(jobs), start=1):
                job.result()
                if not is_terminal:
                    say(f"{number}/{len(jobs)} {jobs[job].name} {decimal(jobs[job].num_bytes)}")
        finally:  # after an error or Ctrl-C the others end at their next block
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)


def _fetch(
    hub: Any, directory: Path, file: HubFile, stream: Stream, tick: Callable[[int], None], stop: threading.Event
) -> None:
    """Go on with what is there of a file until it is whole, check it, and give it its name."""
    partial, failed = file.partial(directory), 0
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("ab", buffering=0) as out:
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise WeightsError(f"another download is writing {partial}: wait for its end.") from None
        while (start := os.fstat(out.fileno()).st_size) < file.num_bytes:
            lost = hub.errors.HTTPError("the answer ended early")
            try:
                with stream(file, start) as response:
                    hub.utils.hf_raise_for_status(response)
                    if start and response.status_code != 206:  # it comes from its first byte all the same
                        out.truncate(0)
                        tick(-start)
                    for chunk in response.iter_bytes():
                        room = file.num_bytes - os.fstat(out.fileno()).st_size
                        written = out.write(chunk[:room])
                        tick(written)
                        if stop.is_set() or written < len(chunk):  # beyond the end, or the disk is filling up
                            break
            except hub.errors.HTTPError as error:
                lost = error
            if stop.is_set():
                return
            failed = 0 if os.fstat(out.fileno()).st_size > start else failed + 1
            if failed == _ATTEMPTS or getattr(getattr(lost, "response", None), "status_code", None) not in _PASSING:
                raise lost
            stop.wait(_PAUSE_SECONDS * 2**failed if failed else 0)
        os.fsync(out.fileno())
        if not file.is_at(partial):
            partial.unlink()
            raise WeightsError(f"{file.name} arrived damaged (its checksum is another) and is removed: try again.")
        partial.rename(directory / file.name)
