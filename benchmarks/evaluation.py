"""Fine-tunes and evaluates encoders on a list of tasks, beside each other and beside baselines without a model.

    python benchmarks/evaluation.py --models runs/nano runs/modernbert --tasks tasks.json --output_dir runs/evaluation

Every model takes every task with every seed, by the scripts of this repository. `tasks.json` maps the name of a task to
its script and the script's arguments; those under `*` go to all tasks, before their own:

    {"*": {"do_train": true, "num_train_epochs": 2},
     "sst2": {"script": "run_glue", "train_files": ["sst2/train.parquet"], "validation_files": ["sst2/dev.parquet"]},
     "scifact": {"script": "run_beir", "dataset": "scifact"}}

The command can be given again: the scripts keep a run that has ended, resume one that was stopped, and refuse other
settings or rows. Writes `comparison.md` and `comparison.png`.
"""

from argparse import ArgumentParser
from pathlib import Path

from common import count, read_tasks, run_jobs, start_script, to_flags

from modernalbert.training.cli import run_script


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", required=True, help="folders, whose last parts differ, or Hub names")
    parser.add_argument("--tasks", required=True, help="JSON file, see above")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/evaluation"))
    parser.add_argument("--processes", type=count, default=2, help="runs at a time, one thread each")
    args = parser.parse_args(argv)
    names = [Path(model).name for model in args.models]
    if len(set(names)) < len(names):
        parser.error(f"the last parts of --models name their folders and must differ, got {', '.join(names)}")
    tasks = read_tasks(args.tasks, "script")
    common = tasks.pop("*", {})

    def evaluate(name: str, model: str) -> None:
        arguments = {**common, **tasks[name], "model_name_or_path": model, "seeds": args.seeds}
        folder = args.output_dir / Path(model).name / name
        start_script(arguments.pop("script"), *to_flags(arguments), "--output_dir", str(folder))

    run_jobs(args.processes, evaluate, [(name, model) for name in tasks for model in args.models])
    folders = [str(args.output_dir / name) for name in names]
    start_script("compare_results", "--runs", *folders, "--output_dir", str(args.output_dir))
    print((args.output_dir / "comparison.md").read_text())


if __name__ == "__main__":
    run_script(main)
