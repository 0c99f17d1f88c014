"""What a fine-tuning or evaluation run leaves: scores, and everything that they depend on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .cards import clean, environment
from .checkpoints import RESULTS_NAME, write_text


def write_results(
    output_dir: str | Path,
    *,
    task: str,
    model_name: str,
    model: PreTrainedModel,
    scores: dict[str, float],
    data: dict[str, Any],
    seeds: Sequence[int],
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
        data: What was read: sources, rows, and `datasets`' fingerprints.
        seeds: Of the runs behind the scores.
        settings: Arguments that the scores depend on.
        details: Anything else: scores of single seeds, tasks or queries.

    Returns:
        What was written.
    """
    results = {
        "task": task,
        "model": clean(model_name),
        "model_type": model.config.model_type,
        "parameters": model.num_parameters(),
        "scores": scores,
        "seeds": list(seeds),
        "data": clean(data),
        "settings": clean(settings),
        "details": details or {},
        "environment": environment(),
    }
    write_text(Path(output_dir) / RESULTS_NAME, json.dumps(results, indent=1, default=str))
    return results
