import copy

import pytest
import torch

from modernalbert import (
    ModernAlbertForMaskedLM,
    ModernAlbertForSequenceClassification,
    ModernAlbertModel,
)
from modernalbert.merging_modernalbert import METHODS, uniform
from modernalbert.mixture_modernalbert import ModernAlbertMLP, ModernAlbertMoL


INPUT_IDS = torch.arange(3, 27).view(3, 8)
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [0] * 2 + [1] * 6])
BOTH_GROUPS = {"mol_groups": [0, 1]}
FACTORS = ("in_A", "in_B", "out_A", "out_B")
each_way = pytest.mark.parametrize("fold", [True, False], ids=["folded", "unfolded"])


def states(model):
    return model(INPUT_IDS, MASK).last_hidden_state


@each_way
def test_equal_experts_merge_to_themselves(make_model, fold):
    model = make_model(dtype=torch.float64, **BOTH_GROUPS)
    with torch.no_grad():
        for layer in model.layers:
            for factor in layer.mlp.experts.parameters():
                factor.copy_(factor[:1].expand_as(factor))
    routed = states(model)
    torch.testing.assert_close(states(model.merge_experts(fold=fold)), routed, rtol=1e-10, atol=1e-10)


@each_way
def test_experts_at_zero_change_nothing(make_model, fold):
    model = make_model(dtype=torch.float64, **BOTH_GROUPS)
    for layer in model.layers:
        torch.nn.init.zeros_(layer.mlp.experts.in_B)
        torch.nn.init.zeros_(layer.mlp.experts.out_B)
    routed = states(model)
    torch.testing.assert_close(states(model.merge_experts(fold=fold)), routed, rtol=1e-10, atol=1e-10)


def test_folded_equals_unfolded(make_model):
    model = make_model(dtype=torch.float64, **BOTH_GROUPS)
    routed = states(model)
    unfolded = copy.deepcopy(model).merge_experts(fold=False)
    folded = model.merge_experts()
    torch.testing.assert_close(states(folded), states(unfolded), rtol=1e-10, atol=1e-10)
    # What was kept beside the projections can be folded later.
    torch.testing.assert_close(states(unfolded.merge_experts()), states(folded), rtol=1e-10, atol=1e-10)
    assert (states(folded) - routed).abs().max() > 0.1  # experts that differ do not merge exactly


def test_uniform_is_the_mean_of_the_factors(make_model):
    model = make_model(dtype=torch.float64)
    mixture = model.layers[1].mlp
    A1, B1, A2, B2 = (
        sum(getattr(mixture.experts, name)[expert].detach() for expert in range(4)) / 4 for name in FACTORS
    )
    Wi, Wo = mixture.Wi.weight.detach().clone(), mixture.Wo.weight.detach().clone()
    scaling = 6 / 3  # alpha / rank of the tiny configuration
    unfolded = copy.deepcopy(model).merge_experts("uniform", fold=False).layers[1].mlp.experts
    for name, factor in zip(FACTORS, (A1, B1, A2, B2), strict=True):
        torch.testing.assert_close(getattr(unfolded, name)[0].detach(), factor, rtol=1e-12, atol=1e-12)
    folded = model.merge_experts("uniform").layers[1].mlp
    torch.testing.assert_close(folded.Wi.weight.detach(), Wi + scaling * B1 @ A1, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(folded.Wo.weight.detach(), Wo + scaling * B2 @ A2, rtol=1e-12, atol=1e-12)


def test_default_is_uniform():
    assert METHODS["uniform"] is uniform
    assert ModernAlbertModel.merge_experts.__defaults__ == ("uniform", True)


@each_way
def test_half_precision_is_merged_in_float32(make_model, fold):
    model = make_model(dtype=torch.bfloat16)
    before = copy.deepcopy(model.layers[1].mlp).float()
    after = model.merge_experts(fold=fold).layers[1].mlp
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    mean = {name: getattr(before.experts, name).mean(0) for name in FACTORS}
    if fold:
        expected = {
            "Wi": before.Wi.weight + 2 * mean["in_B"] @ mean["in_A"],
            "Wo": before.Wo.weight + 2 * mean["out_B"] @ mean["out_A"],
        }
        actual = {"Wi": after.Wi.weight, "Wo": after.Wo.weight}
    else:
        expected = {name: factor[None] for name, factor in mean.items()}
        actual = {name: getattr(after.experts, name) for name in FACTORS}
    # Rounded once, at the end.
    rounded = {name: tensor.bfloat16() for name, tensor in expected.items()}
    torch.testing.assert_close(actual, rounded, rtol=0, atol=0)


@each_way
@pytest.mark.parametrize("model_class", [ModernAlbertModel, ModernAlbertForMaskedLM])
def test_merged_model_is_what_its_configuration_says(make_model, make_config, model_class, fold):
    num_experts = 0 if fold else 1
    model = make_model(model_class, **BOTH_GROUPS)
    assert model.merge_experts(fold=fold) is model
    assert model.config.num_experts == num_experts
    assert model.config.mol_groups == [0, 1]
    assert not model.config.has_router

    built = model_class(make_config(num_experts=num_experts, **BOTH_GROUPS)).eval()
    assert model.config.num_parameters() == built.config.num_parameters()
    assert [name for name, _ in model.named_modules()] == [name for name, _ in built.named_modules()]
    assert [type(module) for module in model.modules()] == [type(module) for module in built.modules()]
    assert list(model.state_dict()) == list(built.state_dict())
    built.load_state_dict(model.state_dict())
    torch.testing.assert_close(built(INPUT_IDS, MASK)[0], model(INPUT_IDS, MASK)[0], rtol=0, atol=0)


def test_folded_model_has_no_experts(make_model):
    model = make_model(**BOTH_GROUPS).merge_experts()
    assert not any("router" in name or "experts" in name for name in model.state_dict())
    assert not any(isinstance(module, ModernAlbertMoL) for module in model.modules())
    assert all(type(layer.mlp) is ModernAlbertMLP for layer in model.layers)


@each_way
def test_groups_without_experts_stay_as_they_are(make_model, fold):
    model = make_model()
    before = copy.deepcopy(model.layers[0].state_dict())
    model.merge_experts(fold=fold)
    torch.testing.assert_close(model.layers[0].state_dict(), before, rtol=0, atol=0)


@each_way
@pytest.mark.parametrize("model_class", [ModernAlbertForMaskedLM, ModernAlbertForSequenceClassification])
def test_merged_model_saves_and_loads(make_model, model_class, fold, tmp_path):
    model = make_model(model_class).merge_experts(fold=fold)
    model.save_pretrained(tmp_path)
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.num_experts == (0 if fold else 1)
    torch.testing.assert_close(loaded(INPUT_IDS, MASK).logits, model(INPUT_IDS, MASK).logits, rtol=0, atol=0)


@each_way
@pytest.mark.parametrize("training", [True, False])
def test_training_mode_is_kept(make_model, fold, training):
    model = make_model(mlp_dropout=0.25).train(training).merge_experts(fold=fold)
    assert {module.training for module in model.modules()} == {training}
    assert model.layers[1].mlp.drop.p == 0.25


@each_way
def test_frozen_weights_stay_frozen(make_model, fold):
    model = make_model()
    frozen = model.layers[1].mlp
    frozen.Wi.requires_grad_(False)
    frozen.experts.in_A.requires_grad_(False)
    mlp = model.merge_experts(fold=fold).layers[1].mlp
    assert not mlp.Wi.weight.requires_grad and mlp.Wo.weight.requires_grad
    if not fold:
        assert not mlp.experts.in_A.requires_grad and mlp.experts.in_B.requires_grad


@each_way
def test_merged_model_trains(make_model, fold):
    model = make_model(ModernAlbertForMaskedLM, **BOTH_GROUPS).merge_experts(fold=fold).train()
    assert model.decoder.weight is model.model.embeddings.tok_embeddings.weight
    output = model(INPUT_IDS, MASK, labels=INPUT_IDS, output_router_logits=True)
    output.loss.backward()
    assert output.aux_loss is None and not output.router_logits
    assert all(parameter.grad is not None for parameter in model.parameters())


@each_way
def test_outputs_are_recorded_as_before(make_model, fold):
    model = make_model()
    model(INPUT_IDS, MASK, output_hidden_states=True, output_router_logits=True)  # hooks are there from now on
    output = model.merge_experts(fold=fold)(INPUT_IDS, MASK, output_hidden_states=True, output_router_logits=True)
    assert len(output.hidden_states) == 5
    assert not output.router_logits


def test_unknown_method_is_refused(make_model):
    with pytest.raises(ValueError, match="there is no merging method 'best'; the methods are uniform"):
        make_model().merge_experts("best")


@pytest.mark.parametrize(
    ("overrides", "fold", "message"),
    [
        ({"num_experts": 0}, True, "`num_experts` is 0 in 1 MoL groups"),
        ({"num_experts": 0}, False, "`num_experts` is 0 in 1 MoL groups"),
        ({"num_experts": 1}, False, "`num_experts` is 1 in 1 MoL groups"),
        ({"mol_groups": []}, True, "`num_experts` is 4 in 0 MoL groups"),
    ],
)
def test_nothing_to_merge_is_refused(make_model, overrides, fold, message):
    with pytest.raises(ValueError, match=f"there is nothing to merge: {message}"):
        make_model(**overrides).merge_experts(fold=fold)


@each_way
def test_merging_twice_is_refused(make_model, fold):
    model = make_model().merge_experts(fold=fold)
    with pytest.raises(ValueError, match="there is nothing to merge"):
        model.merge_experts(fold=fold)
