"""What initialising from a teacher and distilling from it are worth: masked-LM loss at equal tokens, several seeds.

    python benchmarks/pretraining.py --train_data "prose/train-*.parquet" --validation_data prose/validation.parquet \
        --output_dir runs/benchmark-pretraining

Trains a tokenizer, a small ModernBERT as the teacher, and `nano` from scratch, initialised, and initialised and
distilled, all by the scripts of this repository and on the same texts. The command can be given again: a run that has
ended is kept, one that was stopped is resumed. Writes `pretraining.json`, a Markdown table and a plot.
"""

import statistics
from argparse import ArgumentParser, Namespace
from pathlib import Path

from common import (
    BATCH,
    LENGTH,
    bind_folder,
    count,
    format_table,
    positive,
    pretrain,
    read_curve,
    run_jobs,
    start_script,
    train_tokenizer,
)
from transformers import ModernBertConfig

from modernalbert.training.cli import run_script
from modernalbert.training.reports.html import draw_panels
from modernalbert.training.runs import write_json, write_text


VARIANTS = {"scratch": "from scratch", "initialised": "initialised", "distilled": "initialised and distilled"}


def train_all(args: Namespace) -> None:
    """Tokenizer, teacher, initialisation, then every variant with every seed."""
    teacher, start, shape = (args.output_dir / name for name in ("teacher", "initialisation", "teacher-config"))
    train_tokenizer(args)
    ModernBertConfig(
        hidden_size=192,
        intermediate_size=288,
        num_attention_heads=3,
        num_hidden_layers=6,
        max_position_embeddings=1024,
    ).save_pretrained(shape)
    pretrain(args, teacher, args.teacher_steps, 0, args.learning_rate, "--config_name", str(shape))
    if not start.exists():
        start_script("init_from_teacher", "--teacher", str(teacher), "--preset", "nano", "--output_dir", str(start))
    models = {
        "scratch": ("--config_name", str(start)),
        "initialised": ("--model_name_or_path", str(start)),
        "distilled": ("--model_name_or_path", str(start), "--teacher", str(teacher)),
    }

    def train(name: str, seed: int) -> None:
        pretrain(args, args.output_dir / f"{name}-{seed}", args.steps, seed, args.learning_rate, *models[name])

    run_jobs(args.processes, train, [(name, seed) for seed in args.seeds for name in VARIANTS])


def summarise(args: Namespace) -> None:
    """Writes the figures, the table and the plot."""
    results = {name: [read_curve(args.output_dir / f"{name}-{seed}") for seed in args.seeds] for name in VARIANTS}
    teacher = read_curve(args.output_dir / "teacher")
    rows = []
    for name, title in VARIANTS.items():
        rows.append([title])
        for source in teacher:
            last = [curves[source][-1][1] for curves in results[name]]
            rows[-1].append(f"{statistics.mean(last):.3f} ± {statistics.stdev(last) if len(last) > 1 else 0:.3f}")
    tokens = args.teacher_steps * BATCH * LENGTH / 1e6
    rows.append([f"teacher ({tokens:.2f}M tokens)", *(f"{curve[-1][1]:.3f}" for curve in teacher.values())])
    heading = f"{args.steps * BATCH * LENGTH / 1e6:.2f}M tokens, {len(args.seeds)} seeds"
    table = format_table([heading, *teacher], rows)

    def losses(source):
        def panel(axes):
            for color, (name, title) in enumerate(VARIANTS.items()):
                for index, curves in enumerate(results[name]):
                    axes.plot(*zip(*curves[source], strict=True), f"C{color}", label=title if index == 0 else None)
            axes.axhline(teacher[source][-1][1], color="gray", linestyle="--", label="teacher, at its end")
            axes.set(title=source, xlabel="tokens", ylabel="masked-LM loss (nats)")
            axes.legend()

        return panel

    write_text(args.output_dir / "pretraining.md", table + "\n")
    write_json(args.output_dir / "pretraining.json", {**results, "teacher": teacher})
    write_text(args.output_dir / "pretraining.svg", draw_panels([losses(source) for source in teacher]))
    print(table)


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_data", nargs="+", required=True)
    parser.add_argument("--validation_data", nargs="+", required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmark-pretraining"))
    parser.add_argument("--teacher_steps", type=count, default=2500, help=f"of {BATCH} sequences x {LENGTH} tokens")
    parser.add_argument("--steps", type=count, default=800, help="of each variant")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning_rate", type=positive, default=2e-3)
    parser.add_argument("--max_eval_samples", type=count, default=512)
    parser.add_argument("--processes", type=count, default=2, help="runs at a time, one thread each")
    args = parser.parse_args(argv)
    bind_folder(args, {}, ignore=("seeds",))
    train_all(args)
    summarise(args)


if __name__ == "__main__":
    run_script(main)
