"""What merging experts costs: routed models against every merging method, before and after fine-tuning.

    python benchmarks/merging.py --models runs/a runs/b runs/c --tasks tasks.json --train_data "prose/train-*.parquet" \
        --validation_data prose/validation.parquet --output_dir runs/benchmark-merging

`--models` are routed masked language models that differ by their seed. For each of them: masked-LM loss of the routed
model and of every merge of it (with `--distil`, for models that learned the states of an encoder: 1 - cosine to them, of tokens
plus that of pooled texts), and for each task the metric of the routed classifier, of every merge of that classifier
(fine-tune, then merge), and of classifiers that were fine-tuned from merged models (merge, then fine-tune). Calibration
text is the task's own training text, and `--train_data` for masked-LM. `tasks.json` maps a name to the arguments of
`scripts/run_glue.py`: `{"sst2": {"train_files": [...], "validation_files": [...], "text_columns": ["sentence"]}}`.

The command can be given again: a job that has ended is kept. Writes `merging.json` and a Markdown table.
"""

import copy
import json
import shutil
import statistics
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from common import (
    LENGTH,
    MASKED,
    bind_folder,
    count,
    fine_tune,
    format_table,
    limit_rows,
    read_tasks,
    run_jobs,
    start_script,
)
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from modernalbert import ModernAlbertForMaskedLM
from modernalbert.mixture_modernalbert import ModernAlbertExperts
from modernalbert.training.alignment import pack_sequences, same_tokenizer
from modernalbert.training.callbacks import ROUTING_NAME, read_routing_weights
from modernalbert.training.cli import run_script
from modernalbert.training.data import load_texts, read_rows
from modernalbert.training.distillation import EncoderDistiller, Teacher
from modernalbert.training.evaluation.metrics import score_model
from modernalbert.training.export.embedder import read_projection
from modernalbert.training.packing import PackedCollator, TokenMasker, mask_rows, pack_texts
from modernalbert.training.reports.merging import recovered_share
from modernalbert.training.runs import write_json, write_text


METHODS = {
    "drop": {"method": "drop"},
    "uniform": {"method": "uniform"},
    "ema": {"method": "ema"},
    "svd": {"method": "svd"},
    "cat": {"method": "cat"},
    "frequency": {"method": "frequency"},
    "regression": {"method": "regression"},
    "regression, experts' rank": {"method": "regression", "fold": False},
    "cluster to 4": {"method": "cluster", "num_experts": 4},
    "cluster to 2": {"method": "cluster", "num_experts": 2},
}
BEFORE = ("drop", "uniform", "svd", "cat", "regression")  # methods to fine-tune from, beside routed


def methods_for(model: PreTrainedModel) -> list[str]:
    """Routed, and every method that a model can be merged by."""
    experts, known = model.config.num_experts, (Path(model.name_or_path) / ROUTING_NAME).exists()
    fits = {
        name: fields.get("num_experts", 0) < experts and (known or name != "ema") for name, fields in METHODS.items()
    }
    return ["routed", *(name for name in METHODS if fits[name])]


def merge(model: PreTrainedModel, name: str, batches: list[dict]) -> PreTrainedModel:
    """A merged copy, `ema` with what training wrote into the model's folder; `routed` is the model itself."""
    if name == "routed":
        return model
    weights = read_routing_weights(Path(model.name_or_path) / ROUTING_NAME, model.config) if name == "ema" else None
    return copy.deepcopy(model).merge_experts(batches=batches, weights=weights, **METHODS[name])


def text_batches(
    tokenizer, sources: list[str], rows: int, pack: Callable, masker: TokenMasker | None = None
) -> list[dict]:
    """Batches of packed rows; with a masker, with fixed masks and labels."""
    texts = load_texts(sources)
    packed = pack(texts.select(range(min(len(texts), 50 * rows))), tokenizer, max_length=LENGTH)
    packed = packed.select(range(min(rows, len(packed))))
    if masker is not None:
        packed = mask_rows(packed, masker)
    collate = PackedCollator(tokenizer, LENGTH)
    return [collate(packed.select(range(i, min(i + 32, len(packed)))).to_list()) for i in range(0, len(packed), 32)]


@torch.no_grad()
def distillation_losses(args: Namespace, folder: str) -> dict[str, float]:
    """The loss that `scripts/pretrain.py` measures on clean text, of the routed model and of every merge."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not same_tokenizer(tokenizer, AutoTokenizer.from_pretrained(args.distil)):
        raise ValueError(f"'{folder}' and '{args.distil}' have different tokenizers: their tokens cannot be compared")
    routed = ModernAlbertForMaskedLM.from_pretrained(folder).eval()
    distiller = EncoderDistiller(Teacher(args.distil), routed)
    learned = read_projection(folder)
    if learned is None or distiller.projection is not distiller.pooled_projection:
        raise ValueError(f"'{folder}' has no projection to the states of '{args.distil}'; was it distilled from it?")
    distiller.projection.load_state_dict(learned.state_dict())
    distiller.remove_heads(routed)

    pack = partial(pack_sequences, teacher_tokenizer=None, teacher_length=distiller.teacher.max_length)
    calibration = text_batches(tokenizer, args.train_data, args.calibration_rows, pack)
    validation = text_batches(tokenizer, args.validation_data, args.validation_rows, pack)
    answers = [distiller.ask({**batch, "clean_ids": batch["input_ids"]}) for batch in validation]
    counts = torch.tensor([EncoderDistiller.count(batch) for batch in validation]).sum(dim=0).tolist()
    losses = {}
    for name in methods_for(routed):
        encoder = merge(routed, name, calibration).model
        terms = [
            distiller(batch, encoder(**batch, output_hidden_states=True), *counts, answer)
            for batch, answer in zip(validation, answers, strict=True)
        ]
        losses[name] = sum(value.item() for own in terms for value in own.values())
    return losses


def masked_lm_losses(args: Namespace, folder: str) -> dict[str, float]:
    """Nats for each masked token, of the routed model and of every merge."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    masker = TokenMasker(tokenizer, MASKED)
    calibration = text_batches(tokenizer, args.train_data, args.calibration_rows, pack_texts, masker)
    validation = text_batches(tokenizer, args.validation_data, args.validation_rows, pack_texts, masker)
    routed = ModernAlbertForMaskedLM.from_pretrained(folder).eval()
    losses = {}
    for name in methods_for(routed):
        model = merge(routed, name, calibration)
        model.config.sparse_prediction = True
        losses[name] = score_model(model, validation)["loss"]
    return losses


def task_scores(args: Namespace, folder: str, task: dict, output_dir: Path, seed: int) -> dict[str, dict[str, float]]:
    """Scores by order and method. `output_dir` holds what the job writes."""
    output_dir.mkdir(parents=True, exist_ok=True)
    task = limit_rows(args, task, output_dir)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(files: list[str], limit: int | None) -> list[dict]:
        rows = read_rows(files)
        rows = rows.select(range(min(limit or len(rows), len(rows))))
        batches = []
        for part in rows.batch(64):
            texts = (part[column] for column in task["text_columns"])
            batch = tokenizer(*texts, truncation=True, max_length=96, padding=True, return_tensors="pt")
            batches.append({**batch, "labels": torch.tensor(part[task.get("label_column", "label")])})
        return batches

    calibration = encode(task["train_files"], 512)
    validation = encode(task["validation_files"], None)
    metrics = ("pearson",) if validation[0]["labels"].is_floating_point() else ("accuracy",)

    def score(model: PreTrainedModel) -> float:
        return score_model(model, validation, metrics)[metrics[0]]

    fine_tune(folder, task, output_dir / "routed", seed, args.epochs)
    routed = AutoModelForSequenceClassification.from_pretrained(output_dir / "routed").eval()
    after = {name: score(merge(routed, name, calibration)) for name in methods_for(routed)}
    before = {"routed": after["routed"]}
    for name in BEFORE:
        merged = merge(ModernAlbertForMaskedLM.from_pretrained(folder), name, calibration)
        start = output_dir / "merged"
        merged.save_pretrained(start)
        tokenizer.save_pretrained(start)
        shutil.rmtree(output_dir / "tuned", ignore_errors=True)  # of another method
        fine_tune(start, task, output_dir / "tuned", seed, args.epochs)
        tuned = AutoModelForSequenceClassification.from_pretrained(output_dir / "tuned").eval()
        before[name] = score(tuned)
    return {"fine-tune, then merge": after, "merge, then fine-tune": before}


@torch.no_grad()
def compare_experts(folder: str) -> tuple[float, float]:
    """Of the products `B_e A_e`, means over layers and projections: cosine of two, and norm of the mean to that of one."""
    cosines, norms = [], []
    for module in ModernAlbertForMaskedLM.from_pretrained(folder).modules():
        if isinstance(module, ModernAlbertExperts):
            for A, B in ((module.in_A, module.in_B), (module.out_A, module.out_B)):
                products = (B @ A).flatten(1)  # [E, out * in]
                norms.append((products.mean(dim=0).norm() / products.norm(dim=1).mean()).item())
                units = F.normalize(products, dim=1)
                pairs = len(units) * (len(units) - 1)
                cosines.append((((units @ units.T).sum() - len(units)) / pairs).item())
    return statistics.mean(cosines), statistics.mean(norms)


def run_job(args: Namespace, seed: int, name: str) -> None:
    """Writes the figures of one model on one task, or its losses on text (`text`)."""
    folder = args.models[seed]
    if name == "text":
        result = (distillation_losses if args.distil else masked_lm_losses)(args, folder)
    else:
        result = task_scores(
            args,
            folder,
            read_tasks(args.tasks, "train_files", "validation_files", "text_columns")[name],
            args.output_dir / f"{seed}-{name}",
            seed,
        )
    write_json(args.output_dir / f"{seed}-{name}.json", result)


def format_cell(own: list[float], routed: list[float], scale: float, digits: int) -> str:
    """Mean over the models, and the paired difference to the routed model with its standard error."""
    differences = [scale * (a - b) for a, b in zip(own, routed, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0
    mean = scale * statistics.mean(own)
    return f"{mean:.{digits}f} ({statistics.mean(differences):+.{digits}f} ± {error:.{digits}f})"


def summarise(args: Namespace, tasks: list[str]) -> None:
    """Writes and prints the tables."""
    seeds = range(len(args.models))
    names = {(seed, name): f"{seed}-{name}" for seed in seeds for name in ("text", *tasks)}
    read = {key: json.loads((args.output_dir / f"{name}.json").read_text()) for key, name in names.items()}
    rows = []
    for name in ("routed", *METHODS):
        found = [
            read[seed, "text"] for seed in seeds if name in read[seed, "text"]
        ]  # `ema` needs a file of the training
        if not found:
            continue
        shares = [recovered_share(*({"loss": own[kind]} for kind in ("routed", name, "drop"))) for own in found]
        title = name if len(found) == len(seeds) else f"{name}, {len(found)} of {len(seeds)} models"
        cell = format_cell([own[name] for own in found], [own["routed"] for own in found], 1, 4)
        rows.append([title, cell, "" if None in shares else f"{statistics.mean(shares):.0%}"])
    loss = "distillation loss" if args.distil else "masked-LM loss"
    tables = [format_table(["method", loss, "recovered"], rows)]
    for order, methods in (("fine-tune, then merge", METHODS), ("merge, then fine-tune", BEFORE)) if tasks else ():

        def scores(task, name, order=order):
            return [read[seed, task][order][name] for seed in seeds]

        rows = [
            [name, *(format_cell(scores(task, name), scores(task, "routed"), 100, 1) for task in tasks)]
            for name in ("routed", *methods)
            if all(name in read[seed, task][order] for seed in seeds for task in tasks)
        ]
        tables.append(format_table([order, *tasks], rows))
    cosines, norms = (statistics.mean(values) for values in zip(*map(compare_experts, args.models), strict=True))
    tables.append(
        f"Corrections of two experts: cosine {cosines:.3f}; norm of their mean to that of one: {norms:.3f}.\n"
    )
    text = "\n\n".join(tables)
    write_text(args.output_dir / "merging.md", text)
    figures = {name: read[key] for key, name in names.items()}
    write_json(args.output_dir / "merging.json", figures)
    print(text)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--tasks", help="JSON file, see above")
    parser.add_argument("--distil", help="encoder or SentenceTransformer that the models were distilled from")
    parser.add_argument("--train_data", nargs="+", required=True, help="text to calibrate on")
    parser.add_argument("--validation_data", nargs="+", required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmark-merging"))
    parser.add_argument("--calibration_rows", type=count, default=256)
    parser.add_argument("--validation_rows", type=count, default=512)
    parser.add_argument("--train_rows", type=count, default=4000)
    parser.add_argument("--validation_examples", type=count, default=2000)
    parser.add_argument("--epochs", type=count, default=3)
    parser.add_argument("--processes", type=count, default=2, help="jobs at a time, one thread each")
    parser.add_argument("--job", nargs=2, help="run one job, SEED NAME, in this process")
    args = parser.parse_args(argv)
    if args.job:
        return run_job(args, int(args.job[0]), args.job[1])
    tasks = read_tasks(args.tasks, "train_files", "validation_files", "text_columns")
    bind_folder(args, tasks, models=args.models + ([args.distil] if args.distil else []))

    def start(seed: int, name: str) -> None:
        if not (args.output_dir / f"{seed}-{name}.json").exists():
            start_script(__file__, *sys.argv[1:], "--job", str(seed), name)

    run_jobs(args.processes, start, [(seed, name) for name in ("text", *tasks) for seed in range(len(args.models))])
    summarise(args, list(tasks))


if __name__ == "__main__":
    run_script(main)
