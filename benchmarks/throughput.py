"""Training throughput of `scripts/pretrain.py`'s Trainer beside a plain Trainer on transformers' ModernBERT.

    python benchmarks/throughput.py --tokenizer answerdotai/ModernBERT-base --train_data "prose/*.parquet"

Both train on the same packed rows, with the same depth, widths, vocabulary, batch, optimizer and masking rate, the head
at masked positions only. The plain run is transformers' own: its collator masks, and the sequences of a row see each
other. Rounds alternate, and each figure is the median over the steps of all rounds. `routed` has the Mixture of LoRAs of
the preset in the last two groups, at the same width.
"""

import statistics
import tempfile
import time
from argparse import ArgumentParser

import torch
from common import count, describe_machine, format_table, synchronise
from transformers import (
    DataCollatorForLanguageModeling,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from modernalbert import ModernAlbertConfig, ModernAlbertForMaskedLM
from modernalbert.tokenization import load_tokenizer, padded_vocab_size
from modernalbert.training.cli import run_script
from modernalbert.training.data import load_texts
from modernalbert.training.packing import PackedCollator, TokenMasker, pack_texts
from modernalbert.training.pretraining import PretrainingTrainer


class StepTimes(TrainerCallback):
    """Seconds from the end of one step to the end of the next; the first two steps warm up."""

    def __init__(self, seconds: list[float]):
        self.seconds = seconds

    def on_step_end(self, args, state, control, **kwargs):
        synchronise()
        now = time.perf_counter()
        if state.global_step > 2:
            self.seconds.append(now - self.before)
        self.before = now


def build(args, tokenizer) -> dict:
    """The three models, by name."""
    tokens = {name: getattr(tokenizer, name) for name in ("pad_token_id", "cls_token_id", "sep_token_id")}
    shared = {
        "vocab_size": padded_vocab_size(tokenizer),
        "hidden_size": args.hidden_size,
        "intermediate_size": args.intermediate_size,
        "num_attention_heads": args.hidden_size // 64,
        "num_hidden_layers": args.num_hidden_layers,
        "sparse_prediction": True,
        **tokens,
    }
    recursive = {"num_hidden_groups": args.num_hidden_layers // 2, "mol_intermediate_size": args.intermediate_size}
    bert = {"bos_token_id": tokens["cls_token_id"], "eos_token_id": tokens["sep_token_id"]}
    return {
        "ModernBERT, plain Trainer": ModernBertForMaskedLM(ModernBertConfig(**shared, **bert)),
        "ModernALBERT, no experts": ModernAlbertForMaskedLM(
            ModernAlbertConfig(**shared, **recursive, **bert, num_experts=0)
        ),
        "ModernALBERT, routed": ModernAlbertForMaskedLM(ModernAlbertConfig(**shared, **recursive, **bert)),
    }


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--train_data", nargs="+", required=True)
    parser.add_argument("--hidden_size", type=count, default=384)
    parser.add_argument("--intermediate_size", type=count, default=576)
    parser.add_argument("--num_hidden_layers", type=count, default=12)
    parser.add_argument("--max_length", type=count, default=512)
    parser.add_argument("--batch_size", type=count, default=4)
    parser.add_argument("--steps", type=count, default=8, help="of a round")
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args(argv)

    tokenizer = load_tokenizer(args.tokenizer)
    texts = load_texts(args.train_data)
    rows = pack_texts(texts.select(range(min(20_000, len(texts)))), tokenizer, args.max_length)
    rows = rows.filter(lambda row: len(row["input_ids"]) == args.max_length)
    models = build(args, tokenizer)
    seconds = {name: [] for name in models}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            for name, model in models.items():
                training_args = TrainingArguments(
                    output_dir=folder,
                    per_device_train_batch_size=args.batch_size,
                    max_steps=args.steps,
                    learning_rate=1e-4,
                    bf16=args.bf16,
                    use_cpu=not torch.cuda.is_available(),
                    dataloader_pin_memory=torch.cuda.is_available(),
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    logging_strategy="no",
                )
                shared = {"model": model, "args": training_args, "train_dataset": rows}
                if isinstance(model, ModernBertForMaskedLM):
                    trainer = Trainer(
                        **shared, data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)
                    )
                else:
                    training_args.remove_unused_columns = False
                    trainer = PretrainingTrainer(
                        **shared, data_collator=PackedCollator(tokenizer), masker=TokenMasker(tokenizer)
                    )
                trainer.add_callback(StepTimes(seconds[name]))
                trainer.train()

    tokens = args.batch_size * args.max_length
    baseline = statistics.median(seconds["ModernBERT, plain Trainer"])
    about = [f"{args.num_hidden_layers} x {args.hidden_size}/{args.intermediate_size}"]
    about += [f"{args.batch_size} rows of {args.max_length} tokens", f"vocabulary {padded_vocab_size(tokenizer)}"]
    print(", ".join(about + [f"{key} {value}" for key, value in describe_machine().items()]) + "\n")
    rows = []
    for name, model in models.items():
        step, size = statistics.median(seconds[name]), model.num_parameters() / 1e6
        rows.append([name, f"{size:.1f}M", f"{step:.3f}", f"{tokens / step:,.0f}", f"{baseline / step:.2f}"])
    print(format_table(["", "parameters", "seconds per step", "tokens/s", "throughput"], rows))


if __name__ == "__main__":
    run_script(main)
