"""Trains an encoder to retrieve, and scores it on a set in BEIR's format by exact search.

Zero-shot, with BM25 beside it, on any data set of the Hub in BEIR's layout:

    python scripts/run_beir.py --model_name_or_path runs/tiny-embedder --dataset BeIR/scifact --bm25 true \
        --max_seq_length 512 --output_dir runs/scifact

Training with in-batch negatives and two mined ones for each query, on a folder with corpus, queries and qrels; on a CPU:

    python scripts/run_beir.py --model_name_or_path runs/nano --dataset data/scifact --do_train \
        --num_negatives 2 --max_seq_length 128 --max_steps 50 --learning_rate 1e-4 --output_dir runs/scifact

The model is any encoder of the Auto classes, or a SentenceTransformer. The same command resumes a stopped run, in training
and in encoding. `model` in the output folder loads as a `SentenceTransformer` and in mteb, prompts included; several seeds
or learning rates write into folders of their own. `--peft` trains a LoRA, which is folded into `model` and also saved in
`adapter`. The router of a ModernALBERT is balanced with `router_aux_loss_coef`, as in every training.

Search holds one shard of the corpus at a time. If exact search is too slow, add `embeddings/model/*.safetensors` to an
index, in order: `index.add(load_file(shard)["embeddings"].numpy())` with `faiss.IndexHNSWFlat(width,
32, faiss.METRIC_INNER_PRODUCT)`.
"""

import copy
import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.util import mine_hard_negatives
from transformers import AutoModel


try:
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )
except ImportError:  # sentence-transformers 5
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss

import modernalbert  # noqa: F401  (registers the Auto classes)
from modernalbert.merging_modernalbert import METHODS
from modernalbert.training.callbacks import ROUTING_NAME, read_routing_weights
from modernalbert.training.cli import Count, Positive, run_script
from modernalbert.training.evaluation import retrieval
from modernalbert.training.evaluation.contrastive import BalancedLoss
from modernalbert.training.evaluation.task import Setup, Task, run_task
from modernalbert.training.export.cards import MERGED_NAME
from modernalbert.training.export.folder import draft_folder
from modernalbert.training.finetuning import CALIBRATION_ROWS, check_max_length, make_lora, write_tokenizer
from modernalbert.training.loading import check_folder, load_model
from modernalbert.training.packing import collate_batches, encode_texts
from modernalbert.training.runs import SETTINGS_NAME, describe_model, hash_file, write_files
from modernalbert.training.trainer import TrainerMixin


logger = logging.getLogger(__name__)

MAIN = "ndcg_at_10"
ONCE = "the model is scored once, after its training"


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
    max_seq_length: Count | None = field(
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
    temperature: Positive = field(default=0.05, metadata={"help": "Of the contrastive loss."})
    mini_batch_size: Count | None = field(
        default=None, metadata={"help": "Texts in memory at once (GradCache), so that batches may be large."}
    )
    bm25: bool = field(default=False, metadata={"help": "Score BM25 as well; it holds all documents in memory."})

    def __post_init__(self):
        if not 0 <= self.num_negatives <= 1000:
            raise ValueError(f"`num_negatives` ({self.num_negatives}) must be at least 0 and at most 1000")
        if self.mining_margin is not None and not 0 <= self.mining_margin < 1:
            raise ValueError(f"`mining_margin` ({self.mining_margin}) must be at least 0 and below 1")


class ContrastiveTrainer(TrainerMixin, SentenceTransformerTrainer):
    """Trainer of a SentenceTransformer, maybe with a LoRA in its encoder."""

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        # Private; seen in sentence-transformers 6.2 and transformers 5.24. Theirs builds a model without a LoRA. Only the
        # LoRA has changed since the start of the run.
        encoder = self.model[0].auto_model
        names = [name for name in encoder.state_dict() if "lora_" in name]
        if not names:
            return super()._load_from_checkpoint(resume_from_checkpoint)
        saved = load_file(Path(resume_from_checkpoint) / "model.safetensors")
        encoder.load_state_dict({name: saved[name] for name in names}, strict=False)


class RetrievalTask(Task):
    """A query to the documents that answer it; model and Trainer are those of sentence-transformers."""

    arguments = RetrievalArguments
    training_arguments = SentenceTransformerTrainingArguments
    # A query has several relevant documents: in one batch, each would be a negative of the other.
    defaults = {"batch_sampler": "no_duplicates", "warmup_steps": 0.1, "save_total_limit": 2}
    fixed = {
        "eval_strategy": ("no", ONCE),
        "load_best_model_at_end": (False, ONCE),
        "label_names": (None, "pairs have no labels"),
        "label_smoothing_factor": (0.0, "pairs have no classes to smooth"),
        "prompts": (None, "`query_prompt` and `document_prompt` are saved with the model as well"),
    }
    without_effect = ("bm25", "dataset", "train_dataset")
    peft_type = "FEATURE_EXTRACTION"

    def __init__(self, setup: Setup):
        args, tuning = setup.args, setup.tuning
        self.sets = {"validation": retrieval.load_retrieval(args.dataset, args.split, tuning.max_eval_samples)}
        if args.bm25 and not any(re.search(r"\w", text) for text in self.sets["validation"].corpus["text"]):
            raise ValueError(f"the documents of '{args.dataset}' have no word for `bm25` to find")
        if setup.training_args.do_train:
            source = args.train_dataset or args.dataset
            self.sets["train"] = retrieval.load_retrieval(source, args.train_split, tuning.max_train_samples)
            self.pairs_to_train = retrieval.make_pairs(self.sets["train"])
        rows = {split: data.judged for split, data in self.sets.items()}
        sources = {split: data.facts["source"] for split, data in self.sets.items()}
        name = f"{Path(args.dataset).name}, {args.split}"
        mining = {"mining_model": args.mining_model and describe_model(args.mining_model)}
        super().__init__(setup, name, list(retrieval.MEASURES), rows, sources, ["query"], mining)
        self.data = {split: data.facts for split, data in self.sets.items()}

    @classmethod
    def open(cls, args, tuning, training_args):
        if not training_args.do_train:
            for name in ("train_dataset", "num_negatives", "mining_model", "mini_batch_size"):
                if getattr(args, name):
                    raise ValueError(f"`{name}` is for training: give `do_train`, or leave it out")
        elif args.mining_model is not None and args.num_negatives == 0:
            raise ValueError("`mining_model` mines negatives: give `num_negatives`, or leave it out")
        if tuning.elastic_depth:
            raise ValueError("`elastic_depth` compares the outputs of a head, and an embedder has none: leave it out")
        if args.mining_model is not None:
            check_folder(args.mining_model)
        # SentenceTransformer would initialise missing tensors at random.
        if (Path(args.model_name_or_path) / "config.json").is_file():
            load_model(AutoModel, args.model_name_or_path, trust_remote_code=tuning.trust_remote_code)
        model = build_model(args, tuning, args.model_name_or_path, str(training_args.device))
        return Setup(args, tuning, training_args, model[0].auto_model.config, model.tokenizer)

    @classmethod
    def load(cls, setup):
        return [cls(setup)]

    def load_model(self, start):
        return build_model(self.setup.args, self.setup.tuning, start, str(self.setup.training_args.device)), []

    def add_lora(self, model, new):
        tuning, encoder = self.setup.tuning, model[0].auto_model
        for parameter in model.parameters():
            parameter.requires_grad = False
        # Puts the LoRA into the encoder itself.
        lora = make_lora(encoder, self.peft_type, new, tuning.peft_rank, tuning.peft_target_modules)
        self.adapter = get_peft_model(encoder, lora)
        return model

    def encoder(self, model):
        return model[0].auto_model

    def build_trainer(self, model, run, scored=False):
        args = self.setup.args
        with run.main_process_first():
            pairs = self.mine_pairs(model, run)
        logger.info("training on %d pairs with %d mined negatives each", len(pairs), args.num_negatives)
        prompts = {"query": model.prompts.get("query"), "document": model.prompts.get("document")}
        prompts |= {name: prompts["document"] for name in pairs.column_names if name not in prompts}
        run.prompts = {name: prompt for name, prompt in prompts.items() if prompt} or None
        options = {"scale": 1 / args.temperature, "gather_across_devices": run.world_size > 1}
        if args.mini_batch_size is None:
            loss = MultipleNegativesRankingLoss(model, **options)
        else:
            loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=args.mini_batch_size, **options)
        if getattr(model[0].auto_model.config, "router_aux_loss_coef", 0) > 0:
            loss = BalancedLoss(model, loss)
        return ContrastiveTrainer(model=model, args=run, train_dataset=pairs, loss=loss)

    def mine_pairs(self, model: SentenceTransformer, run: SentenceTransformerTrainingArguments) -> Dataset:
        """Queries, each with a relevant document and its mined negatives; a resumed run reads what it has mined before.

        Raises:
            ValueError: There are no negatives for any of them.
        """
        args, folder, data = self.setup.args, Path(run.output_dir), self.sets["train"]
        if args.num_negatives == 0:
            return self.pairs_to_train
        # The folder's settings, which are checked before, stand for all that the pairs depend on.
        path = folder / f"pairs-{hash_file(folder / SETTINGS_NAME)}.parquet"
        if path.is_file():
            return Dataset.from_parquet(str(path))
        miner = model
        if args.mining_model is not None:
            miner = SentenceTransformer(args.mining_model, trust_remote_code=self.setup.tuning.trust_remote_code)
        pairs = mine_hard_negatives(
            self.pairs_to_train,
            miner,
            corpus=[text for text in data.corpus["text"] if text],
            relative_margin=args.mining_margin,
            num_negatives=args.num_negatives,
            output_format="n-tuple",
            batch_size=run.per_device_eval_batch_size,
            verbose=False,
        )
        found, count = len(pairs), len(self.pairs_to_train)
        logger.info("%d of %d pairs have %d negatives; the others are left out", found, count, args.num_negatives)
        if found == 0:
            raise ValueError(
                f"no pair has {args.num_negatives} negatives; lower `num_negatives`, leave `mining_margin` "
                f"({args.mining_margin}) out, or mine with another `mining_model`"
            )
        write_files(folder, lambda draft: pairs.to_parquet(str(draft / path.name)))
        return pairs

    def save(self, trainer, folder):
        if isinstance(trainer.loss, BalancedLoss):
            trainer.loss.remove()
        model = trainer.model
        if self.setup.tuning.peft:  # SentenceTransformer loads the whole model, PEFT the adapter
            (folder / "adapter").mkdir(exist_ok=True)
            write_files(folder / "adapter", self.adapter.save_pretrained)
            model, _ = self.load_model(self.setup.model_name)
            PeftModel.from_pretrained(model[0].auto_model, folder / "adapter").merge_and_unload()
        save(model, self.saved(folder))

    def saved(self, folder):
        return folder / "model"

    def evaluate(self, model, run, folder):
        if not run.should_save:  # one process evaluates
            return {}, {}
        root = Path(run.output_dir)
        name = "model" if folder == root else folder.name
        if not run.do_train:
            save(model, root / name)
        data = self.sets["validation"]
        queries = retrieval.evaluate_model(model, data, root / "embeddings" / name, run.per_device_eval_batch_size)
        details = {f"{MAIN} of queries": {query: values[MAIN] for query, values in queries.items()}}
        return retrieval.mean_scores(queries), details

    def merge(self, trainer, model, folder):
        method = self.setup.tuning.merge_after
        merged = copy.deepcopy(model)
        encoder, batches, weights = merged[0].auto_model, None, None
        if METHODS[method].source == "given":
            weights = read_routing_weights(folder / ROUTING_NAME, encoder.config)
        if METHODS[method].source == "text":
            prompt = model.prompts.get("document") or ""
            texts = [prompt + text for text in self.sets["train"].corpus[:CALIBRATION_ROWS]["text"]]
            options = {"padding": True, "truncation": True, "max_length": model.max_seq_length, "return_tensors": "pt"}
            batches = collate_batches(
                texts,
                lambda part: encode_texts(model.tokenizer, part, **options).to(encoder.device),
                trainer.args.per_device_eval_batch_size,
            )
        encoder.eval().merge_experts(method, weights=weights, batches=batches)
        if trainer.args.should_save:
            save(merged, folder / MERGED_NAME)
        return merged

    @classmethod
    def score_baselines(cls, tasks):
        (task,) = tasks.values()
        if not task.setup.args.bm25:
            return {}
        return {"BM25": retrieval.mean_scores(retrieval.evaluate_bm25(task.sets["validation"]))}


def build_model(args: RetrievalArguments, tuning, start: str, device: str) -> SentenceTransformer:
    """The encoder with pooling and prompts, in float32.

    Raises:
        ValueError: `max_seq_length` exceeds what the model takes, or a file of the model is damaged.
    """
    check_folder(start)
    model = SentenceTransformer(
        start,
        device=device,
        trust_remote_code=tuning.trust_remote_code,
        config_kwargs={} if tuning.num_hidden_layers is None else {"num_hidden_layers": tuning.num_hidden_layers},
        model_kwargs={"dtype": "float32"},  # whatever the checkpoint holds, the master weights are float32
    )
    config = model[0].auto_model.config
    if tuning.router_aux_loss_coef is not None and getattr(config, "has_router", False):
        config.router_aux_loss_coef = tuning.router_aux_loss_coef
    if config.model_type == "modernalbert":  # the saved tokenizer says what the model takes
        model.tokenizer.model_max_length = min(model.tokenizer.model_max_length, config.max_position_embeddings)
    if args.pooling is not None:
        model[1] = type(model[1])(config.hidden_size, args.pooling)
    if args.max_seq_length is not None:
        check_max_length("max_seq_length", args.max_seq_length, model.tokenizer, config)
        model.max_seq_length = args.max_seq_length
    for kind, prompt in (("query", args.query_prompt), ("document", args.document_prompt)):
        if prompt is not None:
            model.prompts[kind] = prompt
    return model


def save(model: SentenceTransformer, folder: Path) -> None:
    """Writes the folder atomically, replacing an older one."""
    shutil.rmtree(folder, ignore_errors=True)
    with draft_folder(folder) as draft:
        model.save_pretrained(str(draft), create_model_card=False)  # theirs shows training texts, and no scores
        write_tokenizer(model.tokenizer, draft)


def main(argv: Sequence[str] | None = None) -> dict:
    """See [`run_task`]."""
    return run_task(RetrievalTask, argv, __doc__)


if __name__ == "__main__":
    run_script(main)
