"""What a fine-tuning or evaluation run leaves: scores, and everything that they depend on; and means over several."""

import hashlib
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..export.cards import clean, environment
from ..runs import RESULTS_NAME, check_output_dir, same_run, write_text


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
    """Writes `results.json`, whole or not at all.

    Args:
        output_dir: Folder of the run.
        task: What was measured, for example `"mrpc"`, `"squad_v2"` or `"scifact"`.
        model_name: Hub name or folder of the model that the run started from; of a folder the last name is kept.
        model: The model that was measured.
        scores: Name to value, as the task's official metrics give them, from 0 to 1; the first is the main one.
        data: What was read: sources, rows, and the [`~training.data.fingerprint`] of each part.
        seed: Of the run.
        settings: Arguments that the scores depend on.
        details: Anything else, by name.

    Returns:
        What was written.
    """
    results = {
        "task": task,
        "model": clean(model_name),
        "model_type": model.config.model_type,
        "parameters": model.num_parameters(),
        "scores": scores,
        "seeds": [seed],
        "data": clean(data),
        "settings": clean(settings),
        "details": details or {},
        "environment": environment(),
    }
    write_text(Path(output_dir) / RESULTS_NAME, json.dumps(results, indent=1, default=str))
    return results


def describe_model(name: str) -> str:
    """Name on the Hub; of a folder its last name and a hash of its weights, so that another model is not taken for it."""
    if not (folder := Path(name)).is_dir():
        return name
    digest = hashlib.sha256()
    for pattern in ("*.safetensors", "*.bin", "[0-9]_*/*.safetensors"):  # the last of modules of sentence-transformers
        for path in sorted(folder.glob(pattern)):
            digest.update(path.read_bytes())
    return f"{folder.resolve().name} {digest.hexdigest()[:16]}"


def read_finished(folder: str | Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What a finished run wrote; else None, and the folder is ready for the run, or for more of it.

    Raises:
        ValueError: The folder holds a run, or checkpoints of one, with other settings.
    """
    folder = Path(folder)
    if not (folder / RESULTS_NAME).exists():
        check_output_dir(folder)
        same_run(folder, settings)
        return None
    path = folder / "arguments.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    changed = [
        f"{name}: {before.get(name)!r} before, {value!r} now"
        for name, value in json.loads(json.dumps(settings)).items()
        if before.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"'{folder}' holds a finished run with other settings ({'; '.join(changed)}); choose another `output_dir` "
            "or remove it"
        )
    return json.loads((folder / RESULTS_NAME).read_text(encoding="utf-8"))


def choose_rate(runs: Iterable[dict[str, Any]]) -> tuple[float | None, list[dict[str, Any]]]:
    """The learning rate whose mean main score over the seeds is best, on the rows that are reported, and its runs."""
    by_rate = defaultdict(list)
    for results in runs:
        by_rate[results["settings"].get("learning_rate")].append(results)
    return max(
        by_rate.items(),
        key=lambda item: statistics.mean(next(iter(results["scores"].values())) for results in item[1]),
    )


def summarise(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `results.json` says of several runs of a task: means over the seeds, at the best learning rate.

    Under `details` are the standard deviations (`std`, None of a single seed), the scores of each seed (`by_seed`), and
    those of every run.
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
    """Sample standard deviation of each score; None of a single seed."""
    return {name: statistics.stdev(values) if len(values) > 1 else None for name, values in by_seed.items()}


def common(settings: Sequence[dict[str, Any]], *without: str) -> dict[str, Any]:
    """Settings that all runs share."""
    return {
        name: value
        for name, value in settings[0].items()
        if name not in without and all(each.get(name) == value for each in settings)
    }
