"""A self-contained model folder: weights, code, tokenizer; whole or not at all, checked by a fresh process; the Hub."""

import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...tokenization import save_tokenizer


logger = logging.getLogger(__name__)

SENTENCE = "A sentence to check the folder with."

# What a stranger does with the folder: no `modernalbert` package, and the class that `config.json` names.
RELOAD = """
import sys
sys.modules["modernalbert"] = None
import torch, transformers
from safetensors.torch import save_file
folder, sentence, output = sys.argv[1:]
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
auto = next(auto for auto, target in config.auto_map.items() if target.endswith("." + config.architectures[0]))
model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    save_file({"output": model(**tokenizer(sentence, return_tensors="pt"))[0].float()}, output)
"""


def new_folder(folder: str | Path) -> Path:
    """Checks, before any work, that a folder can be made.

    Raises:
        FileExistsError: It exists and is not empty.
        PermissionError: Its parent cannot be written to.
    """
    folder = Path(folder).resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"'{folder}' exists and is not empty; choose another folder or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(folder.parent, os.W_OK):
        raise PermissionError(f"cannot write to '{folder.parent}'")
    return folder


@contextmanager
def draft_folder(folder: str | Path) -> Iterator[Path]:
    """A folder to fill, which gets its name once the block has ended without an error, and else is removed.

    Raises:
        FileExistsError: A folder of that name exists and is not empty.
    """
    folder = new_folder(folder)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        yield draft
        os.chmod(draft, 0o755)
        if folder.exists():
            folder.rmdir()
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def export_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> Path:
    """Writes a folder that loads with `trust_remote_code=True` where the package is not installed.

    Args:
        model: With any head.
        tokenizer: Its tokenizer.
        folder: Where to; must not exist yet, or be empty.

    Returns:
        The folder, after a fresh process without the package has loaded it and run the model.

    Raises:
        FileExistsError: The folder exists and is not empty.
        RuntimeError: The fresh process could not load it, or got other outputs; nothing is left behind.
    """
    with draft_folder(folder) as draft:
        write_model(model, tokenizer, draft)
    return Path(folder).resolve()


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Fills a folder as [`export_model`] does, and checks it.

    Raises:
        RuntimeError: A fresh process could not load it, or got other outputs.
    """
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    check_export(model, tokenizer, folder)


def check_export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Loads a folder in a fresh process, and compares what the model says of a sentence.

    Raises:
        RuntimeError: It does not load, or says something else.
    """
    # A module cache of its own, so that no code from another folder answers.
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "output.safetensors"
        result = subprocess.run(
            [sys.executable, "-c", RELOAD, str(folder), SENTENCE, str(output)],
            env={**os.environ, "HF_MODULES_CACHE": scratch},
            cwd=scratch,
            capture_output=True,
            text=True,
        )
        if result.returncode:
            raise RuntimeError(f"the exported folder does not load in a fresh process:\n{result.stderr}")
        found = load_file(output)["output"]
    model.eval()
    with torch.no_grad():
        expected = model(**tokenizer(SENTENCE, return_tensors="pt"))[0].float()
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
        raise RuntimeError("the exported folder loads in a fresh process, but gives other outputs")


# What a model's repository holds: no pickle among it.
SUFFIXES = {".safetensors", ".json", ".py", ".md", ".html", ".txt", ".jinja"}
TRAINING_STATE = re.compile(r"optimizer|scheduler|scaler|rng_state|trainer_state|training_args|exp_avg")
TOKEN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}")


def check_public(folder: Path, private: Sequence[Path] = ()) -> list[Path]:
    """Sees that a folder can be shown to everybody.

    Args:
        folder: Of an exported model.
        private: Folders of this machine that no text may name, beside `folder` itself, the home and the working folder.

    Returns:
        Its files, in order.

    Raises:
        ValueError: A file may be a pickle, holds state of a training run, an access token, or a path of this machine.
    """
    # Inside of home and working folder; the others may end where they are named.
    names = [f"{parent}{os.sep}" for parent in (Path.home(), Path.cwd()) if len(parent.parts) > 1]
    names += [str(path.resolve()) for path in (folder, *private)]
    files = sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    for path in files:
        name = path.relative_to(folder).as_posix()
        problem = None
        if path.is_symlink() or path.suffix not in SUFFIXES:
            problem = f"is none of the files of a model ({', '.join(sorted(SUFFIXES))})"
        else:
            text = read_text(path)
            found = [local for local in names if local in text]
            if TRAINING_STATE.search(path.name) or (path.suffix == ".safetensors" and TRAINING_STATE.search(text)):
                problem = "holds the state of a training run"
            elif TOKEN.search(text):
                problem = "holds what looks like an access token"
            elif found:
                problem = f"names a folder of this machine ('{found[0]}')"
        if problem is not None:
            raise ValueError(f"'{name}' {problem}; nothing was uploaded. Mend or remove the file, then upload again")
    return files


def read_text(path: Path) -> str:
    """What a file says in plain text: all of it, or the header of a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little") if path.suffix == ".safetensors" else -1
        return file.read(length).decode("utf-8", errors="replace")


def push_folder(folder: Path, name: str, private: Sequence[Path] = (), dry_run: bool = False) -> list[Path]:
    """Uploads a folder's files to a model repository, which is made where there is none; again, it changes nothing.

    Args:
        folder: Of an exported model.
        name: Repository, `namespace/name`.
        private: See [`check_public`].
        dry_run: List files and sizes, and upload nothing.

    Returns:
        The files.

    Raises:
        ValueError: A file is not for the public; nothing was uploaded.
    """
    files = check_public(folder, private)
    for path in files:
        logger.info("%12s bytes  %s", f"{path.stat().st_size:,}", path.relative_to(folder).as_posix())
    if dry_run:
        logger.info("dry run: %d files for '%s', nothing was uploaded", len(files), name)
        return files
    api = HfApi()
    api.create_repo(name, exist_ok=True)
    api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload merged ModernALBERT")
    logger.info("uploaded %d files to '%s'", len(files), name)
    return files
