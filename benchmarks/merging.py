"""What merging experts costs: routed models against every merging method, before and after fine-tuning.

    python benchmarks/merging.py --models runs/a runs/b runs/c --tasks tasks.json --train_data "prose/train-*.parquet" \
        --validation_data prose/validation.parquet --output_dir runs/benchmark-merging

`--models` are routed masked language models that differ by their seed. For each of them: masked-LM loss of the routed
model and of every merge of it, and for each task the metric of the routed classifier, of every merge of that classifier
(fine-tune, then merge), and of classifiers that were fine-tuned from merged models (merge, then fine-tune). Calibration
text is the task's own training text, and `--train_data` for masked-LM. `tasks.json` maps a name to the arguments of
`scripts/run_glue.py`: `{"sst2": {"train_files": [...], "validation_files": [...], "text_columns": ["sentence"]}}`.

A job that has ended is not repeated. Writes `merging.json` and a Markdown table.
"""

import copy
import json
import os
import shutil
import statistics
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from evaluation import to_flags
from pretraining import run
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from modernalbert import ModernAlbertForMaskedLM
from modernalbert.mixture_modernalbert import ModernAlbertExperts
from modernalbert.training.callbacks import ROUTING_NAME
from modernalbert.training.data import PackedCollator, TokenMasker, load_files, load_texts, mask_rows, pack_texts
from modernalbert.training.reports.merging import evaluate, read_routing_weights
from modernalbert.training.runs import write_text


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


def merge(model: PreTrainedModel, name: str, batches: list[dict]) -> PreTrainedModel:
    """A merged copy, `ema` with what training wrote into the model's folder; `routed` is the model itself."""
    if name == "routed":
        return model
    weights = read_routing_weights(Path(model.name_or_path) / ROUTING_NAME, model.config) if name == "ema" else None
    return copy.deepcopy(model).merge_experts(batches=batches, weights=weights, **METHODS[name])


def packed_batches(args: Namespace, tokenizer, sources: list[str], rows: int, masked: bool) -> list[dict]:
    """Batches of packed rows of 128 tokens, with fixed masks and labels if `masked`."""
    texts = load_texts(sources)
    packed = pack_texts(texts.select(range(min(len(texts), 50 * rows))), tokenizer, 128)
    packed = packed.select(range(min(rows, len(packed))))
    if masked:
        packed = mask_rows(packed, TokenMasker(tokenizer, 0.3))
    collate = PackedCollator(tokenizer, 128)
    return [
        collate([packed[i] for i in range(start, min(start + 32, len(packed)))]) for start in range(0, len(packed), 32)
    ]


def masked_lm_losses(args: Namespace, folder: str) -> dict[str, float]:
    """Nats for each masked token, of the routed model and of every merge."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    calibration = packed_batches(args, tokenizer, args.train_data, args.calibration_rows, masked=True)
    validation = packed_batches(args, tokenizer, args.validation_data, args.validation_rows, masked=True)
    routed = ModernAlbertForMaskedLM.from_pretrained(folder).eval()
    losses = {}
    for name in ("routed", *METHODS):
        if name == "ema" and not (Path(folder) / ROUTING_NAME).exists():
            continue
        model = merge(routed, name, calibration)
        model.config.sparse_prediction = True
        losses[name] = evaluate(model, validation)["loss"]
    return losses


def fine_tune(args: Namespace, model: str | Path, task: dict, output_dir: Path, seed: int) -> float:
    """Runs `scripts/run_glue.py`; returns its first metric."""
    run(
        "run_glue",
        *("--model_name_or_path", str(model), "--output_dir", str(output_dir)),
        *("--do_train", "--learning_rate", "5e-4"),
        *("--per_device_train_batch_size", "32", "--per_device_eval_batch_size", "64"),
        *("--num_train_epochs", str(args.epochs), "--warmup_steps", "0.1", "--max_length", "96", "--seed", str(seed)),
        *("--save_strategy", "no", "--report_to", "none", "--use_cpu", "true", "--disable_tqdm", "true"),
        *("--dataloader_pin_memory", "false", *to_flags(task)),
    )
    return next(iter(json.loads((output_dir / "results.json").read_text())["scores"].values()))


def cut(task: dict, folder: Path, args: Namespace) -> dict:
    """The task with at most so many rows, drawn with a fixed seed."""
    cut = dict(task)
    for name, rows in (("train_files", args.train_rows), ("validation_files", args.validation_examples)):
        texts = load_files(task[name])
        path = folder / f"{name}.parquet"
        texts.shuffle(seed=0).select(range(min(rows, len(texts)))).to_parquet(path)
        cut[name] = [str(path)]
    return cut


def task_scores(args: Namespace, folder: str, task: dict, output_dir: Path, seed: int) -> dict[str, dict[str, float]]:
    """Scores by order and method. `output_dir` holds what the job writes."""
    output_dir.mkdir(parents=True, exist_ok=True)
    task = cut(task, output_dir, args)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(files: list[str], limit: int | None) -> list[dict]:
        rows = load_files(files)
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
        return evaluate(model, validation, metrics)[metrics[0]]

    fine_tune(args, folder, task, output_dir / "routed", seed)
    routed = AutoModelForSequenceClassification.from_pretrained(output_dir / "routed").eval()
    after = {name: score(merge(routed, name, calibration)) for name in ("routed", *METHODS)}
    before = {"routed": after["routed"]}
    for name in BEFORE:
        merged = merge(ModernAlbertForMaskedLM.from_pretrained(folder), name, calibration)
        start = output_dir / "merged"
        merged.save_pretrained(start)
        tokenizer.save_pretrained(start)
        shutil.rmtree(output_dir / "tuned", ignore_errors=True)  # of another method
        fine_tune(args, start, task, output_dir / "tuned", seed)
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
    folder = args.models[seed]
    path = args.output_dir / f"{seed}-{name}.json"
    if name == "mlm":
        result = masked_lm_losses(args, folder)
    else:
        task = json.loads(Path(args.tasks).read_text())[name]
        result = task_scores(args, folder, task, args.output_dir / f"{seed}-{name}", seed)
    write_text(path, json.dumps(result, indent=1))


def summarise(args: Namespace, tasks: list[str]) -> None:
    """Prints the tables: means over the models, and the paired difference to routed with its standard error."""
    read = {
        (seed, name): json.loads((args.output_dir / f"{seed}-{name}.json").read_text())
        for seed in range(len(args.models))
        for name in ("mlm", *tasks)
    }
    seeds = range(len(args.models))

    def to_cells(title: str, values: list[list[float]], routed: list[list[float]], scale: float, digits: int) -> str:
        cells = []
        for own, reference in zip(values, routed, strict=True):
            differences = [scale * (a - b) for a, b in zip(own, reference, strict=True)]
            error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0
            mean = scale * statistics.mean(own)
            cells.append(f"{mean:.{digits}f} ({statistics.mean(differences):+.{digits}f} ± {error:.{digits}f})")
        return f"| {title} | " + " | ".join(cells) + " |"

    lines = ["| method | masked-LM loss | recovered |", "|---|---|---|"]
    for name in ("routed", *METHODS):
        rows = [read[seed, "mlm"] for seed in seeds if name in read[seed, "mlm"]]  # `ema` needs a file of the training
        if not rows:
            continue
        share = statistics.mean((row["drop"] - row[name]) / (row["drop"] - row["routed"]) for row in rows)
        title = name if len(rows) == len(seeds) else f"{name}, {len(rows)} of {len(seeds)} models"
        cells = to_cells(title, [[row[name] for row in rows]], [[row["routed"] for row in rows]], 1, 4)
        lines.append(cells + f" {share:.0%} |")
    for order, names in (("fine-tune, then merge", METHODS), ("merge, then fine-tune", BEFORE)):
        lines += ["", f"| {order} | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
        routed = [[read[seed, task][order]["routed"] for seed in seeds] for task in tasks]
        for name in ("routed", *names):
            values = [[read[seed, task][order][name] for seed in seeds] for task in tasks]
            lines.append(to_cells(name, values, routed, 100, 1))
    cosines, norms = (statistics.mean(values) for values in zip(*map(compare_experts, args.models), strict=True))
    lines += ["", f"Corrections of two experts: cosine {cosines:.3f}; norm of their mean to that of one: {norms:.3f}."]
    text = "\n".join(lines) + "\n"
    write_text(args.output_dir / "merging.md", text)
    write_text(
        args.output_dir / "merging.json", json.dumps({f"{s}-{n}": value for (s, n), value in read.items()}, indent=1)
    )
    print(text)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--tasks", help="JSON file, see above")
    parser.add_argument("--train_data", nargs="+", required=True, help="calibration text for masked-LM")
    parser.add_argument("--validation_data", nargs="+", required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmark-merging"))
    parser.add_argument("--calibration_rows", type=int, default=256)
    parser.add_argument("--validation_rows", type=int, default=512)
    parser.add_argument("--train_rows", type=int, default=4000)
    parser.add_argument("--validation_examples", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2, help="jobs at a time, one thread each")
    parser.add_argument("--job", nargs=2, help="run one job, SEED NAME, in this process")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    if args.job:
        run_job(args, int(args.job[0]), args.job[1])
        return
    tasks = list(json.loads(Path(args.tasks).read_text())) if args.tasks else []

    def start(seed: int, name: str) -> None:
        if not (args.output_dir / f"{seed}-{name}.json").exists():
            command = [sys.executable, *sys.argv, "--job", str(seed), name]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})

    with ThreadPoolExecutor(args.processes) as pool:
        jobs = [pool.submit(start, seed, name) for name in ("mlm", *tasks) for seed in range(len(args.models))]
        for job in jobs:
            job.result()
    summarise(args, tasks)


if __name__ == "__main__":
    main()
