"""The folder of a run: settings, lock, checkpoints to resume from, atomic writes."""

import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import EarlyStoppingCallback, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .loading import base_of, is_adapter


logger = logging.getLogger(__name__)

RESULTS_NAME = "results.json"
SETTINGS_NAME = "arguments.json"
LOCK_NAME = ".lock"
DRAFT = ".draft-"  # beginning of the names of files and folders that are being written

# Arguments of Trainer that change neither weights nor scores. A change of any other argument makes another run.
WITHOUT_EFFECT = {
    *("output_dir", "run_name", "report_to", "project", "trackio_space_id", "trackio_bucket_id"),
    *("trackio_static_space_id", "disable_tqdm", "log_level", "log_level_replica", "log_on_each_node"),
    *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "skip_memory_metrics"),
    *("include_num_input_tokens_seen", "save_strategy", "save_steps", "save_total_limit", "save_on_each_node"),
    *("per_device_eval_batch_size", "eval_accumulation_steps", "eval_use_gather_object", "prediction_loss_only"),
    *(
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
    ),
    *("dataloader_multiprocessing_context", "torch_empty_cache_steps", "do_eval", "do_predict", "push_to_hub"),
    *("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"),
    *("ddp_backend", "ddp_timeout", "debug", "local_rank", "restore_callback_states_from_checkpoint"),
}
BEST = {"save_strategy", "save_steps"}  # with `load_best_model_at_end`, these decide which checkpoint is the best


def run_settings(*arguments: Any, without: Iterable[str] = (), **identities: Any) -> dict[str, Any]:
    """Everything that a run depends on, as JSON: all fields of its arguments except those without effect.

    Args:
        arguments: Dataclasses, `TrainingArguments` among them.
        without: Fields of our own dataclasses that change neither weights nor scores.
        **identities: Values that replace or extend the fields: [`describe_model`] for a model's name, fingerprints of
            the rows that were read.
    """
    settings = {}
    for one in arguments:
        skipped = set(without)
        if isinstance(one, TrainingArguments):
            skipped |= WITHOUT_EFFECT - (BEST if one.load_best_model_at_end else set())
            settings["world_size"] = one.world_size  # decides how many rows a step has
        settings |= {
            field.name: getattr(one, field.name) for field in fields(one) if field.init and field.name not in skipped
        }
    return json.loads(json.dumps({**settings, **identities}, default=_plain, sort_keys=True))


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):  # accelerator_config
        return value.to_dict()
    return sorted(value) if isinstance(value, set) else str(value)


def describe_model(name: str | Path) -> str:
    """Name on the Hub, or the last name of a folder and a hash of the model in it.

    The hash covers weights, configuration, tokenizer, code, modules of sentence-transformers and, for a LoRA, its base.
    """
    if not (folder := Path(name)).is_dir():
        return str(name)
    digest = hashlib.sha256()
    # Other files of a finished run, which are not part of the model.
    others = {RESULTS_NAME, SETTINGS_NAME, TRAINER_STATE_NAME, "routing_weights.json", "initialization.json"}
    paths = [
        path
        for pattern in ("*", "[0-9]*_*/*")  # the latter of sentence-transformers
        for path in folder.glob(pattern)
        if path.suffix in (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja", ".py")
        and path.name not in others
        and path.is_file()
    ]
    for path in sorted(paths):
        digest.update(f"\0{path.relative_to(folder).as_posix()}\0{hash_file(path)}".encode())
    if is_adapter(folder):
        digest.update(describe_model(base_of(folder)).encode())
    return f"{folder.resolve().name} {digest.hexdigest()[:16]}"


def hash_file(path: str | Path) -> str:
    """Hash of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def start_run(folder: str | Path, settings: dict[str, Any], sources: Iterable[str | Path] = ()) -> dict | None:
    """Prepares the folder of a run that starts or resumes, and locks it.

    Of the processes that a launcher started for one run, only the first writes.

    Args:
        folder: Folder of the run.
        settings: See [`run_settings`].
        sources: Models that the run reads; they must not be overwritten.

    Returns:
        Results of the run if it is finished, else None.

    Raises:
        OSError: The folder cannot be used, see [`check_output_dir`] and [`lock_folder`].
        ValueError: It holds a run, or checkpoints of one, with other settings.
    """
    folder, lead = Path(folder), int(os.environ.get("RANK", 0)) == 0
    finished = (folder / RESULTS_NAME).exists()
    if not finished:
        check_output_dir(folder, sources=sources)
        if lead:
            lock_folder(folder)
            remove_drafts(folder)
    path = folder / SETTINGS_NAME
    before = read_json(path) if path.exists() else None
    if finished or find_checkpoints(folder):
        held = "a finished run" if finished else "checkpoints of a run"
        if before is None:
            raise ValueError(
                f"'{folder}' holds {held} and no {SETTINGS_NAME}, which says what it was made with; choose another "
                "`output_dir`, or remove it"
            )
        changed = [
            f"{name}: {before.get(name)!r} before, {settings.get(name)!r} now"
            for name in sorted(before | settings)
            if before.get(name) != settings.get(name)
        ]
        if changed:
            raise ValueError(
                f"'{folder}' holds {held} with other settings ({'; '.join(changed)}); give the same command to go on, "
                "or choose another `output_dir`"
            )
    if finished:
        return read_json(folder / RESULTS_NAME)
    if lead:
        write_json(path, settings)
    return None


def check_output_dir(folder: str | Path, num_bytes: int = 0, sources: Iterable[str | Path] = ()) -> Path:
    """Creates the folder, and checks before any work that it is writable and has enough space.

    Args:
        folder: Output folder of a run.
        num_bytes: Space that the run needs.
        sources: Models that the run reads.

    Raises:
        FileExistsError: It holds a finished run, is a file, or is or lies in the folder of a source.
        PermissionError: It cannot be written to.
        OSError: The disk has too little space.
    """
    folder = Path(folder)
    for source in map(Path, sources):
        here, there = folder.resolve(), source.resolve()
        if source.is_dir() and (
            here == there or there in here.parents or here == there.parent and is_checkpoint(source)
        ):
            raise FileExistsError(
                f"`output_dir` '{folder}' would be written over or into the model '{source}'; choose another"
            )
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


def bytes_of_run(args: TrainingArguments, num_parameters: int) -> int:
    """Space that checkpoints and model of a run need, for so many trained parameters in float32."""
    # A checkpoint is the weights and AdamW's two moments; one more is written before an old one is removed.
    checkpoints = 0 if args.save_strategy == "no" else (args.save_total_limit or 1) + 1
    return (3 * checkpoints + 1) * 4 * num_parameters


_locks = {}  # folder -> open file; the lock goes with the process


def lock_folder(folder: str | Path) -> None:
    """Locks a folder until this process ends, however it ends.

    Raises:
        BlockingIOError: Another process has locked it.
    """
    path = Path(folder).resolve() / LOCK_NAME
    if path in _locks and path.exists():
        return
    file = open(path, "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise BlockingIOError(
            f"another process is at work in '{folder}'; wait for it, or choose another `output_dir`"
        ) from error
    except OSError:  # a file system without locks
        logger.warning("'%s' cannot be locked: see that no other process works in it", folder)
    _locks[path] = file


def remove_drafts(folder: str | Path) -> None:
    """Removes unfinished files that killed processes left in a folder that this process has locked."""
    for left in Path(folder).glob(f"{DRAFT}*"):
        logger.info("removing '%s', which was left half written", left)
        shutil.rmtree(left, ignore_errors=True)
        left.unlink(missing_ok=True)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder has the name that Trainer gives to checkpoints."""
    return re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name) is not None


def find_checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoint folders of a run, newest first."""
    found = [path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if is_checkpoint(path)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)


def last_checkpoint(folder: str | Path, remove: bool = True) -> Path | None:
    """Newest complete checkpoint of a run: model, optimizer, scheduler, random state and Trainer's state are readable.

    Trainer writes its state last: a checkpoint without it was interrupted, and is removed. A checkpoint with it that
    lacks another part was damaged later; an older one is used instead, with a warning.

    Args:
        folder: Folder of the run.
        remove: Whether to remove interrupted checkpoints.

    Raises:
        ValueError: There are damaged checkpoints and no complete one.
    """
    damaged = {}
    for checkpoint in find_checkpoints(folder):
        try:
            state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            if not isinstance(state["global_step"], int):
                raise ValueError
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            if remove:
                logger.warning("removing the incomplete checkpoint '%s'", checkpoint)
                shutil.rmtree(checkpoint, ignore_errors=True)  # another process may be faster
            continue
        problem = find_damage(checkpoint)
        if problem is None:
            if damaged:
                logger.warning("going on from the older '%s'", checkpoint)
            return checkpoint
        damaged[checkpoint.name] = problem
        logger.warning("the checkpoint '%s' %s", checkpoint, problem)
    if damaged:
        said = "; ".join(f"{name} {problem}" for name, problem in damaged.items())
        raise ValueError(
            f"'{folder}' holds no whole checkpoint to go on from ({said}); restore one from a copy, or remove them to "
            "start anew"
        )
    return None


def find_damage(checkpoint: Path) -> str | None:
    """Which part of a checkpoint is missing or unreadable; None if it is complete."""
    weights = sorted((*checkpoint.glob("model*.safetensors"), *checkpoint.glob("adapter_model*.safetensors")))
    if (index := checkpoint / "model.safetensors.index.json").exists():
        try:
            weights += [checkpoint / name for name in json.loads(index.read_text())["weight_map"].values()]
        except (ValueError, KeyError):
            return f"has a damaged {index.name}"
    world = int(os.environ.get("WORLD_SIZE", 1))
    random_states = [f"rng_state_{rank}.pth" for rank in range(world)] if world > 1 else ["rng_state.pth"]
    # Sharded states of FSDP and DeepSpeed are folders.
    sharded = [
        path for pattern in ("optimizer_*", "pytorch_model_fsdp*", "global_step*") for path in checkpoint.glob(pattern)
    ]
    for part, paths in {
        "weights": weights or sharded or sorted(checkpoint.glob("[0-9]*_*/*.safetensors")),
        "optimizer": [*checkpoint.glob("optimizer.*"), *sharded],
        "scheduler": [*checkpoint.glob("scheduler.pt")],
        "random state": [checkpoint / name for name in random_states],
    }.items():
        if not paths or not all(path.exists() for path in paths):
            return f"lacks its {part}"
        for path in paths:
            if path.is_file() and not is_readable(path):
                return f"has a damaged {path.name}"
    return None


def is_readable(path: Path) -> bool:
    """Whether a file of torch or safetensors is complete, without loading it."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                return True
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None  # checksums
    except (SafetensorError, zipfile.BadZipFile, EOFError, NotImplementedError):
        return False


def is_complete(checkpoint: Path, max_steps: int, patience: int | None = None) -> bool:
    """Whether a checkpoint is of the last step: `max_steps` if given, else the last step of the run that wrote it.

    With `patience`, also if it was written after that many evaluations in a row without a better score.
    """
    state = read_json(checkpoint / TRAINER_STATE_NAME)
    if patience is not None:
        stopping = state["stateful_callbacks"].get(EarlyStoppingCallback.__name__, {"attributes": {}})
        if stopping["attributes"].get("early_stopping_patience_counter", 0) >= patience:
            return True
    return state["global_step"] >= (max_steps if max_steps > 0 else state["max_steps"])


def read_json(path: str | Path) -> Any:
    """Content of a JSON file of the run.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is damaged ({error}); remove its folder, or restore it from a copy") from error


def write_json(path: str | Path, content: Any, **kwargs: Any) -> None:
    """Writes a JSON file atomically; keyword arguments are those of `json.dumps`.

    Raises:
        ValueError: A number is not finite, which JSON cannot hold.
    """
    if (where := find_not_finite(content)) is not None:
        raise ValueError(f"{where} of '{Path(path).name}' is no finite number; nothing was written")
    write_text(path, json.dumps(content, **{"indent": 1, "allow_nan": False, **kwargs}))


def find_not_finite(content: Any, where: str = "") -> str | None:
    """Dotted path of a number in JSON content that is not finite; None if there is none."""
    if isinstance(content, float) and not math.isfinite(content):
        return where or "the value"
    items = content.items() if isinstance(content, dict) else ()
    items = enumerate(content) if isinstance(content, list | tuple) else items
    found = (find_not_finite(value, f"{where}.{name}".lstrip(".")) for name, value in items)
    return next((one for one in found if one is not None), None)


def write_text(path: str | Path, text: str) -> None:
    """Writes a file atomically, with the permissions that the user's umask gives."""
    path = Path(path)
    descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f"{DRAFT}{path.name}-")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        set_permissions(Path(draft))
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise


def set_permissions(path: Path) -> None:
    """Gives a file, or a folder and its content, the permissions of the user's umask, which temporary files ignore."""
    umask = os.umask(0)
    os.umask(umask)
    for one in (path, *(path.rglob("*") if path.is_dir() else ())):
        os.chmod(one, (0o777 if one.is_dir() else 0o666) & ~umask)


def write_files(folder: str | Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary folder, then moves its files into `folder`, each atomically.

    Temporary folders that killed processes left are removed first.
    """
    remove_drafts(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=DRAFT) as draft:
        write(Path(draft))
        for path in sorted(Path(draft).iterdir()):
            set_permissions(path)
            os.replace(path, Path(folder) / path.name)
