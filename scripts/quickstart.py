"""What `modernalbert-nano` and `modernalbert-nano-embed` are for, without network.

    python scripts/quickstart.py --output_dir runs/quickstart

It takes two to three minutes on two cores, about six where these lack AVX512. It fills in masks, and searches the
language reference that every Python carries. Fine-tunes `modernalbert-nano` to tell which part of the standard
library a docstring describes, beside TF-IDF on the same rows; merges the experts, with a report on what that costs;
and lets a fresh process that has no `modernalbert` package load the result. Each step runs the script of that name in
this folder.
"""

import ast
import json
import random
import re
import shutil
import sysconfig
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import merge_experts
import run_glue
import transformers
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer
from transformers import pipeline

import modernalbert  # noqa: F401  (registers the Auto classes)
from modernalbert.training.cli import Count, Seed, emulates_bf16, parse_arguments, run_script
from modernalbert.training.export.folder import run_fresh
from modernalbert.training.runs import write_json


CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
MASKED = [
    "The capital of France is [MASK].",
    "She opened the [MASK] and walked into the garden.",
    "Plants take carbon dioxide from the [MASK].",
]
QUESTIONS = [
    "How do I leave a loop early?",
    "What happens when a name is not defined?",
    "Which methods make an object behave like a dictionary?",
]

# Parts of the standard library, by their modules.
AREAS = {
    "internet": "email ftplib html http imaplib ipaddress mailbox poplib smtplib socket socketserver ssl urllib xmlrpc",
    "concurrency": "asyncio concurrent multiprocessing queue sched selectors subprocess threading",
    "testing": "bdb cProfile cmd code doctest pdb profile pstats timeit trace traceback tracemalloc unittest",
    "numbers": "_pydatetime _pydecimal calendar colorsys datetime decimal fractions numbers random statistics",
    "files": "_pyio bz2 dbm filecmp fileinput fnmatch glob gzip io lzma os pathlib shelve shutil tarfile tempfile zipfile",
    "graphics": "curses tkinter turtle turtledemo",
    "formats": "argparse base64 codecs configparser csv encodings json locale logging pickle plistlib re string textwrap xml",
    "packaging": "distutils ensurepip importlib inspect modulefinder pkgutil pydoc runpy site sysconfig typing venv zipapp",
}

# What a user of the exported folder does.
RELOAD = """
import json, sys
from transformers import pipeline
judge = pipeline("text-classification", model=sys.argv[1], trust_remote_code=True)
print(json.dumps([answer["label"] for answer in judge(json.loads(sys.argv[2]))]))
"""
MARK = ".quickstart"  # lies in a folder that this script made


OUTPUT_DIR = {"help": "Folder that receives everything; new, or of an earlier run of this script, which is removed."}
SEED = {"help": "Seed of everything random."}


@dataclass
class QuickstartArguments:
    """Where to, and how much."""

    output_dir: str = field(default="runs/quickstart", metadata=OUTPUT_DIR)
    rows: Count = field(default=100, metadata={"help": "Docstrings of each class to fine-tune on."})
    seed: Seed = field(default=0, metadata=SEED)


def read_docstrings() -> Iterator[tuple[str, str]]:
    """Module of the standard library, and a docstring in it."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield Path(parts[0]).stem, ast.get_docstring(node) or ""


def read_topics() -> list[str]:
    """Entries of the language reference."""
    from pydoc_data.topics import topics

    return list(topics.values())


def split_paragraphs(document: str) -> list[str]:
    """Paragraphs of some length, whitespace collapsed."""
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", document))
    return [paragraph for paragraph in paragraphs if len(paragraph) > 40]


def write_rows(path: Path, rows: Sequence[dict]) -> str:
    """One JSON object a line; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_task(folder: Path, rows: int, seed: int) -> dict[str, str]:
    """Files of the classification: `rows` docstrings of each class to train on, 100 others to validate on."""
    area_of = {module: area for area, modules in AREAS.items() for module in modules.split()}
    texts = defaultdict(dict)  # of each class, without those of another
    seen = {}
    for module, document in read_docstrings():
        for text in split_paragraphs(document):
            if module in area_of and seen.setdefault(text, area_of[module]) == area_of[module]:
                texts[area_of[module]][text] = None
    rng = random.Random(seed)
    parts = {"train": [], "validation": []}
    for area in AREAS:
        drawn = rng.sample(list(texts[area]), min(rows + 100, len(texts[area])))
        parts["validation"] += [{"text": text, "label": area} for text in drawn[:100]]
        parts["train"] += [{"text": text, "label": area} for text in drawn[100:]]
    return {name: write_rows(folder / f"{name}.jsonl", part) for name, part in parts.items()}


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
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    folder = Path(args.output_dir)
    make_folder(folder)
    nano, embedder = (str(CHECKPOINTS / name) for name in ("modernalbert-nano", "modernalbert-nano-embed"))

    console.rule("1. modernalbert-nano fills in masks")
    fill = pipeline("fill-mask", model=nano)
    for sentence in MASKED:
        guesses = ", ".join(f"{guess['token_str']} ({guess['score']:.0%})" for guess in fill(sentence, top_k=3))
        console.print(f"{sentence.replace('[MASK]', '____')}  {guesses}", highlight=False)

    console.rule("2. modernalbert-nano-embed searches Python's language reference")
    model = SentenceTransformer(embedder, device="cpu")
    paragraphs = [paragraph for topic in read_topics() for paragraph in split_paragraphs(topic)]
    paragraphs = random.Random(args.seed).sample(list(dict.fromkeys(paragraphs)), 1000)
    documents = model.encode(paragraphs, batch_size=64)
    best = model.similarity(model.encode(QUESTIONS), documents).max(dim=1)
    for question, score, index in zip(QUESTIONS, best.values.tolist(), best.indices.tolist(), strict=True):
        console.print(f"{question}\n    {score:.2f}  {paragraphs[index][:90]}", highlight=False)

    console.rule("3. fine-tuning: which part of the standard library?")
    files = write_task(folder, args.rows, args.seed)
    shared = ["--report_to", "none", "--use_cpu", "True", "--dataloader_pin_memory", "False", "--max_length", "96"]
    shared += ["--validation_files", files["validation"], "--per_device_eval_batch_size", "64"]
    shared += ["--bf16", str(not emulates_bf16())]
    routed = run_glue.main(
        ["--model_name_or_path", nano, "--output_dir", str(folder / "classifier"), "--do_train", "--baselines", "True"]
        + ["--train_files", files["train"], "--num_train_epochs", "4", "--per_device_train_batch_size", "16"]
        + [
            "--learning_rate",
            "5e-4",
            "--warmup_steps",
            "0.1",
            "--save_strategy",
            "no",
            "--seed",
            str(args.seed),
            *shared,
        ]
    )

    console.rule("4. merging the experts")
    merge_experts.main(
        ["--model_name_or_path", str(folder / "classifier"), "--output_dir", str(folder / "merged")]
        + ["--method", "regression", "--compare", "uniform", "drop", "--calibration_data", files["train"]]
        + ["--validation_data", files["validation"], "--max_length", "96"]
    )
    merged = run_glue.main(
        ["--model_name_or_path", str(folder / "merged"), "--output_dir", str(folder / "merged-results"), *shared]
    )

    console.rule("5. a fresh process without the package")
    texts = ["Send a request and read the response.", "Acquire the lock, blocking until it is free."]
    answers = json.loads(run_fresh(RELOAD, str((folder / "merged").resolve()), json.dumps(texts)).splitlines()[-1])
    for text, answer in zip(texts, answers, strict=True):
        console.print(f"{text}  {answer}", highlight=False)

    baselines = routed["details"]["baselines"]
    figures = {
        "accuracy of the majority": baselines["majority"]["accuracy"],
        "accuracy of TF-IDF": baselines["TF-IDF"]["accuracy"],
        "accuracy of modernalbert-nano": routed["scores"]["accuracy"],
        "accuracy, experts merged": merged["scores"]["accuracy"],
        "megabytes of the checkpoint": (CHECKPOINTS / "modernalbert-nano" / "model.safetensors").stat().st_size / 1e6,
        "seconds": time.perf_counter() - start,
    }
    write_json(folder / "results.json", figures)
    table = Table(title="quickstart", title_justify="left", show_header=False)
    for name, value in figures.items():
        table.add_row(name, f"{value:.3f}" if value < 1 else f"{value:.1f}")
    for name in ("classifier", "merged"):
        table.add_row(name, str(folder / name))
    console.print(table)
    return figures


if __name__ == "__main__":
    run_script(main)
