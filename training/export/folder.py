"""A self-contained model folder: weights, code, tokenizer; written atomically, checked in a new process, uploaded."""

import copy
import errno
import fcntl
import logging
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ... import modeling_modernalbert as modeling
from ...configuration_modernalbert import ModernAlbertConfig
from ...tokenization import save_tokenizer
from ..loading import is_adapter, load_config, load_model, load_tokenizer
from ..runs import read_json, set_permissions, write_json
from .redaction import find_private, read_text


logger = logging.getLogger(__name__)

SENTENCE = "A sentence to check the folder with."

# Loads the folder as its users do: without the `modernalbert` package, by the class that `config.json` names.
RELOAD = """
import sys, torch, transformers
from safetensors.torch import save_file
folder, sentence, output = sys.argv[1:]
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
auto = next(auto for auto, target in config.auto_map.items() if target.endswith("." + config.architectures[0]))
model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    save_file({"output": model(**tokenizer(sentence, return_tensors="pt"))[0].float()}, output)
"""


def run_fresh(code: str, *arguments: str) -> str:
    """Runs Python code in a new process that cannot import `modernalbert`, installed or not; returns its output.

    Working folder and module cache are empty, so that only the code in a model's folder can be loaded.

    Raises:
        RuntimeError: The process failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        result = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.modules['modernalbert'] = None\n{code}", *arguments],
            env={**os.environ, "HF_MODULES_CACHE": scratch},
            cwd=scratch,
            capture_output=True,
            text=True,
        )
    if result.returncode:
        raise RuntimeError(f"the exported folder does not load in a fresh process:\n{result.stderr}")
    return result.stdout


def new_folder(folder: str | Path, source: str | Path | None = None) -> Path:
    """Checks, before any work, that a folder can be created, and removes drafts of it that killed processes left.

    Args:
        folder: Folder to create.
        source: Hub name or folder of the model that it is made from.

    Raises:
        FileExistsError: It exists and is not empty, or another process is writing it.
        NotADirectoryError: One of its parents is a file.
        PermissionError: Its parent cannot be written to.
        ValueError: It lies in the model's own folder.
    """
    folder = Path(folder).resolve()
    if source is not None and Path(source).is_dir() and (folder / "x").is_relative_to(Path(source).resolve()):
        raise ValueError(f"'{folder}' lies in the folder of the model, '{source}'; choose a folder outside of it")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"'{folder}' exists and is not empty; choose another folder or remove it")
    check_writable(folder)
    for draft in find_drafts(folder):
        with locked(draft) as free:
            if not free:
                raise FileExistsError(f"another process is writing '{folder}'; wait for it, or choose another folder")
            logger.info("removing '%s', which a killed process left", draft)
            shutil.rmtree(draft, ignore_errors=True)
    return folder


def check_writable(path: Path) -> None:
    """Checks that a file or folder can be created.

    Raises:
        NotADirectoryError: One of its parents is a file.
        PermissionError: The nearest parent that exists cannot be written to.
    """
    parent = next(parent for parent in path.resolve().parents if parent.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"'{parent}' is a file, and a folder is expected there; choose another output")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write to '{parent}'; choose another output")


def find_drafts(folder: Path) -> list[Path]:
    """Drafts of a folder, see [`draft_folder`]."""
    if not folder.parent.is_dir():
        return []
    return [
        path for path in folder.parent.iterdir() if re.fullmatch(rf"\.{re.escape(folder.name)}\.draft-\w+", path.name)
    ]


@contextmanager
def locked(draft: Path) -> Iterator[bool]:
    """Locks a draft, until the process ends at the latest; yields whether it was free."""
    try:
        descriptor = os.open(draft, os.O_RDONLY)
    except FileNotFoundError:  # its process has just finished
        yield True
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        yield False
    else:
        yield True
    finally:
        os.close(descriptor)


@contextmanager
def draft_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to fill: renamed to `folder` when the block ends without an error, and removed otherwise.

    Raises:
        FileExistsError: A folder of that name exists and is not empty, or another process is writing it.
    """
    folder = new_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.draft-{secrets.token_hex(4)}")
    draft.mkdir()
    with locked(draft):
        try:
            yield draft
            set_permissions(draft)  # safetensors writes for the owner alone
            try:
                os.replace(draft, folder)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                raise FileExistsError(
                    f"another process has written '{folder}' meanwhile; choose another one"
                ) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def check_exportable(name: str) -> ModernAlbertConfig:
    """Configuration of a model that can be exported.

    Args:
        name: Hub name or folder.

    Raises:
        OSError: There is no such model.
        ValueError: It is a LoRA, no ModernALBERT, or its configuration names no head of one.
    """
    if is_adapter(name):
        raise ValueError(f"'{name}' is a LoRA; fold it into its model with PEFT's `merge_and_unload`, and save that")
    config = load_config(name)
    if config.model_type != "modernalbert":
        raise ValueError(f"'{name}' is a {config.model_type}, expected a ModernALBERT")
    heads = config.architectures or []
    if len(heads) != 1 or not issubclass(getattr(modeling, heads[0], int), PreTrainedModel):
        raise ValueError(
            f"`architectures` in the config.json of '{name}' is {heads}, expected one class of ModernALBERT"
        )
    return config


def load_exportable(name: str, **kwargs) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model that [`check_exportable`] accepts, with the head that its configuration names, and its tokenizer.

    Args:
        name: Hub name or folder.
        **kwargs: As for `from_pretrained`.

    Raises:
        ValueError: A file is damaged, weights are missing or not finite.
    """
    config = check_exportable(name)
    model, new = load_model(getattr(modeling, config.architectures[0]), name, **kwargs)
    if new:
        raise ValueError(f"'{name}' has no {', '.join(new)}: its {type(model).__name__} was not trained")
    check_finite(model, name)
    return model.eval(), load_tokenizer(name)


def check_finite(model: PreTrainedModel, name: str) -> None:
    """Refuses the model of a training that diverged.

    Raises:
        ValueError: A weight is not finite.
    """
    for weight, tensor in model.named_parameters():
        if not tensor.isfinite().all():
            raise ValueError(f"`{weight}` of '{name}' is not finite: training diverged; take an earlier checkpoint")


def fit_tokenizer(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """A copy that truncates to the maximum length of the model."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    return tokenizer


def export_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Path:
    """Writes a folder that loads with `trust_remote_code=True` where the package is not installed.

    Args:
        model: Model with any head.
        tokenizer: Its tokenizer.
        folder: Folder to write; must not exist, or be empty.

    Returns:
        The folder, once a process without the package has loaded it and run the model.

    Raises:
        FileExistsError: The folder exists and is not empty.
        RuntimeError: That process could not load it, or got other outputs; nothing is left behind.
    """
    with draft_folder(folder) as draft:
        write_model(model, tokenizer, draft)
    return Path(folder).resolve()


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Fills a folder as [`export_model`] does, and checks it.

    Raises:
        RuntimeError: A process without the package could not load it, or got other outputs.
    """
    model.save_pretrained(folder)
    save_tokenizer(fit_tokenizer(tokenizer, model.config), folder)
    check_export(model, tokenizer, folder)


def check_export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Loads a folder in a process without the package, and compares the outputs for a sentence.

    Raises:
        RuntimeError: The folder does not load, or its outputs differ or are not finite.
    """
    model.eval()
    with torch.no_grad():
        expected = model(**tokenizer(SENTENCE, return_tensors="pt"))[0].float()
    compare_fresh(RELOAD, folder, expected)


def compare_fresh(code: str, folder: Path, expected: torch.Tensor) -> None:
    """Compares outputs of a model with those of its folder in a process without the package.

    Args:
        code: What that process runs, with the folder, `SENTENCE` and the file for its `output` as arguments.
        folder: Folder of the model.
        expected: The model's outputs.

    Raises:
        RuntimeError: The folder does not load, or outputs differ or are not finite.
    """
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "output.safetensors"
        run_fresh(code, str(folder), SENTENCE, str(output))
        found = load_file(output)["output"]
    if not expected.isfinite().all():
        raise RuntimeError("the model's outputs are not finite; it was not exported")
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
        raise RuntimeError("the exported folder loads in a fresh process, but gives other outputs")


def drop_auto_map(folder: Path) -> None:
    """Lets a folder's configuration name no code of its own."""
    config = read_json(folder / "config.json")
    config.pop("auto_map", None)
    write_json(folder / "config.json", config, indent=2)


# Files of a model repository; pickles are not among them.
SUFFIXES = {".safetensors", ".json", ".py", ".md", ".html", ".txt", ".jinja"}
TRAINING_STATE = re.compile(r"optimizer|scheduler|scaler|rng_state|trainer_state|training_args|exp_avg")


def check_public(folder: Path) -> list[Path]:
    """Checks that a folder can be made public.

    Args:
        folder: Folder of an exported model.

    Returns:
        Its files, sorted.

    Raises:
        ValueError: A file may be a pickle, holds state of a training run, a secret, or a path of this machine.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    for path in files:
        if problem := find_problem(path):
            name = path.relative_to(folder).as_posix()
            raise ValueError(f"'{name}' {problem}; nothing was uploaded. Fix or remove the file, then upload again")
    return files


def find_problem(path: Path) -> str | None:
    """Why a file must not be made public; None if it may."""
    if path.is_symlink() or path.suffix not in SUFFIXES:
        return f"is none of the files of a model ({', '.join(sorted(SUFFIXES))})"
    try:
        text = read_text(path)
    except ValueError as error:
        return f"is no text ({error})"
    if TRAINING_STATE.search(path.name) or (path.suffix == ".safetensors" and TRAINING_STATE.search(text)):
        return "holds the state of a training run"
    return find_private(f"{path.name}\n{text}")


def push_folder(folder: Path, name: str, dry_run: bool = False) -> list[Path]:
    """Uploads a folder's files to a model repository, and creates it if needed; uploading twice changes nothing.

    Args:
        folder: Folder of an exported model.
        name: Repository, `namespace/name`.
        dry_run: List files and sizes, and upload nothing.

    Returns:
        The files.

    Raises:
        ValueError: A file is not for the public; nothing was uploaded.
    """
    files = check_public(folder)
    for path in files:
        logger.info("%12s bytes  %s", f"{path.stat().st_size:,}", path.relative_to(folder).as_posix())
    if dry_run:
        logger.info("dry run: %d files for '%s', nothing was uploaded", len(files), name)
        return files
    api = HfApi()
    api.create_repo(name, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload ModernALBERT")
    logger.info("uploaded %d files to '%s'", len(files), name)
    return files
