"""A self-contained model folder: weights, code, tokenizer; whole or not at all, and checked by a fresh process."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..tokenization import save_tokenizer


# What a stranger does with the folder: no `modernalbert` package, and the class that `config.json` names.
RELOAD = """
import json, sys
sys.modules["modernalbert"] = None
import torch, transformers
folder = sys.argv[1]
config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
name = config.architectures[0]
auto = next(auto for auto, target in config.auto_map.items() if target.endswith("." + name))
model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    output = model(**tokenizer("A sentence to check the folder with.", return_tensors="pt"))
logits = output[0].double()
print(json.dumps({"class": type(model).__name__, "sum": logits.sum().item(), "squares": logits.square().sum().item()}))
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
        RuntimeError: The fresh process could not load it; nothing is left behind.
    """
    folder = new_folder(folder)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        model.save_pretrained(draft)
        save_tokenizer(tokenizer, draft)
        os.chmod(draft, 0o755)
        check_export(model, draft)
        if folder.exists():
            folder.rmdir()
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def check_export(model: PreTrainedModel, folder: Path) -> dict:
    """Loads a folder in a fresh process; returns what that process found.

    Raises:
        RuntimeError: It could not, or found another class.
    """
    # An environment of its own for remote code, so that nothing cached from another folder answers.
    with tempfile.TemporaryDirectory() as cache:
        result = subprocess.run(
            [sys.executable, "-c", RELOAD, str(folder)],
            env={**os.environ, "HF_MODULES_CACHE": cache},
            cwd=cache,
            capture_output=True,
            text=True,
        )
    if result.returncode:
        raise RuntimeError(f"the exported folder does not load in a fresh process:\n{result.stderr}")
    found = json.loads(result.stdout.splitlines()[-1])
    if found["class"] != type(model).__name__:
        raise RuntimeError(f"the exported folder loads as {found['class']}, not as {type(model).__name__}")
    return found
