import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from packaging.version import Version
from torch import nn
from transformers import ModernBertConfig, ModernBertModel

from modernalbert import (
    ModernAlbertConfig,
    ModernAlbertForMaskedLM,
    ModernAlbertForMultipleChoice,
    ModernAlbertForQuestionAnswering,
    ModernAlbertForSequenceClassification,
    ModernAlbertForTokenClassification,
    ModernAlbertModel,
)
from modernalbert.modeling_modernalbert import apply_rotary_pos_emb


MIXED_LAYERS = ["full_attention", "sliding_attention"] * 2
LENGTHS = (10, 7, 3, 10, 5, 9, 1, 6)

# Each head with each kind of label that it takes.
HEADS = {
    "masked_lm": (ModernAlbertForMaskedLM, {}),
    "masked_lm_sparse": (ModernAlbertForMaskedLM, {"sparse_prediction": True}),
    "single_label": (ModernAlbertForSequenceClassification, {"num_labels": 3}),
    "multi_label": (ModernAlbertForSequenceClassification, {"num_labels": 3}),
    "regression": (ModernAlbertForSequenceClassification, {"num_labels": 1}),
    "regression_of_three": (
        ModernAlbertForSequenceClassification,
        {"num_labels": 3, "problem_type": "regression"},
    ),
    "token": (ModernAlbertForTokenClassification, {"num_labels": 3}),
    "question": (ModernAlbertForQuestionAnswering, {}),
    "choice": (ModernAlbertForMultipleChoice, {}),
}
each_head = pytest.mark.parametrize("head", HEADS)


def padded_batch():
    """Eight texts of uneven lengths, padded on the right."""
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(3, 100, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": input_ids * mask, "attention_mask": mask}


def labelled_batch(head):
    """A padded batch with labels for a head; half of the texts or tokens have none where a label can be missing."""
    generator = torch.Generator().manual_seed(1)
    batch = padded_batch()
    mask, size = batch["attention_mask"], len(LENGTHS)
    some = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1], dtype=torch.bool)
    if head.startswith("masked_lm") or head == "token":
        labels = torch.randint(0, 3 if head == "token" else 100, mask.shape, generator=generator)
        chosen = (torch.rand(mask.shape, generator=generator) < 0.4) & (mask == 1)
        batch["labels"] = labels.masked_fill(~chosen, -100)
    elif head == "single_label":
        batch["labels"] = torch.randint(0, 3, (size,), generator=generator).masked_fill(~some, -100)
    elif head == "multi_label":
        batch["labels"] = torch.randint(0, 2, (size, 3), generator=generator).float()
    elif head == "regression":
        batch["labels"] = torch.randn(size, generator=generator)
    elif head == "regression_of_three":
        batch["labels"] = torch.randn(size, 3, generator=generator)
    elif head == "question":
        batch["start_positions"] = (torch.tensor(LENGTHS) // 2).masked_fill(~some, mask.shape[1])
        batch["end_positions"] = (torch.tensor(LENGTHS) - 1).masked_fill(~some, mask.shape[1] + 3)
    elif head == "choice":
        batch = {name: torch.stack([tensor, tensor.flip(0)], dim=1) for name, tensor in batch.items()}
        batch["labels"] = torch.randint(0, 2, (size,), generator=generator).masked_fill(~some, -100)
    return batch


def label_count(head, batch):
    """Labels as Trainer counts them."""
    if head == "question":
        return (batch["start_positions"] < batch["input_ids"].shape[1]).sum()
    return (batch["labels"] != -100).sum()


def expected_loss(head, output, batch):
    """The task's loss from the logits of an output, in plain torch."""
    if head == "question":
        losses = []
        for logits, positions in (
            (output.start_logits, batch["start_positions"]),
            (output.end_logits, batch["end_positions"]),
        ):
            inside = positions < logits.shape[1]
            losses.append(F.cross_entropy(logits[inside], positions[inside]))
        return sum(losses) / 2
    labels = batch["labels"]
    if head.startswith("regression"):
        return F.mse_loss(output.logits, labels.view_as(output.logits))
    if head == "multi_label":
        return F.binary_cross_entropy_with_logits(output.logits, labels)
    if head == "masked_lm_sparse":
        return F.cross_entropy(output.logits, labels[labels != -100])
    return F.cross_entropy(output.logits.flatten(0, -2), labels.flatten())


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# ---- The encoder


def test_a_group_runs_several_times_in_a_row(make_model):
    """Six layers of two groups equal six layers with weights of their own, copied A A A B B B."""
    shared = make_model(dtype=torch.float64, num_hidden_layers=6, mol_groups=[1])
    unshared = make_model(dtype=torch.float64, num_hidden_layers=6, num_hidden_groups=6, mol_groups=[3, 4, 5])
    for name in ("embeddings", "final_norm"):
        getattr(unshared, name).load_state_dict(getattr(shared, name).state_dict())
    for index, layer in enumerate(unshared.layers):
        layer.load_state_dict(shared.layers[index // 3].state_dict())
    batch = padded_batch()
    outputs = [model(**batch).last_hidden_state for model in (shared, unshared)]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)

    for output in outputs:
        (output * torch.linspace(-1, 1, 32)).sum().backward()
    copies = gradients(unshared)
    for name, gradient in gradients(shared.layers).items():
        group, rest = name.split(".", 1)
        expected = sum(copies[f"layers.{3 * int(group) + depth}.{rest}"] for depth in range(3))
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("layer_types", [["full_attention"] * 4, MIXED_LAYERS], ids=["full", "mixed"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_encoder_equals_modernbert(make_model, implementation, layer_types):
    """Without sharing, experts and factorisation, and with ModernBERT's first norm, the encoder is ModernBERT."""
    thetas = {"full_attention": {"rope_theta": 900.0}, "sliding_attention": {"rope_theta": 50.0}}
    modernbert = ModernBertModel(
        ModernBertConfig(
            **{"vocab_size": 100, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 2},
            **{"num_hidden_layers": 4, "max_position_embeddings": 64, "local_attention": 6, "norm_eps": 1e-6},
            **{"pad_token_id": 0, "bos_token_id": 1, "cls_token_id": 1, "eos_token_id": 2, "sep_token_id": 2},
            layer_types=layer_types,
            rope_parameters={name: {"rope_type": "default", **theta} for name, theta in thetas.items()},
            attn_implementation=implementation,
        )
    )
    ours = make_model(
        embedding_size=32,
        num_hidden_groups=4,
        mol_groups=[],
        layer_types=layer_types,
        rope_parameters=thetas,
        attn_implementation=implementation,
    )
    ours.layers[0].attn_norm = nn.Identity()
    nn.init.eye_(ours.embeddings.projection.weight)
    ours.embeddings.projection.requires_grad_(False)
    keys = modernbert.load_state_dict(ours.state_dict(), strict=False)
    assert keys.unexpected_keys == ["embeddings.projection.weight"] and not keys.missing_keys

    batch = padded_batch()
    real = batch["attention_mask"].bool()
    outputs = [model.eval()(**batch).last_hidden_state[real] for model in (ours, modernbert)]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for output in outputs:
        (output * torch.linspace(-1, 1, 32)).mean().backward()
    ours.embeddings.projection.weight.grad = None
    actual = {name: gradient for name, gradient in gradients(ours).items() if gradient is not None}
    torch.testing.assert_close(actual, gradients(modernbert), rtol=1e-4, atol=1e-5)


def test_embedding_is_a_table_a_norm_and_a_projection(make_model):
    model = make_model(dtype=torch.float64)
    input_ids = padded_batch()["input_ids"][:1]
    rows = model.embeddings.tok_embeddings.weight[input_ids]
    assert rows.shape == (1, 10, 16)
    normed = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    expected = (normed * model.embeddings.norm.weight) @ model.embeddings.projection.weight.T
    actual = model(input_ids, output_hidden_states=True).hidden_states[0]
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_rope_of_half_precision_is_rounded_once():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 30, 2, 2, 16, generator=generator).bfloat16()
    angles = (torch.arange(30.0)[:, None] * 100.0 ** -(torch.arange(8) / 8)).repeat(1, 2)[None, :, None, None]
    cos, signed_sin = angles.cos(), angles.sin() * torch.tensor([-1.0] * 8 + [1.0] * 8)
    first, second = features.float().chunk(2, dim=-1)
    expected = features.float() * cos + torch.cat([second, first], dim=-1) * signed_sin
    actual = apply_rotary_pos_emb(features, cos, signed_sin)
    torch.testing.assert_close(actual, expected.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize("field", ["embedding_dropout", "attention_dropout", "mlp_dropout"])
@pytest.mark.parametrize("num_experts", [0, 1, 4])
def test_dropout_is_for_training_only(make_model, field, num_experts):
    overrides = {"num_experts": num_experts, "router_jitter_noise": 0.0, "mol_groups": [0, 1]}
    batch = padded_batch()
    expected = make_model(**overrides)(**batch).last_hidden_state
    model = make_model(**overrides, **{field: 0.3})
    torch.testing.assert_close(model(**batch).last_hidden_state, expected, rtol=0, atol=0)
    assert (model.train()(**batch).last_hidden_state - expected).abs().max() > 0.01


def test_classifier_dropout_is_for_training_only(make_model):
    overrides = {"router_jitter_noise": 0.0}
    batch = padded_batch()
    expected = make_model(ModernAlbertForSequenceClassification, **overrides)(**batch).logits
    model = make_model(ModernAlbertForSequenceClassification, **overrides, classifier_dropout=0.3)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)
    assert (model.train()(**batch).logits - expected).abs().max() > 0.01


@each_head
def test_float64_runs_and_is_near_float32(make_model, head):
    model_class, overrides = HEADS[head]
    batch = labelled_batch(head)
    wide = make_model(model_class, dtype=torch.float64, **overrides)(**batch)
    narrow = make_model(model_class, **overrides)(**batch)
    name = "start_logits" if head == "question" else "logits"
    assert wide[name].dtype == torch.float64
    torch.testing.assert_close(narrow[name].double(), wide[name], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(narrow.loss.double(), wide.loss.double(), rtol=1e-4, atol=1e-5)


@each_head
def test_bfloat16_trains(make_model, head):
    model_class, overrides = HEADS[head]
    model = make_model(model_class, dtype=torch.bfloat16, **overrides).train()
    loss = model(**labelled_batch(head)).loss
    loss.backward()
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


# ---- Initialisation


def expected_initialisation(config, name):
    """Distribution that a parameter starts from: its kind, and its scale."""
    kinds = {
        "norm.weight": ("constant", 1.0),
        "in_B": ("constant", 0.0),
        "out_B": ("constant", 0.0),
        "bias": ("constant", 0.0),
        "in_A": ("uniform", config.hidden_size**-0.5),
        "out_A": ("uniform", config.mol_intermediate_size**-0.5),
        "tok_embeddings.weight": ("normal", 0.05),
        "embeddings.projection.weight": ("normal", 0.05),
        "Wqkv.weight": ("normal", 0.05),
        "Wi.weight": ("normal", 0.05),
        "Wo.weight": ("normal", 0.05 / math.sqrt(2 * config.num_hidden_layers)),
        "router.weight": ("normal", 0.05),
        "head.dense.weight": ("normal", config.hidden_size**-0.5),
        "decoder_projection.weight": ("normal", config.hidden_size**-0.5),
        "classifier.weight": ("normal", config.hidden_size**-0.5),
        "decoder.weight": ("normal", 0.05),
    }
    (kind,) = (kind for suffix, kind in kinds.items() if name.endswith(suffix))
    return kind


def assert_initialised(config, name, tensor):
    kind, scale = expected_initialisation(config, name)
    if kind == "constant":
        torch.testing.assert_close(tensor, torch.full_like(tensor, scale), rtol=0, atol=0, msg=name)
        return
    if name.endswith("tok_embeddings.weight"):
        assert tensor[config.pad_token_id].count_nonzero() == 0
    std = scale if kind == "normal" else scale / math.sqrt(3)
    assert tensor.std().item() == pytest.approx(std, rel=0.08), name
    assert abs(tensor.mean().item()) < 0.1 * std, name
    # A normal distribution reaches beyond the bound of a uniform one.
    assert (tensor.abs().max() <= scale) == (kind == "uniform"), name


@pytest.fixture
def nano():
    """Large enough for statistics of its weights; the classifier too."""
    return ModernAlbertConfig.preset("nano", initializer_range=0.05, tie_word_embeddings=False, num_labels=20)


@pytest.mark.parametrize("model_class", [ModernAlbertForMaskedLM, ModernAlbertForTokenClassification])
def test_initial_weights(nano, model_class):
    torch.manual_seed(0)
    for name, parameter in model_class(nano).named_parameters():
        assert_initialised(nano, name, parameter.detach())


@pytest.mark.parametrize("model_class", [ModernAlbertForMaskedLM, ModernAlbertForTokenClassification])
def test_loading_initialises_what_is_missing_and_nothing_else(nano, model_class, randomize):
    """Of every kind of weight, one is dropped from what is loaded."""
    source = randomize(model_class(nano)).state_dict()
    dropped = {name.split(".", 3)[-1] if name.startswith("model.layers") else name: name for name in source}.values()
    partial = {name: tensor for name, tensor in source.items() if name not in set(dropped)}
    assert 0 < len(partial) < len(source)
    torch.manual_seed(0)
    # Without a path: from a checkpoint, a missing tensor of the encoder is an error.
    loaded = model_class.from_pretrained(None, config=nano, state_dict=partial).state_dict()
    for name, tensor in loaded.items():
        if name in partial:
            torch.testing.assert_close(tensor, source[name], rtol=0, atol=0, msg=name)
        else:
            assert_initialised(nano, name, tensor)


@pytest.mark.parametrize("pad_token_id", [100, -1])
def test_a_padding_token_outside_the_vocabulary_is_refused(make_config, pad_token_id):
    """By the model, and not by the configuration, whose default is ModernBERT's token."""
    config = make_config(pad_token_id=pad_token_id)
    with pytest.raises(
        ValueError, match=rf"`pad_token_id` \({pad_token_id}\) must be below `vocab_size` \(100\).*None"
    ):
        ModernAlbertModel(config)


def test_tied_decoder_is_the_embedding_table(make_config):
    tied = ModernAlbertForMaskedLM(make_config())
    assert tied.decoder.weight is tied.model.embeddings.tok_embeddings.weight
    untied = ModernAlbertForMaskedLM(make_config(tie_word_embeddings=False))
    assert untied.decoder.weight is not untied.model.embeddings.tok_embeddings.weight


# ---- What a model returns


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padded", [True, False])
def test_hidden_states(make_model, implementation, padded):
    model = make_model(attn_implementation=implementation)
    batch = padded_batch() if padded else {"input_ids": padded_batch()["input_ids"]}
    output = model(**batch, output_hidden_states=True)
    assert [states.shape for states in output.hidden_states] == [(8, 10, 32)] * (4 + 1)
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    differences = [(after - before).abs().max() for before, after in itertools.pairwise(output.hidden_states)]
    assert min(differences) > 0.1
    if padded:
        padding = batch["attention_mask"] == 0
        assert all(states[padding].count_nonzero() == 0 for states in output.hidden_states)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="needs transformers 5.23: single hidden states"
)
@pytest.mark.parametrize(("selection", "selected"), [(2, {2}), (-1, {4}), ([0, -2], {0, 3})], ids=str)
def test_selected_hidden_states(make_model, selection, selected):
    model = make_model()
    batch = padded_batch()
    every = model(**batch, output_hidden_states=True).hidden_states
    some = model(**batch, output_hidden_states=selection).hidden_states
    assert {index for index, states in enumerate(some) if states is not None} == selected
    for index in selected:
        torch.testing.assert_close(some[index], every[index], rtol=0, atol=0)


def test_attentions(make_model):
    model = make_model(attn_implementation="eager")
    batch = padded_batch()
    attentions = model(**batch, output_attentions=True).attentions
    assert [weights.shape for weights in attentions] == [(8, 2, 10, 10)] * 4
    real = batch["attention_mask"].bool()
    for weights in attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(8, 2, 10), rtol=1e-5, atol=1e-5)
        to_padding = weights.transpose(1, 3)[~real]  # [padding, query, heads]
        queries = real.repeat_interleave((~real).sum(-1), dim=0)
        assert to_padding[queries].count_nonzero() == 0


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_router_logits(make_model, implementation):
    model = make_model(num_hidden_layers=6, attn_implementation=implementation)
    batch = padded_batch()
    logits = model(**batch, output_router_logits=True).router_logits
    assert [layer.shape for layer in logits] == [(8, 10, 4)] * 3
    real = batch["attention_mask"].bool()
    for layer in logits:
        assert layer[~real].count_nonzero() == 0
        assert layer[real].abs().min(dim=-1).values.count_nonzero() == real.sum()
    unpadded = model(batch["input_ids"][:1], output_router_logits=True).router_logits
    assert [layer.shape for layer in unpadded] == [(1, 10, 4)] * 3
    torch.testing.assert_close(unpadded[2], logits[2][:1], rtol=1e-4, atol=1e-5)


@each_head
def test_heads_hand_on_what_the_encoder_recorded(make_model, head):
    model_class, overrides = HEADS[head]
    model = make_model(model_class, attn_implementation="eager", **overrides)
    batch = labelled_batch(head)
    plain = model(**batch)
    assert plain.hidden_states is plain.attentions is plain.router_logits is plain.aux_loss is None
    output = model(**batch, output_hidden_states=True, output_attentions=True, output_router_logits=True)
    assert (len(output.hidden_states), len(output.attentions), len(output.router_logits)) == (5, 4, 2)
    assert output.aux_loss.dim() == 0
    torch.testing.assert_close(output.loss, plain.loss, rtol=0, atol=0)


def test_router_logits_can_be_asked_for_in_the_configuration(make_model):
    batch = padded_batch()
    model = make_model(ModernAlbertForMaskedLM, output_router_logits=True)
    assert len(model(**batch).router_logits) == 2
    assert model(**batch, output_router_logits=False).router_logits is None
    assert not make_model(ModernAlbertForMaskedLM, num_experts=0)(**batch, output_router_logits=True).router_logits


@pytest.mark.parametrize("model_class", [ModernAlbertModel, ModernAlbertForMaskedLM])
def test_tuple_instead_of_a_dictionary(make_model, model_class):
    model = make_model(model_class)
    batch = padded_batch()
    output = model(**batch, return_dict=False)
    assert isinstance(output, tuple)
    torch.testing.assert_close(output[0], model(**batch)[0], rtol=0, atol=0)


# ---- Losses


@each_head
@pytest.mark.parametrize("num_experts", [0, 4])
def test_evaluation_loss_is_the_tasks(make_model, head, num_experts):
    model_class, overrides = HEADS[head]
    model = make_model(model_class, num_experts=num_experts, **overrides)
    batch = labelled_batch(head)
    output = model(**batch)
    torch.testing.assert_close(output.loss, expected_loss(head, output, batch), rtol=1e-5, atol=1e-6)
    assert output.aux_loss is None


@pytest.mark.parametrize("labels_have_a_column", [True, False])
@pytest.mark.parametrize("head", ["single_label", "regression"])
def test_labels_may_have_a_column(make_model, head, labels_have_a_column):
    model_class, overrides = HEADS[head]
    batch = labelled_batch(head)
    output = make_model(model_class, **overrides)(**{**batch, "labels": batch["labels"].view(8, 1)})
    torch.testing.assert_close(output.loss, expected_loss(head, output, batch), rtol=1e-5, atol=1e-6)


def test_integer_labels_are_converted_where_the_problem_needs_floats(make_model):
    batch = labelled_batch("multi_label")
    model = make_model(ModernAlbertForSequenceClassification, num_labels=3, problem_type="multi_label_classification")
    output = model(**{**batch, "labels": batch["labels"].long()})
    torch.testing.assert_close(output.loss, expected_loss("multi_label", output, batch), rtol=1e-5, atol=1e-6)


def test_sparse_prediction_changes_neither_loss_nor_gradients(make_model):
    batch = labelled_batch("masked_lm")
    dense = make_model(ModernAlbertForMaskedLM, dtype=torch.float64)
    sparse = make_model(ModernAlbertForMaskedLM, dtype=torch.float64, sparse_prediction=True)
    dense_output, sparse_output = dense(**batch), sparse(**batch)
    labelled = batch["labels"] != -100
    assert sparse_output.logits.shape == (labelled.sum(), 100)
    torch.testing.assert_close(sparse_output.logits, dense_output.logits[labelled], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(sparse_output.loss, dense_output.loss, rtol=1e-6, atol=0)  # a loss is float32
    dense_output.loss.backward()
    sparse_output.loss.backward()
    torch.testing.assert_close(gradients(sparse), gradients(dense), rtol=1e-5, atol=1e-7)
    del batch["labels"]
    assert sparse(**batch).logits.shape == (8, 10, 100)


@pytest.mark.parametrize("head", ["masked_lm", "masked_lm_sparse", "single_label", "token", "question", "choice"])
@pytest.mark.parametrize("num_items_in_batch", [None, 5])
def test_loss_without_any_label_is_zero(make_model, head, num_items_in_batch):
    model_class, overrides = HEADS[head]
    model = make_model(model_class, **overrides).train()
    batch = labelled_batch(head)
    for name in ("labels", "start_positions", "end_positions"):
        if name in batch:
            batch[name] = torch.full_like(batch[name], 10 if name == "end_positions" else -100)
    output = model(**batch, num_items_in_batch=num_items_in_batch)
    output.loss.backward()
    assert output.loss.item() == 0
    assert all(gradient.count_nonzero() == 0 for gradient in gradients(model).values())


@each_head
def test_balancing_loss_is_added_in_training(make_model, head):
    model_class, overrides = HEADS[head]
    batch = labelled_batch(head)
    model = make_model(model_class, router_aux_loss_coef=0.5, **overrides).train()
    output = model(**batch)
    task_loss = expected_loss(head, output, batch)
    assert output.aux_loss > 0.9
    assert output.router_logits is None
    torch.testing.assert_close(output.loss, task_loss + 0.5 * output.aux_loss, rtol=1e-5, atol=1e-6)
    # The batch is half of what gradients accumulate over: both losses count half.
    torch.manual_seed(0)
    output = model(**batch, num_items_in_batch=2 * label_count(head, batch))
    task_loss = expected_loss(head, output, batch)
    torch.testing.assert_close(output.loss, (task_loss + 0.5 * output.aux_loss) / 2, rtol=1e-5, atol=1e-6)

    unlabelled = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert model(**unlabelled).aux_loss is None


@each_head
def test_coefficient_of_zero_leaves_the_plain_loss(make_model, head):
    model_class, overrides = HEADS[head]
    batch = labelled_batch(head)
    model = make_model(model_class, router_aux_loss_coef=0.0, **overrides).train()
    torch.manual_seed(0)
    output = model(**batch)
    assert output.aux_loss is None
    torch.testing.assert_close(output.loss, expected_loss(head, output, batch), rtol=1e-5, atol=1e-6)
    torch.manual_seed(0)
    asked = model(**batch, output_router_logits=True)
    assert asked.aux_loss > 0.9
    torch.testing.assert_close(asked.loss, output.loss, rtol=0, atol=0)


def test_balancing_loss_reaches_the_router(make_model):
    batch = labelled_batch("masked_lm")
    weights = []
    for coefficient in (0.0, 0.5):
        model = make_model(ModernAlbertForMaskedLM, router_aux_loss_coef=coefficient, router_jitter_noise=0.0).train()
        model(**batch).loss.backward()
        weights.append(model.model.layers[1].mlp.router.weight.grad)
    aux_loss = model(**batch, output_router_logits=True).aux_loss
    (expected,) = torch.autograd.grad(0.5 * aux_loss, model.model.layers[1].mlp.router.weight)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(weights[1] - weights[0], expected, rtol=1e-4, atol=1e-5)


@each_head
@pytest.mark.parametrize("as_tensor", [True, False])
def test_gradient_accumulation(make_model, head, as_tensor):
    """One batch of 8 equals two of 4 and four of 2, though their label counts differ."""
    model_class, overrides = HEADS[head]
    model = make_model(
        model_class, dtype=torch.float64, router_aux_loss_coef=0.0, router_jitter_noise=0.0, **overrides
    ).train()
    batch = labelled_batch(head)
    count = label_count(head, batch)
    items = count if as_tensor else int(count)

    def accumulated(size):
        model.zero_grad()
        losses = []
        for start in range(0, 8, size):
            part = {name: tensor[start : start + size] for name, tensor in batch.items()}
            losses.append(model(**part, num_items_in_batch=items).loss)
            losses[-1].backward()
        return {"loss": sum(losses).detach(), **gradients(model)}

    whole = accumulated(8)
    model.zero_grad()
    model(**batch).loss.backward()
    torch.testing.assert_close(gradients(model), {k: v for k, v in whole.items() if k != "loss"}, rtol=1e-5, atol=1e-7)
    for size in (4, 2):
        # Losses are float32, also of a float64 model.
        torch.testing.assert_close(accumulated(size), whole, rtol=1e-5, atol=1e-6)


@each_head
def test_forward_leaves_the_configuration_alone(make_model, head):
    model_class, overrides = HEADS[head]
    model = make_model(model_class, **overrides).train()
    before = copy.deepcopy(model.config.to_dict())
    model(**labelled_batch(head)).loss.backward()
    assert model.config.to_dict() == before
    assert model.config.problem_type == overrides.get("problem_type")


@each_head
def test_every_parameter_gets_a_gradient(make_model, head):
    """As distributed training needs it: with one batch, most of whose tokens choose the same experts."""
    model_class, overrides = HEADS[head]
    model = make_model(model_class, mol_groups=[0, 1], **overrides).train()
    batch = labelled_batch(head)
    batch["input_ids"] = torch.full_like(batch["input_ids"], 5)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.router.weight.zero_()  # ties: the same two experts for every token
    model(**batch).loss.backward()
    missing = [name for name, gradient in gradients(model).items() if gradient is None]
    assert not missing
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    in_B = model.model.layers[0].mlp.experts.in_B.grad.flatten(1)
    assert [bool(expert.count_nonzero()) for expert in in_B].count(False) == 2


# ---- Gradient checkpointing

ignore_renamed = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
NOISE = {
    **{"embedding_dropout": 0.1, "attention_dropout": 0.1, "mlp_dropout": 0.1, "classifier_dropout": 0.1},
    "router_jitter_noise": 0.3,
}


@ignore_renamed
@pytest.mark.parametrize("head", ["masked_lm", "single_label"])
def test_gradient_checkpointing_changes_no_gradient(make_model, head):
    model_class, overrides = HEADS[head]
    batch = labelled_batch(head)
    results, calls = [], []
    for checkpointed in (False, True):
        model = make_model(model_class, dtype=torch.float64, router_aux_loss_coef=0.5, **NOISE, **overrides).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        calls.append(0)

        def count(module, inputs):
            calls[-1] += 1

        model.model.layers[1].mlp.register_forward_pre_hook(count)
        torch.manual_seed(0)
        loss = model(**batch).loss
        loss.backward()
        results.append({"loss": loss.detach(), **gradients(model)})
    assert calls == [2, 4]  # the backward pass repeats the layer
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)
    for name in ("router.weight", "experts.in_A", "experts.out_B"):
        assert results[1][f"model.layers.1.mlp.{name}"].abs().max() > 1e-4


@ignore_renamed
def test_reentrant_checkpointing_is_refused_where_it_loses_the_balancing_loss(make_model):
    batch = labelled_batch("masked_lm")

    def reentrant(**overrides):
        model = make_model(ModernAlbertForMaskedLM, router_jitter_noise=0.0, **overrides).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        return model

    with pytest.raises(ValueError, match=r"reentrant gradient checkpointing; use .*'use_reentrant': False.*coef=0"):
        reentrant()(**batch)
    model, plain = reentrant(router_aux_loss_coef=0.0), make_model(ModernAlbertForMaskedLM)
    model(**batch).loss.backward()
    plain(**batch).loss.backward()
    torch.testing.assert_close(gradients(model), gradients(plain), rtol=1e-5, atol=1e-6)


# ---- Pooling, embeddings


@pytest.mark.parametrize("classifier_pooling", ["cls", "mean"])
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("model_class", [ModernAlbertForSequenceClassification, ModernAlbertForMultipleChoice])
def test_pooling_ignores_padding(make_model, model_class, classifier_pooling, left):
    model = make_model(model_class, dtype=torch.float64, classifier_pooling=classifier_pooling)
    batch = padded_batch()
    alone = []
    for row, length in zip(batch["input_ids"], LENGTHS, strict=True):
        states = model.model(row[None, :length]).last_hidden_state[0]
        pooled = states[0] if classifier_pooling == "cls" else states.sum(0) / length
        alone.append(model.classifier(model.head(pooled)))
    if left:
        batch = {
            name: torch.stack([row.roll(10 - length) for row, length in zip(tensor, LENGTHS, strict=True)])
            for name, tensor in batch.items()
        }
    expected = torch.stack(alone)
    if model_class is ModernAlbertForMultipleChoice:
        batch = {name: tensor.view(4, 2, 10) for name, tensor in batch.items()}
        expected = expected.view(4, 2)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("classifier_pooling", ["cls", "mean"])
def test_pooling_without_a_mask(make_model, classifier_pooling):
    model = make_model(ModernAlbertForSequenceClassification, classifier_pooling=classifier_pooling)
    input_ids = padded_batch()["input_ids"]
    expected = model(input_ids, attention_mask=torch.ones_like(input_ids)).logits
    torch.testing.assert_close(model(input_ids).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("size", [80, 130])
@pytest.mark.parametrize("tie_word_embeddings", [True, False])
def test_resized_embeddings(make_model, size, tie_word_embeddings):
    model = make_model(ModernAlbertForMaskedLM, tie_word_embeddings=tie_word_embeddings)
    batch = labelled_batch("masked_lm")
    batch["input_ids"] %= 80
    batch["labels"] = batch["labels"].where(batch["labels"] < 80, -100)
    with torch.no_grad():
        logits = model(**batch).logits
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == size
    assert model.decoder.weight.shape == (size, 16)
    assert model.decoder.bias.shape == (size,)
    assert (model.decoder.weight is model.model.embeddings.tok_embeddings.weight) == tie_word_embeddings
    output = model(**batch)
    common = min(size, 100)
    torch.testing.assert_close(output.logits[..., :common], logits[..., :common], rtol=1e-5, atol=1e-5)
    output.loss.backward()
    assert output.loss.isfinite()
    with pytest.raises(ValueError, match=f"the vocabulary has {size} tokens"):
        model(torch.tensor([[size]]))


@pytest.mark.parametrize("packed", [True, False])
def test_embeddings_of_the_input_equal_the_input(make_model, packed):
    model = make_model()
    batch = padded_batch()
    if packed:
        batch["position_ids"] = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4, 0]).expand(8, 10)
    expected = model(**batch).last_hidden_state
    inputs_embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    torch.testing.assert_close(model(inputs_embeds=inputs_embeds, **batch).last_hidden_state, expected, rtol=0, atol=0)


def test_multiple_choice_takes_embeddings(make_model):
    model = make_model(ModernAlbertForMultipleChoice)
    batch = labelled_batch("choice")
    expected = model(**batch).logits
    inputs_embeds = model.get_input_embeddings()(batch.pop("input_ids"))
    torch.testing.assert_close(model(inputs_embeds=inputs_embeds, **batch).logits, expected, rtol=0, atol=0)


# ---- Errors

IDS = torch.arange(3, 13).view(2, 5)
EMBEDS = torch.zeros(2, 5, 16)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "give either `input_ids` or `inputs_embeds`, and not both"),
        ({"input_ids": IDS, "inputs_embeds": EMBEDS}, "give either `input_ids` or `inputs_embeds`, and not both"),
        ({"input_ids": IDS[0]}, r"`input_ids` must be \[batch, seq\], got \[5\]; add a batch dimension"),
        ({"inputs_embeds": EMBEDS[0]}, r"`inputs_embeds` must be \[batch, seq, 16\] .*got \[5, 16\]"),
        ({"inputs_embeds": EMBEDS[..., :8]}, r"`inputs_embeds` must be \[batch, seq, 16\].*got \[2, 5, 8\]"),
        (
            {"input_ids": IDS, "attention_mask": torch.ones(2, 4)},
            r"`attention_mask` must be \[batch, seq\] = \[2, 5\] as the input, got \[2, 4\]",
        ),
        ({"input_ids": IDS, "attention_mask": torch.ones(5)}, r"`attention_mask` must be .*got \[5\]"),
        ({"input_ids": IDS, "attention_mask": torch.ones(2, 5, 5)}, r"`attention_mask` must be .*got \[2, 5, 5\]"),
        (
            {"input_ids": IDS, "position_ids": torch.arange(5)},
            r"`position_ids` must be \[batch, seq\] = \[2, 5\] as the input, got \[5\]",
        ),
        ({"input_ids": IDS, "position_ids": torch.arange(4)[None]}, r"`position_ids` must be .*got \[1, 4\]"),
        ({"input_ids": IDS + 90}, "`input_ids` run from 93 to 102, but the vocabulary has 100 tokens.*tokenizer"),
        ({"input_ids": IDS - 5}, "`input_ids` run from -2 to 7, but the vocabulary has 100 tokens.*tokenizer"),
    ],
)
@pytest.mark.parametrize("model_class", [ModernAlbertModel, ModernAlbertForMaskedLM])
def test_wrong_inputs_are_refused(make_model, model_class, inputs, message):
    with pytest.raises(ValueError, match=message):
        make_model(model_class)(**inputs)


def test_multiple_choice_without_inputs_is_refused(make_model):
    with pytest.raises(ValueError, match="give either `input_ids` or `inputs_embeds`"):
        make_model(ModernAlbertForMultipleChoice)()


@pytest.mark.parametrize("padded", [True, False])
def test_too_long_a_text_is_refused(make_model, padded):
    model = make_model(max_position_embeddings=8)
    input_ids = torch.arange(3, 21).view(2, 9)
    mask = torch.ones_like(input_ids)
    mask[0, 3:] = 0
    with pytest.raises(
        ValueError, match="a sequence has 9 tokens.*at most 8 .`max_position_embeddings`.; truncate it"
    ):
        model(input_ids, mask if padded else None)


@pytest.mark.parametrize("rope_type", ["linear", "dynamic"])
def test_scaled_rope_takes_longer_sequences(make_model, rope_type):
    model = make_model(max_position_embeddings=8, rope_parameters={"rope_type": rope_type, "factor": 2.0})
    assert model(torch.arange(3, 17)[None]).last_hidden_state.isfinite().all()


def test_length_is_that_of_texts_not_of_rows(make_model):
    model = make_model(max_position_embeddings=8)
    input_ids = torch.arange(3, 21).view(1, 18)
    model(input_ids, position_ids=torch.cat([torch.arange(8), torch.arange(8), torch.arange(2)])[None])
    model(input_ids, torch.tensor([[0] * 10 + [1] * 8]))
    with pytest.raises(ValueError, match="a sequence has 9 tokens"):
        model(input_ids, position_ids=torch.cat([torch.arange(9), torch.arange(9)])[None])


@pytest.mark.parametrize(
    ("head", "labels", "message"),
    [
        ("masked_lm", torch.zeros(8, 9).long(), r"integers of shape \[8, 10\], token ids, -100 .*of shape \[8, 9\]"),
        ("masked_lm", torch.zeros(8, 10), r"integers of shape \[8, 10\], token ids.*got torch.float32"),
        ("masked_lm_sparse", torch.zeros(8, 9).long(), r"integers of shape \[8, 10\], token ids, -100"),
        ("single_label", torch.zeros(8, 3).long(), r"integers of shape \[8\], classes from 0 to 2; got .*\[24\]"),
        ("single_label", torch.zeros(8).bool(), r"integers of shape \[8\], classes from 0 to 2; got torch.bool"),
        ("multi_label", torch.zeros(8, 2), r"for multi_label_classification must have .*\[8, 3\]; got \[8, 2\]"),
        ("regression", torch.zeros(7), r"for regression must have the shape of the logits, \[8, 1\]; got \[7\]"),
        ("token", torch.zeros(8).long(), r"integers of shape \[8, 10\], classes from 0 to 2, -100 without loss"),
        ("token", torch.zeros(8, 10), r"integers of shape \[8, 10\].*got torch.float32"),
        ("choice", torch.zeros(16).long(), r"integers of shape \[8\], the right choice, from 0 to 1; got"),
    ],
)
def test_wrong_labels_are_refused(make_model, head, labels, message):
    model_class, overrides = HEADS[head]
    batch = {**labelled_batch(head), "labels": labels}
    with pytest.raises(ValueError, match=f"`labels`.*{message}"):
        make_model(model_class, **overrides)(**batch)


# ---- Compilation and export


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda model, **options: torch.compile(model, backend="aot_eager", fullgraph=True, **options)
    torch._dynamo.reset()


# Every layer costs seconds: one plain and full, one with experts and a sliding window.
SHALLOW = {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}


def slices(*shapes):
    """Padded batches of several shapes, each in memory of its own: graphs are made for a layout."""
    batch = padded_batch()
    return [{name: tensor[:rows, :seq].clone() for name, tensor in batch.items()} for rows, seq in shapes]


@pytest.mark.slow
@pytest.mark.parametrize("fold", [False, True], ids=["routed", "folded"])
def test_compiled_equals_eager(make_model, compiler, fold):
    model = make_model(ModernAlbertForMaskedLM, **SHALLOW)
    if fold:
        model.merge_experts()
    compiled = compiler(model, dynamic=True)
    graphs = []
    with torch.no_grad():
        for batch in slices((8, 10), (8, 7), (5, 9)):
            real = batch["attention_mask"].bool()
            torch.testing.assert_close(
                compiled(**batch).logits[real], model(**batch).logits[real], rtol=1e-4, atol=1e-5
            )
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [1, 1, 1]


def test_compiled_training_equals_eager(make_model, compiler):
    model = make_model(ModernAlbertForMaskedLM, router_jitter_noise=0.0, **SHALLOW).train()
    batch = labelled_batch("masked_lm")
    expected = model(**batch).loss
    expected.backward()
    eager = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    loss = compiler(model)(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(model), eager, rtol=1e-4, atol=1e-5)


def test_exported_folded_model_equals_eager(make_model):
    model = make_model(ModernAlbertForMaskedLM, **SHALLOW).merge_experts()
    batch, *others = slices((8, 10), (8, 7), (3, 4))
    dimensions = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=64)}
    program = torch.export.export(
        model, (), kwargs=batch, dynamic_shapes={name: dimensions for name in batch}, strict=False
    ).module()
    for inputs in (batch, *others):
        real = inputs["attention_mask"].bool()
        actual, expected = program(**inputs).logits, model(**inputs).logits
        torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-5)


def test_unknown_tensors_are_refused(make_model):
    tokens = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match=r"does not take 'token_type_ids'.*model_input_names"):
        make_model()(tokens, token_type_ids=torch.zeros_like(tokens))
