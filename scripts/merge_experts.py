"""Merges the experts of a ModernALBERT, writes a self-contained folder, and measures what merging cost.

    python scripts/merge_experts.py --model_name_or_path runs/mrpc --output_dir runs/mrpc-merged

adds the mean of the experts to the shared weights: a plain recursive encoder, without routing. On a CPU within a
minute, the method that fits the routed layers on calibration text, beside others, with the loss of each:

    python scripts/merge_experts.py --model_name_or_path runs/nano --output_dir runs/nano-merged --method regression \
        --calibration_data "*.md" --validation_data README.md --compare uniform svd frequency

`--format adapter` writes the shared weights (`base`) and the merged experts (`adapter`, a LoRA that PEFT loads), and
`--format routed` a model with fewer experts (`--method cluster --num_experts 4`). Whatever the format, a fresh process
without this package has loaded the model before the folder gets its name. `merge_report.html` in it has usage and
similarity of the experts, errors of merged layers and the loss of each method. `--push_to_hub NAME` uploads the folder;
to do that again, `hf upload NAME FOLDER`.
"""

import copy
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from huggingface_hub.utils import validate_repo_id
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

from modernalbert.configuration_modernalbert import ModernAlbertConfig
from modernalbert.merging_modernalbert import METHODS, check_mergeable
from modernalbert.training.callbacks import read_routing_weights
from modernalbert.training.cli import Count, Seed, Share, parse_arguments, run_script
from modernalbert.training.data import check_labelled, find_files, first_rows, is_local, load_texts, read_rows
from modernalbert.training.evaluation.labels import class_names, number_labels, read_labels, relabel
from modernalbert.training.evaluation.metrics import score_model
from modernalbert.training.export.adapter import write_adapter
from modernalbert.training.export.cards import write_merged_card
from modernalbert.training.export.folder import (
    check_exportable,
    draft_folder,
    load_exportable,
    new_folder,
    push_folder,
    write_model,
)
from modernalbert.training.export.redaction import redact
from modernalbert.training.packing import (
    PackedCollator,
    TokenMasker,
    collate_batches,
    encode_texts,
    mask_rows,
    pack_texts,
)
from modernalbert.training.reports.merging import (
    compare_methods,
    describe_experts,
    states_by_depth,
    tabulate,
    write_merge_report,
)
from modernalbert.training.reports.tables import text_table


logger = logging.getLogger(__name__)

FORMATS = ("folded", "adapter", "routed")
BATCH_SIZE = 16
PER_DEPTH = ", per depth"  # behind the name of a method in the report


@dataclass
class MergingArguments:
    """Model, method, and texts for calibration and validation."""

    model_name_or_path: str = field(metadata={"help": "Hub name or folder of a ModernALBERT with experts."})
    output_dir: str = field(metadata={"help": "Folder to write; must not exist, or be empty."})
    method: str = field(default="uniform", metadata={"help": f"Merging method: {', '.join(METHODS)}."})
    format: str = field(
        default="folded",
        metadata={"help": "folded: into the shared weights; adapter: beside them, for PEFT; routed: fewer experts."},
    )
    rank: Count | None = field(
        default=None,
        metadata={
            "help": "Rank of the adapter; default: the experts', for frequency and regression, folded, no limit."
        },
    )
    num_experts: Count | None = field(default=None, metadata={"help": "Experts that method `cluster` leaves."})
    per_depth: bool = field(
        default=False,
        metadata={
            "help": "Fold an adapter for every run of a group, by frequency or regression: more memory, the same time."
        },
    )
    calibration_data: list[str] = field(
        default_factory=list, metadata={"help": "Texts to see routing on: files, globs or data sets of the Hub."}
    )
    calibration_rows: Count = field(default=128, metadata={"help": "Packed rows of calibration text to take."})
    routing_weights: str | None = field(
        default=None, metadata={"help": "routing_weights.json of the training, for `ema`, `svd` and `cat`."}
    )
    compare: list[str] = field(default_factory=list, metadata={"help": "Further methods to report on."})
    validation_data: list[str] = field(
        default_factory=list,
        metadata={"help": "Texts for the masked-LM loss; for a sequence classifier files of labelled rows."},
    )
    max_eval_samples: Count | None = field(default=None, metadata={"help": "Rows to evaluate on; default: all."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the texts."})
    text_columns: list[str] = field(
        default_factory=lambda: ["text"], metadata={"help": "Of labelled rows: one or two columns with the texts."}
    )
    label_column: str = field(
        default="label", metadata={"help": "Of labelled rows: names of the model's classes, or numbers."}
    )
    max_length: Count | None = field(
        default=None,
        metadata={"help": "Tokens of a packed row, and of a labelled one; default: 128, or all that the model takes."},
    )
    mlm_probability: Share = field(default=0.3, metadata={"help": "Share of tokens that is masked to evaluate."})
    seed: Seed = field(default=42, metadata={"help": "Of masks and of the choice of calibration text."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Repository to upload the folder to."})
    dry_run: bool = field(default=False, metadata={"help": "List what would be uploaded, and upload nothing."})
    license: str = field(default="apache-2.0", metadata={"help": "Licence of the weights, for the model card."})

    def __post_init__(self):
        methods = [self.method, *self.compare]
        for method in methods:
            if method not in METHODS:
                raise ValueError(f"there is no merging method '{method}'; the methods are {', '.join(METHODS)}")
            source = METHODS[method].source
            if source == "text" and not self.calibration_data:
                raise ValueError(f"method '{method}' looks at how text is routed: give some as `calibration_data`")
            if source == "given" and self.routing_weights is None:
                raise ValueError(
                    f"method '{method}' averages with the weights that the router gave in training: give the "
                    "`routing_weights.json` that lies beside the checkpoint as `routing_weights`"
                )
        if self.format not in FORMATS:
            raise ValueError(f"there is no format '{self.format}'; the formats are {', '.join(FORMATS)}")
        if (self.format == "routed") != (self.method == "cluster"):
            raise ValueError(
                f"method '{self.method}' does not give format '{self.format}': `--format routed` goes with `--method "
                "cluster --num_experts n`, which leaves experts and a router; all others leave one adapter"
            )
        if ("cluster" in methods) != (self.num_experts is not None):
            raise ValueError(
                "method 'cluster' needs `num_experts`"
                if self.num_experts is None
                else f"`num_experts` is for method 'cluster'; {', '.join(methods)} merge to one adapter"
            )
        if self.per_depth and (self.method not in ("frequency", "regression") or self.format != "folded"):
            raise ValueError(
                "`per_depth` folds what the router does at each depth: it goes with `--method frequency` or `regression` "
                f"and `--format folded`, got '{self.method}' and '{self.format}'"
            )
        columns = [*self.text_columns, self.label_column]
        if not 1 <= len(self.text_columns) <= 2 or len(set(columns)) < len(columns):
            raise ValueError(f"`text_columns` and `label_column` {columns} must be one or two columns and another one")
        if self.push_to_hub is not None:
            validate_repo_id(self.push_to_hub)
        elif self.dry_run:
            raise ValueError("`dry_run` shows what `push_to_hub` would upload: give both")


def check_model(args: MergingArguments, config: ModernAlbertConfig) -> None:
    """Checks, before any text is read, that the arguments fit the model.

    Raises:
        ValueError: They do not, or the model cannot be merged.
    """
    check_mergeable(config, text=bool(args.calibration_data or args.validation_data))
    single = config.num_experts == 1 and (args.method == "cluster" or args.per_depth)
    if config.num_experts == 0 or not config.mol_groups or single:
        raise ValueError(
            f"there is nothing to merge in '{args.model_name_or_path}': `num_experts` is {config.num_experts} in "
            f"{len(config.mol_groups)} MoL groups"
        )
    if args.num_experts is not None and not 2 <= args.num_experts < config.num_experts:
        raise ValueError(f"`num_experts` ({args.num_experts}) must be from 2 to {config.num_experts - 1}")
    full = min(config.hidden_size, config.mol_intermediate_size)
    if args.rank is not None and args.rank > full:
        raise ValueError(f"`rank` ({args.rank}) must be at most {full}, the rank of the model's projections")
    if args.max_length is None:
        args.max_length = min(128, config.max_position_embeddings)
    if args.max_length > config.max_position_embeddings:
        raise ValueError(
            f"`max_length` ({args.max_length}) must be at most the {config.max_position_embeddings} tokens that the model "
            "takes"
        )
    (head,) = config.architectures
    if args.validation_data and not head.endswith(("ForMaskedLM", "ForSequenceClassification")):
        raise ValueError(
            f"`validation_data` is for masked language models and sequence classifiers, not for a {head}; leave it out"
        )


def load_calibration(args: MergingArguments, tokenizer: PreTrainedTokenizerBase) -> list[dict]:
    """Batches of packed rows from all sources alike. They are streamed: a few rows need no whole data set.

    Raises:
        ValueError: The texts are empty; and what `load_texts` raises.
    """
    sources = args.calibration_data
    texts = load_texts(sources, "train", args.text_column, True, [1.0] * len(sources), args.seed)
    packed = pack_texts(texts, tokenizer, args.max_length, args.text_column)
    rows = list(islice(packed, args.calibration_rows))
    if not rows:
        raise ValueError(f"column '{args.text_column}' of `calibration_data` holds no text")
    return collate_batches(rows, PackedCollator(tokenizer), BATCH_SIZE)


def load_validation(
    args: MergingArguments, config: ModernAlbertConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[dict], tuple[str, ...]]:
    """Batches with labels, and the names of the metrics; none for the masked-LM loss.

    Raises:
        ValueError: A row has no text or label, or a class that the model does not know.
    """
    if config.architectures[0].endswith("ForMaskedLM"):
        texts = load_texts(args.validation_data, "validation", args.text_column)
        rows = pack_texts(texts, tokenizer, args.max_length, args.text_column)
        rows = first_rows(rows, args.max_eval_samples)
        rows = mask_rows(rows, TokenMasker(tokenizer, args.mlm_probability, args.seed))
        if not any(label != -100 for row in rows["labels"] for label in row):
            raise ValueError("no token of `validation_data` is masked; give more text, or a larger `mlm_probability`")
        return collate_batches(rows, PackedCollator(tokenizer), BATCH_SIZE), ()
    rows = read_rows(args.validation_data)
    rows = check_labelled(rows, ", ".join(args.validation_data), args.text_columns, args.label_column)
    regression = config.num_labels == 1
    names = None if regression else class_names(config)
    labels = number_labels(read_labels(rows), ", ".join(args.validation_data), names, "trained model")
    if regression and len(set(labels)) < 2:
        raise ValueError(f"all labels of `validation_data` are {labels[0]}: nothing correlates with them")
    rows = relabel(rows, labels)
    rows = first_rows(rows, args.max_eval_samples)

    def encode(part):
        texts = [part[column] for column in args.text_columns]
        encoded = encode_texts(tokenizer, *texts, truncation=True, max_length=args.max_length)
        return {**encoded, "labels": part["label"]}

    encoded = rows.map(encode, batched=True, remove_columns=rows.column_names, desc="Tokenising")
    metrics = ("pearson", "spearman") if regression else ("accuracy",)
    return collate_batches(encoded, DataCollatorWithPadding(tokenizer), BATCH_SIZE), metrics


def resolve(sources: Sequence[str]) -> list[str]:
    """Absolute paths of local sources, and the names of Hub sources."""
    local = [str(Path(path).resolve()) for source in sources if is_local(source) for path in find_files([source])]
    return local + [source for source in sources if not is_local(source)]


def measure(
    args: MergingArguments,
    model: PreTrainedModel,
    methods: Sequence[str],
    merge: Callable[[str], PreTrainedModel],
    calibration: list[dict] | None,
    validation: list[dict] | None,
    metrics: Sequence[str],
) -> dict:
    """Measurements for the report; `not_measured` lists what is missing and why."""
    report = {"methods": {}, "not_measured": []}
    if calibration is None and validation is None:
        report["not_measured"].append(
            "what merging costs: the command had neither `calibration_data` nor `validation_data` to measure it on"
        )
        return report
    if calibration is None:
        report["not_measured"].append("usage and similarity of the experts: the command had no `calibration_data`")
    else:
        report["experts"] = describe_experts(model, states_by_depth(model, calibration))
    if validation is None:
        report["not_measured"].append("the loss or the metric of the task: the command had no `validation_data`")
    if shared := sorted(set(resolve(args.calibration_data)) & set(resolve(args.validation_data))):
        report["not_measured"].append(
            f"the methods on text that none was fitted to: {', '.join(redact(shared))} is both `calibration_data` and "
            "`validation_data`"
        )
    # Text that no method was fitted to, where there is some.
    batches = calibration if validation is None else validation[: math.ceil(args.calibration_rows / BATCH_SIZE)]
    report["error_text"] = "calibration" if validation is None else "validation"
    score = None if validation is None else lambda scored: score_model(scored, validation, metrics)
    states = states_by_depth(model, batches)
    return report | compare_methods(model, methods, merge, states, score)


def main(argv: Sequence[str] | None = None) -> dict:
    """Loads, merges, measures, writes, checks and uploads; returns the report.

    Raises:
        FileExistsError: `output_dir` is not empty, or another process is writing it.
        ValueError: The model is no ModernALBERT or has no experts, arguments do not go together, or a file to upload is
            not for the public.
    """
    (args,) = parse_arguments((MergingArguments,), argv, description=__doc__)
    folder = new_folder(args.output_dir, args.model_name_or_path)
    config = check_exportable(args.model_name_or_path)
    check_model(args, config)
    weights = read_routing_weights(args.routing_weights, config) if args.routing_weights else None
    with draft_folder(folder) as draft:
        report = write_merged(args, config, weights, draft)
    if report["methods"]:
        logger.info("\n%s", text_table(tabulate(report)))
    for reason in report["not_measured"]:
        logger.info("not measured: %s", reason)
    logger.info("%s", json.dumps({"folder": str(folder), "method": args.method, **report["parameters"]}))
    if args.push_to_hub is not None:
        push_folder(folder, args.push_to_hub, args.dry_run)
    return report


def write_merged(
    args: MergingArguments, config: ModernAlbertConfig, weights: list[list[float]] | None, folder: Path
) -> dict:
    """Fills a folder with the merged model, its report and its card; returns the report."""
    model, tokenizer = load_exportable(args.model_name_or_path, dtype="auto")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    calibration = load_calibration(args, tokenizer) if args.calibration_data else None
    validation, metrics = load_validation(args, config, tokenizer) if args.validation_data else (None, ())

    def merge(label: str) -> PreTrainedModel:
        method, per_depth = label.removesuffix(PER_DEPTH), label.endswith(PER_DEPTH)
        merged = copy.deepcopy(model)
        fold = args.format != "adapter" or method != args.method
        if not fold and config.num_experts == 1:  # an adapter already
            return merged
        count = args.num_experts if method == "cluster" else None
        return merged.merge_experts(
            *(method, fold),
            weights=weights,
            batches=calibration,
            rank=args.rank,
            num_experts=count,
            per_depth=per_depth,
        )

    methods = [args.method, *args.compare]
    if args.per_depth:  # beside the one fold for each group
        methods.insert(0, args.method + PER_DEPTH)
    chosen = merge(methods[0])
    report = {
        "model": redact(args.model_name_or_path),
        "method": args.method,
        "format": args.format,
        "rank": args.rank,
        "num_experts": args.num_experts,
        "per_depth": args.per_depth,
        "parameters": {"routed": model.num_parameters(), "merged": chosen.num_parameters()},
        "data": {
            name: redact(sources)
            for name, sources in (("calibration", args.calibration_data), ("validation", args.validation_data))
            if sources
        },
    }
    report |= measure(
        args,
        model,
        methods,
        lambda name: chosen if name == methods[0] else merge(name),
        calibration,
        validation,
        metrics,
    )
    chosen.cpu()
    if args.format == "adapter":
        write_adapter(chosen, tokenizer, folder)
    else:
        write_model(chosen, tokenizer, folder)
    write_merge_report(folder, report)
    name = args.push_to_hub or Path(args.output_dir).resolve().name
    write_merged_card(folder, name, type(model).__name__, args.model_name_or_path, report, args.license)
    return report


if __name__ == "__main__":
    run_script(main)
