"""Model cards that hold every fact of a run, and nothing of the machine's folders."""

import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel

from ...configuration_modernalbert import ModernAlbertConfig
from ..data import READERS
from ..runs import write_text


ROOT = Path(__file__).parents[2]
TEMPLATE = ROOT / "model_cards" / "pretrained.md"
MERGED_TEMPLATE = ROOT / "model_cards" / "merged.md"
FINETUNED_TEMPLATE = ROOT / "model_cards" / "finetuned.md"
MERGED_NAME = "merged"
TAGS = ["modernalbert", "recursive-transformer", "mixture-of-loras", "masked-lm", "encoder"]

# What each head is for, as the Hub calls it.
PIPELINES = {
    "ModernAlbertModel": "feature-extraction",
    "ModernAlbertForMaskedLM": "fill-mask",
    "ModernAlbertForSequenceClassification": "text-classification",
    "ModernAlbertForTokenClassification": "token-classification",
    "ModernAlbertForQuestionAnswering": "question-answering",
}

# Where the Hub has other names for our metrics.
METRICS = {"pearson": "pearsonr", "spearman": "spearmanr", "exact": "exact_match"}

# A folder of this machine: the whole of a text, or inside one; `//` starts the host of a URL, which stays.
WHOLE_PATH = re.compile(r"(/(?!/)|~|\.{1,2}/|file:|[A-Za-z]:[\\/]|\\\\)")
INNER_PATH = re.compile(r"((?<![\w/])(file:/*|~\w*|\.{1,2})?/(?!/)|\b[A-Za-z]:\\)[^\s'\",;=)\]]+")
# Tokens of the Hub, and user and password of a URL.
SECRET = re.compile(r"\bhf_\w{8,}|(?<=://)[^/\s@]+@")


def environment() -> dict[str, str]:
    """Versions, hardware and commit that a run's results depend on; what cannot be found out is "unknown"."""
    try:
        version = importlib.metadata.version("modernalbert")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    # The package's own checkout: an installed package may lie inside somebody else's repository.
    git = ["git", f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}"]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        commit, changed = "unknown", False
    return {
        "hardware": f"{os.environ.get('WORLD_SIZE', '1')} x {device}",
        "commit": commit + (" with local changes" if changed else ""),
        "modernalbert": version,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


@dataclass
class PretrainingFacts:
    """What the card of a pretrained model says.

    Args:
        name: Hub id, or name of the folder, of the model.
        preset: Size that the configuration started from; None where it came from elsewhere.
        config: The model's configuration.
        tokenizer: Hub id or folder.
        recipe: The run's arguments.
        data: Sources of the training texts, each a Hub data set `name` or `name:config`, or local files.
        tokens: Tokens seen in training.
        max_length: Tokens of a row.
        mlm_probability: Share of tokens masked, in training and evaluation.
        precision: For example "bf16".
        seconds: Wall time of the training.
        train_losses: Last value of each term.
        eval_losses: Masked-LM loss in nats of each validation source, written as in `data`.
        validation_split: Split of those that are Hub data sets.
        teacher: Hub id or folder of the model that was distilled.
        initialised_from: Hub id or folder of the model whose weights the run started from.
        license: Licence of the weights, by its identifier on the Hub.
        languages: ISO 639-1 codes.
        environment: See [`environment`].
    """

    name: str
    preset: str | None
    config: ModernAlbertConfig
    tokenizer: str
    recipe: dict[str, Any]
    data: list[str]
    tokens: int
    max_length: int
    mlm_probability: float
    precision: str
    seconds: float
    train_losses: dict[str, float] = field(default_factory=dict)
    eval_losses: dict[str, float] = field(default_factory=dict)
    validation_split: str | None = None
    teacher: str | None = None
    initialised_from: str | None = None
    license: str = "apache-2.0"
    languages: list[str] = field(default_factory=lambda: ["en"])
    environment: dict[str, str] = field(default_factory=environment)


def write_card(folder: str | Path, facts: PretrainingFacts) -> Path:
    """Writes `README.md` into a folder, whole or not at all.

    Local folders appear by their last name only, access tokens not at all. A source counts as the Hub's where it has
    the form `namespace/name` and no local file has this name.

    Returns:
        The card's path.
    """
    values = {name: value if name == "config" else clean(value) for name, value in vars(facts).items()}
    base = find_base_model(facts.initialised_from) if facts.initialised_from else None
    hub_ids = [hub_id(source) for source in facts.data]
    results = evaluation_results(facts)
    data = ModelCardData(
        language=facts.languages,
        license=facts.license,
        library_name="transformers",
        pipeline_tag="fill-mask",
        tags=TAGS + (["distillation"] if facts.teacher else []),
        base_model=base,
        datasets=list(dict.fromkeys(filter(None, hub_ids))) or None,
        eval_results=results or None,
        model_name=values["name"].split("/")[-1] if results else None,
    )
    values["recipe"] = yaml.safe_dump(values["recipe"], sort_keys=False, allow_unicode=True).strip()
    values["evaluations"] = [
        (clean(source), facts.validation_split if hub_id(source) else "", loss, perplexity(loss))
        for source, loss in facts.eval_losses.items()
    ]
    card = ModelCard.from_template(data, template_path=str(TEMPLATE), base=base, **values)
    path = Path(folder) / "README.md"
    write_text(path, str(card))
    return path


def write_merged_card(folder: str | Path, name: str, head: str, source: str, report: dict, license: str) -> Path:
    """Writes `README.md` for a model with merged experts, whole or not at all.

    Args:
        folder: Of the model.
        name: Hub id, or name of the folder.
        head: Class of the model.
        source: Hub id or folder of the model with its experts.
        report: What `merge_report.json` holds.
        license: Licence of the weights, by its identifier on the Hub.

    Returns:
        The card's path.
    """
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag=PIPELINES.get(head),
        tags=[tag for tag in TAGS if tag != "masked-lm"] + ["merge"],
        base_model=hub_id(source),
    )
    values = {"name": name, "head": head, "task": PIPELINES.get(head), "report": clean(report)}
    card = ModelCard.from_template(data, template_path=str(MERGED_TEMPLATE), environment=environment(), **values)
    path = Path(folder) / "README.md"
    write_text(path, str(card))
    return path


def write_finetuned_cards(
    folder: str | Path,
    *,
    task: str,
    model_name: str,
    model: PreTrainedModel,
    scores: dict[str, float],
    data: dict[str, Any],
    seed: int,
    settings: dict[str, Any],
    details: dict[str, Any],
    pairs: bool = False,
) -> None:
    """Writes `README.md` into the folder of a fine-tuned model and, where that is, of its merged form.

    Args:
        folder: Of the run; of an encoder without a head the model is in `model`, and the merged one always in `merged`.
        task: See [`~training.results.write_results`], as for the others.
        model_name: Hub id or folder of the model that the run started from.
        model: The fine-tuned model.
        scores: Those of the merged model begin with `merged_`.
        data: By split, with a `source` for all of them or one each.
        seed: Of the run.
        settings: Of the run.
        details: Has `merged_parameters` where the model was merged.
        pairs: Whether a classifier takes two texts.
    """
    parts = {name: facts for name, facts in data.items() if name != "source"}
    parts = {name: {"source": data.get("source"), **facts} for name, facts in parts.items()}
    sources = {source for facts in parts.values() for source in [facts["source"]] if isinstance(source, str)}
    dataset = next(iter(sources)) if len(sources) == 1 and hub_id(next(iter(sources))) else None
    head = type(getattr(model, "get_base_model", lambda: model)()).__name__
    answering, retrieving = head.endswith("ForQuestionAnswering"), "For" not in head
    kind = "sentence-similarity" if retrieving else "question-answering" if answering else "text-classification"
    model_type = model.config.model_type
    recipe = {name: value for name, value in clean(settings).items() if name != "data" and value not in (None, [])}
    values = {
        "task": task,
        "base": clean(model_name),
        "model_type": model_type,
        "kind": kind,
        "auto_class": "AutoModel" + head[head.find("For") :],
        "remote": ", trust_remote_code=True" if getattr(model.config, "auto_map", None) else "",
        "pairs": pairs,
        "answers": task == "squad_v2" if answering else None,
        "seed": seed,
        "settings": settings,
        "hub": dataset is not None,
        "data": clean(parts),
        "environment": environment(),
        "recipe": yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip(),
    }
    own_folder = Path(folder) / "model" if retrieving else Path(folder)
    for prefix, path in (("", own_folder), ("merged_", Path(folder) / MERGED_NAME)):
        own = {name: value for name, value in scores.items() if name.startswith("merged_") == bool(prefix)}
        if not own:
            continue
        own = {name.removeprefix(prefix): value for name, value in own.items()}
        lora = settings.get("peft", False) and not prefix
        results = [
            EvalResult(
                task_type="text-retrieval" if retrieving else kind,
                dataset_type=dataset or "local-files",  # not the Hub's data set of the same name
                dataset_name=f"{dataset or 'local files'}: {task}",
                dataset_config=task if dataset and kind == "text-classification" else None,
                dataset_split=settings.get("split", "validation") + "_mismatched" * name.endswith("_mismatched"),
                metric_type=METRICS.get(name, name),
                metric_name=name,
                metric_value=round(value, 4),
            )
            for name, value in own.items()
        ]
        card = ModelCardData(
            library_name="peft" if lora else "sentence-transformers" if retrieving else "transformers",
            pipeline_tag=kind,
            tags=([tag for tag in TAGS if tag != "masked-lm"] if model_type == "modernalbert" else [])
            + (["lora"] if lora else [])
            + (["merge"] if prefix else []),
            base_model=hub_id(model_name),
            datasets=[dataset] if dataset else None,
            eval_results=results,
            model_name=path.name,
        )
        facts = {
            "name": path.name,
            "scores": own,
            "lora": lora,
            "merged": settings["merge_after"] if prefix else None,
            "parameters": details["merged_parameters"] if prefix else model.num_parameters(),
        }
        text = ModelCard.from_template(card, template_path=str(FINETUNED_TEMPLATE), **values, **facts)
        write_text(path / "README.md", str(text))


def evaluation_results(facts: PretrainingFacts) -> list[EvalResult]:
    """Entries of the card's `model-index`: finite losses on data sets of the Hub, which others can repeat."""
    results = []
    for source, loss in facts.eval_losses.items():
        dataset = hub_id(source)
        if dataset is None or not math.isfinite(perplexity(loss)):
            continue
        for metric, value in (("loss", loss), ("perplexity", perplexity(loss))):
            results.append(
                EvalResult(
                    task_type="fill-mask",
                    task_name="Masked language modelling",
                    dataset_type=dataset,
                    dataset_name=source,
                    dataset_config=source.partition(":")[2] or None,
                    dataset_split=facts.validation_split,
                    metric_type=metric,
                    metric_name=f"{metric} of masked tokens, {facts.mlm_probability:.0%} masked",
                    metric_value=round(value, 4),
                )
            )
    return results


def perplexity(loss: float) -> float:
    """Perplexity of a loss in nats; infinite where it overflows."""
    return math.inf if loss > 700 else math.exp(loss)


def find_base_model(start: str) -> str | None:
    """Hub id of the model that the weights come from; None if there is none.

    Args:
        start: What a run started from: a Hub id, or a folder, whose teacher `scripts/init_from_teacher.py` notes in it.
    """
    note = Path(start) / "initialization.json"
    return hub_id(json.loads(note.read_text())["teacher"] if note.is_file() else start)


def hub_id(source: str) -> str | None:
    """`namespace/name` of a source `namespace/name` or `namespace/name:config` of the Hub; None for a local one."""
    name = source.partition(":")[0]
    if "/" not in name or Path(name).suffix in READERS or os.path.exists(source):
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def clean(value: Any) -> Any:
    """Plain values for a public text: local folders by their last name, no secrets, texts on one line."""
    if isinstance(value, dict):
        return {clean(name): clean(part) for name, part in value.items() if not str(name).endswith("_token")}
    if isinstance(value, list | tuple):
        return [clean(part) for part in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    text = " ".join(str(value).split())
    is_path = "/" in text and " " not in text and "://" not in text and hub_id(text) is None
    if is_path or WHOLE_PATH.match(text):
        text = last_name(text)
    return SECRET.sub("", INNER_PATH.sub(lambda match: last_name(match[0]), text))


def last_name(path: str) -> str:
    """`c` of `/a/b/c/`, on every system."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]
