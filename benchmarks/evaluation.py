"""What encoders score after fine-tuning, task by task, beside each other and beside what needs no model.

    python benchmarks/evaluation.py --models runs/nano runs/modernbert --tasks tasks.json --output_dir runs/evaluation

Every model takes every task with every seed, by the scripts of this repository. `tasks.json` maps the name of a task to
its script and the script's arguments; those under `*` go to all tasks, before their own:

    {"*": {"do_train": true, "num_train_epochs": 2},
     "sst2": {"script": "run_glue", "train_files": ["sst2/train.parquet"], "validation_files": ["sst2/dev.parquet"]},
     "scifact": {"script": "run_beir", "dataset": "scifact"}}

A run that has ended is not repeated, and one that was stopped goes on. Writes `comparison.md` and `comparison.png`.
"""

import json
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pretraining import run


def to_flags(arguments: dict) -> list[str]:
    """`{"files": ["a", "b"], "do_train": true}` as `--files a b --do_train true`."""
    flags = []
    for name, value in arguments.items():
        values = value if isinstance(value, list) else [value]
        flags += [f"--{name}", *(part if isinstance(part, str) else json.dumps(part) for part in values)]
    return flags


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", required=True, help="folders, whose last parts differ, or Hub names")
    parser.add_argument("--tasks", required=True, help="JSON file, see above")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/evaluation"))
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    tasks = json.loads(Path(args.tasks).read_text())
    common = tasks.pop("*", {})

    def evaluate(name: str, model: str) -> None:
        arguments = {**common, **tasks[name], "model_name_or_path": model, "seeds": args.seeds}
        folder = args.output_dir / Path(model).name / name
        run(arguments.pop("script"), *to_flags(arguments), "--output_dir", str(folder))

    with ThreadPoolExecutor(args.processes) as pool:
        for job in [pool.submit(evaluate, name, model) for name in tasks for model in args.models]:
            job.result()
    folders = [str(args.output_dir / Path(model).name) for model in args.models]
    run("compare_results", *folders, "--output_dir", str(args.output_dir))
    print((args.output_dir / "comparison.md").read_text())


if __name__ == "__main__":
    main()
