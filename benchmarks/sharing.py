"""Where sharing hurts: what it costs and what experts give back, by how often a group of layers runs.

    python benchmarks/sharing.py --num_hidden_groups 6 3 2 --config_overrides '{"num_hidden_layers": 12}' \
        --distil sentence-transformers/all-MiniLM-L6-v2 --train_data texts.jsonl --validation_data validation.jsonl

Models of equal depth and widths, whose layers share the weights of fewer and fewer groups, without experts and with experts in
every group, beside one that shares nothing. Each number of groups is a study of `benchmarks/ablation.py`, which takes the other
arguments, in a folder of its own; the command can be given again as that one can. Writes `sharing.json`, `sharing.md` and
`sharing.svg`.
"""

import json
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import ablation
from common import count, format_table

from modernalbert.training.cli import parse_json, run_script
from modernalbert.training.reports.html import draw_panels
from modernalbert.training.runs import read_json, write_json, write_text


def read_losses(folder: Path) -> dict[str, list[float]]:
    """Losses of each variant of a study, one for each seed, means over its validation sources."""
    measures = [
        own["values"] for name, own in read_json(folder / "ablation.json")["measures"].items() if "loss" in name
    ]
    return {
        name: [mean(values) for values in zip(*(own[name] for own in measures), strict=True)] for name in measures[0]
    }


def summarise(unshared: list[float], none: list[float], mol: list[float]) -> dict[str, Any]:
    """What sharing costs, what experts give back, each with half the width of its 95% interval, and their ratio.

    All are losses, one for each seed, in the same order.
    """
    cost, gain = ablation.compare(none, unshared), ablation.compare(none, mol)
    return {"cost": cost, "gain": gain, "share": gain["mean"] / cost["mean"] if cost["mean"] > 0 else None}


def tabulate(results: dict[int, dict[str, Any]]) -> str:
    """Markdown: a row for each number of runs."""

    def number(figure):
        half = f" ± {figure['half_width']:.4f}" if figure["half_width"] is not None else ""
        return f"{figure['mean']:+.4f}{half}"

    rows = [
        [str(runs), number(own["cost"]), number(own["gain"]), "" if own["share"] is None else f"{own['share']:.0%}"]
        for runs, own in results.items()
    ]
    columns = ("runs of a group", "cost of sharing, 95% interval", "given back by experts, 95% interval", "share")
    return format_table(columns, rows, numbers=True) + "\n"


def draw(results: dict[int, dict[str, Any]]) -> list[Callable]:
    """Panels: cost and gain over the runs of a group, and their ratio."""
    runs = list(results)

    def losses(axes):
        for name, label in (("cost", "cost of sharing"), ("gain", "given back by experts")):
            figures = [results[count][name] for count in runs]
            halves = [figure["half_width"] or 0 for figure in figures]
            axes.errorbar(runs, [figure["mean"] for figure in figures], halves, marker="o", capsize=3, label=label)
        axes.set(
            title="loss", xlabel="runs of a group", ylabel="difference, 95% interval", xticks=runs, ylim=(0, None)
        )
        axes.legend(fontsize="x-small")

    def shares(axes):
        known = [(count, 100 * results[count]["share"]) for count in runs if results[count]["share"] is not None]
        axes.plot(*zip(*known, strict=True), marker="o")
        axes.set(
            title="share that experts give back", xlabel="runs of a group", ylabel="%", xticks=runs, ylim=(0, None)
        )

    return [losses, shares]


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0], epilog="Other arguments are those of ablation.py.")
    parser.add_argument("--num_hidden_groups", type=count, nargs="+", default=[6, 3, 2], help="each a study")
    parser.add_argument("--config_overrides", default='{"num_hidden_layers": 12}', help="fields of all models")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmark-sharing"))
    args, others = parser.parse_known_args(argv)
    if taken := {"--variants", "--changes", "--start", "--teacher", "--teacher_cache", "--tasks"} & set(others):
        parser.error(f"{', '.join(sorted(taken))} of ablation.py cannot be given here")
    fields = parse_json("config_overrides", args.config_overrides)
    layers = fields.get("num_hidden_layers", 12)
    for groups in args.num_hidden_groups:
        if layers % groups or groups == layers:
            parser.error(f"--num_hidden_groups {groups}: {layers} layers need a smaller number that divides them")

    losses = {}
    for groups in sorted(args.num_hidden_groups, reverse=True):
        shape = {**fields, "num_hidden_layers": layers, "num_hidden_groups": groups, "mol_groups": list(range(groups))}
        folder = args.output_dir / f"groups-{groups}"
        # The model that shares nothing as well, again for each number: it starts as the others of its study do.
        study = ["--variants", "none", "mol", "unshared", "--config_overrides", json.dumps(shape)]
        study += ["--output_dir", str(folder), "--teacher_cache", str(args.output_dir / "teacher.sqlite")]
        ablation.main([*study, *others])
        losses[layers // groups] = read_losses(folder)
    results = {runs: summarise(own["unshared"], own["none"], own["mol"]) for runs, own in losses.items()}
    write_json(args.output_dir / "sharing.json", results)
    write_text(args.output_dir / "sharing.md", tabulate(results))
    write_text(args.output_dir / "sharing.svg", draw_panels(draw(results)))
    print(tabulate(results))


if __name__ == "__main__":
    run_script(main)
