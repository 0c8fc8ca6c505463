"""The Hugging Face hub: what we read from it, and what happens without internet.

    with using_hub("openai/clip-vit-base-patch32"):
        AutoConfig.from_pretrained("openai/clip-vit-base-patch32")

    'openai/clip-vit-base-patch32' is not in HF_HOME (/scratch/hf) and the hub is not reachable (HF_HUB_OFFLINE is set):
    run `python -m model fetch --preset priorclip-b32` where there is internet, with the same HF_HOME

A process asks once whether the hub answers. If it does not, everything is read from HF_HOME, as HF_HUB_OFFLINE=1 does.
Without that question, huggingface_hub tries each file six times in half a minute and logs each try twice.

    hub_id("hf://user/name")  ->  ("user/name", None)         hub_id("hf://user/name@v1")  ->  ("user/name", "v1")
    hub_id("user/name")       ->  ("user/name", None), unless there is a folder ``user`` or ``user/name`` here
    hub_id("runs/export")     ->  None if there is a folder ``runs``, because the user then means a path

huggingface_hub is imported when a function needs it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

from priorclip.common.printable import one_line

SCHEME = "hf://"
ID = re.compile(r"(?P<id>[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)(?:@(?P<revision>[\w./-]+))?")
SECONDS = 20.0  # timeout of the hub's first answer
# Files of an export folder: no code. A tokenizer has several of them.
EXPORT_FILES = (
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "README.md",
    "*token*.json",
    "*vocab*",
    "merges.txt",
    "*.model",
)


class NotFetched(OSError):
    """Something is not in HF_HOME, and the hub cannot be reached. ``options`` are those of ``model fetch``."""

    def __init__(self, source: str, reason: str, options: str = "--preset NAME") -> None:
        self.source, self.reason = source, reason
        super().__init__(
            f"'{source}' is not in HF_HOME ({hub_home()}) and the hub is not reachable ({reason}): run "
            f"`python -m model fetch {options}` where there is internet, with the same HF_HOME"
        )


def hub_home() -> str:
    """Returns the folder in which huggingface_hub keeps what it has fetched."""
    from huggingface_hub import constants

    return str(constants.HF_HOME)


@cache
def why_offline() -> str | None:
    """Returns why the hub cannot be used, or None if it answers. Asks once a process."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # what its HTTP library raises: no route, refused, timeout, proxy, certificate
        return one_line(f"{constants.ENDPOINT}: {error or type(error).__name__}")[:200]
    return None


def hide_bars_in_logs() -> None:
    """Lets huggingface_hub and transformers show bars on a terminal only."""
    if not sys.stderr.isatty():
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()


@contextmanager
def using_hub(source: str) -> Iterator[None]:
    """Within it, libraries read ``source`` from the hub, or from HF_HOME alone if the hub does not answer.

    Raises:
        NotFetched: the hub does not answer and HF_HOME lacks a part
    """
    from huggingface_hub import constants

    hide_bars_in_logs()
    reason, before = why_offline(), constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or reason is not None
    try:
        yield
    except Exception as error:
        if reason is None or not (isinstance(error, OSError) or is_missing(error)):
            raise
        raise NotFetched(source, reason) from error
    finally:
        constants.HF_HUB_OFFLINE = before


def reading(source: str | Path) -> AbstractContextManager[None]:
    """Within it, libraries read ``source``, a local path or else a hub id, as in `using_hub`."""
    return nullcontext() if Path(source).exists() else using_hub(str(source))


def is_missing(error: BaseException | None) -> bool:
    """Tells whether the error, or one that led to it, is about a file that HF_HOME lacks."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    while error is not None:
        if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def fetched_by(options: str) -> Iterator[None]:
    """Names in a `NotFetched` the options of ``model fetch`` that fetch all that the command needs."""
    try:
        yield
    except NotFetched as error:
        raise NotFetched(error.source, error.reason, options) from error


def hub_id(source: str | Path) -> tuple[str, str | None] | None:
    """Returns (id, revision) if the source means a repository of the hub, otherwise None.

    Raises:
        ValueError: it starts with ``hf://`` and is no id
    """
    text = str(source)
    found = ID.fullmatch(text.removeprefix(SCHEME))
    if text.startswith(SCHEME):
        if not found:
            raise ValueError(f"{text} is no id of the hub: write hf://user/name or hf://user/name@revision")
        return found["id"], found["revision"]
    if not found or found["revision"] or Path(text).exists() or Path(found["id"].split("/")[0]).exists():
        return None
    return found["id"], None


def fetch_export(source: str | Path, files: tuple[str, ...] = EXPORT_FILES, **options: Any) -> Path:
    """Returns the export folder: the given one, or the local copy of the hub's, without any code of it.

    Args:
        source: folder, ``hf://user/name``, or ``user/name`` if it cannot be a path here
        files: patterns of the files to fetch
        options: of huggingface_hub.snapshot_download: revision, cache_dir, token, local_files_only

    Raises:
        FileNotFoundError: there is no such folder, and the hub does not give it
        NotFetched: the hub does not answer
    """
    named = hub_id(source)
    if named is None:
        return Path(source).expanduser()
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    name, revision = named
    chosen: dict[str, Any] = {"allow_patterns": list(files), "revision": revision, **options}
    try:
        if options.get("local_files_only"):
            return Path(snapshot_download(name, **chosen))
        with fetched_by(f"--init_from {SCHEME}{name}"), using_hub(name):
            return Path(snapshot_download(name, etag_timeout=SECONDS, **chosen))
    except NotFetched:
        raise
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise FileNotFoundError(f"{source} is no folder here, and the hub does not give it: {error}") from error
