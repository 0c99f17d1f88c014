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
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from huggingface_hub.utils import validate_repo_id
from transformers import AutoConfig, AutoTokenizer, DataCollatorWithPadding, PreTrainedModel

import modernalbert
from modernalbert.merging_modernalbert import METHODS, check_mergeable
from modernalbert.training.cli import parse_arguments
from modernalbert.training.data import (
    PackedCollator,
    TokenMasker,
    load_labelled,
    load_texts,
    mask_rows,
    pack_texts,
)
from modernalbert.training.export.cards import clean, write_merged_card
from modernalbert.training.export.folder import draft_folder, new_folder, push_folder, write_model
from modernalbert.training.reports.merging import (
    compare_methods,
    describe_experts,
    evaluate,
    read_routing_weights,
    states_by_depth,
    tabulate,
    write_adapter,
    write_merge_report,
)


logger = logging.getLogger(__name__)

FORMATS = ("folded", "adapter", "routed")
BATCH_SIZE = 16


@dataclass
class MergingArguments:
    """What to merge, how, and on which texts to look at it."""

    model_name_or_path: str = field(metadata={"help": "Hub name or folder of a ModernALBERT with experts."})
    output_dir: str = field(metadata={"help": "Folder to write; must not exist, or be empty."})
    method: str = field(default="uniform", metadata={"help": f"Merging method: {', '.join(METHODS)}."})
    format: str = field(
        default="folded",
        metadata={"help": "folded: into the shared weights; adapter: beside them, for PEFT; routed: fewer experts."},
    )
    rank: int | None = field(
        default=None,
        metadata={
            "help": "Rank of the adapter; default: the experts', for frequency and regression, folded, no limit."
        },
    )
    num_experts: int | None = field(default=None, metadata={"help": "Experts that method `cluster` leaves."})
    calibration_data: list[str] = field(
        default_factory=list, metadata={"help": "Texts to see routing on: files, globs or data sets of the Hub."}
    )
    calibration_rows: int = field(default=128, metadata={"help": "Packed rows of calibration text to take."})
    routing_weights: str | None = field(
        default=None, metadata={"help": "routing_weights.json of the training, for `ema`, `svd` and `cat`."}
    )
    compare: list[str] = field(default_factory=list, metadata={"help": "Further methods to report on."})
    validation_data: list[str] = field(
        default_factory=list,
        metadata={"help": "Texts for the masked-LM loss; for a sequence classifier files of labelled rows."},
    )
    max_eval_samples: int | None = field(default=None, metadata={"help": "Rows to evaluate on; default: all."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the texts."})
    text_columns: list[str] = field(
        default_factory=lambda: ["text"], metadata={"help": "Of labelled rows: one or two columns with the texts."}
    )
    label_column: str = field(default="label", metadata={"help": "Of labelled rows: integer classes, or floats."})
    max_length: int = field(default=128, metadata={"help": "Tokens of a packed row; longer labelled texts are cut."})
    mlm_probability: float = field(default=0.3, metadata={"help": "Share of tokens that is masked to evaluate."})
    seed: int = field(default=42, metadata={"help": "Of masks and of the choice of calibration text."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Repository to upload the folder to."})
    dry_run: bool = field(default=False, metadata={"help": "List what would be uploaded, and upload nothing."})
    license: str = field(default="apache-2.0", metadata={"help": "Licence of the weights, for the model card."})

    def __post_init__(self):
        methods = [self.method, *self.compare]
        for method in methods:
            if method not in METHODS:
                raise ValueError(f"there is no merging method '{method}'; the methods are {', '.join(METHODS)}")
            source = METHODS[method][1]
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
        if self.push_to_hub is not None:
            validate_repo_id(self.push_to_hub)
        elif self.dry_run:
            raise ValueError("`dry_run` shows what `push_to_hub` would upload: give both")


def load_calibration(args: MergingArguments, tokenizer) -> list[dict]:
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
    return batched(rows, PackedCollator(tokenizer))


def load_validation(args: MergingArguments, model: PreTrainedModel, tokenizer) -> tuple[list[dict], tuple[str, ...]]:
    """Batches with labels, and the names of the metrics; none for the masked-LM loss.

    Raises:
        ValueError: The model has another head, or a class that the model does not know is in the data.
    """
    head = type(model).__name__
    if head == "ModernAlbertForMaskedLM":
        texts = load_texts(args.validation_data, "validation", args.text_column)
        rows = pack_texts(texts, tokenizer, args.max_length, args.text_column)
        rows = rows.select(range(min(len(rows), args.max_eval_samples or len(rows))))
        masker = TokenMasker(tokenizer, args.mlm_probability, args.seed)
        return batched(mask_rows(rows, masker), PackedCollator(tokenizer)), ()
    if head != "ModernAlbertForSequenceClassification":
        raise ValueError(
            f"`validation_data` is for masked language models and sequence classifiers, not for a {head}; leave it out"
        )
    rows = load_labelled(args.validation_data, args.text_columns, args.label_column)
    rows = rows.select(range(min(len(rows), args.max_eval_samples or len(rows))))
    regression = isinstance(rows[0]["label"], float)
    if not regression and max(rows["label"]) >= model.num_labels:
        raise ValueError(f"`validation_data` has the class {max(rows['label'])}, the model has {model.num_labels}")

    def encode(part):
        texts = (part[column] for column in args.text_columns)
        return {**tokenizer(*texts, truncation=True, max_length=args.max_length), "labels": part["label"]}

    encoded = rows.map(encode, batched=True, remove_columns=rows.column_names, desc="Tokenising")
    metrics = ("pearson", "spearman") if regression else ("accuracy",)
    return batched(encoded, DataCollatorWithPadding(tokenizer)), metrics


def batched(rows, collate) -> list[dict]:
    """Rows as batches of a collator."""
    rows = list(rows)
    return [dict(collate(rows[start : start + BATCH_SIZE])) for start in range(0, len(rows), BATCH_SIZE)]


def measure(args: MergingArguments, model: PreTrainedModel, merge, calibration, validation, metrics) -> dict:
    """What the report says beside the facts of the command; what could not be measured, under `not_measured`."""
    report = {"methods": {}, "not_measured": []}
    if calibration is None:
        report["not_measured"].append("usage and similarity of the experts; give `calibration_data`")
    else:
        report["experts"] = describe_experts(model, states_by_depth(model, calibration))
    if validation is None:
        report["not_measured"].append("the loss or the metric of the task; give `validation_data`")
    # Text that no method was fitted to, where there is some.
    batches = calibration if validation is None else validation[: -(-args.calibration_rows // BATCH_SIZE)]
    if batches is None:
        report["not_measured"].append("errors of merged layers; give `calibration_data` or `validation_data`")
        return report
    report["error_text"] = "calibration" if validation is None else "validation"
    score = None if validation is None else lambda scored: evaluate(scored, validation, metrics)
    states = states_by_depth(model, batches)
    return report | compare_methods(model, [args.method, *args.compare], merge, states, score)


def main(argv: Sequence[str] | None = None) -> dict:
    """Loads, merges, measures, writes, checks and uploads; returns the report.

    Raises:
        FileExistsError: `output_dir` is not empty.
        ValueError: The model is no ModernALBERT or has no experts, arguments do not go together, or a file to upload is
            not for the public.
    """
    (args,) = parse_arguments((MergingArguments,), argv, description=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    folder = new_folder(args.output_dir)
    config = AutoConfig.from_pretrained(args.model_name_or_path)
    if config.model_type != "modernalbert":
        raise ValueError(f"'{args.model_name_or_path}' is a {config.model_type}; only ModernALBERT has experts")
    check_mergeable(config, text=bool(args.calibration_data or args.validation_data))
    weights = read_routing_weights(args.routing_weights, config) if args.routing_weights else None
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = getattr(modernalbert, config.architectures[0]).from_pretrained(args.model_name_or_path)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    calibration = load_calibration(args, tokenizer) if args.calibration_data else None
    validation, metrics = load_validation(args, model, tokenizer) if args.validation_data else (None, ())

    def merge(method: str) -> PreTrainedModel:
        merged = copy.deepcopy(model)
        fold = args.format != "adapter" or method != args.method
        if not fold and config.num_experts == 1:  # an adapter already
            return merged
        count = args.num_experts if method == "cluster" else None
        return merged.merge_experts(
            method, fold, weights=weights, batches=calibration, rank=args.rank, num_experts=count
        )

    chosen = merge(args.method)
    report = {
        "model": clean(args.model_name_or_path),
        "method": args.method,
        "format": args.format,
        "rank": args.rank,
        "num_experts": args.num_experts,
        "parameters": {"routed": model.num_parameters(), "merged": chosen.num_parameters()},
        "data": {
            name: clean(sources)
            for name, sources in (("calibration", args.calibration_data), ("validation", args.validation_data))
            if sources
        },
    }
    report |= measure(
        args, model, lambda name: chosen if name == args.method else merge(name), calibration, validation, metrics
    )
    chosen.cpu()
    with draft_folder(folder) as draft:
        if args.format == "adapter":
            write_adapter(chosen, tokenizer, draft)
        else:
            write_model(chosen, tokenizer, draft)
        write_merge_report(draft, report)
        name = args.push_to_hub or folder.name
        write_merged_card(draft, name, type(model).__name__, args.model_name_or_path, report, args.license)
    if report["methods"]:
        logger.info("\n%s", "\n".join("".join(f"{cell:>18}" for cell in row) for row in tabulate(report)))
    for reason in report["not_measured"]:
        logger.info("not measured: %s", reason)
    logger.info("%s", json.dumps({"folder": str(folder), "method": args.method, **report["parameters"]}))
    if args.push_to_hub is not None:
        push_folder(folder, args.push_to_hub, [Path(args.model_name_or_path)], args.dry_run)
    return report


if __name__ == "__main__":
    main()
