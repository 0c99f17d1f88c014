"""A model or a SentenceTransformer as a folder for the Hub, its weights stored in half precision if wanted."""

from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..loading import check_folder, is_sentence_transformer, load_config
from .folder import SENTENCE, check_finite, compare_fresh, draft_folder, drop_auto_map, load_exportable, write_model


# Loads a SentenceTransformer as its users do, without the `modernalbert` package.
RELOAD = """
import sys, torch
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
folder, sentence, output = sys.argv[1:]
model = SentenceTransformer(folder, device="cpu", trust_remote_code=True)
save_file({"output": torch.from_numpy(model.encode([sentence, sentence + " " + sentence]))}, output)
"""


def export_to_hub(name: str | Path, folder: str | Path, dtype: torch.dtype | None = None, code: bool = True) -> Path:
    """Writes a folder for the Hub: weights, configuration, tokenizer, the model's code, and its card if it has one.

    A process without the package has loaded the folder, and got the outputs of the model, before it appears.

    Args:
        name: Hub name or folder of a ModernALBERT, or folder of a SentenceTransformer with one.
        folder: Folder to write; must not exist, or be empty.
        dtype: What weights are stored in; default: what most of a folder's are in, and float32 for a model of the Hub.
            Half precision is for the size of the files: the configuration says float32, which models are loaded in.
        code: Whether the model's code is written. Without it the folder needs the package to load.

    Returns:
        The folder.

    Raises:
        FileExistsError: The folder exists and is not empty.
        RuntimeError: The other process could not load it, or got other outputs; nothing is left behind.
        ValueError: The model is no ModernALBERT, or a weight does not fit the dtype.
    """
    dtype = dtype or stored_dtype(name)
    with draft_folder(folder) as draft:
        if is_sentence_transformer(name):
            write_sentence_transformer(name, draft, dtype)
        else:
            model, tokenizer = load_exportable(str(name))
            round_weights(model, dtype)
            check_finite(model, str(name))
            write_model(model, tokenizer, draft)
        store_weights(draft, dtype)
        if not code:
            for path in draft.glob("*_modernalbert.py"):
                path.unlink()
            drop_auto_map(draft)
        card = Path(name) / "README.md"
        if card.is_file():
            (draft / card.name).write_bytes(card.read_bytes())
    return Path(folder).resolve()


def write_sentence_transformer(name: str | Path, folder: Path, dtype: torch.dtype | None) -> None:
    """Fills a folder with a SentenceTransformer, and compares its vectors of two texts with those of a new process.

    Raises:
        RuntimeError: They differ.
        ValueError: Its encoder is no ModernALBERT.
    """
    from sentence_transformers import SentenceTransformer

    kind = load_config(name).model_type
    if kind != "modernalbert":
        raise ValueError(f"the encoder of '{name}' is a {kind}, expected a ModernALBERT")
    options = {"dtype": "float32", "use_safetensors": True}
    model = SentenceTransformer(str(name), device="cpu", model_kwargs=options)
    round_weights(model, dtype)
    check_finite(model, str(name))
    model.save_pretrained(str(folder), create_model_card=False)
    vectors = model.encode([SENTENCE, f"{SENTENCE} {SENTENCE}"], convert_to_tensor=True)
    compare_fresh(RELOAD, folder, vectors)


def stored_dtype(folder: str | Path) -> torch.dtype | None:
    """What most numbers in the weights of a folder are stored in; None where there are none."""
    check_folder(folder)
    counts = Counter()
    for path in Path(folder).glob("*.safetensors"):
        for tensor in load_file(path).values():
            counts[tensor.dtype] += tensor.numel()
    return max(counts, key=counts.get, default=None)


@torch.no_grad()
def round_weights(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Rounds weights to what a dtype can hold, in place.

    Raises:
        ValueError: A weight is too large for it.
    """
    if dtype is None:
        return
    for name, parameter in model.named_parameters():
        rounded = parameter.to(dtype)
        if parameter.isfinite().all() and not rounded.isfinite().all():
            raise ValueError(f"`{name}` holds values that {dtype} does not; store it in bfloat16 or float32")
        parameter.copy_(rounded)


def store_weights(folder: Path, dtype: torch.dtype | None) -> None:
    """Stores all weights of a folder in a dtype, which must be able to hold them."""
    if dtype is None:
        return
    for path in folder.rglob("*.safetensors"):
        tensors = load_file(path)
        save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, path, {"format": "pt"})
