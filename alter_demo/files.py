"""Where files are, and safe ways to write them."""

import json
import os
import re
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from .errors import UserError

RUN_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$")
ASSETS = Path(__file__).parent / "assets"  # adapters, results and the stored example
if not ASSETS.is_dir():  # in a checkout, they are at its top level
    ASSETS = ASSETS.parents[1] / "assets"
EXAMPLE = ASSETS / "example.json"  # the finished run that the page opens with
RESULTS = ASSETS / "results"


def cache_dir() -> Path:
    """`$ALTER_CACHE_DIR`, or `alter_demo` in the user's cache folder."""
    if path := os.environ.get("ALTER_CACHE_DIR"):
        return Path(path).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "alter_demo"


def write_json(path: Path, value, indent: int | None = 1) -> None:
    """Write a JSON file in one step, so that a reader never sees half of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as handle:
            temporary = Path(handle.name)
        try:
            with temporary.open("w", encoding="utf-8") as handle:
                json.dump(value, handle, ensure_ascii=False, indent=indent)
            temporary.chmod(0o644)  # a temporary file is readable by its owner only
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"Cannot write {path} ({error.strerror}). Free some disk space or choose another path."
        ) from None


def require_disk(folder: Path, megabytes: int) -> None:
    """Create `folder` if needed. Raises UserError if its disk has less than `megabytes` MB free."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot create the folder {folder} ({error.strerror}).") from None
    free = shutil.disk_usage(folder).free // 2**20
    if free < megabytes:
        raise UserError(
            f"{folder} needs {megabytes} MB of free disk space, got {free} MB. "
            "Free some space or choose another folder."
        )


def remove_stale_folders(folder: Path) -> None:
    """Remove the unfinished folders (`.new-*`) of killed processes once they are a day old."""
    for unfinished in folder.glob(".new-*"):
        with suppress(FileNotFoundError):  # its process has finished in the meantime
            if unfinished.stat().st_mtime < time.time() - 24 * 3600:
                shutil.rmtree(unfinished, ignore_errors=True)
