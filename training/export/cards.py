"""Model cards: the facts of a run, without local paths and secrets."""

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

import jinja2
import torch
import transformers
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from ...configuration_modernalbert import ModernAlbertConfig
from ..reports.tables import escape_markdown
from ..runs import write_text
from .redaction import hub_id, redact


ROOT = Path(__file__).parents[2]
TEMPLATES = ROOT / "model_cards"
MERGED_NAME = "merged"
TAGS = ["modernalbert", "recursive-transformer", "mixture-of-loras", "masked-lm", "encoder"]

# The Hub's pipeline tag of each head.
PIPELINES = {
    "ModernAlbertModel": "feature-extraction",
    "ModernAlbertForMaskedLM": "fill-mask",
    "ModernAlbertForSequenceClassification": "text-classification",
    "ModernAlbertForTokenClassification": "token-classification",
    "ModernAlbertForQuestionAnswering": "question-answering",
}

# The same for any encoder, by the end of its class name.
KINDS = {name.removeprefix("ModernAlbert"): kind for name, kind in PIPELINES.items() if "For" in name}

# Metrics that have other names on the Hub.
METRICS = {"pearson": "pearsonr", "spearman": "spearmanr", "exact": "exact_match"}


def environment() -> dict[str, str]:
    """Versions, hardware and commit that a run's results depend on, "unknown" if they cannot be determined."""
    try:
        version = importlib.metadata.version("modernalbert")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    # The package's own checkout: an installed package may lie inside another repository.
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


class Safe(str):
    """Text of a card that is already escaped."""


def one_line(value: Any) -> str:
    """A value as text without line breaks."""
    return " ".join(str(value).split())


def to_code(value: Any) -> Safe:
    """A code span, which is also valid in a table."""
    text = one_line(value)
    if not re.search(r"[`|]", text):
        return Safe(f"`{text}`")
    return Safe("<code>" + re.sub(r"[^\w ]", lambda match: f"&#{ord(match[0])};", text) + "</code>")


def to_fence(value: str, language: str) -> Safe:
    """A code block, with a fence longer than any in its content."""
    fence = "`" * max(3, *(len(ticks) + 1 for ticks in re.findall("`+", value)), 3)
    return Safe(f"{fence}{language}\n{value}\n{fence}")


def to_number(value: float, digits: int = 4) -> str:
    """A number rounded to `digits` decimals."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "not finite"


def render(folder: str | Path, template: str, data: ModelCardData, /, **values: Any) -> Path:
    """Writes `README.md` into a folder, atomically.

    Values are escaped as Markdown text, unless the template applies one of the filters `code` (a span), `python` (a
    string literal) and `fence` (a block).

    Args:
        folder: Folder of the model.
        template: Name of a file in `model_cards`.
        data: The front matter.
        values: Variables of the template.

    Returns:
        Path of the card.
    """

    def finalize(value):
        return value if isinstance(value, Safe | jinja2.Undefined) else escape_markdown(value)

    environment = jinja2.Environment(finalize=finalize)
    environment.filters |= {
        "code": to_code,
        "fence": to_fence,
        "number": to_number,
        "python": lambda value: Safe(json.dumps(one_line(value), ensure_ascii=False)),
    }
    text = (TEMPLATES / template).read_text(encoding="utf-8")
    card = ModelCard(environment.from_string(text).render(card_data=Safe(data.to_yaml()), **values))
    path = Path(folder) / "README.md"
    write_text(path, str(card))
    return path


@dataclass
class PretrainingFacts:
    """Facts for the card of a pretrained model.

    Args:
        name: Hub id, or name of the folder, of the model.
        preset: Preset of the configuration; None if it comes from elsewhere.
        config: The model's configuration.
        tokenizer: Hub id or folder.
        recipe: The run's arguments.
        data: Sources of the training texts: Hub data sets `name` or `name:config`, or local files.
        tokens: Tokens seen in training.
        max_length: Tokens of a row.
        mlm_probability: Share of tokens masked, in training and evaluation.
        precision: For example "bf16".
        seconds: Wall time of the training.
        train_losses: Last value of each term.
        masked_share: Share of the training sequences that are masked at all.
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
    masked_share: float = 1.0
    eval_losses: dict[str, float] = field(default_factory=dict)
    validation_split: str | None = None
    teacher: str | None = None
    initialised_from: str | None = None
    license: str = "apache-2.0"
    languages: list[str] = field(default_factory=lambda: ["en"])
    environment: dict[str, str] = field(default_factory=environment)


def write_card(folder: str | Path, facts: PretrainingFacts) -> Path:
    """Writes `README.md` into the folder of a pretrained model, atomically.

    Only the last name of a local path appears, and no secret. A source is a data set of the Hub if it has the form
    `namespace/name` and no local file has this name.

    Returns:
        Path of the card.
    """
    values = {name: value if name == "config" else redact(value) for name, value in vars(facts).items()}
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
    values["recipe"] = to_yaml(values["recipe"])
    values["evaluations"] = [
        (redact(source), facts.validation_split if hub_id(source) else "", loss, perplexity(loss))
        for source, loss in facts.eval_losses.items()
    ]
    return render(folder, "pretrained.md", data, base=base, **values)


def to_yaml(settings: dict[str, Any]) -> str:
    """Settings as YAML, in their order."""
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip()


def write_merged_card(folder: str | Path, name: str, head: str, source: str, report: dict, license: str) -> Path:
    """Writes `README.md` for a model with merged experts, atomically.

    Args:
        folder: Folder of the model.
        name: Hub id, or name of the folder.
        head: Class of the model.
        source: Hub id or folder of the model with its experts.
        report: What `merge_report.json` holds.
        license: Licence of the weights, by its identifier on the Hub.

    Returns:
        Path of the card.
    """
    data = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag=PIPELINES.get(head),
        tags=[tag for tag in TAGS if tag != "masked-lm"] + ["merge"],
        base_model=hub_id(source),
    )
    values = {"name": redact(name), "task": PIPELINES.get(head), "report": redact(report), "license": license}
    auto_class = "AutoModel" + head.removeprefix("ModernAlbert").removeprefix("Model")
    return render(folder, "merged.md", data, auto_class=auto_class, environment=environment(), **values)


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
    """Writes `README.md` into the folder of a fine-tuned model and, if there is one, of the merged model.

    Args:
        folder: Folder of the run; an encoder without a head is in `model`, a merged model in `merged`.
        task: Name of the task.
        model_name: Hub id or folder of the model that the run started from.
        model: The fine-tuned model.
        scores: Scores; names for the merged model begin with `merged_`.
        data: Facts by split, with one `source` for all or one per split.
        seed: Seed of the run.
        settings: Settings of the run.
        details: Details of the run, with `merged_parameters` if the model was merged.
        pairs: Whether a classifier takes two texts.
    """
    parts = {name: facts for name, facts in data.items() if name != "source"}
    parts = {name: {"source": data.get("source"), **facts} for name, facts in parts.items()}
    for facts in parts.values():
        facts["sources"] = facts["source"] if isinstance(facts["source"], list | tuple) else [facts["source"]]
    sources = {source for facts in parts.values() for source in [facts["source"]] if isinstance(source, str)}
    dataset = next(iter(sources)) if len(sources) == 1 and hub_id(next(iter(sources))) else None
    head = type(getattr(model, "get_base_model", lambda: model)()).__name__
    auto_class = "AutoModel" + head[head.find("For") :] if "For" in head else "AutoModel"
    kind = next((kind for name, kind in KINDS.items() if head.endswith(name)), "sentence-similarity")
    retrieving = kind == "sentence-similarity"
    model_type = model.config.model_type
    task = redact(task)
    recipe = {name: value for name, value in redact(settings).items() if name != "data" and value not in (None, [])}
    values = {
        "task": task,
        "base": redact(model_name),
        "model_type": model_type,
        "kind": kind,
        "auto_class": auto_class,
        "remote": bool(getattr(model.config, "auto_map", None)) or model_type == "modernalbert",
        "pairs": pairs,
        "no_answer": task == "squad_v2",
        "seed": seed,
        "settings": settings,
        "hub": dataset is not None,
        "data": redact(parts),
        "environment": environment(),
        "recipe": to_yaml(recipe),
    }
    own_folder = Path(folder) / "model" if retrieving else Path(folder)
    for prefix, path in (("", own_folder), ("merged_", Path(folder) / MERGED_NAME)):
        own = {name: value for name, value in scores.items() if name.startswith("merged_") == bool(prefix)}
        if not own:
            continue
        own = {name.removeprefix(prefix): value for name, value in own.items()}
        name = redact(Path(path).resolve().name)
        lora = settings.get("peft", False) and not prefix and not retrieving  # there the LoRA is folded in
        results = [
            EvalResult(
                task_type="text-retrieval" if retrieving else kind,
                dataset_type=dataset or "local-files",  # not the Hub's data set of the same name
                dataset_name=f"{dataset or 'local files'}: {task}",
                dataset_config=task if dataset and kind == "text-classification" else None,
                dataset_split=settings.get("split", "validation") + "_mismatched" * metric.endswith("_mismatched"),
                metric_type=METRICS.get(metric, metric),
                metric_name=metric,
                metric_value=round(value, 4),
            )
            for metric, value in own.items()
            if math.isfinite(value)
        ]
        tags = [tag for tag in TAGS if tag != "masked-lm"] if model_type == "modernalbert" else []
        card = ModelCardData(
            library_name="peft" if lora else "sentence-transformers" if retrieving else "transformers",
            pipeline_tag=kind,
            tags=tags + (["lora"] if lora else []) + (["merge"] if prefix else []),
            base_model=hub_id(model_name),
            datasets=[dataset] if dataset else None,
            eval_results=results or None,
            model_name=name,
        )
        facts = {
            "name": name,
            "scores": own,
            "lora": lora,
            "merged": settings["merge_after"] if prefix else None,
            "parameters": details["merged_parameters"] if prefix else model.num_parameters(),
        }
        render(path, "finetuned.md", card, **values, **facts)


def evaluation_results(facts: PretrainingFacts) -> list[EvalResult]:
    """Entries of the card's `model-index`: finite losses on data sets of the Hub, which others can reproduce."""
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
        start: Hub id or folder that a run started from; `initialization.json` in the folder names the teacher.
    """
    note = Path(start) / "initialization.json"
    return hub_id(json.loads(note.read_text())["teacher"] if note.is_file() else start)
