"""Folders of runs: where a run is written, whole or not at all."""

import os
import re
import shutil
import tempfile
import time
from pathlib import Path

from peft import PeftModel
from safetensors import SafetensorError

from .errors import UserError
from .files import RUN_NAME, remove_stale_folders, require_disk, write_json
from .models.loading import quiet
from .record import write_record

RUNS = Path("runs")


def new_run_path(folder: Path, name: str | None, model, forget_set) -> Path:
    """Where a new run will lie; by default named after the model, the set and the time.

    Raises:
        UserError: a bad or taken name, or a full disk. Call this before any work.
    """
    folder = Path(folder)
    if name is None:
        labels = (str(getattr(x, "name", x)) for x in (model, forget_set))
        label = "-".join((Path(next(labels)).name, Path(next(labels)).stem))
        name = re.sub(r"[^A-Za-z0-9.-]+", "-", label).lstrip(".-")
        name = re.sub(r"\.{2,}", ".", name)[:60]
        name = f"{name}-{time.strftime('%m%d-%H%M%S')}".lstrip("-")
    if not RUN_NAME.fullmatch(name) or ".." in name:
        raise UserError(
            f"A run's name may hold letters, digits, dots and dashes, 80 at most, got {name!r}."
        )
    if (folder / name).exists():
        raise UserError(
            f"The run {name!r} already exists. Choose another name or remove {folder / name}."
        )
    require_disk(folder, 200)
    remove_stale_folders(folder)
    return folder / name


def write_run(run, path: Path) -> Path:
    """Write `run` aside, then rename: a run folder is whole or not there.

    Returns:
        where it lies: if another command has taken the name meanwhile, the time of day is added.
    Raises:
        UserError: the disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=".new-"))
    try:
        write_weights(run, aside)
        config = run.metrics["config"] | {k: run.metrics[k] for k in ("model", "data")}
        write_json(aside / "config.json", config)
        write_record(run.metrics, run.logs, aside)
        os.chmod(aside, 0o755)
        try:
            os.rename(aside, path)
        except OSError:
            if not path.exists():
                raise
            path = path.with_name(f"{path.name[:60]}-{time.strftime('%H%M%S')}")
            os.rename(aside, path)
        return path
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"The run could not be written to {path} ({reason}). Free some space and try again."
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_weights(run, folder: Path) -> None:
    """The adapter, or the whole model where its weights have changed."""
    if isinstance(run.model, PeftModel):
        # the portable name, not a local cache path
        run.model.peft_config["default"].base_model_name_or_path = run.lm.name
        weights = run.model.state_dict()  # a bank holds values that float16 holds too
        weights = {k: v.half() if ".alter_gate_" in k else v for k, v in weights.items()}
        run.model.save_pretrained(
            folder / "adapter", state_dict=weights, save_embedding_layers=False
        )
        return
    require_disk(folder, run.lm.model.get_memory_footprint() // 2**20 + 50)
    with quiet():
        run.model.save_pretrained(folder / "model")
    run.lm.tokenizer.save_pretrained(folder / "model")


def newest_run(folder: Path = RUNS) -> Path:
    """The run that was written last. Raises UserError if there is none."""
    files = sorted(folder.glob("[!.]*/metrics.json"), key=lambda p: p.stat().st_mtime)
    if not files:
        raise UserError(f"{folder}/ holds no run yet. Make one: python -m alter_demo unlearn.")
    return files[-1].parent
