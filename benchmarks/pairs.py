"""What a frozen encoder knows of two texts: seen together, as a cross-encoder is fine-tuned, and apart, as an embedder sees them.

    python benchmarks/pairs.py --models checkpoints/modernalbert-nano sentence-transformers/all-MiniLM-L6-v2 \
        --pairs data/glue/stsb:sentence1:sentence2 data/glue/mrpc:sentence1:sentence2

Nothing of the encoder is trained: ridge regression, its penalty chosen by cross-validation on the training rows, reads the
mean of the last hidden states of `[CLS] first [SEP] second [SEP]`, or `|u - v|` and `u * v` of the two texts' own means, of
unit length. A folder of `--pairs` holds `train.*` and `validation.*` with a column `label`: numbers are scored by Pearson's
correlation, classes by accuracy, in percent. Output is Markdown.
"""

from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import torch
from common import count, describe_machine, format_table
from datasets import Dataset
from rich.console import Console
from rich.progress import track
from scipy.stats import pearsonr
from sklearn.linear_model import RidgeClassifierCV, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

import modernalbert  # noqa: F401  (registers the Auto classes)
from modernalbert.training.cli import run_script
from modernalbert.training.data import first_rows, read_rows
from modernalbert.training.loading import load_model, load_tokenizer
from modernalbert.training.packing import encode_texts


@torch.no_grad()
def mean_states(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *texts: list[str], batch_size: int = 64
) -> np.ndarray:
    """Mean of the last hidden states of texts, or of pairs given as two lists, `[rows, hidden]`."""
    means = []
    starts = range(0, len(texts[0]), batch_size)
    for start in track(starts, "Encoding", console=Console(stderr=True), transient=True):
        part = [column[start : start + batch_size] for column in texts]
        batch = encode_texts(tokenizer, *part, padding=True, truncation=True, max_length=128, return_tensors="pt")
        if model.config.model_type == "modernalbert":
            batch.pop("token_type_ids", None)
        mask = batch["attention_mask"][..., None]
        states = model(**batch).last_hidden_state  # [rows, seq, hidden]
        means.append((states * mask).sum(dim=1) / mask.sum(dim=1))
    return torch.cat(means).numpy()


def see_apart(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, first: list[str], second: list[str]
) -> np.ndarray:
    """Features of pairs of which the model reads each text by itself, `[pairs, 2 * hidden]`."""
    u, v = (mean_states(model, tokenizer, texts) for texts in (first, second))
    u, v = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (u, v))
    return np.concatenate([abs(u - v), u * v], axis=1)


def score(features: list[np.ndarray], labels: list[list]) -> float:
    """Of a linear model that is fitted to the first features and labels, on the second, in percent."""
    train, validation = (np.asarray(part) for part in labels)
    penalties = np.logspace(0, 5, 11)
    if np.issubdtype(train.dtype, np.floating):
        fitted = make_pipeline(StandardScaler(), RidgeCV(penalties)).fit(features[0], train)
        return 100 * pearsonr(fitted.predict(features[1]), validation)[0]
    classifier = make_pipeline(StandardScaler(), RidgeClassifierCV(penalties))
    return 100 * classifier.fit(features[0], train).score(features[1], validation)


def read_pairs(source: str, max_rows: int) -> tuple[list[Dataset], str, str]:
    """Rows to fit on and to score, and the columns of the two texts, of `FOLDER:FIRST:SECOND`."""
    folder, first, second = source.rsplit(":", 2)
    parts = [
        first_rows(read_rows(f"{folder}/{split}.*").shuffle(seed=0), max_rows) for split in ("train", "validation")
    ]
    return parts, first, second


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models", nargs="+", required=True, help="encoders, or SentenceTransformers, of which the encoder is used"
    )
    parser.add_argument("--pairs", nargs="+", required=True, help="FOLDER:FIRST:SECOND, columns of its files")
    parser.add_argument("--max_rows", type=count, default=2000, help="rows of each split, drawn at random")
    args = parser.parse_args(argv)
    sets = {Path(source.rsplit(":", 2)[0]).name: read_pairs(source, args.max_rows) for source in args.pairs}
    views = {"together": mean_states, "apart": see_apart}
    rows = []
    for name in args.models:
        tokenizer = load_tokenizer(name)
        model = load_model(AutoModel, name)[0].eval()
        cells = []
        for parts, first, second in sets.values():
            for view in views.values():
                features = [view(model, tokenizer, list(part[first]), list(part[second])) for part in parts]
                cells.append(f"{score(features, [part['label'] for part in parts]):.1f}")
        rows.append([Path(name).name, *cells])
    header = ["", *(f"{title}, {view}" for title in sets for view in views)]
    print(format_table(header, rows, numbers=True))
    print("\n" + ", ".join(f"{key}: {value}" for key, value in describe_machine().items()))


if __name__ == "__main__":
    run_script(main)
