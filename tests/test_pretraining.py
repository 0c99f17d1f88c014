"""The parts of pretraining: texts, masks, distillation, the Trainer."""

import copy
import json
import logging
import math
import os
import random
from collections import Counter
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from datasets import Dataset
from transformers import BertConfig, BertForMaskedLM, ModernBertConfig, ModernBertForMaskedLM, TrainingArguments

from modernalbert import ModernAlbertForMaskedLM
from modernalbert.tokenization import train_tokenizer
from modernalbert.training.data import PackedCollator, TokenMasker, load_texts, mask_rows, name_sources, pack_texts
from modernalbert.training.distillation import Distiller, packed_inputs
from modernalbert.training.initialization import teacher_segments
from modernalbert.training.pretraining import PretrainingTrainer, routing_statistics


TEXTS = [f"Sentence number {n} says that {n} times {n} is {n * n}." for n in range(60)]
CLS, SEP, PAD = 1, 2, 3  # the trained tokenizer's
VOCAB = 320
TOKENS = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": CLS, "cls_token_id": CLS}


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    # `datasets` sleeps at the end of each stream of Parquet files.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


@pytest.fixture
def tokenizer():
    """A new one for each test, since calls leave traces in it."""
    return train_tokenizer(TEXTS, vocab_size=VOCAB)


@pytest.fixture
def make_student(make_model):
    def make(dtype=torch.float32, **overrides):
        settings = {**TOKENS, "sparse_prediction": True, "router_jitter_noise": 0.0, **overrides}
        return make_model(ModernAlbertForMaskedLM, dtype=dtype, **settings)

    return make


@pytest.fixture
def make_teacher(randomize):
    def make(dtype=torch.float32, **overrides):
        settings = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
        settings |= {**TOKENS, "eos_token_id": SEP, "sep_token_id": SEP, "local_attention": 6}
        settings |= {"max_position_embeddings": 64, "attn_implementation": "sdpa", **overrides}
        return randomize(ModernBertForMaskedLM(ModernBertConfig(**settings)), seed=1).to(dtype).eval()

    return make


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


def write_sources(folder):
    """Three sources of four kinds of files, with 40 texts each, `a 0` to `c 39`."""
    texts = {name: [f"{name} {n}" for n in range(40)] for name in "abc"}
    (folder / "a.txt").write_text("".join(f"{text}\n" for text in texts["a"]))
    lines = [json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(texts["b"])]
    (folder / "b.jsonl").write_text("".join(lines))
    (folder / "c").mkdir()
    Dataset.from_dict({"text": texts["c"][:20]}).to_parquet(folder / "c" / "1.parquet")
    (folder / "c" / "2.csv").write_text(
        "id,text\n" + "".join(f"{n},{text}\n" for n, text in enumerate(texts["c"][20:]))
    )
    return [str(folder / "a.txt"), str(folder / "b.jsonl"), str(folder / "c" / "*")], texts


def first_letters(texts):
    return [row["text"][0] for row in texts]


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_of_several_kinds_are_read_once_each(tmp_path, streaming):
    sources, texts = write_sources(tmp_path)
    rows = list(load_texts(sources, streaming=streaming))
    assert {name for row in rows for name in row} == {"text"}
    assert Counter(row["text"] for row in rows) == Counter(sum(texts.values(), []))


@pytest.mark.parametrize("streaming", [False, True])
def test_mixing_weights_are_shares_of_the_texts(tmp_path, streaming):
    sources, texts = write_sources(tmp_path)

    def mix(seed):
        weights = [6, 3, 1]
        return [row["text"] for row in load_texts(sources, streaming=streaming, mixing_weights=weights, seed=seed)]

    mixed = mix(0)
    counts = Counter(text[0] for text in mixed)
    for name, share in zip("abc", (0.6, 0.3, 0.1), strict=True):
        tolerance = 4 * math.sqrt(share * (1 - share) / len(mixed))
        assert counts[name] / len(mixed) == pytest.approx(share, abs=tolerance)
    assert set(mixed) == set(sum(texts.values(), []))  # the smallest share is not cut
    assert mixed == mix(0) != mix(1)


@pytest.mark.parametrize("weights", [[1], [1, 2, 3, 4], [1, 0, 1], [1, -1, 1]])
def test_mixing_weights_that_do_not_fit_are_refused(tmp_path, weights):
    sources, _ = write_sources(tmp_path)
    with pytest.raises(ValueError, match="must be positive, one for each of the 3 sources"):
        load_texts(sources, mixing_weights=weights)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stream_is_shuffled_by_its_seed(tmp_path, streaming):
    sources, _ = write_sources(tmp_path)
    one, same, other = (list(load_texts(sources, streaming=streaming, seed=seed)) for seed in (0, 0, 1))
    assert one == same and (one != other) == streaming


# A message says at least which file it is.
BROKEN = [
    ("body.jsonl", b'{"body": "a"}\n', "has no column 'text', but 'body'"),
    ("empty.txt", b"", "empty.txt"),
    ("empty.jsonl", b"", "empty.jsonl"),
    ("empty.csv", b"", "empty.csv"),
    ("header.csv", b"text\n", "header.csv"),
    ("numbers.csv", b"text\n1\n2\n", "column 'text' of '.*numbers.csv' holds int, expected texts"),
    ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "cannot read .*broken.jsonl"),
    ("broken.parquet", b"not a parquet file", "cannot read .*broken.parquet"),
    ("texts.docx", b"", "cannot read '.*texts.docx'; convert it to one of .parquet"),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("name", "content", "message"), BROKEN, ids=[name for name, *_ in BROKEN])
def test_files_without_texts_are_refused(tmp_path, name, content, message, streaming):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(load_texts([str(tmp_path / name)], streaming=streaming))


@pytest.mark.parametrize("pattern", ["*.txt", "none.txt", "**/none.jsonl"])
def test_a_source_that_matches_no_file_is_refused(tmp_path, pattern):
    with pytest.raises(FileNotFoundError, match="no file matches"):
        load_texts([str(tmp_path / pattern)])


def test_a_folder_as_a_source_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file matches"):
        load_texts([str(tmp_path)])


@pytest.mark.parametrize("streaming", [False, True])
def test_other_columns_need_not_agree(tmp_path, streaming):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "id": 1}\n')
    (tmp_path / "b.csv").write_text("text,id\ntwo,b\n")
    rows = load_texts([str(tmp_path / "*")], streaming=streaming)
    assert sorted(row["text"] for row in rows) == ["one", "two"]


@pytest.mark.parametrize("streaming", [False, True])
def test_large_strings_mix_with_others(tmp_path, streaming):
    """Polars and recent pandas write Parquet files of `large_string`."""
    column = pyarrow.array(["one"], type=pyarrow.large_string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("two\n")
    rows = load_texts([str(tmp_path / "a.parquet"), str(tmp_path / "b.txt")], streaming=streaming)
    assert sorted(row["text"] for row in rows) == ["one", "two"]


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["data/a.txt", "other/b.jsonl"], ["a", "b"]),
        (["org/wikitext:raw-v1", "org/news"], ["wikitext", "news"]),
        (["org/wiki:en", "org/wiki:de"], ["org_wiki_en", "org_wiki_de"]),
        (["x/a.txt", "y/a.txt", "b.txt"], ["x_a_txt", "y_a_txt", "b"]),
        (["org/a:b", "a.jsonl"], ["org_a_b", "a_jsonl"]),
        ([], []),
    ],
)
def test_sources_are_named_by_stem_where_it_is_unique(sources, names):
    assert name_sources(sources) == dict(zip(sources, names, strict=True))


@pytest.mark.parametrize("sources", [["x-y/a.txt", "x_y/a.txt"], ["x/a.txt", "y/a.txt", "x_a_txt.csv"]])
def test_no_two_sources_share_a_name(sources):
    assert len(set(name_sources(sources).values())) == len(sources)


def test_a_stream_packs_to_the_same_rows(tokenizer):
    """More texts than one batch of a thousand, the first thousand of them empty."""
    texts = Dataset.from_dict({"text": ["", None, " "] * 400 + TEXTS * 20})
    packed = pack_texts(texts, tokenizer, 32)
    stream = pack_texts(texts.to_iterable_dataset(), tokenizer, 32)
    assert list(stream) == list(packed) and packed.column_names == ["input_ids"]


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


@torch.no_grad()
def test_texts_of_a_packed_row_are_apart_in_modernbert(tokenizer, make_teacher):
    """Layers 0 and 3 of 4 are full, and 17 tokens are longer than the window of 3 on either side."""
    model = make_teacher()
    assert model.config.layer_types[:4] == ["full_attention", *["sliding_attention"] * 2, "full_attention"]
    batch = PackedCollator(tokenizer)(lay_out(ROWS))
    packed = model(**packed_inputs(model, batch), output_hidden_states=True)
    assert not any(states.isnan().any() for states in packed.hidden_states)
    for row, start, length in SPANS:
        alone = model(batch["input_ids"][row : row + 1, start : start + length], output_hidden_states=True)
        for states, expected in zip(packed.hidden_states, alone.hidden_states, strict=True):
            torch.testing.assert_close(states[row, start : start + length], expected[0], rtol=1e-5, atol=1e-5)


def test_packed_inputs_are_refused_for_other_models(tokenizer):
    config = BertConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(ValueError, match="packed rows would let texts of a bert see each other"):
        packed_inputs(BertForMaskedLM(config), make_batch(tokenizer))


def test_packed_inputs_are_refused_where_a_mask_would_not_hold(tokenizer, make_teacher):
    with pytest.raises(ValueError, match="need `attn_implementation='sdpa'`, got 'eager'"):
        packed_inputs(make_teacher(attn_implementation="eager"), make_batch(tokenizer))


def test_packed_inputs_of_modernalbert_pass_unchanged(tokenizer, make_student):
    batch = make_batch(tokenizer)
    assert packed_inputs(make_student(), batch) is batch


def naive_terms(distiller, student, batch, spans=SPANS):
    """Both terms, from models that run over one text at a time, token by token."""
    kl, count = 0.0, 0
    differences = [[] for _ in distiller.layer_map]
    for row, start, length in spans:
        ids, labels = (batch[name][row, start : start + length] for name in ("input_ids", "labels"))
        ours, theirs = (model(ids[None], output_hidden_states=True) for model in (student, distiller.teacher))
        for place in range(length):
            if labels[place] != -100:
                p, q = (torch.softmax(o.logits[0, place] / distiller.temperature, -1) for o in (theirs, ours))
                kl = kl + distiller.temperature**2 * (p * (p.log() - q.log())).sum()
                count += 1
            for found, (student_layer, teacher_layer) in zip(differences, distiller.layer_map, strict=True):
                a, b = ours.hidden_states[student_layer][0, place], theirs.hidden_states[teacher_layer][0, place]
                if len(a) > len(b):
                    a = distiller.projection.to(a).T @ a
                elif len(a) < len(b):
                    b = distiller.projection.to(b).T @ b
                cosine = a @ b / (a.norm() * b.norm())
                found.append(1 - cosine if distiller.hidden_loss == "cosine" else ((a - b) ** 2).sum() / len(a))
    hidden = sum(sum(found) / len(found) for found in differences) / len(differences)
    return {"kl_loss": kl / count, "hidden_loss": hidden}


def run_distiller(distiller, student, batch, num_items=None, num_tokens=None):
    outputs = student(**packed_inputs(student, batch), output_hidden_states=True)
    num_items = (batch["labels"] != -100).sum() if num_items is None else num_items
    num_tokens = batch["attention_mask"].sum().item() if num_tokens is None else num_tokens
    return distiller(batch, outputs, num_items, num_tokens)


@pytest.mark.parametrize("hidden_loss", ["cosine", "mse"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("width", [32, 16, 48])
def test_distillation_terms_are_those_of_texts_and_tokens_one_by_one(
    tokenizer, make_student, make_teacher, hidden_loss, temperature, width
):
    student = make_student(torch.float64)
    distiller = Distiller(make_teacher(torch.float64, hidden_size=width), student, temperature, hidden_loss)
    batch = make_batch(tokenizer)
    terms = run_distiller(distiller, student, batch)
    with torch.no_grad():
        expected = naive_terms(distiller, student, batch)
    assert set(terms) == set(expected) and min(expected.values()) > 0.01
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("hidden_loss", ["cosine", "mse"])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(tokenizer, make_student, hidden_loss):
    student = make_student()
    distiller = Distiller(copy.deepcopy(student), student, 2.0, hidden_loss)
    for value in run_distiller(distiller, student, make_batch(tokenizer)).values():
        assert value.item() == pytest.approx(0, abs=1e-6)


def test_the_gradient_of_distillation_reaches_the_student_alone(tokenizer, make_student, make_teacher):
    student, teacher = make_student(), make_teacher().train()
    names = set(student.state_dict())
    distiller = Distiller(teacher, student)
    for term in run_distiller(distiller, student, make_batch(tokenizer)).values():
        student.zero_grad()
        term.backward(retain_graph=True)
        assert student.model.embeddings.tok_embeddings.weight.grad.abs().sum() > 0
    assert not teacher.training and set(student.state_dict()) == names
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())


def test_the_gradient_of_distillation_is_that_of_texts_and_tokens_one_by_one(tokenizer, make_student, make_teacher):
    student = make_student(torch.float64)
    distiller = Distiller(make_teacher(torch.float64), student, 2.0, "mse")
    batch = make_batch(tokenizer)
    gradients = []
    for terms in (run_distiller(distiller, student, batch), naive_terms(distiller, student, batch)):
        student.zero_grad()
        (terms["kl_loss"] + 3 * terms["hidden_loss"]).backward()
        gradients.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("layers", "groups", "depth", "expected"),
    [
        (6, 3, 2, [(2, 2), (4, 4), (6, 6)]),
        (22, 7, 2, [(2, 3), (4, 6), (6, 9), (8, 13), (10, 16), (12, 19), (14, 22)]),
    ],
)
def test_each_group_learns_from_the_last_layer_of_its_segment(
    make_student, make_teacher, layers, groups, depth, expected
):
    student = make_student(num_hidden_layers=groups * depth, num_hidden_groups=groups, mol_groups=[groups - 1])
    assert Distiller(make_teacher(num_hidden_layers=layers), student).layer_map == expected
    assert [segment.stop for segment in teacher_segments(layers, groups)] == [layer for _, layer in expected]


def test_segments_cover_the_teacher_and_differ_by_one_layer_at_most():
    for layers in range(1, 40):
        for groups in range(1, layers + 1):
            segments = teacher_segments(layers, groups)
            assert [layer for segment in segments for layer in segment] == list(range(layers))
            assert len(segments) == groups and max(map(len, segments)) - min(map(len, segments)) <= 1
    with pytest.raises(ValueError, match=r"`num_hidden_groups` \(5\) exceeds the 4 layers of the teacher"):
        teacher_segments(4, 5)


@pytest.mark.parametrize("width", [16, 48])
def test_other_widths_are_projected_on_orthonormal_columns(make_student, make_teacher, width):
    distiller = Distiller(make_teacher(hidden_size=width), make_student())
    narrow, wide = sorted((width, 32))
    assert distiller.projection.shape == (wide, narrow) and not distiller.projection.requires_grad
    torch.testing.assert_close(distiller.projection.T @ distiller.projection, torch.eye(narrow))
    again = Distiller(make_teacher(hidden_size=width), make_student())
    assert torch.equal(again.projection, distiller.projection)  # a run that is resumed goes on with the same


def test_teachers_that_do_not_fit_are_refused(make_student, make_teacher):
    student = make_student()
    with pytest.raises(ValueError, match="the teacher has 384 tokens and the student 320; set"):
        Distiller(make_teacher(vocab_size=384), student)
    with pytest.raises(ValueError, match="`hidden_loss` must be 'cosine' or 'mse', got 'l1'"):
        Distiller(make_teacher(), student, hidden_loss="l1")


@pytest.mark.parametrize("hidden_loss", ["cosine", "mse"])
def test_distillation_terms_of_parts_of_a_batch_add_up(tokenizer, make_student, make_teacher, hidden_loss):
    student = make_student(torch.float64)
    distiller = Distiller(make_teacher(torch.float64), student, hidden_loss=hidden_loss)
    batch = make_batch(tokenizer)
    num_items, num_tokens = (batch["labels"] != -100).sum(), batch["attention_mask"].sum().item()
    whole = run_distiller(distiller, student, batch)
    parts = [
        run_distiller(distiller, student, {k: v[rows] for k, v in batch.items()}, num_items, num_tokens)
        for rows in (slice(0, 1), slice(1, 3))
    ]
    for name, value in whole.items():
        torch.testing.assert_close(parts[0][name] + parts[1][name], value, rtol=1e-5, atol=1e-7)


def make_trainer(model, tokenizer, folder, rows=None, probability=0.3, arguments=None, teacher=None, **settings):
    defaults = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    defaults |= {"remove_unused_columns": False, "save_strategy": "no", "max_steps": 1, "weight_decay": 0.0}
    args = arguments if isinstance(arguments, TrainingArguments) else TrainingArguments(**defaults | (arguments or {}))
    trainer = PretrainingTrainer(
        model=model,
        args=args,
        data_collator=PackedCollator(tokenizer),
        train_dataset=Dataset.from_list(lay_out(ROWS if rows is None else rows)),
        masker=TokenMasker(tokenizer, probability),
        distiller=teacher and Distiller(teacher, model),
        **settings,
    )
    return trainer


def learning_rates(trainer, steps):
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=trainer.args.learning_rate)
    scheduler = trainer.create_scheduler(steps)
    rates = []
    for _ in range(steps + 1):
        rates.append(scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(("decay", "decay_steps"), [(0.25, 10), (12, 12), (1, 1), (0.0, 0)])
def test_the_learning_rate_warms_up_stays_and_falls_as_one_minus_the_root(
    tokenizer, make_student, tmp_path, decay, decay_steps
):
    arguments = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 5, "learning_rate": 0.2}
    trainer = make_trainer(make_student(), tokenizer, tmp_path, arguments=arguments, decay_steps=decay)

    def rate(step):
        if step < 5:
            return 0.2 * step / 5
        if step <= 40 - decay_steps and step < 40:
            return 0.2
        return 0.2 * (1 - math.sqrt((step - (40 - decay_steps)) / decay_steps)) if decay_steps else 0.0

    assert learning_rates(trainer, 40) == pytest.approx([rate(step) for step in range(41)], abs=1e-9)


def test_other_schedules_are_left_alone(tokenizer, make_student, tmp_path):
    arguments = {"lr_scheduler_type": "linear", "warmup_steps": 0, "learning_rate": 0.2}
    trainer = make_trainer(make_student(), tokenizer, tmp_path, arguments=arguments, decay_steps=5)
    rates = learning_rates(trainer, 10)
    assert (
        rates == pytest.approx([0.2 * (1 - step / 10) for step in range(11)]) and not trainer.args.lr_scheduler_kwargs
    )


def test_given_settings_of_the_schedule_win(tokenizer, make_student, tmp_path):
    arguments = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"decay_type": "linear"}}
    arguments |= {"learning_rate": 0.2}
    trainer = make_trainer(make_student(), tokenizer, tmp_path, arguments=arguments, decay_steps=4)
    assert learning_rates(trainer, 8)[4:] == pytest.approx([0.2, 0.15, 0.1, 0.05, 0.0])


def test_trainers_with_the_same_arguments_have_schedules_of_their_own(tokenizer, make_student, tmp_path):
    first = make_trainer(
        make_student(), tokenizer, tmp_path, arguments={"lr_scheduler_type": "warmup_stable_decay"}, decay_steps=0.5
    )
    learning_rates(first, 10)
    second = make_trainer(make_student(), tokenizer, tmp_path, arguments=first.args, decay_steps=0.5)
    rates = learning_rates(second, 20)
    assert rates[10] == rates[0] > rates[11]


@pytest.mark.parametrize("top_k", [1, 2])
def test_routing_statistics_are_those_of_tokens_one_by_one(top_k):
    """Two groups of three executed layers, five experts, three rows of which two are padded, one on the left."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]])
    logits = 2 * torch.randn(6, *mask.shape, 5, generator=torch.Generator().manual_seed(0))
    config = SimpleNamespace(router_type="top_k", mol_groups=[0, 1], num_experts_per_tok=top_k)
    load, entropy = routing_statistics(tuple(logits), config, mask)
    for group in range(2):
        chosen, entropies = [0] * 5, []
        for layer in range(3 * group, 3 * group + 3):
            for row in range(3):
                for place in range(4):
                    if mask[row, place]:
                        values = [math.exp(value) for value in logits[layer, row, place].tolist()]
                        shares = [value / sum(values) for value in values]
                        entropies.append(-sum(p * math.log(p) for p in shares) / math.log(5))
                        for expert in sorted(range(5), key=lambda e, p=shares: -p[e])[:top_k]:
                            chosen[expert] += 1
        assert load[group].tolist() == pytest.approx([count / sum(chosen) for count in chosen])
        assert entropy[group].item() == pytest.approx(sum(entropies) / len(entropies), abs=1e-5)


def test_even_routing_has_an_entropy_of_one():
    config = SimpleNamespace(router_type="top_k", mol_groups=[0], num_experts_per_tok=2)
    _, entropy = routing_statistics((torch.zeros(1, 3, 4),), config, torch.ones(1, 3))
    assert entropy.tolist() == pytest.approx([1.0])


UNEVEN = [[make_text(4 + 3 * (n % 5), n), make_text(3 + n % 7, 100 + n)] for n in range(24)]


@pytest.mark.parametrize("distilled", [True, False])
def test_a_run_logs_every_term_of_its_loss(tokenizer, make_student, make_teacher, tmp_path, distilled):
    student = make_student(router_aux_loss_coef=0.1, mol_groups=[0, 1], mol_intermediate_size=40)
    arguments = {"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 3, "learning_rate": 1e-3}
    arguments |= {"gradient_accumulation_steps": 2}
    weights = {"mlm_weight": 0.7, "kl_weight": 2.0, "hidden_weight": 0.5}
    teacher = make_teacher() if distilled else None
    trainer = make_trainer(student, tokenizer, tmp_path, UNEVEN, arguments=arguments, teacher=teacher, **weights)
    trainer.train()

    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [2, 4]
    assert logs[-1]["tokens"] == sum(len(text) for row in UNEVEN for text in row)  # 4 steps of 6 rows are all
    for entry in logs:
        expected = 0.7 * entry["mlm_loss"] + 0.1 * entry["aux_loss"]
        if distilled:
            expected += 2 * entry["kl_loss"] + 0.5 * entry["hidden_loss"]
        assert entry["loss"] == pytest.approx(expected, abs=1e-4) and entry["mlm_loss"] > 1
        assert ("kl_loss" in entry) == ("hidden_loss" in entry) == distilled
        assert entry["aux_loss"] >= 1 and entry["tokens_per_second"] > 0 and entry["mfu"] > 0
        for group in range(2):
            assert 0 <= entry[f"router_entropy/group_{group}"] <= 1
            loads = [entry[f"expert_load/group_{group}/expert_{expert}"] for expert in range(4)]
            assert min(loads) >= 0 and sum(loads) == pytest.approx(1, abs=1e-5)


def test_a_modernbert_is_trained_in_the_same_way(tokenizer, make_teacher, tmp_path):
    """The loss of a step is that of its texts apart."""
    model = make_teacher(sparse_prediction=True)
    arguments = {"per_device_train_batch_size": 3, "logging_steps": 1, "learning_rate": 0.0}
    trainer = make_trainer(model, tokenizer, tmp_path, arguments=arguments)
    seen = []
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, *rest, **named: (
        seen.append(inputs) or compute_loss(model, inputs, *rest, **named)
    )
    trainer.train()
    (batch,), total = seen, 0.0
    model.eval().sparse_prediction = False
    starts = [(row, place) for row, place in (batch["position_ids"] == 0).nonzero().tolist()]
    for row, start in starts:
        places = batch["position_ids"][row, start:].tolist()
        end = start + next((n for n in range(1, len(places)) if places[n] == 0), len(places))
        end = min(end, int(batch["attention_mask"][row].sum()))
        with torch.no_grad():
            logits = model(batch["input_ids"][row : row + 1, start:end]).logits[0]
        labels = batch["labels"][row, start:end]
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100).item()
    assert len(starts) == len(SPANS)
    expected = total / (batch["labels"] != -100).sum().item()
    assert trainer.state.log_history[0]["mlm_loss"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("distilled", [True, False])
def test_micro_batches_give_the_weights_of_one_large_batch(tokenizer, make_student, make_teacher, tmp_path, distilled):
    """Rows of a batch have 7 to 25 tokens, so that micro-batches are padded to different lengths."""
    weights = []
    for size in (8, 4, 2):
        model = make_student(router_aux_loss_coef=0.0)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "optim": "sgd"}
        arguments |= {"learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
        teacher = make_teacher() if distilled else None
        trainer = make_trainer(model, tokenizer, tmp_path, UNEVEN[:8], arguments=arguments, teacher=teacher)
        trainer.train()
        assert not torch.equal(model.lm_head.dense.weight, before["lm_head.dense.weight"])
        weights.append(model.state_dict())
    for other in weights[1:]:
        for name, value in weights[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("distilled", [True, False])
def test_a_step_without_a_masked_token_leaves_the_weights_finite(
    tokenizer, make_student, make_teacher, tmp_path, distilled
):
    """The last row of a thousand texts may be that short."""
    model = make_student()
    arguments = {"per_device_train_batch_size": 1, "logging_steps": 1, "logging_nan_inf_filter": False}
    teacher = make_teacher() if distilled else None
    trainer = make_trainer(
        model, tokenizer, tmp_path, [[make_text(4, 0)]], probability=1e-9, arguments=arguments, teacher=teacher
    )
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_routing_is_reported_under_the_group_that_routed(tokenizer, make_student, tmp_path):
    """MoL groups are executed by their number, in whichever order the configuration names them."""
    model = make_student(mol_groups=[1, 0], mol_intermediate_size=40)
    trainer = make_trainer(model, tokenizer, tmp_path)
    batch = make_batch(tokenizer)
    with torch.no_grad():
        model.model.layers[0].mlp.router.weight.zero_()  # even probabilities
        outputs = model.model(
            batch["input_ids"], batch["attention_mask"], batch["position_ids"], output_router_logits=True
        )
    trainer.tokens_in_batch = batch["attention_mask"].sum()
    trainer.record_routing(outputs.router_logits, batch["attention_mask"])
    assert trainer.terms["router_entropy/group_0"].item() == pytest.approx(1, abs=1e-5)
    assert trainer.terms["router_entropy/group_1"].item() < 0.999


@pytest.mark.parametrize(
    ("overrides", "routed"),
    [
        ({"ffn_modulation": "moa", "router_type": "soft"}, True),
        ({"router_type": "sequence"}, True),
        ({"router_type": "top_p"}, True),
        ({"ffn_modulation": "depth_lora"}, False),
        ({"ffn_modulation": "none"}, False),
    ],
    ids=str,
)
def test_alternatives_to_the_mixture_train(tokenizer, make_student, tmp_path, overrides, routed):
    trainer = make_trainer(make_student(**overrides), tokenizer, tmp_path, arguments={"logging_steps": 1})
    trainer.train()
    logs = trainer.state.log_history[0]
    assert math.isfinite(logs["loss"])
    loads = [value for name, value in logs.items() if name.startswith("expert_load/")]
    assert bool(loads) == routed
    if routed:
        assert sum(loads) == pytest.approx(len(trainer.model.config.mol_groups), rel=1e-5)
