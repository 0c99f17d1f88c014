import copy

import numpy as np
import pytest
import torch

from modernalbert import (
    ModernAlbertForMaskedLM,
    ModernAlbertForSequenceClassification,
    ModernAlbertModel,
)
from modernalbert.merging_modernalbert import average, cat, collect_states, merge_router, reduced_rank, similarity, svd
from modernalbert.mixture_modernalbert import ModernAlbertMLP, ModernAlbertMoL


INPUT_IDS = torch.arange(3, 27).view(3, 8)
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [0] * 2 + [1] * 6])
BOTH_GROUPS = {"mol_groups": [0, 1]}
FACTORS = ("in_A", "in_B", "out_A", "out_B")
each_way = pytest.mark.parametrize("fold", [True, False], ids=["folded", "unfolded"])


def states(model):
    return model(INPUT_IDS, MASK).last_hidden_state


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


def test_default_is_uniform_and_folded(make_model):
    model = make_model()
    expected = states(copy.deepcopy(model).merge_experts("uniform", True))
    torch.testing.assert_close(states(model.merge_experts()), expected, rtol=0, atol=0)


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


def dense(A, B):
    """`B_e A_e` of every expert, as NumPy arrays."""
    return [b.numpy() @ a.numpy() for a, b in zip(A, B, strict=True)]


@pytest.fixture
def factors():
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(4, 3, 11, generator=generator, dtype=torch.float64)
    B = torch.randn(4, 17, 3, generator=generator, dtype=torch.float64)
    return A, B, torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)


def test_average_is_the_weighted_mean_of_the_factors(factors):
    A, B, weights = factors
    merged_A, merged_B = average(*factors, rank=3)
    torch.testing.assert_close(merged_A, sum(w * a for w, a in zip(weights, A, strict=True)))
    torch.testing.assert_close(merged_B, sum(w * b for w, b in zip(weights, B, strict=True)))


def test_cat_is_the_weighted_mean_of_the_products(factors):
    merged_A, merged_B = cat(*factors, rank=3)
    assert merged_A.shape == (12, 11) and merged_B.shape == (17, 12)
    expected = sum(w * product for w, product in zip(factors[2].numpy(), dense(*factors[:2]), strict=True))
    np.testing.assert_allclose((merged_B @ merged_A).numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_svd_is_the_closest_matrix_of_its_rank(factors, rank):
    merged_A, merged_B = svd(*factors, rank)
    assert merged_A.shape == (rank, 11) and merged_B.shape == (17, rank)
    mean = sum(w * product for w, product in zip(factors[2].numpy(), dense(*factors[:2]), strict=True))
    U, S, Vh = np.linalg.svd(mean)
    closest = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    np.testing.assert_allclose((merged_B @ merged_A).numpy(), closest, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("combine", [average, svd, cat])
def test_one_hot_weights_return_that_expert(factors, combine):
    A, B, _ = factors
    merged_A, merged_B = combine(A, B, torch.tensor([0, 0, 1, 0], dtype=torch.float64), rank=3)
    np.testing.assert_allclose((merged_B @ merged_A).numpy(), dense(A, B)[2], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_reduced_rank_regression_is_least_squares_projected_on_its_predictions(rank):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 9)), rng.normal(size=(50, 13))
    prior = torch.zeros(9, 13, dtype=torch.float64)
    A, B = reduced_rank(torch.tensor(x.T @ x), torch.tensor(x.T @ y), prior, rank, ridge=0)
    solution = np.linalg.lstsq(x, y, rcond=None)[0]
    directions = np.linalg.svd(x @ solution)[2][:rank]
    np.testing.assert_allclose((B @ A).numpy().T, solution @ directions.T @ directions, rtol=1e-8, atol=1e-8)


def states_of(model, mixture, batches):
    """Inputs of a layer over all its runs."""
    (depths,) = collect_states(model, [mixture], batches)
    return torch.cat(depths)


TEXT = [{"input_ids": torch.randint(5, 100, (8, 32), generator=torch.Generator().manual_seed(n))} for n in range(4)]


@each_way
@pytest.mark.parametrize("method", ["uniform", "ema", "svd", "cat", "frequency", "regression"])
def test_every_method_merges_equal_experts_to_themselves(make_model, method, fold):
    model = make_model(dtype=torch.float64, **BOTH_GROUPS)
    with torch.no_grad():
        for layer in model.layers:
            for factor in layer.mlp.experts.parameters():
                factor.copy_(factor[:1].expand_as(factor))
    routed = states(model)
    given = {"weights": [[1, 2, 3, 4], [4, 3, 2, 1]]} if method == "ema" else {}
    model.merge_experts(method, fold, batches=TEXT, **given)
    torch.testing.assert_close(states(model), routed, rtol=1e-8, atol=1e-8)


def layer_error(model, merged):
    """Relative error of a merged layer on the inputs that the routed one gets from the calibration text."""
    mixture = model.layers[1].mlp
    with torch.no_grad():
        inputs = states_of(model, mixture, TEXT)
        expected = mixture(inputs)
        return ((merged.layers[1].mlp(inputs) - expected).norm() / expected.norm()).item()


def test_regression_is_closer_to_the_routed_layer_than_any_mean(make_model):
    model = make_model(dtype=torch.float64)
    errors = {
        method: layer_error(model, copy.deepcopy(model).merge_experts(method, batches=TEXT, rank=3))
        for method in ("uniform", "svd", "cat", "frequency", "regression", "drop")
    }
    assert errors["regression"] < 0.9 * min(error for method, error in errors.items() if method != "regression")
    wider = layer_error(model, copy.deepcopy(model).merge_experts("regression", batches=TEXT, rank=20))
    assert wider < errors["regression"]


@pytest.mark.parametrize(("method", "limited"), [("svd", True), ("frequency", False), ("regression", False)])
def test_folded_methods_that_look_at_text_have_no_limit_to_the_rank(make_model, method, limited):
    model = make_model(dtype=torch.float64)
    merged = copy.deepcopy(model).merge_experts(method, batches=TEXT)
    change = torch.linalg.matrix_rank(merged.layers[1].mlp.Wi.weight - model.layers[1].mlp.Wi.weight, rtol=1e-9)
    assert (change <= model.config.expert_rank) == limited
    kept = copy.deepcopy(model).merge_experts(method, fold=False, batches=TEXT)
    assert kept.config.expert_rank == model.config.expert_rank


def test_frequency_takes_the_weights_of_the_router(make_model):
    model = make_model(dtype=torch.float64)
    mixture = model.layers[1].mlp
    with torch.no_grad():
        inputs = states_of(model, mixture, TEXT)
        used = torch.zeros(4, dtype=torch.float64)
        for token in inputs:
            _, weights, experts = mixture.router(token[None])
            for weight, expert in zip(weights[0], experts[0], strict=True):
                used[expert] += weight / len(inputs)
    expected = copy.deepcopy(model).merge_experts("svd", weights=[used.tolist()])
    torch.testing.assert_close(states(model.merge_experts("frequency", batches=TEXT, rank=3)), states(expected))


def test_drop_leaves_the_shared_layer(make_model):
    model = make_model()
    Wi = model.layers[1].mlp.Wi.weight.clone()
    torch.testing.assert_close(model.merge_experts("drop").layers[1].mlp.Wi.weight, Wi, rtol=0, atol=0)


def test_cat_kept_unfolded_has_its_own_rank_in_the_configuration(make_model, tmp_path):
    model = make_model(dtype=torch.float64)
    folded = states(copy.deepcopy(model).merge_experts("cat"))
    model.merge_experts("cat", fold=False)
    assert (model.config.expert_rank, model.config.expert_alpha) == (12, 24)
    model.save_pretrained(tmp_path)
    loaded = ModernAlbertModel.from_pretrained(tmp_path)
    torch.testing.assert_close(states(loaded), folded, rtol=1e-10, atol=1e-10)


def test_similarity_is_the_cosine_of_corrections(make_model):
    model = make_model(dtype=torch.float64)
    mixture = model.layers[1].mlp
    with torch.no_grad():
        inputs = states_of(model, mixture, TEXT[:1])
        cosines = similarity(mixture, inputs)
        shared = mixture.Wo(mixture.glu(mixture.Wi(inputs)))
        corrections = []
        for expert in range(4):  # an expert alone is a merge to that expert
            alone = copy.deepcopy(model).merge_experts("cat", weights=[[float(e == expert) for e in range(4)]])
            corrections.append((alone.layers[1].mlp(inputs) - shared).flatten())
    for i in range(4):
        for j in range(4):
            expected = torch.nn.functional.cosine_similarity(corrections[i], corrections[j], dim=0)
            torch.testing.assert_close(cosines[i, j], expected)


def test_cluster_joins_experts_that_do_the_same(make_model):
    """Experts 0 and 2, and 1 and 3, are equal: two are left, which are these."""
    model = make_model(dtype=torch.float64)
    mixture = model.layers[1].mlp
    with torch.no_grad():
        for factor in mixture.experts.parameters():
            factor[2:] = factor[:2]
        products = [mixture.experts.in_B[e] @ mixture.experts.in_A[e] for e in range(2)]
    model.merge_experts("cluster", batches=TEXT, num_experts=2)
    experts = model.layers[1].mlp.experts
    left = [(experts.in_B[e] @ experts.in_A[e]).detach() for e in range(2)]
    for product in products:
        assert min((product - other).norm() for other in left) < 1e-10
    assert model.config.num_experts == 2 and model.config.num_experts_per_tok == 2
    assert model.layers[1].mlp.router.weight.shape == (2, 32)


def test_the_router_of_clusters_gives_the_sum_of_their_probabilities(make_model):
    """Exactly, where the members of a cluster have equal rows and clusters have equal size."""
    model = make_model(dtype=torch.float64)
    mixture = model.layers[1].mlp
    with torch.no_grad():
        mixture.router.weight[2:] = mixture.router.weight[:2]
        inputs = states_of(model, mixture, TEXT)
        rows = merge_router(mixture, inputs, [[0, 2], [1, 3]])
        probabilities = (inputs @ mixture.router.weight.T).softmax(-1)
    expected = torch.stack([probabilities[:, [0, 2]].sum(-1), probabilities[:, [1, 3]].sum(-1)], dim=-1)
    torch.testing.assert_close((inputs @ rows.T).softmax(-1), expected, rtol=1e-2, atol=1e-2)


def test_a_model_of_clusters_saves_trains_and_merges_on(make_model, tmp_path):
    model = make_model(ModernAlbertForMaskedLM, **BOTH_GROUPS)
    model.merge_experts("cluster", batches=TEXT, num_experts=3).save_pretrained(tmp_path)
    loaded = ModernAlbertForMaskedLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(INPUT_IDS, MASK).logits, model(INPUT_IDS, MASK).logits, rtol=0, atol=0)
    loaded.train()(INPUT_IDS, MASK, labels=INPUT_IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())
    assert loaded.merge_experts("svd").config.num_experts == 0


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("ema", {}, "'ema' needs `weights`"),
        ("svd", {"weights": [[1, 2, 3]]}, r"1 rows, .* of 4 values; got rows of \[3\]"),
        ("ema", {"weights": [[1, -2, 3, 4]]}, r"`weights` must be finite and at least 0.* got \[1, -2, 3, 4\]"),
        ("svd", {"weights": [[1, float("nan"), 3, 4]]}, "`weights` must be finite"),
        ("cat", {"weights": [[0, 0, 0, 0]]}, "not all 0 in a group"),
        ("regression", {}, "'regression' looks at how text is routed: give it some as `batches`"),
        ("frequency", {"batches": []}, "`batches` is empty"),
        ("cluster", {"batches": TEXT}, "needs `num_experts` from 2 to 3, got None"),
        ("cluster", {"batches": TEXT, "num_experts": 4}, "needs `num_experts` from 2 to 3, got 4"),
        ("svd", {"rank": 0}, "`rank` must be at least 1, got 0"),
        ("uniform", {"num_experts": 2}, "`num_experts` is for method 'cluster'"),
    ],
)
def test_what_a_method_lacks_is_named(make_model, method, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model().merge_experts(method, **arguments)


def test_a_joined_adapter_wider_than_its_layer_is_refused_before_merging(make_model):
    model = make_model(expert_rank=9)
    with pytest.raises(ValueError, match="'cat' joins 4 experts of rank 9 to a rank of 36, more than the 32"):
        model.merge_experts("cat", fold=False)
    assert model.config.num_experts == 4
    model.merge_experts("cat")


@pytest.mark.parametrize("rank", [None, 2])
def test_per_depth_folds_what_the_router_does_there(make_model, rank):
    """Each depth gets the mean of the products with the weights that its own tokens got."""
    model = make_model(dtype=torch.float64, **BOTH_GROUPS, num_hidden_layers=6)
    weights = []
    for layer in model.layers:
        (depths,) = collect_states(model, [layer.mlp], TEXT)
        rows = []
        for states in depths:
            _, shares, chosen = layer.mlp.router(states)
            one_hot = torch.nn.functional.one_hot(chosen, 4).double()  # [tokens, 2, 4]
            rows.append((shares[..., None] * one_hot).sum(dim=1).mean(dim=0).tolist())
        weights.append(rows)
    assert max(abs(a - b) for a, b in zip(weights[0][0], weights[0][1], strict=True)) > 0.01
    routed = model.num_parameters()
    merged = model.merge_experts("frequency", batches=TEXT, rank=rank, per_depth=True, inplace=False)
    assert model.config.num_experts == 4 and model.num_parameters() == routed
    for depth in range(3):
        given = [rows[depth] for rows in weights]
        group = model.merge_experts("svd", weights=given, rank=rank or 32, inplace=False)
        for layer, expected in zip(merged.layers, group.layers, strict=True):
            for name in ("Wi", "Wo"):
                found = getattr(layer.mlp.depths[depth], name).weight
                torch.testing.assert_close(found, getattr(expected.mlp, name).weight, rtol=1e-8, atol=1e-8)


def test_per_depth_regression_is_fitted_to_each_depth(make_model):
    """On the text it was fitted to, it errs less than one fold for all depths."""
    model = make_model(dtype=torch.float64)
    mixture = model.layers[1].mlp
    (depths,) = collect_states(model, [mixture], TEXT)
    merged = {
        per_depth: model.merge_experts("regression", batches=TEXT, per_depth=per_depth, inplace=False).layers[1].mlp
        for per_depth in (False, True)
    }
    errors = {}
    with torch.no_grad():
        for per_depth, layer in merged.items():
            errors[per_depth] = [(layer(h, d) - mixture(h, d)).square().sum() for d, h in enumerate(depths)]
    assert all(one < all_depths for one, all_depths in zip(errors[True], errors[False], strict=True))


def test_a_fold_per_depth_is_saved_and_loaded(make_model, tmp_path):
    model = make_model(ModernAlbertForMaskedLM, **BOTH_GROUPS)
    model.merge_experts("regression", batches=TEXT, per_depth=True)
    assert (model.config.ffn_modulation, model.config.num_experts, model.config.has_router) == ("per_depth", 0, False)
    assert model.num_parameters() == model.config.num_parameters()
    model.save_pretrained(tmp_path)
    loaded = ModernAlbertForMaskedLM.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(INPUT_IDS).logits, model(INPUT_IDS).logits, rtol=0, atol=0)
    with pytest.raises(ValueError, match="only a Mixture of LoRAs can be merged"):
        loaded.merge_experts()


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("uniform", {}),
        ("svd", {}),
        ("frequency", {"fold": False}),
        ("cluster", {"num_experts": 2}),
    ],
)
def test_per_depth_without_routing_to_fold_is_refused(make_model, method, changes):
    with pytest.raises(ValueError, match="`per_depth` folds what the router does at each depth"):
        make_model().merge_experts(method, batches=TEXT, per_depth=True, **changes)
    with pytest.raises(ValueError, match="`per_depth` folds what the router does at each depth: .* 1 experts"):
        make_model(num_experts=1).merge_experts("frequency", batches=TEXT, per_depth=True)


def test_calibration_sees_no_padding(make_model):
    states = []
    for unpad_inputs in (True, False):
        model = make_model(unpad_inputs=unpad_inputs)
        states += collect_states(model, [model.layers[1].mlp], TEXT)
        assert model.config.unpad_inputs is unpad_inputs
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_collecting_keeps_each_modules_mode(make_model):
    model = make_model(router_jitter_noise=0.5).train()
    model.layers[0].eval()
    first = collect_states(model, [model.layers[1].mlp], TEXT)
    assert model.layers[1].mlp.training and not model.layers[0].training
    torch.testing.assert_close(first, collect_states(model, [model.layers[1].mlp], TEXT), rtol=0, atol=0)


def test_experts_that_correct_nothing_are_similar_to_none(make_model):
    model = make_model()
    mixture = model.layers[1].mlp
    with torch.no_grad():
        for factor in (mixture.experts.in_B, mixture.experts.out_B):
            factor[1:] = 0
        inputs = states_of(model, mixture, TEXT[:1])
        cosines = similarity(mixture, inputs)
    expected = torch.zeros(4, 4, dtype=cosines.dtype)
    expected[0, 0] = 1
    torch.testing.assert_close(cosines, expected)


def test_a_single_adapter_is_folded_or_dropped(make_model):
    model = make_model(num_experts=1, num_experts_per_tok=1)
    Wi = model.layers[1].mlp.Wi.weight.clone()
    folded, dropped = (copy.deepcopy(model).merge_experts(method) for method in ("svd", "drop"))
    torch.testing.assert_close(states(folded), states(model))
    torch.testing.assert_close(dropped.layers[1].mlp.Wi.weight, Wi, rtol=0, atol=0)


def test_calibration_runs_the_encoder_alone(make_model):
    model = make_model(ModernAlbertForMaskedLM)
    model.decoder.register_forward_hook(lambda *arguments: pytest.fail("the head over the vocabulary ran"))
    model.merge_experts("frequency", batches=TEXT[:1])


def test_a_copy_is_merged_where_asked(make_model):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    merged = model.merge_experts("svd", inplace=False)
    assert (merged.config.num_experts, model.config.num_experts) == (0, 4)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(states(merged), states(model.merge_experts("svd")), rtol=0, atol=0)
