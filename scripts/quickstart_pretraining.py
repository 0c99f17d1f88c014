"""Pretrains a small ModernALBERT from nothing on real English, without network, in minutes on two CPU cores.

    python scripts/quickstart_pretraining.py --output_dir runs/quickstart-pretraining

The English is what every Python carries: the language reference and the docstrings of the standard library, about two
million characters. On it this script trains a tokenizer and a `nano` model, merges the experts, and lets a fresh process
that has no `modernalbert` package load the folder and fill in masks. Each step runs the script of that name in this folder.
"""

import json
import math
import random
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import merge_experts
import pretrain
import train_tokenizer
import transformers
from quickstart import OUTPUT_DIR, SEED, make_folder, read_docstrings, read_topics, split_paragraphs, write_rows
from rich.console import Console
from rich.table import Table

from modernalbert.tokenization import load_tokenizer
from modernalbert.training.cli import Count, Seed, parse_arguments, run_script
from modernalbert.training.export.folder import run_fresh
from modernalbert.training.runs import write_json


MASKED = [
    "Return [MASK] if the object is an instance of the class.",
    "The file is opened for [MASK] in binary mode.",
    "If the argument is not given, the [MASK] value is used.",
]

# What a user of the exported folder does.
RELOAD = """
import json, sys
from transformers import pipeline
fill = pipeline("fill-mask", model=sys.argv[1], trust_remote_code=True)
print(json.dumps([[[g["token_str"], g["score"]] for g in fill(s, top_k=3)] for s in json.loads(sys.argv[2])]))
"""


@dataclass
class PretrainingQuickstartArguments:
    """Where to, and how much."""

    output_dir: str = field(default="runs/quickstart-pretraining", metadata=OUTPUT_DIR)
    max_steps: Count = field(default=360, metadata={"help": "Pretraining steps of 1024 tokens."})
    seed: Seed = field(default=0, metadata=SEED)


def write_data(folder: Path, seed: int) -> dict[str, str]:
    """Files of the texts. Paragraphs are shuffled and every tenth is held out."""
    documents = [*read_topics(), *(text for _, text in read_docstrings())]
    paragraphs = list(dict.fromkeys(text for document in documents for text in split_paragraphs(document)))
    random.Random(seed).shuffle(paragraphs)
    parts = {
        "train": [text for index, text in enumerate(paragraphs) if index % 10],
        "validation": paragraphs[::10],
    }
    return {
        name: write_rows(folder / f"{name}.jsonl", [{"text": text} for text in texts]) for name, texts in parts.items()
    }


def unigram_loss(files: dict[str, str], tokenizer) -> float:
    """Loss in nats of the best guess without context: training frequencies, one added to each."""
    counts = {}
    for part in ("train", "validation"):
        texts = [json.loads(line)["text"] for line in open(files[part], encoding="utf-8")]
        encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
        counts[part] = Counter(token for text in encoded for token in text)
    total = counts["train"].total() + len(tokenizer)
    loss = sum(n * -math.log((counts["train"][token] + 1) / total) for token, n in counts["validation"].items())
    return loss / counts["validation"].total()


def main(argv: Sequence[str] | None = None) -> dict:
    """Runs the steps and prints the table; returns its figures."""
    (args,) = parse_arguments((PretrainingQuickstartArguments,), argv, description=__doc__)
    start = time.perf_counter()
    console = Console(width=110)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    folder = Path(args.output_dir)
    make_folder(folder)
    path = {name: str(folder / name) for name in ("tokenizer", "pretrained", "merged")}

    console.rule("1. texts and tokenizer")
    files = write_data(folder, args.seed)
    vocabulary = ["--vocab_size", "2048", "--model_max_length", "1024", "--output_dir", path["tokenizer"]]
    train_tokenizer.main(["--files", files["train"], *vocabulary])
    tokenizer = load_tokenizer(path["tokenizer"])

    console.rule("2. pretraining")
    results = pretrain.main(
        ["--preset", "nano", "--tokenizer", path["tokenizer"], "--output_dir", path["pretrained"]]
        + ["--train_data", files["train"], "--validation_data", files["validation"], "--max_length", "128"]
        + ["--per_device_train_batch_size", "8", "--max_steps", str(args.max_steps), "--warmup_steps", "0.1"]
        + [
            "--learning_rate",
            "3e-3",
            "--weight_decay",
            "0.01",
            "--lr_scheduler_type",
            "linear",
            "--logging_steps",
            "50",
        ]
        + ["--use_cpu", "True", "--dataloader_pin_memory", "False", "--per_device_eval_batch_size", "32"]
        + ["--save_strategy", "no", "--report_to", "none", "--seed", str(args.seed)]
    )

    console.rule("3. merging and export")
    merge_experts.main(
        ["--model_name_or_path", path["pretrained"], "--output_dir", path["merged"]]
        + ["--calibration_data", files["train"], "--validation_data", files["validation"]]
    )

    console.rule("4. a fresh process without the package")
    reloaded = json.loads(run_fresh(RELOAD, str(Path(path["merged"]).resolve()), json.dumps(MASKED)).splitlines()[-1])
    for sentence, guesses in zip(MASKED, reloaded, strict=True):
        console.print(f"{sentence.replace('[MASK]', '____')}  ", end="", highlight=False)
        console.print(", ".join(f"{token.strip()} ({score:.0%})" for token, score in guesses), highlight=False)

    figures = {
        "masked-LM loss at the start": results["eval_loss_start"],
        "masked-LM loss of a unigram model": unigram_loss(files, tokenizer),
        "masked-LM loss at the end": results["eval_loss"],
        "parameters": results["parameters"],
        "seconds": time.perf_counter() - start,
    }
    write_json(folder / "results.json", figures)
    table = Table(title="pretraining from nothing", title_justify="left", show_header=False)
    for name, value in figures.items():
        table.add_row(name, f"{value:.3f}" if value < 100 else f"{value:,.0f}")
    for name in path:
        table.add_row(name, path[name])
    console.print(table)
    console.print(
        textwrap.fill(
            "The language model was trained for minutes on two million characters: it shows the way, not what the "
            "architecture can do.",
            width=110,
        )
    )
    return figures


if __name__ == "__main__":
    run_script(main)
