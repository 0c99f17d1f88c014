"""One set of weights at every depth: tasks fine-tuned with and without `--elastic_depth`, and the time of each depth.

    python benchmarks/depth.py --model checkpoints/modernalbert-nano --tasks benchmarks/tasks.json --only sst2 stsb \
        --learning_rate 5e-4 --output_dir runs/depth

Each task of `tasks.json` (see `benchmarks/evaluation.py`) is fine-tuned twice with every seed, and each of these models is
scored at every depth that its groups can run. Times are medians of interleaved turns in fp32, with the head, without
tokenisation; ratios are to the full depth. The command can be given again: runs that have ended are kept. Output is Markdown,
`depth.json` has the figures.
"""

from argparse import ArgumentParser
from pathlib import Path
from statistics import mean, median, stdev

import torch
from common import (
    count,
    describe_machine,
    format_table,
    interleave,
    make_batches,
    positive,
    ratio,
    read_tasks,
    run_jobs,
    start_script,
    to_flags,
)
from transformers import AutoConfig, AutoModelForSequenceClassification

import modernalbert  # noqa: F401  (registers the Auto classes)
from modernalbert.training.cli import run_script
from modernalbert.training.runs import read_json, write_json


KINDS = {"full depth alone": False, "elastic": True}
TRAINING = (
    "do_train",
    "num_train_epochs",
    "max_steps",
    "warmup_steps",
    "max_train_samples",
    "save_strategy",
    "baselines",
)


def trained_models(folder: Path) -> list[Path]:
    """Folder of each seed."""
    return sorted(folder.glob("seed-*")) or [folder]


def time_depths(model: str, depths: list[int], repeats: int) -> dict[str, dict[int, dict[str, float]]]:
    """Milliseconds of each depth and their ratio to the last, by batch."""
    classifier = AutoModelForSequenceClassification.from_pretrained(model, dtype="float32").eval()
    times = {}
    for name, batch in make_batches(8, min(128, classifier.config.max_position_embeddings)).items():
        batch["input_ids"] %= classifier.config.vocab_size
        with torch.inference_mode():
            found = interleave(
                {
                    depth: lambda depth=depth, batch=batch: classifier(**batch, num_hidden_layers=depth)
                    for depth in depths
                },
                repeats,
                name,
            )
        times[name] = {
            depth: {"milliseconds": 1e3 * median(found[depth]), "ratio": ratio(found[depth], found[depths[-1]])}
            for depth in depths
        }
    return times


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder or Hub name of a ModernALBERT")
    parser.add_argument("--tasks", required=True, help="JSON file, see `benchmarks/evaluation.py`")
    parser.add_argument("--only", nargs="+", required=True, help="names of tasks of run_glue.py")
    parser.add_argument("--learning_rate", type=positive, required=True)
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--repeats", type=count, default=15, help="turns of the timing")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/depth"))
    parser.add_argument("--processes", type=count, default=2, help="runs at a time, one thread each")
    args = parser.parse_args(argv)
    tasks = read_tasks(args.tasks, "script")
    common = tasks.pop("*", {})
    for name in args.only:
        if tasks.get(name, {}).get("script") != "run_glue":
            parser.error(f"'{args.tasks}' has no task '{name}' of run_glue")
    config = AutoConfig.from_pretrained(args.model)
    if config.model_type != "modernalbert" or config.num_hidden_layers == config.num_hidden_groups:
        parser.error(f"'{args.model}' must be a ModernALBERT whose groups run several times")
    depths = list(range(config.num_hidden_groups, config.num_hidden_layers + 1, config.num_hidden_groups))

    def folder_of(name: str, kind: str) -> Path:
        return args.output_dir / name / kind.replace(" ", "-")

    def scored_folder(folder: Path, model: Path, depth: int) -> Path:
        """Where the scores of a trained model lie: its own folder for the full depth."""
        full = depth == depths[-1]
        return model if full else folder.with_name(f"{folder.name}-{depth}-layers") / model.name

    def run(name: str, kind: str) -> None:
        settings = {**common, **tasks[name]}
        script = settings.pop("script")
        folder = folder_of(name, kind)
        training = {"model_name_or_path": args.model, "seeds": args.seeds, "elastic_depth": KINDS[kind]}
        training |= {"learning_rate": args.learning_rate, "output_dir": str(folder)}
        start_script(script, *to_flags(settings | training))
        scoring = {key: value for key, value in settings.items() if key not in TRAINING}
        for model in trained_models(folder):
            for depth in depths[:-1]:
                scored = {"model_name_or_path": str(model), "num_hidden_layers": depth}
                scored["output_dir"] = str(scored_folder(folder, model, depth))
                start_script(script, *to_flags(scoring | scored))

    run_jobs(args.processes, run, [(name, kind) for name in args.only for kind in KINDS])
    figures = {"machine": describe_machine(), "scores": {}, "times": time_depths(args.model, depths, args.repeats)}
    rows = {depth: [f"{depth} layers"] for depth in depths}
    header = [""]
    for name in args.only:
        for kind in KINDS:
            folder = folder_of(name, kind)
            header.append(f"{name}, {kind}")
            for depth in depths:
                folders = [scored_folder(folder, model, depth) for model in trained_models(folder)]
                found = [100 * next(iter(read_json(path / "results.json")["scores"].values())) for path in folders]
                figures["scores"].setdefault(name, {}).setdefault(kind, {})[depth] = found
                spread = f" ± {stdev(found):.1f}" if len(found) > 1 else ""
                rows[depth].append(f"{mean(found):.1f}{spread}")
    for batch, times in figures["times"].items():
        header += [f"{batch} (ms)", "ratio"]
        for depth in depths:
            rows[depth] += [f"{times[depth]['milliseconds']:.1f}", f"{times[depth]['ratio']:.2f}"]
    print(format_table(header, rows.values(), numbers=True))
    print(f"\n{figures['machine']['device']}, torch {figures['machine']['torch']}")
    write_json(args.output_dir / "depth.json", figures)


if __name__ == "__main__":
    run_script(main)
