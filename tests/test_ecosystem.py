"""Tools that work on transformers' ModernBERT work here as well."""

import copy

import captum.attr
import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from torch import nn
from transformers import AutoModelForSequenceClassification, DataCollatorWithFlattening

from modernalbert import ModernAlbertForMaskedLM, ModernAlbertForSequenceClassification, ModernAlbertModel
from modernalbert.routing_modernalbert import load_balancing_loss


CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def batch():
    """Three sequences of different lengths, padded on the right."""
    input_ids = torch.randint(3, 100, (3, 9), generator=torch.Generator().manual_seed(0))
    attention_mask = (torch.arange(9) < torch.tensor([9, 4, 6])[:, None]).long()
    return {"input_ids": input_ids.masked_fill(attention_mask == 0, 0), "attention_mask": attention_mask}


@pytest.fixture
def classifier(make_model):
    return make_model(ModernAlbertForSequenceClassification, num_labels=3)


def randomize_lora(model: nn.Module, seed: int = 0) -> None:
    """Gives every B of a LoRA values: at its start at 0 no adapter does anything."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


# ---- PEFT


@pytest.mark.parametrize(
    "wrapped",
    [{"target_modules": ["tok_embeddings"]}, {"target_modules": ["Wqkv"], "trainable_token_indices": [5, 7]}],
)
def test_a_wrapped_embedding(classifier, batch, wrapped):
    expected = classifier(**batch).logits
    model = get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS", **wrapped)).eval()
    torch.testing.assert_close(model(**batch).logits, expected, **CLOSE)
    with pytest.raises(ValueError, match="the vocabulary has 100 tokens"):
        model(torch.tensor([[100]]))


def test_an_adapter_made_with_the_defaults_reloads(make_model, batch, tmp_path):
    """PEFT saves the adapter and `classifier`; the head, which it leaves as it is, comes from the base."""
    make_model(ModernAlbertForMaskedLM).save_pretrained(tmp_path / "base")

    def load():
        return AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)

    model = get_peft_model(load(), LoraConfig(task_type="SEQ_CLS", target_modules=["Wqkv"])).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        model(**batch, labels=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
    expected = model.eval()(**batch).logits
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(1)
    reloaded = PeftModel.from_pretrained(load(), tmp_path / "adapter").eval()
    torch.testing.assert_close(reloaded(**batch).logits, expected, rtol=0, atol=0)


@pytest.mark.parametrize("merged", [False, True])
def test_one_adapter_per_request(make_model, batch, merged):
    classifier = make_model(ModernAlbertForSequenceClassification, num_labels=3, unpad_inputs=False)
    if merged:
        classifier.merge_experts()
    config = LoraConfig(target_modules=["Wqkv", "Wi", "Wo"])
    model = get_peft_model(classifier, config, adapter_name="first").eval()
    model.add_adapter("second", config)
    randomize_lora(model)
    expected = []
    for row, name in enumerate(["first", "__base__", "second"]):
        single = {key: value[row : row + 1] for key, value in batch.items()}
        if name == "__base__":
            with model.disable_adapter():
                expected.append(model(**single).logits)
        else:
            model.set_adapter(name)
            expected.append(model(**single).logits)
    expected = torch.cat(expected)
    assert len({tuple(row) for row in expected.tolist()}) == 3
    mixed = model(**batch, adapter_names=["first", "__base__", "second"]).logits
    torch.testing.assert_close(mixed, expected, **CLOSE)


def test_an_adapter_on_the_router(classifier, batch):
    expected = classifier(**batch).logits
    model = get_peft_model(classifier, LoraConfig(target_modules=[], target_parameters=["router.weight"])).eval()
    torch.testing.assert_close(model(**batch).logits, expected, **CLOSE)
    model.train()(**batch, labels=torch.tensor([0, 1, 2])).loss.backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "lora_B" in name]
    assert gradients and all(gradient.count_nonzero() > 0 for gradient in gradients)


@pytest.mark.parametrize("config_class", [PromptTuningConfig, PromptEncoderConfig])
def test_virtual_tokens_have_the_width_of_the_embedding(classifier, batch, config_class):
    config = config_class(task_type=TaskType.SEQ_CLS, num_virtual_tokens=4, token_dim=classifier.config.embedding_size)
    model = get_peft_model(classifier, config).train()
    output = model(**batch, labels=torch.tensor([0, 1, 2]))
    output.loss.backward()
    assert output.logits.shape == (3, 3)
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "prompt_encoder" in name)


# ---- Tools that index the batch inside the layers


def test_attribution_to_a_layer_on_padded_input(make_model, batch):
    model = make_model(ModernAlbertForSequenceClassification, num_labels=3, unpad_inputs=False, mol_groups=[])

    def score(input_ids, attention_mask):
        return model(input_ids, attention_mask).logits

    attribution = captum.attr.LayerIntegratedGradients(score, model.model.embeddings)
    found, error = attribution.attribute(
        batch["input_ids"],
        additional_forward_args=(batch["attention_mask"],),
        target=1,
        n_steps=200,
        return_convergence_delta=True,
    )
    assert found.shape == (3, 9, 32)
    assert found[batch["attention_mask"] == 0].count_nonzero() == 0
    assert error.abs().max() < 0.05  # attributions add up to the difference of the scores


def test_hooks_see_rows_where_rows_are_kept(make_model, batch):
    seen = []
    for unpad_inputs in (True, False):
        model = make_model(unpad_inputs=unpad_inputs)
        model.layers[1].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
        model.layers[1].mlp.Wi.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[:2]))
        model(**batch)
    assert set(seen[:4]) == {(1, 19, 32), (1, 19)}
    assert set(seen[4:]) == {(3, 9, 32), (3, 9)}


# ---- torch.func, double backward


def test_gradients_of_every_sample(classifier, batch):
    parameters = {name: parameter.detach() for name, parameter in classifier.named_parameters()}
    labels = torch.tensor([0, 1, 2])

    def loss(parameters, input_ids, attention_mask, label):
        inputs = {"input_ids": input_ids[None], "attention_mask": attention_mask[None]}
        logits = torch.func.functional_call(classifier, parameters, kwargs=inputs).logits
        return nn.functional.cross_entropy(logits, label[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(parameters, *batch.values(), labels)
    for row in range(3):
        classifier.zero_grad()
        length = batch["attention_mask"][row].sum()
        logits = classifier(batch["input_ids"][row : row + 1, :length]).logits
        nn.functional.cross_entropy(logits, labels[row : row + 1]).backward()
        for name, parameter in classifier.named_parameters():
            torch.testing.assert_close(gradients[name][row], parameter.grad, msg=name, rtol=1e-4, atol=1e-5)


def test_double_backward(make_model, batch):
    """The gradient of a gradient's norm, against a small step along it."""
    model = make_model(dtype=torch.float64, attn_implementation="eager")  # torch has no such derivative of sdpa
    experts = model.layers[1].mlp.experts

    def norm(create_graph=False):
        loss = model(**batch).last_hidden_state.square().mean()
        (gradient,) = torch.autograd.grad(loss, experts.in_B, create_graph=create_graph)
        return gradient.square().sum()

    (second,) = torch.autograd.grad(norm(create_graph=True), experts.in_B)
    step = 1e-6 * second / second.norm()
    with torch.no_grad():
        experts.in_B.add_(step)
    above = norm()
    with torch.no_grad():
        experts.in_B.sub_(2 * step)
    below = norm()
    torch.testing.assert_close((above - below) / 2e-6, second.norm(), rtol=1e-5, atol=0)


# ---- Quantisation


class Int8Linear(nn.Module):
    """A linear layer whose weight is packed, as libraries of 8- and 4-bit weights have it."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, states):
        return nn.functional.linear(states, self.weight.to(states.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["dynamic", "packed"])
def test_quantised_linear_layers(make_model, batch, implementation, kind):
    model = make_model(attn_implementation=implementation, num_experts_per_tok=4)
    expected = model(**batch).last_hidden_state
    if kind == "dynamic":
        model = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    else:
        for parent in [*model.modules()]:
            for name, module in [*parent.named_children()]:
                if isinstance(module, nn.Linear):
                    setattr(parent, name, Int8Linear(module))
    error = (model(**batch).last_hidden_state - expected).norm() / expected.norm()
    assert 0 < error < 0.1


# ---- Packed sequences, balancing outside our heads


@pytest.mark.parametrize("keys", [{"return_position_ids": True}, {"return_position_ids": False}])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_flattened_batches(make_model, batch, implementation, keys):
    model = make_model(ModernAlbertForMaskedLM, dtype=torch.float64, attn_implementation=implementation)
    sequences = [row[: mask.sum()].tolist() for row, mask in zip(*batch.values(), strict=True)]
    collator = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True, **keys)
    flattened = collator([{"input_ids": sequence} for sequence in sequences])
    assert flattened["seq_idx"].shape == (1, 19)
    output = model(**flattened)
    expected = torch.cat([model(torch.tensor([sequence])).logits[0] for sequence in sequences])
    torch.testing.assert_close(output.logits[0], expected, **CLOSE)
    del flattened["cu_seq_lens_q"]
    torch.testing.assert_close(model(**flattened).logits[0], expected, **CLOSE)


def test_the_encoder_gives_the_balancing_loss(make_model, batch):
    model = make_model().train()
    output = model(**batch, output_router_logits=True)
    expected = load_balancing_loss(output.router_logits, model.config, batch["attention_mask"])
    torch.testing.assert_close(output.aux_loss, expected, rtol=0, atol=0)
    output.aux_loss.backward()
    assert model.layers[1].mlp.router.weight.grad.count_nonzero() > 0
    assert model(**batch).aux_loss is None
    assert isinstance(model, ModernAlbertModel)
