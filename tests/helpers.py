"""What several test modules need: where things lie, and scripts as modules."""

import importlib.util
import os
import random
import sys
from pathlib import Path
from types import ModuleType

import modernalbert
from modernalbert.training.packing import PackedCollator, TokenMasker


ROOT = Path(modernalbert.__file__).parent
SCRIPTS = ROOT / "scripts"
BENCHMARKS = ROOT / "benchmarks"
# Real rows, laid out as on the Hub; the few tests that look at some are skipped where there are none.
DATA = Path(os.environ.get("MODERNALBERT_DATA") or ROOT.parent / "shared" / "data")


def load_script(name: str, folder: Path = SCRIPTS) -> ModuleType:
    """A script as a module; it finds the files beside it, as when Python runs it."""
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(folder))


# Texts, tokens and packed rows of the tests of pretraining.
TEXTS = [f"Sentence number {n} says that {n} times {n} is {n * n}." for n in range(60)]
CLS, SEP, PAD = 1, 2, 3  # the trained tokenizer's
VOCAB = 320
TOKENS = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": CLS, "cls_token_id": CLS}


def make_text(length, seed):
    """`[CLS] ... [SEP]`, without special tokens between them."""
    return [CLS, *random.Random(seed).choices(range(5, VOCAB), k=length - 2), SEP]


# Texts of three packed rows of 20, 15 and 20 tokens; the second row begins with the end of a cut text, and the last
# holds one that is longer than the window on either side.
ROWS = [
    [make_text(9, 0), make_text(11, 1)],
    [make_text(12, 2)[6:], make_text(9, 3)],
    [make_text(17, 4), make_text(3, 5)],
]
SPANS = [(row, sum(map(len, texts[:n])), len(text)) for row, texts in enumerate(ROWS) for n, text in enumerate(texts)]


def lay_out(rows):
    return [{"input_ids": [token for text in texts for token in text]} for texts in rows]


def make_batch(tokenizer, rows=ROWS, probability=0.5):
    """A packed batch with masks, and whatever a row is, its masks are the same."""
    batch = PackedCollator(tokenizer)(lay_out(rows))
    masker = TokenMasker(tokenizer, probability, seed=3)
    batch["input_ids"], batch["labels"] = masker(batch["input_ids"], [(n,) for n in range(len(rows))])
    return batch
