"""How often a masked language model names the word that was masked: one word of each sentence, models beside each other.

    python benchmarks/fill_mask.py --models checkpoints/modernalbert-nano runs/quickstart-pretraining/pretrained \
        --text data/corpus/validation.parquet data/corpus/wikitext103_validation.parquet --train_text "runs/nano-texts/*.jsonl"

The word is one that all models have as a single token, so that all answer the same question, without regard to case.
`unigram` always names the commonest word of `--train_text`. Ten sentences and the first answers to them are printed below
the table. Output is Markdown.
"""

import random
import re
from argparse import ArgumentParser
from collections import Counter
from pathlib import Path

import torch
from common import count, describe_machine, format_table
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForMaskedLM, AutoTokenizer, PreTrainedTokenizerBase

import modernalbert  # noqa: F401  (registers the Auto classes)
from modernalbert.training.cli import run_script
from modernalbert.training.data import load_texts


SENTENCES = [
    "The capital of France is [MASK].",
    "She opened the [MASK] and walked into the garden.",
    "Plants take carbon dioxide from the [MASK].",
    "He was so tired that he fell [MASK] at once.",
    "The [MASK] pumps blood through the body.",
    "In 1776 the colonies declared their [MASK].",
    "Water boils at one hundred [MASK].",
    "The film was so boring that I [MASK] the cinema.",
    '"I do not know," [MASK] the old man.',
    "The price rises when demand [MASK].",
]


def word_token(tokenizer: PreTrainedTokenizerBase, before: str, word: str, after: str) -> int | None:
    """The one token of a word in its sentence; None if it is more than one."""
    encoded = tokenizer(before + word + after, return_offsets_mapping=True)
    inside = [
        token
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        if start < len(before) + len(word) and end > len(before)
    ]
    return inside[0] if len(inside) == 1 else None


def make_questions(texts: list[str], tokenizers: list[PreTrainedTokenizerBase], number: int, seed: int) -> list[tuple]:
    """Text before a word, the word, and the text behind it, of random words that all tokenizers have."""
    rng = random.Random(seed)
    sentences = [part for text in texts for part in re.split(r"(?<=[.!?]) +", text) if 8 <= len(part.split()) <= 40]
    rng.shuffle(sentences)
    questions = []
    for sentence in sentences:
        match = rng.choice(list(re.finditer(r"\b[^\W\d_]+\b", sentence)) or [None])
        if match is None:
            continue
        question = sentence[: match.start()], match.group(), sentence[match.end() :]
        if all(word_token(tokenizer, *question) is not None for tokenizer in tokenizers):
            questions.append(question)
        if len(questions) == number:
            break
    return questions


@torch.no_grad()
def answer(model, tokenizer: PreTrainedTokenizerBase, sentence: str, answers: int = 1) -> list[str]:
    """The first answers for `[MASK]` in a sentence, best first."""
    before, after = sentence.split("[MASK]")
    # ModernBERT's mask token takes the space before it, BERT's does not mind it.
    inputs = tokenizer(before + tokenizer.mask_token + after, return_tensors="pt", return_token_type_ids=False)
    (position,) = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0]
    logits = model(**inputs).logits[0, position]
    return [tokenizer.decode([token]).strip() for token in logits.topk(answers).indices]


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", required=True, help="masked language models")
    parser.add_argument("--text", nargs="+", required=True, help="held-out texts, a column of the table each")
    parser.add_argument("--train_text", nargs="+", default=[], help="texts for the unigram")
    parser.add_argument("--questions", type=count, default=1000, help="of each text")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    models = {
        Path(name).name: AutoModelForMaskedLM.from_pretrained(name, dtype="float32").eval() for name in args.models
    }
    tokenizers = dict(zip(models, map(AutoTokenizer.from_pretrained, args.models), strict=True))
    table = {name: [] for name in models}
    if args.train_text:
        words = Counter(
            word
            for row in load_texts(args.train_text, "train", "text")
            for word in re.findall(r"[^\W\d_]+", row["text"].lower())
        )
        ((common, _),) = words.most_common(1)
        table[f"unigram (`{common}`)"] = []
    for source in args.text:
        texts = load_texts([source], "validation", "text")["text"]
        questions = make_questions(list(texts), list(tokenizers.values()), args.questions, args.seed)
        for name, model in models.items():
            right = sum(
                answer(model, tokenizers[name], f"{before}[MASK]{after}")[0].lower() == word.lower()
                for before, word, after in track(
                    questions, description=name, transient=True, console=Console(stderr=True)
                )
            )
            table[name].append(right / len(questions))
        if args.train_text:
            (unigram,) = (name for name in table if name.startswith("unigram"))
            table[unigram].append(sum(word.lower() == common for _, word, _ in questions) / len(questions))
    header = ["right, in percent", *(Path(source).stem for source in args.text)]
    rows = [[name, *(f"{100 * share:.1f}" for share in shares)] for name, shares in table.items()]
    print(format_table(header, rows, numbers=True))
    machine = describe_machine()
    print(f"\n{args.questions} words of each text; torch {machine['torch']}, transformers {machine['transformers']}\n")
    rows = [
        [sentence, *(", ".join(answer(model, tokenizers[name], sentence, 3)) for name, model in models.items())]
        for sentence in SENTENCES
    ]
    print(format_table(["", *models], rows))


if __name__ == "__main__":
    run_script(main)
