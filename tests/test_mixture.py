import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from reference import naive_load_balancing_loss, naive_mol
from torch import nn

from modernalbert import ModernAlbertForMaskedLM
from modernalbert.mixture_modernalbert import GroupedMixture, ModernAlbertMLP, ModernAlbertMoL
from modernalbert.routing_modernalbert import load_balancing_loss


# Experts for a token, and whether their weights sum to one; top-1 with a sum of one has no gradient for the router.
ROUTING = [(1, False), (2, True), (2, False), (4, True), (4, False)]


@pytest.fixture(params=["grouped", "dense"])
def form(request, trace):
    """Both forms of the mixture: the one for eager CPU, and the one for accelerators and traced graphs."""
    if request.param == "dense":
        trace()
    return request.param


@pytest.fixture
def make_mol(make_config, randomize):
    def make(dtype=torch.float64, **overrides):
        return randomize(ModernAlbertMoL(make_config(**overrides))).to(dtype).eval()

    return make


def random_states(tokens=50, dtype=torch.float64, seed=1):
    return torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def values_and_gradients(function, mol, states):
    """Output, and the gradients of everything that a layer learns from, by name."""
    states = states.detach().clone().requires_grad_()
    mol.zero_grad()
    output = function(states)
    cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(output)
    (output * cotangent / len(output) ** 0.5).sum().backward()
    gradients = {name: parameter.grad for name, parameter in mol.named_parameters()}
    return {"output": output.detach(), "input": states.grad, **gradients}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=str)
@pytest.mark.parametrize(("num_experts_per_tok", "norm_topk_prob"), ROUTING)
def test_mixture_equals_its_definition(make_mol, form, num_experts_per_tok, norm_topk_prob, dtype, tolerance):
    mol = make_mol(dtype, num_experts_per_tok=num_experts_per_tok, norm_topk_prob=norm_topk_prob)
    states = random_states(dtype=dtype)
    expected = values_and_gradients(lambda states: naive_mol(mol, states), mol, states)
    actual = values_and_gradients(mol, mol, states)
    assert all(tensor.abs().max() > 0.1 for tensor in expected.values())  # the comparison says something
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


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


def test_gradients_of_the_grouped_form_equal_finite_differences():
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

    torch.autograd.gradcheck(
        lambda *inputs: GroupedMixture.apply(glu, 0.7, inputs[0], inputs[1], inputs[2], experts, *inputs[3:]),
        (projected, low, weights, in_B, out_A),
    )


def test_expert_without_tokens_gets_a_gradient_of_zero(make_mol, form):
    mol = make_mol()
    with torch.no_grad():
        mol.router.weight[2] = -10  # no token of positive states chooses it
    gradients = values_and_gradients(mol, mol, random_states().abs())
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
    states = random_states()
    torch.testing.assert_close(permuted(states), mol(states), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_experts", [1, 4])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_new_experts_leave_the_shared_layer_as_it_is(make_mol, form, num_experts, norm_topk_prob):
    mol = make_mol(num_experts=num_experts, norm_topk_prob=norm_topk_prob)
    nn.init.zeros_(mol.experts.in_B)
    nn.init.zeros_(mol.experts.out_B)
    states = random_states()
    torch.testing.assert_close(mol(states), ModernAlbertMLP.forward(mol, states), rtol=1e-10, atol=1e-10)


def test_single_expert_is_an_adapter_on_both_projections(make_mol):
    mol = make_mol(num_experts=1)
    assert mol.router is None
    in_A, in_B, out_A, out_B = (
        factor[0] for factor in (mol.experts.in_A, mol.experts.in_B, mol.experts.out_A, mol.experts.out_B)
    )
    scaling = 6 / 3  # alpha / rank of the tiny configuration
    states = random_states()
    gate, value = F.linear(states, mol.Wi.weight + scaling * in_B @ in_A).chunk(2, dim=-1)
    expected = F.linear(F.gelu(gate) * value, mol.Wo.weight + scaling * out_B @ out_A)
    torch.testing.assert_close(mol(states), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("num_experts_per_tok", "norm_topk_prob"), ROUTING)
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
    states = random_states()
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
    states = random_states()
    expected = mol(states)
    torch.testing.assert_close(mol.train()(states), expected, rtol=0, atol=0)


def test_without_jitter_training_equals_evaluation(make_mol, form):
    mol = make_mol(router_jitter_noise=0.0)
    states = random_states()
    expected = mol(states)
    torch.testing.assert_close(mol.train()(states), expected, rtol=0, atol=0)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("num_experts", [1, 4])
def test_bfloat16_is_near_float32(make_mol, form, num_experts, norm_topk_prob):
    mol = make_mol(torch.bfloat16, num_experts=num_experts, norm_topk_prob=norm_topk_prob)
    if mol.router is not None:
        mol.router.float()  # as `from_pretrained` keeps it
    states = random_states(dtype=torch.bfloat16)
    actual = values_and_gradients(mol, mol, states)
    assert actual["output"].dtype == torch.bfloat16
    # The same rounded weights and input, so that the router chooses alike.
    expected = values_and_gradients(mol.float(), mol, states.float())
    for name, tensor in actual.items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(tensor.float(), expected[name], rtol=0, atol=0.03 * scale, msg=name)


@pytest.mark.parametrize("norm_topk_prob", [True, False])
@pytest.mark.parametrize("num_experts", [1, 4])
def test_autocast_is_near_float32(make_mol, form, num_experts, norm_topk_prob):
    mol = make_mol(torch.float32, num_experts=num_experts, norm_topk_prob=norm_topk_prob)
    states = random_states(dtype=torch.float32)

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
    states = random_states(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        logits, weights, _ = router(states)
    assert logits.dtype == weights.dtype == torch.float32
    torch.testing.assert_close(logits, states.float() @ router.weight.T, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("num_groups", [1, 2, 3])
@pytest.mark.parametrize("num_experts_per_tok", [1, 2])
def test_balancing_loss_equals_its_definition(num_groups, num_experts_per_tok):
    generator = torch.Generator().manual_seed(0)
    layers = [2 * torch.randn(2, 5, 4, generator=generator, dtype=torch.float64) for _ in range(6)]
    layers = [layer.requires_grad_() for layer in layers]
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1]])
    depth = 6 // num_groups
    groups = [layers[start : start + depth] for start in range(0, 6, depth)]
    actual = balancing_loss(tuple(layers), num_groups, num_experts_per_tok, mask)
    expected = naive_load_balancing_loss(groups, num_experts_per_tok, mask.bool())
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        torch.autograd.grad(actual, layers), torch.autograd.grad(expected, layers), rtol=1e-10, atol=1e-10
    )


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
