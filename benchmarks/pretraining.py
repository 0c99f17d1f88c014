"""What initialising from a teacher and distilling from it are worth: masked-LM loss at equal tokens, several seeds.

    python benchmarks/pretraining.py --train_data "prose/train-*.parquet" --validation_data prose/validation.parquet \
        --output_dir runs/benchmark-pretraining

Trains a tokenizer, a small ModernBERT as the teacher, and `nano` from scratch, initialised, and initialised and
distilled, all of them by the scripts of this repository and on the same texts. A run that has ended is not repeated, and
one that was stopped goes on, so that the command can be given again. Writes `pretraining.json`, a Markdown table and a
plot.
"""

import json
import os
import statistics
import subprocess
import sys
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from matplotlib.figure import Figure
from transformers import ModernBertConfig


SCRIPTS = Path(__file__).parents[1] / "scripts"
VARIANTS = {"scratch": "from scratch", "initialised": "initialised", "distilled": "initialised and distilled"}


def run(script: str, *arguments: str) -> None:
    """Runs a script of this repository on one thread; its output is kept only if it fails."""
    command = [sys.executable, str(SCRIPTS / f"{script}.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-4000:]}")


def pretrain(args, folder: Path, steps: int, seed: int, *arguments: str) -> None:
    """One run of `scripts/pretrain.py`, unless it has ended before."""
    if (folder / "results.json").exists():
        return
    every = str(max(steps // 8, 1))
    run(
        "pretrain",
        *("--tokenizer", str(args.output_dir / "tokenizer"), "--output_dir", str(folder), "--seed", str(seed)),
        *("--train_data", *args.train_data, "--validation_data", *args.validation_data),
        *("--max_length", "128", "--per_device_train_batch_size", "8", "--per_device_eval_batch_size", "32"),
        *("--learning_rate", str(args.learning_rate), "--decay_steps", "0.5", "--weight_decay", "0.01"),
        *("--max_steps", str(steps), "--eval_strategy", "steps", "--eval_steps", every, "--save_steps", every),
        *("--save_total_limit", "1", "--max_eval_samples", str(args.max_eval_samples), "--disable_tqdm", "true"),
        *("--logging_steps", "25", "--use_cpu", "true", "--dataloader_pin_memory", "false", "--report_to", "none"),
        *arguments,
    )


def train_all(args) -> None:
    """Tokenizer, teacher, initialisation, then every variant with every seed."""
    tokenizer, teacher, start = (args.output_dir / name for name in ("tokenizer", "teacher", "initialisation"))
    if not tokenizer.exists():
        vocabulary = ("--vocab_size", "8192", "--model_max_length", "1024")
        run("train_tokenizer", "--files", *args.train_data, *vocabulary, "--output_dir", str(tokenizer))
    shape = ModernBertConfig(
        hidden_size=192,
        intermediate_size=288,
        num_attention_heads=3,
        num_hidden_layers=6,
        max_position_embeddings=1024,
    )
    shape.save_pretrained(args.output_dir / "teacher-config")
    pretrain(args, teacher, args.teacher_steps, 0, "--config_name", str(args.output_dir / "teacher-config"))
    if not start.exists():
        run("init_from_teacher", "--teacher", str(teacher), "--preset", "nano", "--output_dir", str(start))
    how = {
        "scratch": ("--config_name", str(start)),
        "initialised": ("--model_name_or_path", str(start)),
        "distilled": ("--model_name_or_path", str(start), "--teacher", str(teacher)),
    }
    with ThreadPoolExecutor(args.processes) as pool:
        jobs = [
            pool.submit(pretrain, args, args.output_dir / f"{name}-{seed}", args.steps, seed, *how[name])
            for seed in args.seeds
            for name in VARIANTS
        ]
        for job in jobs:
            job.result()


def read_curve(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tokens and masked-LM loss of every evaluation of a run, by validation source."""
    checkpoint = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    curves = {}
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    for entry in log:
        for name, value in entry.items():
            if name.startswith("eval_") and name.endswith("loss"):
                source = name.removeprefix("eval_").removesuffix("loss").strip("_") or "validation"
                curves.setdefault(source, []).append((entry["step"] * 8 * 128, value))
    return curves


def summarise(args) -> None:
    """Writes the figures, the table and the plot."""
    results = {name: [read_curve(args.output_dir / f"{name}-{seed}") for seed in args.seeds] for name in VARIANTS}
    teacher = read_curve(args.output_dir / "teacher")
    sources = list(teacher)
    lines = [f"| {args.steps * 1024 / 1e6:.2f}M tokens, {len(args.seeds)} seeds | " + " | ".join(sources) + " |"]
    lines.append("|---" * (len(sources) + 1) + "|")
    for name, title in VARIANTS.items():
        cells = []
        for source in sources:
            last = [curves[source][-1][1] for curves in results[name]]
            cells.append(f"{statistics.mean(last):.3f} ± {statistics.stdev(last) if len(last) > 1 else 0:.3f}")
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    tokens = teacher[sources[0]][-1][0] / 1e6
    lines.append(
        f"| teacher ({tokens:.2f}M tokens) | " + " | ".join(f"{teacher[s][-1][1]:.3f}" for s in sources) + " |"
    )
    (args.output_dir / "pretraining.md").write_text("\n".join(lines) + "\n")
    (args.output_dir / "pretraining.json").write_text(json.dumps({**results, "teacher": teacher}, indent=1))
    print("\n".join(lines))

    figure = Figure(figsize=(5 * len(sources), 3.5), layout="constrained")
    for place, source in enumerate(sources, start=1):
        axes = figure.add_subplot(
            1, len(sources), place, title=source, xlabel="tokens", ylabel="masked-LM loss (nats)"
        )
        for color, (name, title) in enumerate(VARIANTS.items()):
            for index, curves in enumerate(results[name]):
                axes.plot(*zip(*curves[source], strict=True), f"C{color}", label=title if index == 0 else None)
        axes.axhline(teacher[source][-1][1], color="gray", linestyle="--", label="teacher, at its end")
        axes.legend()
    figure.savefig(args.output_dir / "pretraining.svg")


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_data", nargs="+", required=True)
    parser.add_argument("--validation_data", nargs="+", required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmark-pretraining"))
    parser.add_argument("--teacher_steps", type=int, default=2500, help="of 8 rows x 128 tokens")
    parser.add_argument("--steps", type=int, default=800, help="of each variant")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--max_eval_samples", type=int, default=512)
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    train_all(args)
    summarise(args)


if __name__ == "__main__":
    main()
