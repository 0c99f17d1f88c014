"""Results of fine-tuning and evaluation runs: scores, everything that they depend on, and means over several runs."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..export.cards import environment
from ..export.redaction import redact
from ..reports.tables import markdown_table
from ..runs import RESULTS_NAME, write_json


def write_results(
    output_dir: str | Path,
    *,
    task: str,
    model_name: str,
    model: PreTrainedModel,
    scores: dict[str, float],
    data: dict[str, Any],
    seed: int,
    settings: dict[str, Any],
    details: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes `results.json`, atomically.

    Args:
        output_dir: Folder of the run.
        task: Name of the task, for example `"mrpc"`, `"squad_v2"` or `"scifact"`.
        model_name: Hub name or folder of the model that the run started from; only the last name of a folder is kept.
        model: The model that was measured.
        scores: Scores by name, from 0 to 1; the first is the main one.
        data: Source, number of rows and [`~training.data.fingerprint`] of each split.
        seed: Seed of the run.
        settings: Arguments that the scores depend on.
        details: Anything else, by name.

    Returns:
        What was written.
    """
    results = {
        "task": task,
        "model": redact(model_name),
        "model_type": model.config.model_type,
        "parameters": model.num_parameters(),
        "scores": scores,
        "seeds": [seed],
        "data": redact(data),
        "settings": redact(settings),
        "details": details or {},
        "environment": environment(),
    }
    write_json(Path(output_dir) / RESULTS_NAME, results, default=str)
    return results


def choose_rate(runs: Iterable[dict[str, Any]]) -> tuple[float | None, list[dict[str, Any]]]:
    """The learning rate with the best mean main score over the seeds, on the validation rows, and its runs."""
    by_rate = defaultdict(list)
    for results in runs:
        by_rate[results["settings"].get("learning_rate")].append(results)
    return max(
        by_rate.items(),
        key=lambda item: statistics.mean(next(iter(results["scores"].values())) for results in item[1]),
    )


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Results of several runs of a task: means over the seeds, at the best learning rate.

    `details` holds the standard deviations (`std`, None for a single seed), the scores of each seed (`by_seed`), and the
    scores of every run.
    """
    rate, chosen = choose_rate(runs)
    first = chosen[0]
    by_seed = {name: [results["scores"][name] for results in chosen] for name in first["scores"]}
    details = {
        name: first["details"][name] for name in ("merged_parameters", "eval_batch_size") if name in first["details"]
    }
    for name in ("milliseconds_per_row", "merged_milliseconds_per_row"):
        if name in first["details"]:
            details[name] = statistics.mean(results["details"][name] for results in chosen)
    for name, values in first["details"].items():  # one score per query
        if name.endswith(" of queries"):
            by_run = [results["details"][name] for results in chosen]
            details[name] = {query: statistics.mean(scores[query] for scores in by_run) for query in values}
    details |= {
        "learning_rate": rate,
        "learning_rates": sorted({results["settings"].get("learning_rate") for results in runs}, key=str),
        "std": deviations(by_seed),
        "by_seed": by_seed,
        "runs": [
            {
                "seed": results["seeds"][0],
                "learning_rate": results["settings"].get("learning_rate"),
                "scores": results["scores"],
            }
            for results in runs
        ],
    }
    return {
        **first,
        "scores": {name: statistics.mean(values) for name, values in by_seed.items()},
        "seeds": [results["seeds"][0] for results in chosen],
        "settings": common([results["settings"] for results in chosen], "seed"),
        "details": details,
    }


def deviations(by_seed: dict[str, list[float]]) -> dict[str, float | None]:
    """Sample standard deviation of each score; None for a single seed."""
    return {name: statistics.stdev(values) if len(values) > 1 else None for name, values in by_seed.items()}


def common(settings: Sequence[dict[str, Any]], *without: str) -> dict[str, Any]:
    """Settings that all runs share."""
    return {
        name: value
        for name, value in settings[0].items()
        if name not in without and all(other.get(name) == value for other in settings)
    }


def to_markdown(results: dict[str, Any], metrics: Mapping[str, str]) -> str:
    """The content of `results.md`: a table, and notes on it.

    Args:
        results: Results of a run, or a summary of several.
        metrics: Main metric of each task of the command.
    """
    std, baselines = results["details"].get("std", {}), results["details"].get("baselines", {})
    rows = [
        [
            f"{name} ({metrics[name]})" if name in metrics else name,
            format_score(score, std.get(name)),
            *(format_score(figures.get(name)) for figures in baselines.values()),
        ]
        for name, score in results["scores"].items()
    ]
    notes = [f"{results['model']}, {results['parameters']:,} parameters; seeds {results['seeds']}, in percent."]
    if len(results["seeds"]) > 1:
        notes.append("±: standard deviation over the seeds.")
    notes += results["details"].get("notes", [])
    details = results["details"].get("tasks", {"": results["details"]})
    if any(len(facts.get("learning_rates", ())) > 1 for facts in details.values()):
        notes.append("Learning rates were chosen on the rows that the scores are of.")
    if results["settings"].get("load_best_model_at_end"):
        notes.append("Checkpoints were chosen on the rows that the scores are of.")
    return markdown_table(["score", results["model"], *baselines], rows) + "\n" + "\n".join(notes) + "\n"


def format_score(mean: float | None, std: float | None = None) -> str:
    """`91.3 ± 0.4`, in percent."""
    if mean is None:
        return ""
    return f"{100 * mean:.1f}" + (f" ± {100 * std:.1f}" if std is not None else "")
