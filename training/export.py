"""A self-contained model folder: weights, code, tokenizer; whole or not at all, and checked by a fresh process."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..tokenization import save_tokenizer


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
    folder = new_folder(folder)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        model.save_pretrained(draft)
        save_tokenizer(tokenizer, draft)
        os.chmod(draft, 0o755)
        check_export(model, tokenizer, draft)
        if folder.exists():
            folder.rmdir()
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


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
