"""The whole life of a small ModernALBERT on real English, without network, in a few minutes on two CPU cores.

    python scripts/quickstart.py --output_dir runs/quickstart

The English is what every Python carries: the language reference and the docstrings of the standard library, about two
million characters. On it this script trains a tokenizer and a `nano` model, fine-tunes the model to tell sentences in
their original word order from disturbed ones, merges the experts, exports, and lets a fresh process that has no
`modernalbert` package load the folders and fill in masks. Each step runs the script of that name in this folder.
"""

import ast
import json
import math
import random
import re
import shutil
import sysconfig
import textwrap
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import merge_experts
import pretrain
import run_glue
import train_tokenizer
import transformers
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

# What a user of the two exported folders does.
RELOAD = """
import json, sys
from transformers import pipeline
masked_lm, classifier, sentences = json.loads(sys.argv[1])
fill = pipeline("fill-mask", model=masked_lm, trust_remote_code=True)
judge = pipeline("text-classification", model=classifier, trust_remote_code=True)
print(json.dumps({"filled": [[[g["token_str"], g["score"]] for g in fill(s, top_k=3)] for s in sentences],
                  "class": type(judge.model).__name__, "judged": judge(["The list is sorted in place.",
                                                                        "place sorted is list The in."])}))
"""
MARK = ".quickstart"  # lies in a folder that this script made


@dataclass
class QuickstartArguments:
    """Where to, and how much."""

    output_dir: str = field(
        default="runs/quickstart",
        metadata={
            "help": "Folder that receives everything; new, or of an earlier run of this script, which is removed."
        },
    )
    max_steps: Count = field(default=360, metadata={"help": "Pretraining steps of 1024 tokens."})
    sentences: Count = field(default=4500, metadata={"help": "Sentences to fine-tune on."})
    seed: Seed = field(default=0, metadata={"help": "Seed of everything random."})


def read_python_prose() -> list[str]:
    """Paragraphs of the language reference and of the standard library's docstrings, whitespace collapsed."""
    from pydoc_data.topics import topics

    documents = list(topics.values())
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(path.relative_to(library).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                documents.append(ast.get_docstring(node) or "")
    paragraphs = (" ".join(part.split()) for document in documents for part in re.split(r"\n\s*\n", document))
    return list(dict.fromkeys(part for part in paragraphs if len(part) > 20))


def split_sentences(paragraphs: Sequence[str]) -> list[str]:
    """Sentences of 6 to 40 words that are mostly words."""
    sentences = (part for text in paragraphs for part in re.split(r"(?<=[.!?])\s+(?=[A-Z])", text))
    return [s for s in sentences if 6 <= len(s.split()) <= 40 and re.fullmatch(r"[A-Z][\w\s,;:'\"().-]+[.!?]", s)]


def disturb(sentence: str, rng: random.Random) -> str:
    """The words in another order; capital and full stop keep their positions, so that they give no hint."""
    words = sentence[0].lower() + sentence[1:-1]
    words = words.split()
    shuffled = words[:]
    while shuffled == words:
        rng.shuffle(shuffled)
    text = " ".join(shuffled)
    return text[0].upper() + text[1:] + sentence[-1]


def write_rows(path: Path, rows: Sequence[dict]) -> str:
    """One JSON object a line; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_data(folder: Path, sentences: int, seed: int) -> dict[str, str]:
    """Files of the two tasks. A sentence of the classification's validation part is in no training text.

    Paragraphs are shuffled and every tenth is held out.
    """
    rng = random.Random(seed)
    paragraphs = read_python_prose()
    rng.shuffle(paragraphs)
    held_out, kept = paragraphs[::10], [text for index, text in enumerate(paragraphs) if index % 10]
    files = {
        "train": write_rows(folder / "train.jsonl", [{"text": text} for text in kept]),
        "validation": write_rows(folder / "validation.jsonl", [{"text": text} for text in held_out]),
    }
    train_sentences = dict.fromkeys(split_sentences(kept))
    validation_sentences = [text for text in dict.fromkeys(split_sentences(held_out)) if text not in train_sentences]
    parts = (("train", train_sentences, sentences), ("validation", validation_sentences, 1000))
    for name, chosen, count in parts:
        rows = []
        for sentence in chosen:
            label = rng.randrange(2)
            rows.append({"text": sentence if label else disturb(sentence, rng), "label": label})
        files[f"order_{name}"] = write_rows(folder / f"order-{name}.jsonl", rows[:count])
    return files


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


def make_folder(folder: Path) -> None:
    """An empty folder, which replaces one that this script made before.

    Raises:
        FileExistsError: It holds something else, which is not to be removed.
    """
    if folder.exists() and not (folder / MARK).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"'{folder}' holds something else than a quickstart; choose another `output_dir`")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARK).touch()


def main(argv: Sequence[str] | None = None) -> dict:
    """Runs the steps and prints the table; returns its figures."""
    (args,) = parse_arguments((QuickstartArguments,), argv, description=__doc__)
    start = time.perf_counter()
    console = Console(width=110)
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    folder = Path(args.output_dir)
    make_folder(folder)
    names = ("tokenizer", "pretrained", "pretrained-merged", "classifier", "classifier-merged", "merged-results")
    path = {name: str(folder / name) for name in names}

    console.rule("1. data and tokenizer")
    files = write_data(folder, args.sentences, args.seed)
    vocabulary = ["--vocab_size", "2048", "--model_max_length", "1024", "--output_dir", path["tokenizer"]]
    train_tokenizer.main(["--files", files["train"], *vocabulary])
    tokenizer = load_tokenizer(path["tokenizer"])

    console.rule("2. pretraining")
    shared = ["--report_to", "none", "--seed", str(args.seed), "--save_strategy", "no", "--logging_steps", "50"]
    shared += ["--use_cpu", "True", "--lr_scheduler_type", "linear", "--optim", "adamw_torch_fused"]
    shared += ["--per_device_eval_batch_size", "32", "--dataloader_pin_memory", "False"]
    pretraining = pretrain.main(
        ["--preset", "nano", "--tokenizer", path["tokenizer"], "--output_dir", path["pretrained"]]
        + ["--train_data", files["train"], "--validation_data", files["validation"], "--max_length", "128"]
        + ["--per_device_train_batch_size", "8", "--max_steps", str(args.max_steps), "--warmup_steps", "0.1"]
        + ["--learning_rate", "3e-3", "--weight_decay", "0.01", *shared]
    )

    console.rule("3. fine-tuning: original or disturbed word order?")
    task = ["--validation_files", files["order_validation"], "--max_length", "64", *shared]
    routed = run_glue.main(
        ["--model_name_or_path", path["pretrained"], "--output_dir", path["classifier"], "--do_train"]
        + ["--train_files", files["order_train"], "--num_train_epochs", "2", "--per_device_train_batch_size", "32"]
        + ["--learning_rate", "5e-4", "--warmup_steps", "0.1", *task]
    )

    console.rule("4. merging and export")
    for name in ("pretrained", "classifier"):
        merge_experts.main(["--model_name_or_path", path[name], "--output_dir", path[f"{name}-merged"]])
    merged = run_glue.main(
        ["--model_name_or_path", path["classifier-merged"], "--output_dir", path["merged-results"], *task]
    )

    console.rule("5. a fresh process without the package")
    folders = [str(Path(path[name]).resolve()) for name in ("pretrained-merged", "classifier-merged")]
    reloaded = json.loads(run_fresh(RELOAD, json.dumps([*folders, MASKED])).splitlines()[-1])
    for sentence, guesses in zip(MASKED, reloaded["filled"], strict=True):
        console.print(f"{sentence.replace('[MASK]', '____')}  ", end="", highlight=False)
        console.print(", ".join(f"{token.strip()} ({score:.0%})" for token, score in guesses), highlight=False)

    labels = [json.loads(line)["label"] for line in open(files["order_validation"], encoding="utf-8")]
    figures = {
        "masked-LM loss at the start": pretraining["eval_loss_start"],
        "masked-LM loss of a unigram model": unigram_loss(files, tokenizer),
        "masked-LM loss at the end": pretraining["eval_loss"],
        "accuracy of the majority": max(Counter(labels).values()) / len(labels),
        "accuracy routed": routed["scores"]["accuracy"],
        "accuracy merged": merged["scores"]["accuracy"],
        "parameters": pretraining["parameters"],
        "seconds": time.perf_counter() - start,
    }
    write_json(folder / "results.json", figures)
    table = Table(title="quickstart", title_justify="left", show_header=False)
    for name, value in figures.items():
        table.add_row(name, f"{value:.3f}" if value < 100 else f"{value:,.0f}")
    for name in ("tokenizer", "pretrained", "pretrained-merged", "classifier", "classifier-merged"):
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
