"""Fine-tunes and evaluates encoders on a list of tasks, beside each other and beside baselines without a model.

    python benchmarks/evaluation.py --models checkpoints/modernalbert-nano sentence-transformers/all-MiniLM-L6-v2 \
        --tasks benchmarks/tasks.json --learning_rates 1e-4 2e-4 5e-4 --sweep_task mrpc --output_dir runs/evaluation

Every model takes every task with every seed, by the scripts of this repository. `tasks.json` maps the name of a task to
its script and the script's arguments; those under `*` go to all tasks, before their own:

    {"*": {"do_train": true, "num_train_epochs": 2},
     "sst2": {"script": "run_glue", "train_files": ["sst2/train.parquet"], "validation_files": ["sst2/dev.parquet"]},
     "scifact": {"script": "run_beir", "dataset": "scifact"}}

With `--learning_rates`, each model first takes `--sweep_task` at each of them with the first seed; the best is its rate for
all tasks that state none of their own. The command can be given again, from two seeds on with more as well: the scripts keep a
run that has ended, resume one that was stopped, and refuse other settings or rows. Writes `comparison.md` and `comparison.png`.
"""

from argparse import ArgumentParser
from pathlib import Path

from common import count, positive, read_tasks, run_jobs, start_script, to_flags

from modernalbert.training.cli import run_script
from modernalbert.training.runs import read_json


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", required=True, help="folders, whose last parts differ, or Hub names")
    parser.add_argument("--tasks", required=True, help="JSON file, see above")
    parser.add_argument("--only", nargs="+", help="names of tasks; default: all")
    parser.add_argument("--learning_rates", nargs="+", type=positive, default=[], help="each model's best is chosen")
    parser.add_argument("--sweep_task", help="task that chooses")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/evaluation"))
    parser.add_argument("--processes", type=count, default=2, help="runs at a time, one thread each")
    args = parser.parse_args(argv)
    names = [Path(model).name for model in args.models]
    if len(set(names)) < len(names):
        parser.error(f"the last parts of --models name their folders and must differ, got {', '.join(names)}")
    tasks = read_tasks(args.tasks, "script")
    common = tasks.pop("*", {})
    for name in [*(args.only or []), *([args.sweep_task] if args.sweep_task else [])]:
        if name not in tasks:
            parser.error(f"there is no task '{name}' in '{args.tasks}'; it has {', '.join(tasks)}")
    if bool(args.learning_rates) != bool(args.sweep_task):
        parser.error("--learning_rates and --sweep_task go together")
    rates = {}

    def run(name: str, model: str, kind: str, **arguments) -> Path:
        arguments = {**common, **arguments, **tasks[name], "model_name_or_path": model}
        folder = args.output_dir / Path(model).name / kind / name
        start_script(arguments.pop("script"), *to_flags(arguments), "--output_dir", str(folder))
        return folder

    def sweep(model: str) -> None:
        folder = run(args.sweep_task, model, "sweep", learning_rates=args.learning_rates, seeds=args.seeds[:1])
        rates[model] = {"learning_rate": read_json(folder / "results.json")["settings"]["learning_rate"]}
        print(f"{model}: {rates[model]}", flush=True)

    def evaluate(name: str, model: str) -> None:
        run(name, model, "tasks", seeds=args.seeds, **rates.get(model, {}))

    if args.sweep_task:
        run_jobs(args.processes, sweep, [(model,) for model in args.models])
    run_jobs(args.processes, evaluate, [(name, model) for name in args.only or tasks for model in args.models])
    folders = [str(args.output_dir / name / "tasks") for name in names]
    start_script("compare_results", "--runs", *folders, "--output_dir", str(args.output_dir))
    print((args.output_dir / "comparison.md").read_text())


if __name__ == "__main__":
    run_script(main)
