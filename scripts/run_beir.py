"""Trains an encoder to retrieve, and scores it on a set in BEIR's format by exact search.

Zero-shot, with BM25 beside it, on any data set of the Hub in BEIR's layout:

    python scripts/run_beir.py --model_name_or_path runs/tiny-embedder --dataset BeIR/scifact --bm25 true \
        --max_seq_length 512 --output_dir runs/scifact

Training with in-batch negatives and two mined ones for each query, on a folder with corpus, queries and qrels; on a CPU:

    python scripts/run_beir.py --model_name_or_path runs/nano --dataset data/scifact --do_train \
        --num_negatives 2 --max_seq_length 128 --max_steps 50 --learning_rate 1e-4 --output_dir runs/scifact

The same command goes on where it was stopped, in training as in encoding. `model` in the output folder is what
`SentenceTransformer` and mteb load, its prompts included; with `--seeds` there is one in each `seed-N`. Any encoder of
the Auto classes will do, and any SentenceTransformer.

Search holds one shard of the corpus at a time. Where exact search gets too slow, `embeddings/model/*.safetensors` go
into an index as they are, in order: `index.add(load_file(shard)["embeddings"].numpy())` with `faiss.IndexHNSWFlat(width,
32, faiss.METRIC_INNER_PRODUCT)`.
"""

import copy
import json
import logging
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.util import mine_hard_negatives
from transformers import set_seed


try:
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )
except ImportError:  # sentence-transformers 5
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss

import modernalbert  # noqa: F401  (registers the Auto classes)
from modernalbert.merging_modernalbert import METHODS, check_mergeable
from modernalbert.training.cli import parse_arguments
from modernalbert.training.evaluation.results import describe_model, read_finished, summarise, write_results
from modernalbert.training.evaluation.retrieval import (
    RetrievalSet,
    evaluate_bm25,
    evaluate_model,
    load_retrieval,
    make_pairs,
    mean_scores,
)
from modernalbert.training.export.cards import write_finetuned_cards
from modernalbert.training.export.folder import draft_folder
from modernalbert.training.finetuning import train_to_the_end, write_tokenizer
from modernalbert.training.runs import RESULTS_NAME, last_checkpoint, write_files, write_text


logger = logging.getLogger(__name__)

# A query has several relevant documents: in one batch, each would be a negative of the other.
DEFAULTS = {"batch_sampler": "no_duplicates", "warmup_steps": 0.1, "logging_steps": 50, "save_total_limit": 2}

SETTINGS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay", "warmup_steps"),
    *("lr_scheduler_type", "max_steps", "num_train_epochs", "batch_sampler", "bf16", "fp16", "optim", "adam_beta1"),
    *("adam_beta2", "adam_epsilon", "max_grad_norm"),
)

# "ema" needs what a router did in training, "cluster" leaves experts.
MERGING = [name for name, (_, source) in METHODS.items() if source != "given" and name != "cluster"]
PAIRS_NAME = "pairs.parquet"
CALIBRATION_ROWS = 256
MAIN = "ndcg_at_10"
QUERIES = f"{MAIN} of queries"


@dataclass
class RetrievalArguments:
    """Which model, on which set, trained on what."""

    model_name_or_path: str = field(metadata={"help": "Hub name or folder: any encoder, or a SentenceTransformer."})
    dataset: str = field(metadata={"help": "Set to evaluate on: Hub name in BEIR's layout, or folder."})
    split: str = field(default="test", metadata={"help": "Judgements to evaluate on."})
    train_dataset: str | None = field(default=None, metadata={"help": "Set to train on; default: `dataset`."})
    train_split: str = field(default="train", metadata={"help": "Judgements to train on."})
    pooling: str | None = field(
        default=None, metadata={"help": "mean, cls, max, ...; default: the SentenceTransformer's own, else mean."}
    )
    max_seq_length: int | None = field(
        default=None, metadata={"help": "Longest text in tokens; default: the model's."}
    )
    query_prompt: str | None = field(default=None, metadata={"help": "Text before every query; saved with the model."})
    document_prompt: str | None = field(default=None, metadata={"help": "Text before every document; saved as well."})
    num_negatives: int = field(default=0, metadata={"help": "Mined negatives of a query, beside those in its batch."})
    mining_model: str | None = field(
        default=None, metadata={"help": "SentenceTransformer to mine with; default: the model that is trained."}
    )
    mining_margin: float | None = field(
        default=None,
        metadata={"help": "Mined: at least this share less similar than the positive, 0.05 with a good miner."},
    )
    temperature: float = field(default=0.05, metadata={"help": "Of the contrastive loss."})
    mini_batch_size: int | None = field(
        default=None, metadata={"help": "Texts in memory at once (GradCache), so that batches may be large."}
    )
    seeds: list[int] = field(default_factory=list, metadata={"help": "One training run for each; default: `seed`."})
    merge_after: str | None = field(
        default=None, metadata={"help": f"Score the model with merged experts as well: {', '.join(MERGING)}."}
    )
    bm25: bool = field(default=False, metadata={"help": "Score BM25 as well; it holds all documents in memory."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the model's own code from the Hub."})

    def __post_init__(self):
        if self.merge_after is not None and self.merge_after not in MERGING:
            raise ValueError(
                f"there is no `merge_after` method '{self.merge_after}'; give one of {', '.join(MERGING)}"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` {self.seeds} names a run twice")
        if self.temperature <= 0:
            raise ValueError(f"`temperature` ({self.temperature}) must be positive")
        for name, least in (("num_negatives", 0), ("mini_batch_size", 1), ("max_seq_length", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` ({value}) must be at least {least}")


def check_training(args: RetrievalArguments, training_args: SentenceTransformerTrainingArguments) -> None:
    """Sees, before any work, that the arguments go together.

    Raises:
        ValueError: They do not.
    """
    if training_args.push_to_hub:
        raise ValueError("`push_to_hub` would upload checkpoints; upload the folder `model` with `hf upload`")
    if training_args.do_train and training_args.n_gpu > 1:
        raise ValueError(
            f"{training_args.n_gpu} GPUs are visible to one process; start one process for each, with `torchrun "
            f"--nproc_per_node {training_args.n_gpu} scripts/run_beir.py ...`"
        )
    if not training_args.do_train:
        for name in ("train_dataset", "num_negatives", "mining_model", "mini_batch_size", "seeds"):
            if getattr(args, name):
                raise ValueError(f"`{name}` is for training: give `do_train`, or leave it out")
    elif args.mining_model is not None and args.num_negatives == 0:
        raise ValueError("`mining_model` mines negatives: give `num_negatives`, or leave it out")


def build_model(args: RetrievalArguments, training_args: SentenceTransformerTrainingArguments) -> SentenceTransformer:
    """The encoder with pooling and prompts, in float32.

    Raises:
        ValueError: `max_seq_length` exceeds what the model takes, or there are no experts to merge.
    """
    model = SentenceTransformer(
        args.model_name_or_path,
        device=str(training_args.device),
        trust_remote_code=args.trust_remote_code,
        model_kwargs={"dtype": "float32"},  # whatever the checkpoint holds, the master weights are float32
    )
    config = model[0].auto_model.config
    if args.merge_after is not None:
        if not getattr(config, "has_router", False):
            raise ValueError(f"'{args.model_name_or_path}' has no experts to merge: leave `merge_after` out")
        check_mergeable(config, text=METHODS[args.merge_after][1] == "text")
    if args.pooling is not None:
        model[1] = type(model[1])(config.hidden_size, args.pooling)
    if args.max_seq_length is not None:
        longest = getattr(config, "max_position_embeddings", args.max_seq_length)
        if args.max_seq_length > longest:
            raise ValueError(
                f"`max_seq_length` ({args.max_seq_length}) exceeds the model's `max_position_embeddings` ({longest})"
            )
        model.max_seq_length = args.max_seq_length
    for kind, prompt in (("query", args.query_prompt), ("document", args.document_prompt)):
        if prompt is not None:
            model.prompts[kind] = prompt
    return model


def load_pairs(
    model: SentenceTransformer,
    args: RetrievalArguments,
    training_args: SentenceTransformerTrainingArguments,
    data: RetrievalSet,
) -> Dataset:
    """Queries, each with a relevant document and its mined negatives; a resumed run reads what it has mined before.

    Raises:
        ValueError: There are no pairs, or no negatives for any of them.
    """
    folder = Path(training_args.output_dir)
    path = folder / PAIRS_NAME
    first = training_args.local_process_index == 0
    if path.is_file() and not (first and last_checkpoint(folder) is None):  # of this very run
        return Dataset.from_parquet(str(path))
    pairs = make_pairs(data)
    if args.num_negatives > 0:
        miner = model
        if args.mining_model is not None:
            miner = SentenceTransformer(args.mining_model, trust_remote_code=args.trust_remote_code)
        mined = mine_hard_negatives(
            pairs,
            miner,
            corpus=[text for text in data.corpus["text"] if text],
            relative_margin=args.mining_margin,
            num_negatives=args.num_negatives,
            output_format="n-tuple",
            batch_size=training_args.per_device_eval_batch_size,
            verbose=False,
        )
        logger.info(
            "%d of %d pairs have %d negatives; the others are left out", len(mined), len(pairs), args.num_negatives
        )
        if len(mined) == 0:
            raise ValueError(
                f"no pair has {args.num_negatives} negatives; lower `num_negatives`, leave `mining_margin` "
                f"({args.mining_margin}) out, or mine with another `mining_model`"
            )
        pairs = mined
    write_files(folder, lambda draft: pairs.to_parquet(str(draft / path.name)))
    return pairs


def train(
    model: SentenceTransformer,
    args: RetrievalArguments,
    training_args: SentenceTransformerTrainingArguments,
    data: RetrievalSet,
) -> None:
    """Trains from the last complete checkpoint on, where there is one, and saves `model` into the output folder.

    Raises:
        SystemExit: Ctrl-C or SIGTERM stopped the run, after its checkpoint was written.
    """
    folder = Path(training_args.output_dir)
    with training_args.main_process_first():
        pairs = load_pairs(model, args, training_args, data)
    logger.info("training on %d pairs with %d mined negatives each", len(pairs), args.num_negatives)
    prompts = {"query": model.prompts.get("query"), "document": model.prompts.get("document")}
    prompts |= {name: prompts["document"] for name in pairs.column_names if name not in prompts}
    training_args.prompts = {name: prompt for name, prompt in prompts.items() if prompt} or None
    loss = {"scale": 1 / args.temperature, "gather_across_devices": training_args.world_size > 1}
    if args.mini_batch_size is None:
        loss = MultipleNegativesRankingLoss(model, **loss)
    else:
        loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=args.mini_batch_size, **loss)
    train_to_the_end(SentenceTransformerTrainer(model=model, args=training_args, train_dataset=pairs, loss=loss))
    if training_args.should_save:
        save(model, folder / "model")


def save(model: SentenceTransformer, folder: Path) -> None:
    """Writes the folder, whole or not at all, in place of an older one."""
    shutil.rmtree(folder, ignore_errors=True)
    with draft_folder(folder) as draft:
        model.save_pretrained(str(draft), create_model_card=False)  # theirs shows training texts, and no scores
        write_tokenizer(model.tokenizer, draft)


def merge(model: SentenceTransformer, method: str, data: RetrievalSet, batch_size: int) -> SentenceTransformer:
    """A copy with merged experts; methods that look at text see the first documents of the corpus."""
    merged = copy.deepcopy(model)
    batches = None
    if METHODS[method][1] == "text":
        prompt = model.prompts.get("document") or ""
        rows = data.corpus[:CALIBRATION_ROWS]["text"]
        options = {"padding": True, "truncation": True, "max_length": model.max_seq_length, "return_tensors": "pt"}
        batches = [
            dict(model.tokenizer([prompt + text for text in rows[start : start + batch_size]], **options))
            for start in range(0, len(rows), batch_size)
        ]
    merged[0].auto_model.merge_experts(method, batches=batches)
    return merged


def execute(
    args: RetrievalArguments,
    training_args: SentenceTransformerTrainingArguments,
    data: RetrievalSet,
    train_data: RetrievalSet | None,
) -> dict[str, Any] | None:
    """One run: trains if asked to, and evaluates; nothing that an earlier run of the same command finished is done again.

    Returns:
        What `results.json` in its folder holds, or held already; None in all processes but the first.
    """
    folder, batch_size = Path(training_args.output_dir), training_args.per_device_eval_batch_size
    facts = {"evaluation": data.facts} | ({} if train_data is None else {"train": train_data.facts})
    others = ("seeds", "bm25", "dataset", "train_dataset")
    settings = {name: value for name, value in asdict(args).items() if name not in others}
    for name in ("model_name_or_path", "mining_model"):
        settings[name] = settings[name] and describe_model(settings[name])
    settings |= {"seed": training_args.seed, "data": {part: each["fingerprint"] for part, each in facts.items()}}
    if training_args.do_train:
        values = training_args.to_dict()
        settings |= {name: values[name] for name in SETTINGS}
    if (results := read_finished(folder, settings)) is not None:
        logger.info("'%s' holds a finished run", folder)
        return results
    set_seed(training_args.seed)
    model = build_model(args, training_args)
    if training_args.do_train:
        if last_checkpoint(folder) is None or not (folder / "model").exists():
            train(model, args, training_args, train_data)
        if not training_args.should_save:  # one process evaluates
            return None
        model = build_model(replace(args, model_name_or_path=str(folder / "model")), training_args)
    else:
        save(model, folder / "model")
    queries = evaluate_model(model, data, folder / "embeddings" / "model", batch_size)
    scores = mean_scores(queries)
    details = {QUERIES: {query: values[MAIN] for query, values in queries.items()}}
    if args.merge_after is not None:
        merged = merge(model, args.merge_after, data, batch_size)
        save(merged, folder / "merged")
        queries = evaluate_model(merged, data, folder / "embeddings" / "merged", batch_size)
        scores |= {f"merged_{name}": value for name, value in mean_scores(queries).items()}
        details[f"merged {QUERIES}"] = {query: values[MAIN] for query, values in queries.items()}
        details["merged_parameters"] = merged[0].auto_model.num_parameters()
    facts = {
        "task": f"{Path(args.dataset).name}, {args.split}",
        "model_name": args.model_name_or_path,
        "model": model[0].auto_model,
        "scores": scores,
        "data": facts,
        "seed": training_args.seed,
        "settings": settings,
        "details": details,
    }
    if training_args.do_train:
        write_finetuned_cards(folder, **facts)
    return write_results(folder, **facts)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Trains if asked to, evaluates, and writes model, embeddings and `results.json`; returns what the latter holds.

    Raises:
        SystemExit: Ctrl-C or SIGTERM stopped a run, after its checkpoint was written.
        ValueError: Arguments do not go together, or the data is broken.
    """
    args, training_args = parse_arguments(
        (RetrievalArguments, SentenceTransformerTrainingArguments), argv, DEFAULTS, __doc__
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    check_training(args, training_args)
    output_dir = Path(training_args.output_dir)
    runs = []
    for seed in args.seeds or [training_args.seed]:
        own = copy.copy(training_args)
        own.seed, own.output_dir = seed, str(output_dir / f"seed-{seed}" if args.seeds else output_dir)
        runs.append(own)
    with training_args.main_process_first():
        data, train_data = load_retrieval(args.dataset, args.split), None
        if training_args.do_train:
            train_data = load_retrieval(args.train_dataset or args.dataset, args.train_split)
    results = [execute(args, own, data, train_data) for own in runs]
    if not training_args.should_save:
        return {}
    summary = summarise(results) if args.seeds else results[0]
    if args.seeds:  # means over the seeds, to compare models query by query
        for name in (name for name in results[0]["details"] if name.endswith(QUERIES)):
            each = [result["details"][name] for result in results]
            summary["details"][name] = {query: statistics.mean(run[query] for run in each) for query in each[0]}
    if args.bm25 and "baselines" not in summary["details"]:
        summary["details"]["baselines"] = {"BM25": mean_scores(evaluate_bm25(data))}
    write_text(output_dir / RESULTS_NAME, json.dumps(summary, indent=1))
    logger.info("%s", json.dumps({**summary["scores"], **summary["details"].get("baselines", {})}))
    return summary


if __name__ == "__main__":
    main()
