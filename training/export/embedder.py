"""A distilled encoder as a SentenceTransformer: the encoder, the mean over tokens, the projection, unit length."""

import logging
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .folder import draft_folder


logger = logging.getLogger(__name__)

EMBEDDER_NAME = "sentence-transformer"


def read_projection(folder: str | Path) -> nn.Linear | None:
    """The projection that [`write_embedder`] wrote beside a model, or that of a SentenceTransformer; None without one."""
    paths = sorted(Path(folder).glob("*_Dense/model.safetensors"))
    paths += sorted((Path(folder) / EMBEDDER_NAME).glob("*_Dense/model.safetensors"))
    if not paths:
        return None
    tensors = load_file(paths[-1])
    weight, bias = tensors["linear.weight"], tensors["linear.bias"]
    projection = nn.Linear(weight.shape[1], weight.shape[0])
    projection.load_state_dict({"weight": weight, "bias": bias})
    return projection


def write_projection(folder: str | Path, projection: nn.Linear) -> None:
    """Writes a projection beside a model, where [`read_projection`] finds it."""
    (Path(folder) / EMBEDDER_NAME / "2_Dense").mkdir(parents=True)
    tensors = {f"linear.{name}": tensor for name, tensor in projection.state_dict().items()}
    save_file(tensors, Path(folder) / EMBEDDER_NAME / "2_Dense" / "model.safetensors")


def write_embedder(folder: str | Path, projection: nn.Linear, max_length: int) -> None:
    """Writes the folder `sentence-transformer` beside a model that was distilled from pooled sequences.

    Args:
        folder: Of the model and its tokenizer.
        projection: From the mean of the model's hidden states to the teacher's vector of a sequence.
        max_length: Tokens that a longer text is cut to.
    """
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer import modules
    except ImportError:
        logger.warning(
            'no `%s` is written: it needs sentence-transformers, `pip install ".[retrieval]"`', EMBEDDER_NAME
        )
        return
    folder = Path(folder)
    transformer = modules.Transformer(str(folder), max_seq_length=max_length)
    dense = modules.Dense(projection.in_features, projection.out_features, activation_function=nn.Identity())
    with torch.no_grad():
        dense.linear.weight.copy_(projection.weight)
        dense.linear.bias.copy_(projection.bias)
    pooling = modules.Pooling(projection.in_features)
    embedder = SentenceTransformer(modules=[transformer, pooling, dense, modules.Normalize()], device="cpu")
    shutil.rmtree(folder / EMBEDDER_NAME, ignore_errors=True)  # of a run that was killed after it
    with draft_folder(folder / EMBEDDER_NAME) as draft:
        embedder.save_pretrained(str(draft), create_model_card=False)
