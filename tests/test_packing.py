"""Texts packed into rows, masks, and batches."""

import copy
import logging
import math
import os

import pytest
import torch
from datasets import Dataset
from helpers import CLS, PAD, ROWS, SEP, SPANS, TEXTS, VOCAB, lay_out

import modernalbert
from modernalbert.tokenization import train_tokenizer
from modernalbert.training.data import load_texts
from modernalbert.training.packing import (
    PackedCollator,
    TokenMasker,
    collate_batches,
    encode_texts,
    mask_rows,
    pack_enough,
    pack_texts,
)


pytestmark = pytest.mark.usefixtures("fresh_cache")


@pytest.fixture
def tokenizer():
    """A new one for each test, since calls leave traces in it."""
    return train_tokenizer(TEXTS, vocab_size=VOCAB)


@pytest.mark.parametrize("max_length", [7, 32, 1000])
def test_packing_loses_no_token_and_cuts_full_rows(tokenizer, max_length):
    packed = pack_texts(Dataset.from_dict({"text": [*TEXTS, "", "many words " * 40]}), tokenizer, max_length)[
        "input_ids"
    ]
    expected = [token for text in [*TEXTS, "", "many words " * 40] if text for token in tokenizer(text)["input_ids"]]
    assert [token for row in packed for token in row] == expected
    assert all(len(row) == max_length for row in packed[:-1])
    assert tokenizer.model_max_length == 8192


def test_pairs_are_packed_as_the_tokenizer_encodes_them(tokenizer):
    texts = Dataset.from_dict({"text": ["one", "", "two", "three"], "pair": ["and one", "alone", None, " "]})
    (row,) = pack_texts(texts, tokenizer, 1000, pair_column="pair")["input_ids"]
    singles = [tokenizer(text)["input_ids"] for text in ("alone", "two", "three")]
    assert row == sum(singles, []) + tokenizer("one", "and one")["input_ids"]


def test_positions_start_anew_with_every_text(tokenizer):
    rows = [
        {"input_ids": tokenizer(a)["input_ids"] + tokenizer(b)["input_ids"]} for a, b in (("ab", "c"), ("a", "bc"))
    ]
    batch = PackedCollator(tokenizer)(rows)
    for row, positions in zip(rows, batch["position_ids"], strict=True):
        second = row["input_ids"][1:].index(tokenizer.cls_token_id) + 1
        length = len(row["input_ids"])
        assert positions.tolist()[:length] == [*range(second), *range(length - second)]


def test_packed_texts_do_not_see_each_other(tokenizer):
    """The loss of a packed row equals that of its texts apart."""
    model = modernalbert.ModernAlbertForMaskedLM(modernalbert.ModernAlbertConfig.preset("nano", vocab_size=320)).eval()
    first, second = tokenizer("One text.")["input_ids"], tokenizer("Another one, longer.")["input_ids"]
    batch = PackedCollator(tokenizer)([{"input_ids": first + second}])
    packed = model(**batch).logits[0]
    for start, end in ((0, len(first)), (len(first), len(first) + len(second))):
        alone = model(batch["input_ids"][:, start:end]).logits[0]
        torch.testing.assert_close(packed[start:end], alone, rtol=1e-4, atol=1e-5)


def test_a_stream_packs_to_the_same_rows(tokenizer):
    """More texts than one batch of a thousand, the first thousand of them empty."""
    texts = Dataset.from_dict({"text": ["", None, " "] * 400 + TEXTS * 20})
    packed = pack_texts(texts, tokenizer, 32)
    stream = pack_texts(texts.to_iterable_dataset(), tokenizer, 32)
    assert list(stream) == list(packed) and packed.column_names == ["input_ids"]


def test_a_run_packs_as_many_texts_as_it_needs(tokenizer):
    """Of five thousand texts, each of which starts with its number; later ones are longer."""
    texts = Dataset.from_dict({"text": [f"{number} " + "word " * (number // 1000) for number in range(5000)]})
    drawn = []

    def pack(part):
        drawn.append([int(text.split()[0]) for text in part["text"]])
        return pack_texts(part, tokenizer, 16)

    everything = pack_texts(texts, tokenizer, 16)
    needed = len(everything) // 2
    rows = pack_enough(texts, pack, needed)
    assert needed <= len(rows) < 1.25 * needed
    first, last = drawn
    assert len(first) == 1000 and last[:1000] == first and len(set(last)) == len(last)
    shares = [sum(number // 1000 == part for number in last) / len(last) for part in range(5)]
    assert shares == pytest.approx([0.2] * 5, abs=0.04)

    assert pack_enough(texts, pack, needed)[:] == rows[:] != pack_enough(texts, pack, needed, seed=1)[:]
    assert len(pack_enough(texts, pack, 10**6)) == pytest.approx(len(everything), abs=5)
    assert sorted(drawn[-1]) == list(range(5000))


def test_a_text_longer_than_the_tokenizers_limit_passes_in_silence(tokenizer, caplog, recwarn):
    tokenizer.model_max_length = 16
    expected = tokenizer.backend_tokenizer.encode("many words " * 100).ids
    state = {name: copy.deepcopy(value) for name, value in vars(tokenizer).items() if name != "_tokenizer"}
    backend = tokenizer.backend_tokenizer.to_str()
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").addHandler(caplog.handler)
        try:
            packed = pack_texts(Dataset.from_dict({"text": ["many words " * 100]}), tokenizer, 50)["input_ids"]
        finally:
            logging.getLogger("transformers").removeHandler(caplog.handler)
    assert [token for row in packed for token in row] == expected
    assert "sequence length" not in caplog.text and not [w for w in recwarn if "length" in str(w.message)]
    assert {name: value for name, value in vars(tokenizer).items() if name != "_tokenizer"} == state
    assert tokenizer.backend_tokenizer.to_str() == backend


@pytest.mark.parametrize("use", ["not at all", "to pad and cut", "past its limit"])
def test_packing_again_is_served_from_the_cache(tmp_path, tokenizer, use):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    tokenizer.model_max_length = 64

    def pack(max_length=32):
        return pack_texts(load_texts([str(tmp_path / "a.txt")]), tokenizer, max_length)

    before = pack()
    written = [os.stat(file["filename"]).st_mtime_ns for file in before.cache_files]
    if use == "to pad and cut":
        tokenizer(TEXTS[:3], padding=True, truncation=True, max_length=8)
    elif use == "past its limit":
        tokenizer("many words " * 100)
    after = pack()
    assert after._fingerprint == before._fingerprint and after.cache_files == before.cache_files != []
    assert [os.stat(file["filename"]).st_mtime_ns for file in after.cache_files] == written
    assert pack(16)._fingerprint != before._fingerprint


def test_other_tokenizers_do_not_share_the_cache(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS))
    other = train_tokenizer(["aa bb cc dd aa bb"], vocab_size=VOCAB)
    texts = load_texts([str(tmp_path / "a.txt")])
    assert pack_texts(texts, tokenizer, 32)[0] != pack_texts(texts, other, 32)[0]


@pytest.fixture
def long_rows():
    """`[200, 400]`: specials of all kinds among random tokens, and padding at the end of every other row."""
    rows = torch.randint(0, VOCAB, (200, 400), generator=torch.Generator().manual_seed(0))
    rows[:, 0] = CLS
    rows[::2, 300:] = PAD
    return rows


def test_tokens_are_chosen_and_masked_in_the_shares_of_bert(tokenizer, long_rows):
    masked, labels = TokenMasker(tokenizer, 0.3, seed=1)(long_rows, [(n,) for n in range(200)])
    special = torch.isin(long_rows, torch.tensor(tokenizer.all_special_ids))
    chosen = labels != -100
    assert not chosen[special].any() and torch.equal(labels[chosen], long_rows[chosen])
    assert torch.equal(masked[~chosen], long_rows[~chosen])
    assert chosen.sum() / (~special).sum() == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / (~special).sum()))

    total = chosen.sum().item()
    became_mask = masked[chosen] == tokenizer.mask_token_id
    stayed = masked[chosen] == long_rows[chosen]
    swapped = masked[chosen][~became_mask & ~stayed]
    # A random token is the original or a special one, which is not taken, in 6 of VOCAB cases.
    unseen = 0.1 * (1 + len(tokenizer.all_special_ids)) / len(tokenizer)
    for count, share in ((became_mask, 0.8), (stayed, 0.1 + unseen)):
        assert count.sum() / total == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / total))
    assert len(swapped) / total == pytest.approx(0.1 - unseen, abs=4 * math.sqrt(0.09 / total))
    ordinary = set(range(len(tokenizer))) - set(tokenizer.all_special_ids)
    assert set(swapped.tolist()) <= ordinary and len(set(swapped.tolist())) > 0.95 * len(ordinary)


def test_a_rows_masks_do_not_depend_on_its_batch(tokenizer):
    masker = TokenMasker(tokenizer, 0.5, seed=1)
    rows = torch.randint(5, VOCAB, (6, 40), generator=torch.Generator().manual_seed(0))
    keys = [(7, n) for n in range(6)]
    together = masker(rows, keys)
    for n in range(6):
        for alone, batched in zip(masker(rows[n : n + 1], keys[n : n + 1]), together, strict=True):
            assert torch.equal(alone[0], batched[n])


def test_a_rows_masks_do_not_depend_on_its_padding(tokenizer):
    """A row is padded to the longest of its micro-batch, whichever that is."""
    masker = TokenMasker(tokenizer, 0.5, seed=1)
    rows = torch.randint(5, VOCAB, (8, 40), generator=torch.Generator().manual_seed(0))
    keys = [(7, n) for n in range(8)]
    padded = torch.cat([rows, torch.full((8, 17), PAD)], dim=1)
    for short, long in zip(masker(rows, keys), masker(padded, keys), strict=True):
        assert torch.equal(short, long[:, :40])


def test_other_seeds_and_keys_give_other_masks(tokenizer):
    row = torch.randint(5, VOCAB, (1, 200), generator=torch.Generator().manual_seed(0))
    masks = [
        tuple(TokenMasker(tokenizer, 0.3, seed)(row, [key])[1][0].tolist())
        for seed, key in [(0, (1, 0)), (1, (1, 0)), (0, (1, 1)), (0, (2, 0)), (0, (0, 1)), (0, (2,)), (1, (0, 0))]
    ]
    assert len(set(masks)) == len(masks)


def test_evaluation_rows_are_masked_once_and_for_all(tokenizer):
    packed = pack_texts(Dataset.from_dict({"text": TEXTS}), tokenizer, 32)
    rows = [mask_rows(packed, TokenMasker(tokenizer, 0.3, seed))[:] for seed in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2]
    for before, after, labels in zip(packed["input_ids"], rows[0]["input_ids"], rows[0]["labels"], strict=True):
        assert len(before) == len(after) == len(labels)
        assert [a if label == -100 else label for a, label in zip(after, labels, strict=True)] == before


def test_masked_rows_keep_their_positions(tokenizer):
    packed = Dataset.from_list(lay_out(ROWS))
    masked = mask_rows(packed, TokenMasker(tokenizer, 0.9))
    batch = PackedCollator(tokenizer)(list(masked))
    assert batch["input_ids"].shape == (3, 20)
    for row, start, length in SPANS:
        assert batch["position_ids"][row, start : start + length].tolist() == list(range(length))
        expected = masked[row]["labels"][start : start + length]
        assert batch["labels"][row, start : start + length].tolist() == expected
    assert batch["attention_mask"].sum(1).tolist() == [20, 15, 20]
    assert (batch["labels"][1, 15:] == -100).all() and (batch["input_ids"][1, 15:] == PAD).all()


def test_texts_that_are_all_empty_are_refused(tokenizer):
    with pytest.raises(ValueError, match="all of its 2 rows are empty"):
        pack_texts(Dataset.from_dict({"text": ["", " "]}), tokenizer, 8)


def test_names_of_special_tokens_in_prose_are_prose(tokenizer):
    text = "a [CLS] b [MASK] c[SEP] d [PAD]"
    for encoded in (
        encode_texts(tokenizer, [text])["input_ids"][0],
        pack_texts(as_rows(text), tokenizer, 99)[0]["input_ids"],
    ):
        assert [token for token in encoded if token in tokenizer.all_special_ids] == [CLS, SEP]
        assert tokenizer.decode(encoded, skip_special_tokens=True) == text
    pair = encode_texts(tokenizer, [text], [text])["input_ids"][0]
    assert pair.count(CLS) == 1 and pair.count(SEP) == 2
    assert tokenizer(text)["input_ids"].count(CLS) == 2  # what others ask of the tokenizer stays


def as_rows(*texts):
    return Dataset.from_dict({"text": list(texts)})


def test_batches_hold_all_rows_in_order(tokenizer):
    batches = collate_batches(iter(lay_out(ROWS)), PackedCollator(tokenizer), 2)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 1]
    assert batches[1]["input_ids"][0].tolist() == lay_out(ROWS)[2]["input_ids"]
