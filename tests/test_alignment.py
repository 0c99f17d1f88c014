"""Sequences of two tokenizers, word by word, and an encoder of any kind as the teacher."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers import TEXTS, VOCAB, load_script
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertModel, ModernBertConfig, PreTrainedTokenizerFast, TrainingArguments

from modernalbert import ModernAlbertForMaskedLM
from modernalbert.tokenization import save_tokenizer, train_tokenizer
from modernalbert.training.alignment import (
    NO_WORD,
    AlignedCollator,
    align,
    pack_sequences,
    same_tokenizer,
    split_texts,
    words_of_tokens,
)
from modernalbert.training.distillation import EncoderDistiller, Teacher, start_from_table, texts_of_pairs
from modernalbert.training.packing import TokenMasker
from modernalbert.training.pretraining import PretrainingTrainer
from modernalbert.training.teacher_cache import StateCache


HARD = ["Crème  brûlée, FOR\ttwo\n", "I \U0001f600 it", "日本語 text", "naïve"]  # NFC and, the last, not


def train_wordpiece(texts):
    """A tokenizer as BERT's: lower case, no accents, pieces of words."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name[1:-1].lower()}_token": name for name in special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(TEXTS, vocab_size=VOCAB)


@pytest.fixture(scope="module")
def wordpiece():
    return train_wordpiece(TEXTS)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory, wordpiece):
    """A tiny BERT with its tokenizer."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(wordpiece),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    folder = tmp_path_factory.mktemp("bert")
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    wordpiece.save_pretrained(folder)
    return folder


@pytest.fixture
def make_student(make_model, bpe):
    def make(tokenizer=bpe, **overrides):
        ids = {"pad_token_id": tokenizer.pad_token_id, "cls_token_id": tokenizer.cls_token_id}
        fields = {"vocab_size": 384, "sparse_prediction": True, **ids, **overrides}
        return make_model(ModernAlbertForMaskedLM, **fields)

    return make


def pack(texts, tokenizer, teacher_tokenizer, max_length=32):
    rows = Dataset.from_dict({"text": texts})
    return pack_sequences(rows, tokenizer, teacher_tokenizer, max_length, teacher_length=64)


# ---- Words


def test_tokens_lie_in_the_words_that_white_space_separates():
    text = "ab  cd-e\nf"
    offsets = [(0, 0), (0, 1), (1, 2), (2, 5), (5, 8), (8, 10), (10, 10)]
    assert words_of_tokens(text, offsets) == [NO_WORD, 0, 0, 1, 1, 2, NO_WORD]


@pytest.mark.parametrize("text", [*TEXTS[:1], *HARD])
def test_aligned_tokens_are_of_the_same_characters(bpe, wordpiece, text):
    sequences = split_texts([text], bpe, 64)
    aligned = align(sequences, wordpiece, 64)
    (text,) = sequences["texts"]
    teacher_offsets = wordpiece(text, return_offsets_mapping=True)["offset_mapping"]
    spans = [match.span() for match in re.finditer(r"\S+", text)]

    def words_by_number(offsets, numbers):
        found = {}
        for (start, end), number in zip(offsets, numbers, strict=True):
            if number != NO_WORD:
                (word,) = {span for span in spans if span[0] < end and start < span[1]} & set(spans[:])
                found.setdefault(number, set()).add(word)
        return found

    ours = words_by_number(sequences["offsets"][0], aligned["words"][0])
    theirs = words_by_number(teacher_offsets, aligned["teacher_words"][0])
    assert ours == theirs
    assert sorted(ours) == list(range(len(ours)))
    unknown = {
        word
        for word in range(len(spans))
        if set(wordpiece(text[slice(*spans[word])], add_special_tokens=False)["input_ids"]) <= {wordpiece.unk_token_id}
    }
    assert len(ours) == len(spans) - len(unknown)


def test_long_texts_become_several_sequences_and_lose_no_token(bpe):
    text = " ".join(TEXTS)
    sequences = split_texts([text], bpe, 16)
    assert len(sequences["input_ids"]) > 3
    assert all(ids[0] == bpe.cls_token_id and ids[-1] == bpe.sep_token_id for ids in sequences["input_ids"])
    assert max(map(len, sequences["input_ids"])) == 16
    inner = [token for ids in sequences["input_ids"] for token in ids[1:-1]]
    assert inner == bpe(text, add_special_tokens=False)["input_ids"]
    for part, offsets in zip(sequences["texts"], sequences["offsets"], strict=True):
        assert part in text and max(end for _, end in offsets) == len(part)


PAIRS = [(TEXTS[0], TEXTS[1]), ("Crème  brûlée", TEXTS[0]), (TEXTS[1] * 3, "日本語 text"), ("one", None), ("", "two")]


@pytest.mark.parametrize("max_length", [64, 12])
def test_pairs_are_encoded_as_by_the_tokenizer_and_aligned_in_each_text(bpe, wordpiece, max_length):
    firsts, seconds = zip(*PAIRS[:3], strict=True)
    sequences = split_texts(list(firsts), bpe, max_length, list(seconds))
    aligned = align(sequences, wordpiece, 64)
    for row, (first, second) in enumerate(PAIRS[:3]):
        assert sequences["input_ids"][row] == bpe(first, second, truncation=True, max_length=max_length)["input_ids"]
        limits = {"words": max_length, "teacher_words": 64}
        assert aligned["teacher_ids"][row] == wordpiece(first, second, truncation=True, max_length=64)["input_ids"]
        spans = [match.span() for match in re.finditer(r"\S+", f"{first}\n{second}")]
        found = {}
        for side, tokenizer in (("words", bpe), ("teacher_words", wordpiece)):
            limit = {"truncation": True, "max_length": limits[side]}
            encoded = tokenizer(first, second, return_offsets_mapping=True, **limit)
            numbers = aligned[side][row]
            assert len(numbers) == len(encoded["input_ids"])
            places = set()
            for number, (start, end), part in zip(
                numbers, encoded["offset_mapping"], encoded.sequence_ids(0), strict=True
            ):
                if number != NO_WORD:
                    start, end = (offset + part * (len(first) + 1) for offset in (start, end))
                    (span,) = [span for span in spans if span[0] < end and start < span[1]]
                    places.add((number, span))
            found[side] = places
        assert found["words"] == found["teacher_words"]
        assert {number for number, _ in found["words"]} == set(range(len(found["words"])))
        if row == 0 and max_length == 64:
            assert len(found["words"]) == len(spans)


def test_rows_mix_texts_and_pairs(bpe, wordpiece):
    firsts, seconds = (list(column) for column in zip(*PAIRS, strict=True))
    rows = Dataset.from_dict({"text": firsts, "second": seconds})
    packed = pack_sequences(rows, bpe, wordpiece, 256, 64, pair_column="second")
    assert packed.column_names == ["input_ids", "words", "teacher_ids", "teacher_words", "teacher_lengths"]
    expected = [bpe(text)["input_ids"] for text in ("one", "two")]
    expected += [bpe(first, second)["input_ids"] for first, second in PAIRS[:3]]
    assert packed["input_ids"][0] == sum(expected, [])
    plain = pack_sequences(rows, bpe, None, 256, 64, pair_column="second")
    assert plain[0] == {"input_ids": packed["input_ids"][0]}


def test_the_teacher_sees_the_second_text_of_a_pair_as_such(teacher_folder, wordpiece):
    """Its states are those with the types of tokens of its own tokenizer."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(teacher_folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    pair = tokenizer("one two", "three four", return_tensors="pt", return_token_type_ids=True)
    assert pair["token_type_ids"].any()
    single = tokenizer("one two three", return_tensors="pt")
    length = pair["input_ids"].shape[1]
    ids, mask = (
        torch.cat([pair[name], F.pad(single[name], (0, length - single[name].shape[1]))])
        for name in ("input_ids", "attention_mask")
    )
    encoder = BertModel.from_pretrained(teacher_folder, add_pooling_layer=False).eval()
    states, _ = Teacher(str(teacher_folder), sep_token_id=tokenizer.sep_token_id)(ids, mask)
    with torch.no_grad():
        expected = encoder(**pair).last_hidden_state[0]
        alone = encoder(**single).last_hidden_state[0]
    torch.testing.assert_close(states[0], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(states[1][: len(alone)], alone, rtol=1e-5, atol=1e-5)
    untyped, _ = Teacher(str(teacher_folder))(ids, mask)
    assert (untyped[0] - expected).abs().max() > 0.01


def test_rows_hold_whole_sequences(bpe, wordpiece):
    rows = pack(TEXTS, bpe, wordpiece)
    assert len(rows) > 2
    sequences = []
    for row in rows:
        assert len(row["input_ids"]) == len(row["words"]) <= 32
        starts = [index for index, token in enumerate(row["input_ids"]) if token == bpe.cls_token_id]
        assert starts[0] == 0 and len(starts) == len(row["teacher_lengths"])
        assert sum(row["teacher_lengths"]) == len(row["teacher_ids"]) == len(row["teacher_words"])
        found = set(row["words"]) - {NO_WORD}
        assert found == set(row["teacher_words"]) - {NO_WORD} == set(range(len(found)))
        sequences += [row["input_ids"][a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
    assert sequences == split_texts([text for text in TEXTS if text.strip()], bpe, 32)["input_ids"]


def test_texts_that_the_teacher_does_not_know_are_refused(bpe, wordpiece):
    with pytest.raises(ValueError, match="no word of the texts is known to the teacher"):
        pack(["日本語", "漢字"], bpe, wordpiece)


def test_tokenizers_are_the_same_or_not(bpe, wordpiece, tmp_path):
    save_tokenizer(bpe, tmp_path)
    assert same_tokenizer(bpe, PreTrainedTokenizerFast.from_pretrained(tmp_path))
    assert not same_tokenizer(bpe, wordpiece)
    assert not same_tokenizer(bpe, train_tokenizer(TEXTS[:5], vocab_size=VOCAB))


# ---- The teacher's terms


def naive_terms(distiller, student, rows, tokenizer, same):
    """Both terms, sequence by sequence and word by word, with the counts that they are divided by."""
    hidden, pooled = [], []
    for row in rows:
        starts = [index for index, token in enumerate(row["input_ids"]) if token == tokenizer.cls_token_id]
        teacher_start = 0
        for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(row["input_ids"])], strict=True)):
            ids = torch.tensor([row["input_ids"][start:end]])
            states = distiller.projection(student.model(ids).last_hidden_state[0])
            teacher_ids, words, teacher_words = ids, None, None
            if not same:
                stop = teacher_start + row["teacher_lengths"][number]
                teacher_ids = torch.tensor([row["teacher_ids"][teacher_start:stop]])
                words, teacher_words = row["words"][start:end], row["teacher_words"][teacher_start:stop]
                teacher_start = stop
            expected = distiller.teacher.encoder(input_ids=teacher_ids).last_hidden_state[0]
            pooled.append(1 - F.cosine_similarity(states.mean(dim=0), expected.mean(dim=0), dim=0))
            if same:
                hidden += list(1 - F.cosine_similarity(states, expected, dim=-1))
                continue
            for word in sorted(set(words) - {NO_WORD}):
                ours = states[[index for index, other in enumerate(words) if other == word]].mean(dim=0)
                theirs = expected[[index for index, other in enumerate(teacher_words) if other == word]].mean(dim=0)
                hidden.append(1 - F.cosine_similarity(ours, theirs, dim=0))
    return (
        {"hidden_loss": sum(hidden) / len(hidden), "pooled_loss": sum(pooled) / len(pooled)},
        len(hidden),
        len(pooled),
    )


@pytest.mark.parametrize("same", [True, False], ids=["token by token", "word by word"])
def test_terms_are_those_of_sequences_one_by_one(make_student, bpe, wordpiece, teacher_folder, same):
    tokenizer = wordpiece if same else bpe
    teacher = Teacher(str(teacher_folder))
    student = make_student(tokenizer, router_jitter_noise=0.0)
    distiller = EncoderDistiller(teacher, student)
    rows = pack(TEXTS[:12], tokenizer, None if same else wordpiece)
    batch = AlignedCollator(tokenizer, teacher_pad_token_id=None if same else wordpiece.pad_token_id)(list(rows))
    batch["clean_ids"] = batch["input_ids"]
    outputs = student.model(
        batch["input_ids"], batch["attention_mask"], batch["position_ids"], output_hidden_states=True
    )
    counts = EncoderDistiller.count(batch)
    expected, *found = naive_terms(distiller, student, rows, tokenizer, same)
    assert counts == tuple(found)
    actual = distiller(batch, outputs, *counts, distiller.ask(batch))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)

    gradients = []
    for terms in (actual, expected):
        student.zero_grad()
        (terms["hidden_loss"] + 2 * terms["pooled_loss"]).backward()
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and "teacher_projections.0.weight" in gradients[0]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("same", [True, False])
def test_pairs_learn_the_similarity_that_the_teacher_gives_their_texts(
    make_student, bpe, wordpiece, teacher_folder, same
):
    tokenizer = wordpiece if same else bpe
    student, teacher = make_student(tokenizer), Teacher(str(teacher_folder), sep_token_id=wordpiece.sep_token_id)
    distiller = EncoderDistiller(teacher, student, pairs=True)
    torch.nn.init.normal_(distiller.pair_head.weight)
    pairs = [(TEXTS[n], TEXTS[n + 7]) for n in range(4)]
    texts = {"text": [TEXTS[20], *(first for first, _ in pairs)], "second": [None, *(second for _, second in pairs)]}
    other = None if same else wordpiece
    rows = pack_sequences(Dataset.from_dict(texts), tokenizer, other, 100, 64, pair_column="second")
    batch = AlignedCollator(tokenizer, None, None if same else wordpiece.pad_token_id)(list(rows))
    batch["clean_ids"] = batch["input_ids"]
    inputs = (batch["input_ids"], batch["attention_mask"], batch["position_ids"])
    outputs = student.model(*inputs, output_hidden_states=True)
    terms = distiller(batch, outputs, *EncoderDistiller.count(batch), distiller.ask(batch))

    expected = 0
    for first, second in pairs:
        vectors = []
        for text in (first, second):
            ids = wordpiece(text, return_tensors="pt")["input_ids"]
            vectors.append(teacher.encoder(input_ids=ids).last_hidden_state[0].mean(dim=0))
        ids = tokenizer(first, second, return_tensors="pt")["input_ids"]
        states = student.model(ids).last_hidden_state[0].mean(dim=0)
        predicted = states @ distiller.pair_head.weight[0] + distiller.pair_head.bias[0]
        expected = expected + (predicted - F.cosine_similarity(*vectors, dim=0)).square() / 5
    torch.testing.assert_close(terms["pair_loss"], expected, rtol=1e-4, atol=1e-5)

    gradients = []
    for loss in (terms["pair_loss"], expected):
        student.zero_grad()
        loss.backward(retain_graph=True)
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    gradients[0] = {name: gradients[0][name] for name in gradients[1]}
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
    distiller.remove_heads(student)
    assert not [name for name, _ in student.named_parameters() if "pair" in name or "teacher" in name]


def test_a_batch_without_pairs_has_no_loss_of_them_and_a_gradient_of_zero(make_student, wordpiece, teacher_folder):
    student = make_student(wordpiece)
    teacher = Teacher(str(teacher_folder), sep_token_id=wordpiece.sep_token_id)
    distiller = EncoderDistiller(teacher, student, pairs=True)
    batch = AlignedCollator(wordpiece)(list(pack(TEXTS[:3], wordpiece, None)))
    batch["clean_ids"] = batch["input_ids"]
    inputs = (batch["input_ids"], batch["attention_mask"], batch["position_ids"])
    outputs = student.model(*inputs, output_hidden_states=True)
    terms = distiller(batch, outputs, *EncoderDistiller.count(batch), distiller.ask(batch))
    assert terms["pair_loss"] == 0
    terms["pair_loss"].backward()
    assert distiller.pair_head.weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("between", [[3], [3, 3]])
def test_pairs_are_split_into_sequences_of_their_own(between):
    rows = [[2, 7, 8, *between, 9, 3], [2, 7, 3], [2, 5, *between, 6, 6, 6, 3]]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    pairs, texts, text_mask = texts_of_pairs(ids, mask, 3)
    found = [text[kept.bool()].tolist() for text, kept in zip(texts, text_mask, strict=True)]
    assert texts[text_mask == 0].count_nonzero() == 0 and text_mask.diff(dim=1).max() <= 0
    assert pairs.tolist() == [0, 2] and found == [[2, 7, 8, 3], [2, 5, 3], [2, 9, 3], [2, 6, 6, 6, 3]]


def test_the_teacher_sees_clean_text(make_student, wordpiece, teacher_folder):
    student = make_student(wordpiece)
    distiller = EncoderDistiller(Teacher(str(teacher_folder)), student)
    batch = AlignedCollator(wordpiece)(list(pack(TEXTS[:6], wordpiece, None)))
    outputs = student.model(
        batch["input_ids"], batch["attention_mask"], batch["position_ids"], output_hidden_states=True
    )
    counts = EncoderDistiller.count(batch)
    clean = {**batch, "clean_ids": batch["input_ids"]}
    expected = distiller(clean, outputs, *counts, distiller.ask(clean))
    masked = batch["input_ids"].masked_fill(batch["input_ids"] > 10, wordpiece.mask_token_id)
    batch = {**clean, "input_ids": masked}
    found = distiller(batch, outputs, *counts, distiller.ask(batch))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_chunks_of_the_teacher_change_nothing(teacher_folder):
    teacher = Teacher(str(teacher_folder))
    lengths = torch.tensor([5, 9, 2, 7, 9, 3, 1])
    mask = (torch.arange(9) < lengths[:, None]).long()
    ids = torch.randint(5, 60, mask.shape) * mask
    expected = teacher.compute(ids, mask, chunk_size=99)
    torch.testing.assert_close(teacher.compute(ids, mask, chunk_size=2), expected, rtol=1e-4, atol=1e-5)
    assert expected[0][mask == 0].count_nonzero() == 0
    torch.testing.assert_close(expected[1][0], expected[0][0, :5].mean(dim=0), rtol=1e-5, atol=1e-6)


def test_the_embedding_starts_from_the_teachers(make_student, teacher_folder):
    teacher = Teacher(str(teacher_folder))
    table = teacher.encoder.get_input_embeddings().weight
    student = make_student(embedding_size=16)
    before = student.decoder_projection.weight.clone(), student.get_input_embeddings().weight.std()
    kept = start_from_table(table, student)
    rows = student.get_input_embeddings().weight[: len(table)]
    centred = table - table.mean(dim=0)
    energies = torch.linalg.svdvals(centred).square()
    assert kept == pytest.approx((energies[:16].sum() / energies.sum()).item(), rel=1e-4) and 0.5 < kept < 1
    # Distances between rows are the teacher's, as far as the components reach, up to one scale.
    ours, theirs = torch.cdist(rows, rows), torch.cdist(centred, centred)
    assert torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]))[0, 1] > 0.9
    assert rows.std().item() == pytest.approx(1, rel=1e-3)
    torch.testing.assert_close(student.decoder_projection.weight, before[0] * before[1])


# ---- States of the teacher on disk


@pytest.fixture
def sequences():
    lengths = torch.tensor([5, 9, 2, 7])
    mask = (torch.arange(9) < lengths[:, None]).long()
    return torch.randint(5, 60, mask.shape, generator=torch.Generator().manual_seed(0)) * mask, mask


def forbid(teacher, monkeypatch):
    """Lets the encoder fail, so that all states must come from the file."""
    monkeypatch.setattr(teacher.encoder, "forward", lambda *args, **kwargs: pytest.fail("the encoder was run"))


def test_states_from_the_cache_are_those_of_the_teacher(teacher_folder, sequences, tmp_path, monkeypatch):
    ids, mask = sequences
    expected = Teacher(str(teacher_folder))(ids, mask)
    cached = Teacher(str(teacher_folder), cache=tmp_path / "new" / "states.sqlite")
    torch.testing.assert_close(cached(ids, mask), expected, rtol=0, atol=0)
    # Another process, order and padding; one sequence is new to it.
    again = Teacher(str(teacher_folder), cache=tmp_path / "new" / "states.sqlite")
    more = torch.cat([ids.flip(0), torch.full((1, 9), 7)]), torch.cat([mask.flip(0), torch.ones(1, 9).long()])
    found = again(*more)
    torch.testing.assert_close(
        (found[0][:4], found[1][:4]), (expected[0].flip(0), expected[1].flip(0)), rtol=0, atol=0
    )
    forbid(again, monkeypatch)
    torch.testing.assert_close(again(*more), found, rtol=0, atol=0)
    narrow = again(ids[2:3, :2], mask[2:3, :2])
    torch.testing.assert_close(narrow, (expected[0][2:3, :2], expected[1][2:3]), rtol=0, atol=0)


def test_states_in_half_precision_are_kept_as_they_are(teacher_folder, sequences, tmp_path, monkeypatch):
    cached = Teacher(str(teacher_folder), "bfloat16", cache=tmp_path / "states.sqlite")
    expected = cached(*sequences)
    forbid(cached, monkeypatch)
    torch.testing.assert_close(cached(*sequences), expected, rtol=0, atol=0)


def test_a_full_cache_keeps_what_it_has(teacher_folder, sequences, tmp_path, caplog):
    ids, mask = sequences
    path = tmp_path / "states.sqlite"
    small = Teacher(str(teacher_folder), cache=path, cache_bytes=65536)
    expected = Teacher(str(teacher_folder))
    for start in range(60):
        batch = (ids + start) * mask, mask
        torch.testing.assert_close(small(*batch), expected(*batch), rtol=0, atol=0)
    assert small.cache.full and "takes no more states (database or disk is full)" in caplog.text
    assert 0.5 * 65536 < path.stat().st_size <= 65536
    assert small.cache.get(ids[0, :5].tolist()) is not None


def test_a_kill_in_the_middle_of_a_batch_loses_that_batch_alone(teacher_folder, sequences, tmp_path):
    path = tmp_path / "states.sqlite"
    code = (
        "import os, sys, torch\n"
        "from modernalbert.training.teacher_cache import StateCache\n"
        "cache = StateCache(sys.argv[1], 'teacher', torch.float32, 10**9)\n"
        "cache.put([([1], torch.ones(1, 4), torch.ones(4))])\n"
        "cache.database.execute('INSERT INTO states VALUES (?, ?, ?)', (cache.key([2]), b'', b''))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    cache = StateCache(path, "teacher", torch.float32, 10**9)
    torch.testing.assert_close(cache.get([1]), (torch.ones(1, 4), torch.ones(4)))
    assert cache.get([2]) is None


def test_a_cache_of_another_teacher_is_refused(teacher_folder, tmp_path):
    path = tmp_path / "states.sqlite"
    Teacher(str(teacher_folder), cache=path)
    with pytest.raises(
        ValueError, match="holds states of .* in torch.float32, and the teacher is .* in torch.bfloat16"
    ):
        Teacher(str(teacher_folder), "bfloat16", cache=path)
    (tmp_path / "text").write_text("no database, and long enough to be read as one\n" * 50)
    with pytest.raises(ValueError, match="is no cache of teacher states"):
        Teacher(str(teacher_folder), cache=tmp_path / "text")
    with pytest.raises(IsADirectoryError, match="give a file"):
        Teacher(str(teacher_folder), cache=tmp_path)


# ---- Clean sequences among masked ones


def test_whole_sequences_are_masked_or_not(bpe):
    rows = pack(TEXTS * 20, bpe, None, max_length=64)
    batch = AlignedCollator(bpe, 64)(list(rows))
    keys = [(1, row) for row in range(len(rows))]
    full = TokenMasker(bpe, 0.5, 3)(batch["input_ids"], keys)
    masked = clean = 0
    masker = TokenMasker(bpe, 0.5, 3, masked_share=0.4)
    input_ids, labels = masker(batch["input_ids"], keys)
    for row in range(len(rows)):
        starts = (batch["input_ids"][row] == bpe.cls_token_id).nonzero().flatten().tolist()
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            part = (row, slice(start, end))
            if (labels[part] == -100).all() and not (full[1][part] == -100).all():
                clean += 1
                assert torch.equal(input_ids[part], batch["input_ids"][part])
            else:  # as without clean sequences
                masked += 1
                assert torch.equal(input_ids[part], full[0][part]) and torch.equal(labels[part], full[1][part])
    assert masked / (masked + clean) == pytest.approx(0.4, abs=0.06)
    alone = masker(batch["input_ids"][3:4], keys[3:4])
    assert torch.equal(alone[0][0], input_ids[3]) and torch.equal(alone[1][0], labels[3])


# ---- Training


@pytest.mark.parametrize("masked_share", [0.0, 0.5])
def test_micro_batches_give_the_weights_of_one_large_batch(
    make_student, bpe, wordpiece, teacher_folder, tmp_path, masked_share
):
    rows = pack(TEXTS, bpe, wordpiece).select(range(8))
    states = []
    for size, steps in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        student = make_student(router_aux_loss_coef=0.0, router_jitter_noise=0.0)
        trainer = PretrainingTrainer(
            model=student,
            args=TrainingArguments(
                str(tmp_path / str(size)), per_device_train_batch_size=size, gradient_accumulation_steps=steps,
                max_steps=1, learning_rate=1e-2, use_cpu=True, report_to="none", save_strategy="no", logging_steps=1,
                remove_unused_columns=False, disable_tqdm=True, optim="sgd",
            ),
            train_dataset=rows,
            data_collator=AlignedCollator(bpe, 32, wordpiece.pad_token_id),
            masker=TokenMasker(bpe, 0.3, 0, masked_share),
            distiller=EncoderDistiller(Teacher(str(teacher_folder)), student),
        )  # fmt: skip
        trainer.train()
        states.append(student.state_dict())
        log = next(entry for entry in trainer.state.log_history if "hidden_loss" in entry)
        assert log["hidden_loss"] > 0.1 and log["pooled_loss"] > 0.1
        assert (log["mlm_loss"] == 0) == (masked_share == 0)
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def command(tmp_path_factory, bpe, teacher_folder):
    folder = tmp_path_factory.mktemp("distilled")
    save_tokenizer(bpe, folder / "tokenizer")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    overrides = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "mol_intermediate_size": 32}
    return [
        *("--preset", "nano", "--tokenizer", str(folder / "tokenizer"), "--teacher", str(teacher_folder)),
        *("--train_data", str(folder / "texts.jsonl"), "--validation_data", str(folder / "texts.jsonl")),
        *("--max_length", "32", "--per_device_train_batch_size", "4", "--max_steps", "4", "--use_cpu", "true"),
        *("--report_to", "none", "--logging_steps", "1", "--config_overrides", json.dumps(overrides)),
    ]


def test_the_script_distils_from_another_encoder(command, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    script = load_script("pretrain")
    results = script.main([*command, "--masked_share", "0", "--output_dir", str(tmp_path / "run")])
    assert results["eval_loss"] < results["eval_loss_start"] and results["hidden_loss"] > 0
    # That loss is the teacher's: it has no perplexity, and the card does not call it one of masked tokens.
    card = (tmp_path / "run" / "README.md").read_text(encoding="utf-8")
    assert "perplexity" not in results and "perplexity" not in card
    assert "30% of the tokens in 0% of the sequences" in card
    loaded, info = ModernAlbertForMaskedLM.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    embedder = sentence_transformers.SentenceTransformer(str(tmp_path / "run" / "sentence-transformer"))
    assert embedder.max_seq_length == 32 and embedder.get_embedding_dimension() == 24
    found = embedder.encode(TEXTS[:1], convert_to_tensor=True)
    dense = embedder[2].linear
    states = loaded.model.eval()(**embedder.tokenizer(TEXTS[:1], return_tensors="pt", return_token_type_ids=False))
    expected = F.normalize(dense(states.last_hidden_state).mean(dim=1), dim=-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # Training goes on with the projection.
    stage = [*command[2:], "--model_name_or_path", str(tmp_path / "run"), "--eval_on_start", "true"]
    stage = stage[: stage.index("--config_overrides")] + stage[stage.index("--config_overrides") + 2 :]
    second = script.main([*stage, "--masked_share", "0", "--output_dir", str(tmp_path / "second")])
    assert second["eval_loss_start"] == pytest.approx(results["eval_loss"], rel=1e-3)
    # A SentenceTransformer is a teacher as well.
    again = [*command, "--teacher", str(tmp_path / "run" / "sentence-transformer"), "--masked_share", "0.5"]
    assert script.main([*again, "--output_dir", str(tmp_path / "again")])["pooled_loss"] > 0


def test_a_cached_run_is_the_same_run(command, tmp_path, monkeypatch):
    script = load_script("pretrain")
    whole = script.main([*command, "--output_dir", str(tmp_path / "whole")])
    cache = ["--teacher_cache", str(tmp_path / "states.sqlite")]
    script.main([*command, *cache, "--output_dir", str(tmp_path / "first")])
    monkeypatch.setattr(Teacher, "compute", lambda *args: pytest.fail("the teacher was run"))
    found = script.main([*command, *cache, "--output_dir", str(tmp_path / "second")])
    for name in ("hidden_loss", "pooled_loss", "mlm_loss"):
        assert found[name] == pytest.approx(whole[name], rel=1e-4)
    # The cache is no setting of the run: the finished one is found without it.
    assert script.main([*command, "--output_dir", str(tmp_path / "second")]) == found
    assert "states.sqlite" not in (tmp_path / "second" / "README.md").read_text(encoding="utf-8")


def test_a_cache_needs_a_teacher_that_sees_clean_text(command, tmp_path):
    script = load_script("pretrain")
    without = [value for value in command if value != "--teacher" and "bert" not in value]
    run = ["--teacher_cache", str(tmp_path / "states.sqlite"), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="`teacher_cache` keeps states of a `teacher`"):
        script.main([*without, *run])


def test_texts_without_a_character_make_no_sequence(bpe, wordpiece):
    sequences = split_texts([], bpe, 16)
    assert not sequences["input_ids"] and not any(align(sequences, wordpiece, 64).values())
    assert len(pack(["", " ", TEXTS[0]], bpe, wordpiece)) == 1


def test_a_modernbert_is_a_student_as_well(command, tmp_path, wordpiece, teacher_folder):
    config = ModernBertConfig(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    config.save_pretrained(tmp_path / "config")
    arguments = [*command[2 : command.index("--config_overrides")], "--tokenizer", str(teacher_folder)]
    script = load_script("pretrain")
    results = script.main(
        [*arguments, "--config_name", str(tmp_path / "config"), "--output_dir", str(tmp_path / "run")]
    )
    assert results["hidden_loss"] > 0


def test_a_killed_distillation_goes_on(command, tmp_path):
    """The projection to the teacher is part of a checkpoint."""
    script = load_script("pretrain")
    save = ["--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "5"]
    script.main([*command, *save, "--output_dir", str(tmp_path / "whole")])
    whole = ModernAlbertForMaskedLM.from_pretrained(tmp_path / "whole").state_dict()
    (tmp_path / "whole").rename(tmp_path / "run")
    for path in (*(tmp_path / "run").glob("*.json"), *(tmp_path / "run").glob("*.safetensors")):
        if path.name != "arguments.json":
            path.unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    script.main([*command, *save, "--output_dir", str(tmp_path / "run")])
    resumed = ModernAlbertForMaskedLM.from_pretrained(tmp_path / "run").state_dict()
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden_loss", "mse"], "compared by their cosine: leave `hidden_loss`"),
        (["--masked_share", "1.5"], r"`masked_share` \(1.5\) must be at least 0 and at most 1"),
    ],
)
def test_what_an_encoder_cannot_teach_is_refused(command, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_script("pretrain").main([*command, *arguments, "--output_dir", str(tmp_path / "run")])


def test_an_empty_teacher_is_refused(command, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises((OSError, ValueError), match="empty"):
        load_script("pretrain").main(
            [*command, "--teacher", str(tmp_path / "empty"), "--output_dir", str(tmp_path / "run")]
        )


def test_clean_sequences_need_a_teacher(command, tmp_path):
    without = [value for value in command if value != "--teacher" and "bert" not in value]
    with pytest.raises(ValueError, match="`masked_share` must be 1"):
        load_script("pretrain").main([*without, "--masked_share", "0.5", "--output_dir", str(tmp_path / "run")])


def test_the_script_learns_from_pairs(command, tmp_path):
    """Some rows are pairs; the head of their similarity is left in no model."""
    rows = [{"text": text, **({"text_pair": TEXTS[n // 2]} if n % 2 else {})} for n, text in enumerate(TEXTS)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = ["--train_data", str(tmp_path / "pairs.jsonl"), "--pair_column", "text_pair", "--max_length", "64"]
    script = load_script("pretrain")
    results = script.main([*command, *pairs, "--output_dir", str(tmp_path / "run")])
    assert results["pair_loss"] > 0
    _, info = ModernAlbertForMaskedLM.from_pretrained(tmp_path / "run", output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    without = script.main([*command, *pairs, "--pair_weight", "0", "--output_dir", str(tmp_path / "without")])
    assert "pair_loss" not in without and without["hidden_loss"] > 0
    alone = [value for value in command if value != "--teacher" and "bert" not in value]
    assert "hidden_loss" not in script.main([*alone, *pairs, "--output_dir", str(tmp_path / "alone")])


def test_pairs_need_a_token_that_parts_them(command, tmp_path, teacher_folder):
    shutil.copytree(teacher_folder, tmp_path / "teacher")
    settings = json.loads((tmp_path / "teacher" / "tokenizer_config.json").read_text())
    settings.pop("sep_token")
    (tmp_path / "teacher" / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="has no `sep_token`, which parts the texts of a pair"):
        load_script("pretrain").main(
            [
                *command,
                "--teacher",
                str(tmp_path / "teacher"),
                "--pair_column",
                "b",
                "--output_dir",
                str(tmp_path / "run"),
            ]
        )
