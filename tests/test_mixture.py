"""Feed-forward layers and routers, each against a naive form: the Mixture of LoRAs, and what may stand in its place."""

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from reference import naive_load_balancing_loss, naive_mol
from torch import nn
from transformers import dynamic_module_utils

from modernalbert import (
    ModernAlbertForMaskedLM,
    ModernAlbertModel,
    mixture_modernalbert,
)
from modernalbert.merging_modernalbert import METHODS, routing_weights
from modernalbert.mixture_modernalbert import (
    FEED_FORWARD_LAYERS,
    GroupedMixture,
    ModernAlbertMLP,
    ModernAlbertMoL,
    RecomputedMixture,
)
from modernalbert.routing_modernalbert import ROUTERS, load_balancing_loss
from modernalbert.training.callbacks import RoutingFrequencies
from modernalbert.training.trainer import routing_statistics


# With 4 experts of random weights, half of the probability takes one, two or three of them.
ROUTINGS = {name: {"router_type": name, "router_top_p": 0.5} for name in ROUTERS}
VARIANTS = {
    **{f"mol-{name}": fields for name, fields in ROUTINGS.items()},
    **{f"moa-{name}": {"ffn_modulation": "moa", **fields} for name, fields in ROUTINGS.items()},
    "mol-single": {"num_experts": 1},
    "moa-single": {"ffn_modulation": "moa", "num_experts": 1},
    "depth_lora": {"ffn_modulation": "depth_lora"},
    "none": {"ffn_modulation": "none"},
}
UNNORMALISED = {
    f"{modulation}-{name}-rest": {"ffn_modulation": modulation, "norm_topk_prob": False, **fields}
    for modulation in ("mol", "moa")
    for name, fields in ROUTINGS.items()
}
# Experts per token, and whether their weights sum to one; top-1 with a sum of one has no gradient for the router.
TOP_K = [(1, False), (2, True), (2, False), (4, True), (4, False)]
CHOICES = {f"mol-top_{k}-{norm}": {"num_experts_per_tok": k, "norm_topk_prob": norm} for k, norm in TOP_K}
ROUTED = [name for name in VARIANTS if "-" in name and "single" not in name]
LENGTHS = (9, 4, 6)
CLOSE = {"rtol": 1e-10, "atol": 1e-10}

each_variant = pytest.mark.parametrize("name", VARIANTS)
each_router = pytest.mark.parametrize("router_type", ROUTERS)


@pytest.fixture(params=["grouped", "recomputed", "dense"])
def form(request, trace, monkeypatch):
    """The forms of the mixture: for a CPU, for accelerators, and for traced graphs."""
    if request.param == "recomputed":
        monkeypatch.setattr(mixture_modernalbert, "choose_mixture", lambda *arguments: RecomputedMixture.apply)
    elif request.param == "dense":
        trace()


@pytest.fixture
def make_mol(make_config, randomize):
    def make(dtype=torch.float64, **overrides):
        return randomize(ModernAlbertMoL(make_config(**overrides))).to(dtype).eval()

    return make


def random_states(tokens=12, dtype=torch.float64, seed=1):
    return torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_texts():
    """Token ids of three texts."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 100, (length,), generator=generator) for length in LENGTHS]


# ---- Layers against their definition


def choose(config, probabilities):
    """Experts of one token, a list."""
    order = sorted(range(len(probabilities)), key=lambda expert: -probabilities[expert].item())
    if config.router_type == "soft":
        return order
    if config.router_type != "top_p":
        return order[: config.num_experts_per_tok]
    taken = []
    for expert in order:
        taken.append(expert)
        if sum(probabilities[expert].item() for expert in taken) >= config.router_top_p:
            return taken
    return taken


def naive_weights(config, router, states, depth, texts):
    """Weight of every expert for every token, `[tokens, E]`; `texts` is a list of the text of each token."""
    if router is None:
        return states.new_ones(len(states), 1)
    rows = []
    for token, text in enumerate(texts):
        state = states[token]
        if config.router_type == "sequence":
            own = [states[other] for other in range(len(texts)) if texts[other] == text]
            state = sum(own) / len(own)
        logits = torch.stack([(state * row).sum() for row in router.weight])
        if config.router_type == "depth":
            logits = logits + router.depth_bias[depth]
        probabilities = logits.exp() / logits.exp().sum()
        taken = choose(config, probabilities)
        total = probabilities[taken].sum() if config.norm_topk_prob else 1
        zero = torch.zeros_like(probabilities[0])
        rows.append(torch.stack([probabilities[e] / total if e in taken else zero for e in range(len(probabilities))]))
    return torch.stack(rows)


def naive_layer(config, layer, states, depth, texts):
    """A feed-forward layer token by token, every expert as a whole layer of its own."""

    def feed_forward(state, Wi, Wo):
        gate, value = (Wi @ state).chunk(2)
        return Wo @ (F.gelu(gate) * value)

    Wi, Wo, scaling = layer.Wi.weight, layer.Wo.weight, config.expert_alpha / config.expert_rank

    def corrected(state, index):
        experts = layer.experts
        return feed_forward(
            state,
            Wi + scaling * experts.in_B[index] @ experts.in_A[index],
            Wo + scaling * experts.out_B[index] @ experts.out_A[index],
        )

    if config.ffn_modulation == "none":
        return torch.stack([feed_forward(state, Wi, Wo) for state in states])
    if config.ffn_modulation == "depth_lora":
        return torch.stack([corrected(state, depth) for state in states])
    outputs = []
    for state, weights in zip(states, naive_weights(config, layer.router, states, depth, texts), strict=True):
        output = feed_forward(state, Wi, Wo)
        if config.ffn_modulation == "mol":
            output = (1 - weights.sum()) * output + sum(w * corrected(state, e) for e, w in enumerate(weights))
        else:
            pairs = zip(weights, layer.experts.down, layer.experts.up, strict=True)
            output = output + scaling * sum(w * (up @ F.gelu(down @ output)) for w, down, up in pairs)
        outputs.append(output)
    return torch.stack(outputs)


def values_and_gradients(function, layer, states):
    """Output, and the gradients of everything that a layer learns from, by name."""
    states = states.detach().clone().requires_grad_()
    layer.zero_grad()
    output = function(states)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(output)
    (output * cotangent / len(output) ** 0.5).sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": output.detach(), "input": states.grad, **gradients}


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("name", [*VARIANTS, *UNNORMALISED, *CHOICES])
def test_layers_equal_their_definition(make_config, randomize, form, name, depth):
    config = make_config(**{**VARIANTS, **UNNORMALISED, **CHOICES}[name])
    layer = randomize(FEED_FORWARD_LAYERS[config.modulation](config)).double().eval()
    states, texts = random_states(), [0] * 5 + [1] * 3 + [2] * 4
    expected = values_and_gradients(lambda states: naive_layer(config, layer, states, depth, texts), layer, states)
    actual = values_and_gradients(lambda states: layer(states, depth, torch.tensor(texts)), layer, states)
    for factor, gradient in expected.items():
        assert gradient.abs().max() > 0.01, factor  # the comparison says something
    torch.testing.assert_close(actual, expected, **CLOSE)


@each_variant
def test_new_layers_equal_their_shared_layer(make_config, name):
    torch.manual_seed(0)
    model = ModernAlbertModel(make_config(**VARIANTS[name])).double()
    layer, states = model.layers[1].mlp, random_states()
    if name != "none":
        assert all(A.abs().min() > 0 and not B.any() for A, B in layer.experts.pairs())
    output = layer(states, depth=1, sequence_ids=torch.arange(12) // 5)
    torch.testing.assert_close(output, ModernAlbertMLP.forward(layer, states), **CLOSE)


@pytest.mark.parametrize("depth", [0, 1])
def test_the_recursion_tells_layers_their_depth(make_model, depth):
    """Changing what one depth alone reads changes that layer's output, and nothing before it."""
    for overrides in (VARIANTS["depth_lora"], VARIANTS["mol-depth"], VARIANTS["moa-depth"]):
        model = make_model(dtype=torch.float64, **overrides)
        input_ids = random_texts()[0][None]
        before = model(input_ids, output_hidden_states=True).hidden_states[:-1]
        after = copy.deepcopy(model)
        mlp = after.layers[1].mlp
        with torch.no_grad():
            if "depth_lora" in overrides.values():
                mlp.experts.out_B[depth] += 1
            else:
                mlp.router.depth_bias[depth, 0] += 20
        after = after(input_ids, output_hidden_states=True).hidden_states[:-1]
        changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert changed == [False, False, False, depth == 0]  # embedding, then the ends of three layers


def test_empty_slots_cost_nothing(make_config, randomize, monkeypatch):
    config = make_config(**VARIANTS["mol-top_p"])
    layer = randomize(FEED_FORWARD_LAYERS["mol"](config)).double().eval()
    seen, mix = [], GroupedMixture.mix
    monkeypatch.setattr(
        GroupedMixture,
        "mix",
        lambda glu, corrected, *rest: seen.append(len(corrected)) or mix(glu, corrected, *rest),
    )
    states = random_states(200)
    layer(states)
    weights = layer.router(states)[1]
    assert sum(seen) == weights.count_nonzero()
    counts = weights.count_nonzero(dim=1)
    assert {1, 2} <= set(counts.tolist()) and sum(seen) < 3 * 200


@each_router
@pytest.mark.parametrize("modulation", ["mol", "moa"])
def test_weights_sum_to_one(make_config, randomize, modulation, router_type):
    config = make_config(ffn_modulation=modulation, **ROUTINGS[router_type])
    router = randomize(FEED_FORWARD_LAYERS[modulation](config)).router
    _, weights, experts = router(random_states(50).float(), 1, torch.arange(50) // 7)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(50), rtol=1e-6, atol=0)
    if router_type == "sequence":
        for start in range(0, 50, 7):
            text = slice(start, start + 7)
            assert experts[text].unique(dim=0).shape[0] == weights[text].unique(dim=0).shape[0] == 1


@pytest.mark.parametrize("name", ["moa-top_k", "moa-sequence", "mol-depth", "depth_lora"])
def test_autocast_is_near_float32(make_model, name):
    model = make_model(**VARIANTS[name])
    input_ids = torch.cat(random_texts())[None]
    expected = model(input_ids).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16):
        actual = model(input_ids, output_router_logits=True)
    torch.testing.assert_close(actual.last_hidden_state.float(), expected, rtol=0, atol=0.2)
    assert all(logits.dtype == torch.float32 for logits in actual.router_logits)


@pytest.mark.parametrize("shape", [(1, 32), (2, 7, 32), (1, 1, 32)], ids=str)
def test_any_shape_of_input(make_mol, form, shape):
    mol = make_mol()
    states = random_states(tokens=math.prod(shape[:-1])).view(shape)
    expected = values_and_gradients(lambda states: naive_mol(mol, states), mol, states)
    actual = values_and_gradients(mol, mol, states)
    assert actual["output"].shape == shape
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_no_tokens(make_mol, form):
    mol = make_mol()
    output = mol(random_states(tokens=0))
    assert output.shape == (0, 32)
    output.sum().backward()
    assert all(parameter.grad.count_nonzero() == 0 for parameter in mol.parameters())


@pytest.mark.parametrize("mixture", [GroupedMixture, RecomputedMixture])
def test_gradients_equal_finite_differences_twice(mixture):
    generator = torch.Generator().manual_seed(0)
    tokens, num_experts, rank, width = 5, 3, 2, 4
    experts = torch.tensor([[0, 2], [2, 0], [0, 1], [2, 1], [0, 2]])
    projected, low, weights, in_B, out_A = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in (
            *((tokens, 2 * width), (tokens, num_experts, rank), (tokens, 2)),
            *((num_experts, 2 * width, rank), (num_experts, rank, width)),
        )
    )

    def glu(projected):
        gate, value = projected.chunk(2, dim=-1)
        return F.gelu(gate) * value

    def mix(*inputs):
        return mixture.apply(glu, 0.7, inputs[0], inputs[1], inputs[2], experts, *inputs[3:])

    inputs = (projected, low, weights, in_B, out_A)
    assert torch.autograd.gradcheck(mix, inputs)
    assert torch.autograd.gradgradcheck(mix, inputs)


def test_the_form_for_accelerators_keeps_no_activation_of_a_slot(make_mol, monkeypatch):
    """As many bytes for any number of slots, but for the choices and weights themselves."""

    def kept(choose, slots):
        monkeypatch.setattr(mixture_modernalbert, "choose_mixture", choose)
        mol = make_mol(num_experts_per_tok=slots)
        storages = {}

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor  # kept, so that no address is used twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            mol(random_states(200))
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())

    def recomputed(*arguments):
        return RecomputedMixture.apply

    def dense(*arguments):
        return mixture_modernalbert.mix_dense

    widened = 200 * make_mol().Wi.weight.shape[0] * 8  # u + s B1_e A1_e h of one slot
    assert kept(recomputed, 4) - kept(recomputed, 2) < widened / 2
    assert kept(dense, 4) - kept(dense, 2) > 2 * widened
    assert kept(dense, 2) - kept(recomputed, 2) > 2 * widened


@pytest.mark.parametrize(
    ("device", "dtype", "experts", "expected"),
    [
        ("cpu", torch.float32, 4, GroupedMixture),
        ("cpu", torch.float64, 4, GroupedMixture),
        ("cpu", torch.bfloat16, 4, RecomputedMixture),
        ("cpu", torch.float32, 1, None),
        ("meta", torch.float32, 4, RecomputedMixture),
        ("meta", torch.float32, 1, RecomputedMixture),
    ],
)
def test_each_device_and_precision_has_its_form(device, dtype, experts, expected):
    chosen = mixture_modernalbert.choose_mixture(torch.empty(3, 4, device=device, dtype=dtype), experts)
    assert chosen == (mixture_modernalbert.mix_dense if expected is None else expected.apply)


def test_expert_without_tokens_gets_a_gradient_of_zero(make_mol, form):
    mol = make_mol()
    with torch.no_grad():
        mol.router.weight[2] = -10  # no token of positive states chooses it
    gradients = values_and_gradients(mol, mol, random_states(50).abs())
    for name in ("in_A", "in_B", "out_A", "out_B"):
        gradient = gradients[f"experts.{name}"]
        assert gradient[2].count_nonzero() == 0
        assert all(gradient[expert].count_nonzero() > 0 for expert in (0, 1, 3))


@pytest.mark.parametrize(("chunks", "rest"), [(1, -1), (1, 0), (1, 1), (2, 0), (2, 1)])
def test_chunks_cover_every_token_once(make_mol, trace, chunks, rest):
    tokens = chunks * GroupedMixture.chunk_size + rest
    mol = make_mol(num_experts_per_tok=4)  # every expert has all tokens
    states = random_states(tokens)
    actual = values_and_gradients(mol, mol, states)
    trace()
    expected = values_and_gradients(mol, mol, states)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_order_of_experts_does_not_matter(make_mol, form):
    mol, permuted = make_mol(), make_mol()
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        for parameter in (permuted.router.weight, *permuted.experts.parameters()):
            parameter.copy_(parameter[order])
    states = random_states(50)
    torch.testing.assert_close(permuted(states), mol(states), rtol=1e-10, atol=1e-10)


def test_single_expert_is_an_adapter_on_both_projections(make_mol):
    mol = make_mol(num_experts=1)
    assert mol.router is None
    in_A, in_B, out_A, out_B = (
        factor[0] for factor in (mol.experts.in_A, mol.experts.in_B, mol.experts.out_A, mol.experts.out_B)
    )
    scaling = 6 / 3  # alpha / rank of the tiny configuration
    states = random_states(50)
    gate, value = F.linear(states, mol.Wi.weight + scaling * in_B @ in_A).chunk(2, dim=-1)
    expected = F.linear(F.gelu(gate) * value, mol.Wo.weight + scaling * out_B @ out_A)
    torch.testing.assert_close(mol(states), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("num_experts_per_tok", "norm_topk_prob"), TOP_K)
def test_router_weighs_the_most_probable_experts(make_mol, num_experts_per_tok, norm_topk_prob):
    router = make_mol(num_experts_per_tok=num_experts_per_tok, norm_topk_prob=norm_topk_prob).router
    states = random_states(tokens=7)
    logits, weights, experts = router(states)
    for token in range(7):
        expected = [sum(states[token] * row) for row in router.weight]
        torch.testing.assert_close(logits[token], torch.stack(expected), rtol=1e-10, atol=1e-10)
        order = sorted(range(4), key=lambda expert, expected=expected: -expected[expert])[:num_experts_per_tok]
        assert experts[token].tolist() == order
        chances = logits[token].exp() / logits[token].exp().sum()
        total = chances[order].sum() if norm_topk_prob else 1
        torch.testing.assert_close(weights[token], chances[order] / total, rtol=1e-10, atol=1e-10)


def test_jitter_is_for_training_only(make_mol):
    mol = make_mol(router_jitter_noise=0.3)
    states = random_states(50)
    logits = mol.router(states)[0]
    torch.testing.assert_close(mol.router(states)[0], logits, rtol=0, atol=0)
    mol.train()
    torch.manual_seed(0)
    noisy = mol.router(states)[0]
    torch.manual_seed(0)
    noise = torch.empty_like(states).uniform_(0.7, 1.3)
    torch.testing.assert_close(noisy, (states * noise) @ mol.router.weight.T, rtol=1e-10, atol=1e-10)
    assert (noisy - logits).abs().max() > 0.1


def test_jitter_reaches_nothing_but_the_router(make_mol, form):
    mol = make_mol(router_jitter_noise=0.5, num_experts_per_tok=4)
    nn.init.zeros_(mol.router.weight)  # noise times 0: every expert weighs 1/4 whatever the noise is
    states = random_states(50)
    expected = mol(states)
    torch.testing.assert_close(mol.train()(states), expected, rtol=0, atol=0)


def test_without_jitter_training_equals_evaluation(make_mol, form):
    mol = make_mol(router_jitter_noise=0.0)
    states = random_states(50)
    expected = mol(states)
    torch.testing.assert_close(mol.train()(states), expected, rtol=0, atol=0)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("num_experts", [1, 4])
def test_bfloat16_is_near_float32(make_mol, form, num_experts, norm_topk_prob):
    mol = make_mol(torch.bfloat16, num_experts=num_experts, norm_topk_prob=norm_topk_prob)
    if mol.router is not None:
        mol.router.float()  # as `from_pretrained` keeps it
    states = random_states(50, dtype=torch.bfloat16)
    actual = values_and_gradients(mol, mol, states)
    assert actual["output"].dtype == torch.bfloat16
    # The same rounded weights and input, so that the router chooses alike.
    expected = values_and_gradients(mol.float(), mol, states.float())
    for name, tensor in actual.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(tensor.float(), expected[name], rtol=0, atol=0.03 * scale, msg=name)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("num_experts", [1, 4])
def test_autocast_of_a_mixture_is_near_float32(make_mol, form, num_experts, norm_topk_prob):
    mol = make_mol(torch.float32, num_experts=num_experts, norm_topk_prob=norm_topk_prob)
    states = random_states(50, dtype=torch.float32)

    def run(states):
        with torch.autocast("cpu", torch.bfloat16):
            return mol(states)

    actual = values_and_gradients(run, mol, states)
    assert actual["output"].dtype == torch.bfloat16
    expected = values_and_gradients(mol, mol, states)
    for name, tensor in actual.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(tensor.float(), expected[name], rtol=0, atol=0.03 * scale, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_router_stays_in_float32_under_autocast(make_mol, dtype):
    router = make_mol(torch.float32).router
    states = random_states(50, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        logits, weights, _ = router(states)
    assert logits.dtype == weights.dtype == torch.float32
    torch.testing.assert_close(logits, states.float() @ router.weight.T, rtol=1e-5, atol=1e-5)


# ---- A text's result is its own


def padded_rows(texts, left):
    rows, mask = torch.zeros(len(texts), 11, dtype=torch.long), torch.zeros(len(texts), 11, dtype=torch.long)
    for row, text in enumerate(texts):
        start = 11 - len(text) if left else 0
        rows[row, start : start + len(text)], mask[row, start : start + len(text)] = text, 1
    return {"input_ids": rows, "attention_mask": mask}


def packed_rows(texts):
    """The first and the second text in one row, the third in the other, with padding between and behind."""
    rows, mask = torch.zeros(2, 15, dtype=torch.long), torch.zeros(2, 15, dtype=torch.long)
    positions = torch.ones(2, 15, dtype=torch.long)
    for row, start, text in ((0, 0, texts[0]), (0, 10, texts[1]), (1, 2, texts[2])):
        columns = slice(start, start + len(text))
        rows[row, columns], mask[row, columns], positions[row, columns] = text, 1, torch.arange(len(text))
    return {"input_ids": rows, "attention_mask": mask, "position_ids": positions}


def one_packed_row(texts):
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    return {"input_ids": torch.cat(texts)[None], "cu_seq_lens_q": ends}


BATCHES = {
    "right": lambda texts: padded_rows(texts, left=False),
    "left": lambda texts: padded_rows(texts, left=True),
    "packed": packed_rows,
    "one packed row": one_packed_row,
}


@pytest.mark.parametrize("traced", [False, True])
@each_variant
def test_a_text_is_alone_whatever_surrounds_it(make_model, trace, name, traced):
    model = make_model(dtype=torch.float64, attn_implementation="eager", **VARIANTS[name])
    texts = random_texts()
    alone = [model(text[None], output_router_logits=True) for text in texts]
    states = torch.cat([output.last_hidden_state[0] for output in alone])
    logits = [torch.cat(layers, dim=1)[0] for layers in zip(*(o.router_logits or () for o in alone), strict=True)]
    assert len(logits) == (2 if model.config.has_router else 0)
    if traced:
        trace()
    for batch in (make(texts) for make in BATCHES.values()):
        output = model(**batch, output_router_logits=True)
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        torch.testing.assert_close(output.last_hidden_state[real], states, **CLOSE)
        assert not output.last_hidden_state[~real].any()
        torch.testing.assert_close([layer[real] for layer in output.router_logits or ()], logits, **CLOSE)
        assert not any(layer[~real].any() for layer in output.router_logits or ())


def test_a_batch_of_full_rows_is_a_text_each(make_model):
    model = make_model(dtype=torch.float64, **VARIANTS["mol-sequence"])
    rows = torch.stack([random_texts()[0], random_texts()[0].flip(0)])
    both = model(rows, output_router_logits=True)
    assert not torch.allclose(both.router_logits[0][0], both.router_logits[0][1])
    torch.testing.assert_close(both.last_hidden_state[1:], model(rows[1:]).last_hidden_state, **CLOSE)
    assert model(rows, torch.zeros_like(rows)).last_hidden_state.eq(0).all()


def test_routing_of_texts_needs_a_mask_that_tells_padding(make_model):
    model = make_model(**VARIANTS["mol-sequence"])
    with pytest.raises(ValueError, match=r'`router_type="sequence"` must know.*give one of shape \[batch, seq\]'):
        model(random_texts()[0][None], torch.zeros(1, 1, 9, 9))


@pytest.mark.parametrize("name", ["mol-sequence", "moa-top_p"])
def test_exported_graph(make_model, name):
    model = make_model(**VARIANTS[name])
    batch = padded_rows(random_texts(), left=False)
    program = torch.export.export(model, (), kwargs=batch, strict=False)
    other = padded_rows(random_texts()[::-1], left=True)
    with torch.no_grad():
        found, expected = (run(**other).last_hidden_state for run in (program.module(), model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# ---- The balancing loss, and figures of routing


@each_router
def test_balancing_loss_counts_what_the_router_chooses(make_config, router_type):
    config = make_config(num_hidden_layers=6, mol_groups=[0, 1], **ROUTINGS[router_type])
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(2, 5, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(6)]
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1]])
    losses, loads = [], []
    for group in (layers[:3], layers[3:]):
        rows = [row.exp() / row.exp().sum() for layer in group for row in layer[mask.bool()]]
        load = torch.zeros(4, dtype=torch.float64)
        for row in rows:
            taken = choose(config, row)
            for expert in taken:
                load[expert] = load[expert] + (row[expert] if router_type == "soft" else 1 / len(taken)) / len(rows)
        losses.append(4 * (load * sum(rows) / len(rows)).sum())
        loads.append(load.detach())
    expected, actual = sum(losses) / 2, load_balancing_loss(tuple(layers), config, mask)
    torch.testing.assert_close(actual, expected, **CLOSE)
    torch.testing.assert_close(torch.autograd.grad(actual, layers), torch.autograd.grad(expected, layers), **CLOSE)
    found, entropy = routing_statistics(tuple(layer.detach() for layer in layers), config, mask)
    torch.testing.assert_close(found.double(), torch.stack(loads), rtol=1e-5, atol=1e-6)
    assert ((0 < entropy) & (entropy < 1)).all()


@each_router
@pytest.mark.parametrize("modulation", ["mol", "moa"])
def test_an_even_router_has_a_loss_of_one(make_model, modulation, router_type):
    model = make_model(
        ModernAlbertForMaskedLM, ffn_modulation=modulation, router_aux_loss_coef=0.5, **ROUTINGS[router_type]
    )
    for name, parameter in model.named_parameters():
        if "router" in name:
            torch.nn.init.zeros_(parameter)
    batch = padded_rows(random_texts(), left=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    output = model.train()(**batch, labels=labels, output_router_logits=True)
    assert output.aux_loss.item() == pytest.approx(1)
    plain = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    assert output.loss.item() == pytest.approx(plain.item() + 0.5, rel=1e-5)


@pytest.mark.parametrize("name", ROUTED)
def test_routing_frequencies_count_every_router(make_model, name):
    model = make_model(ModernAlbertForMaskedLM, **VARIANTS[name]).train()
    callback = RoutingFrequencies()
    state = SimpleNamespace(stateful_callbacks={}, global_step=0)
    callback.on_train_begin(SimpleNamespace(device="cpu"), state, None, model=model)
    model(**padded_rows(random_texts(), left=False))
    tokens = sum(LENGTHS) * model.config.layers_per_group
    assert callback.sums[0, -1] == tokens
    assert callback.sums[0, :-1].sum().item() == pytest.approx(tokens, rel=1e-5)
    assert (callback.sums[0, :-1] > 0).sum() > 1


def balancing_loss(router_logits, num_groups, num_experts_per_tok, attention_mask=None):
    config = SimpleNamespace(
        router_type="top_k", mol_groups=range(num_groups), num_experts_per_tok=num_experts_per_tok
    )
    return load_balancing_loss(router_logits, config, attention_mask)


def test_balancing_loss_of_three_tokens():
    logits = torch.tensor([[[3.0, 1.0], [3.0, 1.0], [1.0, 3.0]]]).log()
    # Choices fall 2/3 and 1/3, probabilities 7/12 and 5/12: 2 (14/36 + 5/36).
    assert balancing_loss((logits,), 1, 1).item() == pytest.approx(38 / 36)
    # Of two experts every token takes both.
    assert balancing_loss((logits,), 1, 2).item() == pytest.approx(1.0)


@pytest.mark.parametrize("num_experts_per_tok", [1, 2])
def test_balancing_loss_is_one_for_a_uniform_router_and_grows_with_imbalance(num_experts_per_tok):
    uniform = torch.zeros(2, 5, 8)
    assert balancing_loss((uniform,) * 4, 2, num_experts_per_tok).item() == pytest.approx(1.0)
    collapsed = uniform.clone()
    collapsed[..., :num_experts_per_tok] = 50.0
    assert balancing_loss((collapsed,) * 4, 2, num_experts_per_tok).item() == pytest.approx(8 / num_experts_per_tok)


def test_balancing_loss_ignores_padding():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(1, 4, 3, generator=generator)
    padded = torch.cat([100 * torch.randn(1, 2, 3, generator=generator), real], dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    torch.testing.assert_close(balancing_loss((padded,), 1, 2, mask), balancing_loss((real,), 1, 2), rtol=1e-6, atol=0)
    assert balancing_loss((padded,), 1, 2, torch.zeros_like(mask)).item() == 0


def test_balancing_loss_of_a_model_pools_the_depths_of_each_group(make_model):
    model = make_model(ModernAlbertForMaskedLM, dtype=torch.float64, num_hidden_layers=6, mol_groups=[0, 1])
    logits_of_groups = [[], []]
    for group, layer in enumerate(model.model.layers):
        layer.mlp.router.register_forward_hook(
            lambda module, inputs, output, group=group: logits_of_groups[group].append(output[0][None])
        )
    input_ids = torch.arange(3, 21).view(2, 9)
    mask = torch.ones_like(input_ids)
    mask[0, 6:] = 0
    output = model(input_ids, mask, output_router_logits=True)
    assert [len(depths) for depths in logits_of_groups] == [3, 3]
    expected = naive_load_balancing_loss(logits_of_groups, 2)  # hooks saw real tokens only
    torch.testing.assert_close(output.aux_loss, expected, rtol=1e-10, atol=0)


# ---- Training


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@each_variant
def test_gradient_checkpointing_changes_no_gradient(make_model, name):
    batch = padded_rows(random_texts(), left=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    gradients = []
    for checkpointed in (False, True):
        model = make_model(
            ModernAlbertForMaskedLM, dtype=torch.float64, router_aux_loss_coef=0.5, router_jitter_noise=0.3,
            **VARIANTS[name],
        ).train()  # fmt: skip
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(0)
        model(**batch, labels=labels).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0], **CLOSE)


# ---- Counts


SHAPES = [{}, {"num_hidden_groups": 4, "mol_groups": [0, 3]}, {"num_hidden_layers": 6, "mol_groups": [0, 1]}]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_variant
def test_parameters_are_counted_without_the_model(make_config, name, shape):
    config = make_config(**VARIANTS[name], **shape)
    assert config.num_parameters() == ModernAlbertForMaskedLM(config).num_parameters()


# ---- The model as a whole


@each_variant
def test_unshared_model_equals_one_with_copied_weights(make_model, name):
    """As many groups as layers: each layer has its own weights, and the first depth of everything."""
    shared = make_model(dtype=torch.float64, **VARIANTS[name])
    unshared = make_model(dtype=torch.float64, num_hidden_groups=4, **{**VARIANTS[name], "mol_groups": [2, 3]})
    state = {}
    for key, tensor in shared.state_dict().items():
        parts = key.split(".")
        if parts[0] != "layers":
            state[key] = tensor
            continue
        for depth in range(2):
            own = tensor
            if key.endswith("depth_bias") or (name == "depth_lora" and "experts" in key):
                own = tensor[depth : depth + 1]
            state[".".join(["layers", str(2 * int(parts[1]) + depth), *parts[2:]])] = own
    unshared.load_state_dict(state)
    batch = padded_rows(random_texts(), left=False)
    torch.testing.assert_close(unshared(**batch).last_hidden_state, shared(**batch).last_hidden_state, **CLOSE)


@each_variant
def test_save_and_load(make_model, tmp_path, name):
    model = make_model(ModernAlbertForMaskedLM, **VARIANTS[name])
    model.save_pretrained(tmp_path)
    loaded = ModernAlbertForMaskedLM.from_pretrained(tmp_path)
    for field in ("ffn_modulation", "router_type", "router_top_p"):
        assert getattr(loaded.config, field) == getattr(model.config, field)
    batch = padded_rows(random_texts(), left=False)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=0)
    assert not any("lora_" in parameter for parameter in model.state_dict())


def test_remote_code(make_model, tmp_path, monkeypatch):
    """The saved files run by themselves, with a modulation and a router that are not the default."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    model = make_model(ModernAlbertForMaskedLM, **VARIANTS["moa-sequence"])
    model.save_pretrained(tmp_path / "saved")
    remote = dynamic_module_utils.get_class_from_dynamic_module(
        "modeling_modernalbert.ModernAlbertForMaskedLM", str(tmp_path / "saved")
    )
    assert remote.__module__.startswith("transformers_modules.")
    loaded = remote.from_pretrained(tmp_path / "saved")
    batch = padded_rows(random_texts(), left=False)
    torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, rtol=0, atol=0)


def test_checkpoints_from_before_are_a_mixture_with_top_k(make_model, tmp_path):
    model = make_model(ModernAlbertForMaskedLM)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text())
    for name in ("ffn_modulation", "router_type", "router_top_p"):
        del fields[name]
    path.write_text(json.dumps(fields))
    loaded = ModernAlbertForMaskedLM.from_pretrained(tmp_path)
    assert (loaded.config.ffn_modulation, loaded.config.router_type) == ("mol", "top_k")
    input_ids = random_texts()[0][None]
    torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits, rtol=0, atol=0)
    with pytest.raises(ValueError, match="missing in .*depth_bias.*describes another architecture"):
        ModernAlbertForMaskedLM.from_pretrained(tmp_path, router_type="depth")


# ---- What the configuration refuses


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"router_top_p": 0}, r"`router_top_p` \(0\) must be above 0 and at most 1"),
        ({"router_top_p": 1.1}, r"`router_top_p` \(1.1\) must be above 0 and at most 1"),
        (
            {"router_type": "top_p", "router_top_p": 0.25},
            r"`router_top_p` \(0.25\) is reached by one of 4 experts.*raise it above 1 / `num_experts`",
        ),
        (
            {"ffn_modulation": "moa", "num_experts_per_tok": 1},
            r"`num_experts_per_tok` \(1\) with `norm_topk_prob` \(True\)",
        ),
        ({"router_type": "depth", "num_experts_per_tok": 5}, r"`num_experts_per_tok` \(5\) must be from 1"),
        ({"ffn_modulation": "moa", "expert_rank": 33}, r"`expert_rank` \(33\) must be from 1 to 32"),
        ({"ffn_modulation": "depth_lora", "expert_rank": 0}, r"`expert_rank` \(0\) must be from 1 to 32"),
    ],
    ids=str,
)
def test_contradicting_fields_are_refused(make_config, overrides, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        make_config(**overrides)


@pytest.mark.parametrize("field", ["ffn_modulation", "router_type"])
def test_unknown_names_are_refused(make_config, field):
    with pytest.raises(StrictDataclassFieldValidationError, match="expected one of .* got other"):
        make_config(**{field: "other"})


@pytest.mark.parametrize(
    "overrides",
    [
        {"router_type": "soft", "num_experts_per_tok": 1},
        {"router_type": "top_p", "num_experts_per_tok": 1},
        {"router_type": "top_p", "router_top_p": 0.25, "norm_topk_prob": False},
        {"router_type": "top_p", "router_top_p": 1},
        {"ffn_modulation": "none", "expert_rank": 0, "num_experts_per_tok": 1},
        {"ffn_modulation": "depth_lora", "num_experts": 0},
        {"ffn_modulation": "depth_lora", "num_experts_per_tok": 1},
        {"ffn_modulation": "moa", "num_experts": 0, "expert_rank": 0},
        {"ffn_modulation": "moa", "mol_intermediate_size": 5, "expert_rank": 32},
    ],
    ids=str,
)
def test_fields_at_the_edge_of_a_rule_pass(make_config, overrides):
    config = make_config(**overrides)
    assert ModernAlbertForMaskedLM(config).num_parameters() == config.num_parameters()


@pytest.mark.parametrize(
    ("overrides", "has_router"),
    [
        *((fields, name in ROUTED) for name, fields in VARIANTS.items()),
        ({"ffn_modulation": "moa", "mol_groups": []}, False),
        ({"ffn_modulation": "moa", "num_experts": 0}, False),
    ],
    ids=str,
)
def test_has_router(make_model, overrides, has_router):
    model = make_model(**overrides)
    assert model.config.has_router == has_router
    assert any("router" in name for name in model.state_dict()) == has_router


# ---- Merging


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", ["moa-top_k", "moa-single", "depth_lora", "none"])
def test_only_a_mixture_of_loras_merges(make_model, name, fold):
    model = make_model(**VARIANTS[name])
    with pytest.raises(ValueError, match="only a Mixture of LoRAs can be merged, and `ffn_modulation` is '"):
        model.merge_experts("uniform", fold)


@pytest.mark.parametrize("router_type", ["sequence", "depth"])
def test_routers_that_need_more_than_a_token_merge_without_text(make_model, router_type):
    model = make_model(**ROUTINGS[router_type])
    for method in (method for method, (_, source) in METHODS.items() if source == "text"):
        with pytest.raises(
            ValueError, match=rf"`router_type` is '{router_type}'; use 'uniform', 'svd', 'cat' or 'ema'"
        ):
            model.merge_experts(method, batches=[{"input_ids": random_texts()[0][None]}])
    reference = make_model()
    reference.load_state_dict(model.state_dict(), strict=False)  # all but biases for depths
    merged, expected = model.merge_experts("svd"), reference.merge_experts("svd")
    assert not merged.config.has_router
    input_ids = random_texts()[0][None]
    torch.testing.assert_close(merged(input_ids), expected(input_ids), rtol=0, atol=0)


@pytest.mark.parametrize("router_type", ["soft", "top_p"])
def test_merging_reads_the_weights_of_other_routers(make_model, router_type):
    model = make_model(dtype=torch.float64, **ROUTINGS[router_type])
    layer, states = model.layers[1].mlp, random_states()
    expected = naive_weights(model.config, layer.router, states, 0, [0] * len(states))
    torch.testing.assert_close(routing_weights(layer, states), expected, **CLOSE)
    batches = [{"input_ids": text[None]} for text in random_texts()]
    for method, count in (("frequency", None), ("regression", None), ("cluster", 2)):
        merged = model.merge_experts(method, batches=batches, num_experts=count, inplace=False)
        assert merged(batches[0]["input_ids"]).last_hidden_state.isfinite().all()
