"""Output folders that survive: checked before work, resumed from what is complete, finished whole or not at all."""

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from transformers import EarlyStoppingCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


logger = logging.getLogger(__name__)

RESULTS_NAME = "results.json"


def check_output_dir(folder: str | Path, num_bytes: int = 0) -> Path:
    """Makes the folder, and sees before any work that it can be written to and holds what will come.

    Args:
        folder: Where a run will write.
        num_bytes: What it will write.

    Raises:
        FileExistsError: It holds a finished run, or is a file.
        PermissionError: It cannot be written to.
        OSError: The disk has too little space.
    """
    folder = Path(folder)
    if (folder / RESULTS_NAME).exists():
        raise FileExistsError(
            f"'{folder}' holds a finished run ({RESULTS_NAME}); choose another `output_dir` or remove it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError as error:
        raise FileExistsError(f"'{folder}' is a file; choose another `output_dir`") from error
    except OSError as error:
        raise PermissionError(f"cannot write to '{folder}' ({error.strerror}); choose another `output_dir`") from error
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise OSError(
            f"'{folder}' needs {num_bytes / 1e9:.1f} GB and has {free / 1e9:.1f} GB free; make room, choose another "
            "`output_dir`, or keep fewer checkpoints with `save_total_limit`"
        )
    return folder


def last_checkpoint(folder: str | Path) -> Path | None:
    """Newest complete checkpoint of a run; what a killed process left half written is removed.

    Trainer writes its state last, so a checkpoint is complete once that file can be read.
    """
    complete = []
    for checkpoint in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if not re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", checkpoint.name):
            continue
        try:
            step = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())["global_step"]
            complete.append((step, checkpoint))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            logger.warning("removing the incomplete checkpoint '%s'", checkpoint)
            shutil.rmtree(checkpoint, ignore_errors=True)  # another process may be faster
    return max(complete)[1] if complete else None


def is_complete(checkpoint: Path, max_steps: int, patience: int | None = None) -> bool:
    """Whether a checkpoint is of the last step: of `max_steps`, or where these are not given, of the run that wrote it.

    With `patience`, also one that was written when so many evaluations in a row had brought no better score.
    """
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    if patience is not None:
        stopping = state["stateful_callbacks"].get(EarlyStoppingCallback.__name__, {"attributes": {}})
        if stopping["attributes"].get("early_stopping_patience_counter", 0) >= patience:
            return True
    return state["global_step"] >= (max_steps if max_steps > 0 else state["max_steps"])


def same_run(folder: str | Path, arguments: dict) -> None:
    """Keeps what a run was started with, and sees that it is resumed with the same.

    Raises:
        ValueError: A checkpoint was made with other arguments.
    """
    path = Path(folder) / "arguments.json"
    arguments = json.loads(json.dumps(arguments))
    if last_checkpoint(folder) is not None and path.exists():
        before = json.loads(path.read_text())
        changed = [
            f"{name}: {before.get(name)!r} before, {value!r} now"
            for name, value in arguments.items()
            if before.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"'{folder}' has checkpoints of a run with other arguments ({'; '.join(changed)}); give the same "
                "command to go on, or choose another `output_dir`"
            )
    write_text(path, json.dumps(arguments, indent=1))


def write_text(path: str | Path, text: str) -> None:
    """Writes a file whole or not at all."""
    path = Path(path)
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


def write_files(folder: str | Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a folder of its own, and moves each of its finished files into `folder`.

    What a killed process left of such a folder is removed first.
    """
    for left in Path(folder).glob(".draft-*"):
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".draft-") as draft:
        write(Path(draft))
        for path in sorted(Path(draft).iterdir()):
            os.replace(path, Path(folder) / path.name)
