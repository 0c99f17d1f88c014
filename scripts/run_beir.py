"""Trains an encoder to retrieve, and scores it on a set in BEIR's format by exact search.

Zero-shot, with BM25 beside it, on any data set of the Hub in BEIR's layout:

    python scripts/run_beir.py --model_name_or_path runs/tiny-embedder --dataset BeIR/scifact --bm25 true \
        --max_seq_length 512 --output_dir runs/scifact

Training with in-batch negatives and two mined ones for each query, on a folder with corpus, queries and qrels; on a CPU:

    python scripts/run_beir.py --model_name_or_path runs/nano --dataset shared/data/beir/scifact --do_train \
        --num_negatives 2 --max_seq_length 128 --max_steps 50 --learning_rate 1e-4 --output_dir runs/scifact

The same command goes on where it was stopped, in training as in encoding. `model` in the output folder is what
`SentenceTransformer` and mteb load, its prompts included; with `--seeds` there is one in each `seed-N`. Any encoder of
the Auto classes will do, and any SentenceTransformer.

Search holds one shard of the corpus at a time. Where exact search gets too slow, `embeddings/model/*.safetensors` go
into an index as they are, in order: `index.add(load_file(shard)["embeddings"].numpy())` with `faiss.IndexHNSWFlat(width,
32, faiss.METRIC_INNER_PRODUCT)`.
"""

import copy
import logging
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.util import mine_hard_negatives
from transformers import PreTrainedModel, set_seed


try:
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )
except ImportError:  # sentence-transformers 5
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss

import modernalbert  # noqa: F401  (registers the Auto classes)
from modernalbert.merging_modernalbert import METHODS
from modernalbert.training.arguments import parse_arguments
from modernalbert.training.checkpoints import check_output_dir, last_checkpoint, same_run, write_files
from modernalbert.training.export import draft_folder
from modernalbert.training.results import write_results
from modernalbert.training.retrieval import (
    MEASURES,
    RetrievalSet,
    evaluate_bm25,
    evaluate_model,
    load_retrieval,
    make_pairs,
    mean_scores,
)


logger = logging.getLogger(__name__)

# A query has several relevant documents: in one batch, each would be a negative of the other.
DEFAULTS = {"batch_sampler": "no_duplicates", "warmup_steps": 0.1, "logging_steps": 50, "save_total_limit": 2}

SETTINGS = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "weight_decay", "warmup_steps"),
    *("lr_scheduler_type", "max_steps", "num_train_epochs", "batch_sampler", "bf16", "fp16"),
)

# "ema" needs what a router did in training, "cluster" leaves experts.
MERGING = [name for name, (_, source) in METHODS.items() if source != "given" and name != "cluster"]
PAIRS_NAME = "pairs.parquet"
CALIBRATION_ROWS = 256
MAIN = "ndcg_at_10"


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


def describe_training(training_args: SentenceTransformerTrainingArguments) -> dict[str, Any]:
    """Those of transformers' arguments that the scores depend on."""
    values = training_args.to_dict()
    return {name: values[name] for name in SETTINGS}


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
    if args.merge_after is not None and not getattr(config, "has_router", False):
        raise ValueError(f"'{args.model_name_or_path}' has no experts to merge: leave `merge_after` out")
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
    model: SentenceTransformer, args: RetrievalArguments, training_args: SentenceTransformerTrainingArguments
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
    data = load_retrieval(args.train_dataset or args.dataset, args.train_split)
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
    model: SentenceTransformer, args: RetrievalArguments, training_args: SentenceTransformerTrainingArguments
) -> None:
    """Trains from the last complete checkpoint on, where there is one, and saves `model` into the output folder."""
    folder = Path(training_args.output_dir)
    with training_args.main_process_first():
        pairs = load_pairs(model, args, training_args)
    logger.info("training on %d pairs with %d mined negatives each", len(pairs), args.num_negatives)
    prompts = {"query": model.prompts.get("query"), "document": model.prompts.get("document")}
    prompts |= {name: prompts["document"] for name in pairs.column_names if name not in prompts}
    training_args.prompts = {name: prompt for name, prompt in prompts.items() if prompt} or None
    loss = {"scale": 1 / args.temperature, "gather_across_devices": training_args.world_size > 1}
    if args.mini_batch_size is None:
        loss = MultipleNegativesRankingLoss(model, **loss)
    else:
        loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=args.mini_batch_size, **loss)
    trainer = SentenceTransformerTrainer(model=model, args=training_args, train_dataset=pairs, loss=loss)
    checkpoint = last_checkpoint(folder)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    if training_args.should_save:
        save(model, folder / "model")


def save(model: SentenceTransformer, folder: Path) -> None:
    """Writes the folder, whole or not at all, in place of an older one."""
    shutil.rmtree(folder, ignore_errors=True)
    with draft_folder(folder) as draft:
        model.save_pretrained(str(draft))


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


def run(
    args: RetrievalArguments, training_args: SentenceTransformerTrainingArguments, data: RetrievalSet
) -> tuple[PreTrainedModel, dict[str, dict[str, dict[str, float]]]]:
    """Trains if asked to, and evaluates; nothing that an earlier run of the same command finished is done again.

    Returns:
        The model that was measured, and the measures of each query, of it and of its merged form.
    """
    set_seed(training_args.seed)
    folder, batch_size = check_output_dir(training_args.output_dir), training_args.per_device_eval_batch_size
    model = build_model(args, training_args)
    if training_args.do_train:
        same_run(folder, {**asdict(args), **describe_training(training_args), "seed": training_args.seed})
        if last_checkpoint(folder) is None or not (folder / "model").exists():
            train(model, args, training_args)
        if not training_args.should_save:  # one process evaluates
            return model[0].auto_model, {}
        model = build_model(replace(args, model_name_or_path=str(folder / "model")), training_args)
    else:
        save(model, folder / "model")
    measures = {"model": evaluate_model(model, data, folder / "embeddings" / "model", batch_size)}
    if args.merge_after is not None:
        merged = merge(model, args.merge_after, data, batch_size)
        save(merged, folder / "merged")
        measures["merged"] = evaluate_model(merged, data, folder / "embeddings" / "merged", batch_size)
    return model[0].auto_model, measures


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Trains if asked to, evaluates, and writes model, embeddings and `results.json`; returns the scores."""
    args, training_args = parse_arguments(
        (RetrievalArguments, SentenceTransformerTrainingArguments), argv, DEFAULTS, __doc__
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    check_training(args, training_args)
    output_dir = check_output_dir(training_args.output_dir)
    data = load_retrieval(args.dataset, args.split)

    systems = defaultdict(list)  # measures of each query, for each seed
    seeds = args.seeds or [training_args.seed]
    for seed in seeds:
        own = copy.copy(training_args)
        own.seed, own.output_dir = seed, str(output_dir / f"seed-{seed}" if args.seeds else output_dir)
        model, measures = run(args, own, data)
        for name, queries in measures.items():
            systems[name].append(queries)
    if not training_args.should_save:
        return {}
    if args.bm25:
        systems["bm25"] = [evaluate_bm25(data)]

    scores, by_seed, by_query = {}, {}, {}
    for name, repeats in systems.items():
        by_seed[name] = [mean_scores(queries) for queries in repeats]
        by_query[name] = {query: float(np.mean([queries[query][MAIN] for queries in repeats])) for query in data.qrels}
        means = {measure: float(np.mean([each[measure] for each in by_seed[name]])) for measure in MEASURES}
        scores |= {measure if name == "model" else f"{name}_{measure}": value for measure, value in means.items()}
        logger.info("%-8s%s", name, "".join(f"{measure:>16}: {value:.4f}" for measure, value in means.items()))
    write_results(
        output_dir,
        task=f"{Path(args.dataset).name}, {args.split}",
        model_name=args.model_name_or_path,
        model=model,
        scores=scores,
        data=data.facts,
        seeds=seeds,
        settings={
            **{name: value for name, value in asdict(args).items() if name not in ("model_name_or_path", "seeds")},
            **(describe_training(training_args) if training_args.do_train else {}),
        },
        details={"seeds": by_seed, f"{MAIN} of queries": by_query},
    )
    return scores


if __name__ == "__main__":
    main()
