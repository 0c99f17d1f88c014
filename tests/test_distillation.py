"""What a teacher adds to the loss, against texts and tokens one by one."""

import copy

import pytest
import torch
from helpers import ROWS, SPANS, TEXTS, VOCAB, lay_out, make_batch
from transformers import BertConfig, BertForMaskedLM

from modernalbert.tokenization import train_tokenizer
from modernalbert.training.distillation import Distiller, packed_inputs
from modernalbert.training.initialization import teacher_segments
from modernalbert.training.packing import PackedCollator


@pytest.fixture
def tokenizer():
    """A new one for each test, since calls leave traces in it."""
    return train_tokenizer(TEXTS, vocab_size=VOCAB)


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
        for position in range(length):
            if labels[position] != -100:
                p, q = (torch.softmax(o.logits[0, position] / distiller.temperature, -1) for o in (theirs, ours))
                kl = kl + distiller.temperature**2 * (p * (p.log() - q.log())).sum()
                count += 1
            for found, (student_layer, teacher_layer) in zip(differences, distiller.layer_map, strict=True):
                a, b = ours.hidden_states[student_layer][0, position], theirs.hidden_states[teacher_layer][0, position]
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
    return distiller(batch, outputs, num_items, num_tokens, distiller.ask(batch))


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
