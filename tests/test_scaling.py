import pytest
import torch
from helpers import BENCHMARKS, ROOT, load_script
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from modernalbert import ModernAlbertConfig, ModernAlbertForMaskedLM


TEXTS, LENGTH = 2, 20


@pytest.fixture(scope="module")
def scaling():
    return load_script("scaling", BENCHMARKS)


def count_flops(model, labelled: int, training: bool = False) -> int:
    """Operations that run on full texts, of which `labelled` tokens each have a label."""
    model.set_attn_implementation("eager")  # the counter does not know the CPU's fused kernel
    input_ids = torch.randint(3, 100, (TEXTS, LENGTH), generator=torch.Generator().manual_seed(0))
    labels = input_ids.clone()
    labels[:, labelled:] = -100
    counter = FlopCounterMode(display=False)
    counter.flop_registry[torch.ops.aten.addmm_] = flop_registry[torch.ops.aten.addmm]  # of the grouped mixture
    with counter:
        loss = model.train(training)(input_ids, labels=labels).loss
        if training:
            loss.backward()
    return counter.get_total_flops()


MODELS = [
    {"mol_groups": []},
    {"num_experts": 0},
    {"num_experts": 1},
    {},
    {"num_experts_per_tok": 1, "norm_topk_prob": False},
    {"num_experts_per_tok": 3, "hidden_size": 64, "num_hidden_layers": 6, "mol_groups": [0, 1]},
    {"num_hidden_groups": 4, "mol_groups": [0, 3]},
    {"decoder_bias": False, "tie_word_embeddings": False},
    {"ffn_modulation": "none"},
    {"ffn_modulation": "depth_lora", "num_experts": 0},
    {"ffn_modulation": "per_depth"},
    {"ffn_modulation": "per_depth", "num_experts": 0, "num_hidden_layers": 6, "mol_groups": [0, 1]},
    {"ffn_modulation": "moa"},
    {"ffn_modulation": "moa", "num_experts": 1},
    {"ffn_modulation": "moa", "router_type": "top_p"},
    {"router_type": "soft"},
    {"router_type": "top_p", "router_top_p": 1.0},
    {"router_type": "sequence"},
    {"router_type": "depth"},
]


@pytest.mark.parametrize("overrides", MODELS, ids=str)
@pytest.mark.parametrize("labelled", [LENGTH, 6])
def test_the_estimate_equals_the_operations_of_a_forward_pass(make_model, overrides, labelled):
    model = make_model(ModernAlbertForMaskedLM, sparse_prediction=True, **overrides)
    estimate = TEXTS * LENGTH * model.config.estimate_flops(LENGTH, labelled / LENGTH)
    assert count_flops(model, labelled) == pytest.approx(estimate, rel=1e-12)


@pytest.mark.parametrize("overrides", MODELS, ids=str)
def test_training_takes_three_times_as_many_and_what_the_grouped_mixture_repeats(make_model, overrides):
    model = make_model(ModernAlbertForMaskedLM, sparse_prediction=True, **overrides)
    config = model.config
    repeated = 0
    if (
        config.has_router and config.modulation == "mol"
    ):  # its backward pass computes in_B and out_A of the chosen experts again
        layers = config.layers_per_group * len(config.mol_groups)
        chosen = config.num_experts if config.router_type in ("soft", "top_p") else config.num_experts_per_tok
        repeated = layers * chosen * 2 * config.expert_rank * 3 * config.mol_intermediate_size
    estimate = config.estimate_flops(LENGTH, 6 / LENGTH, training=True)
    assert count_flops(model, 6, training=True) == pytest.approx(TEXTS * LENGTH * (estimate + repeated), rel=1e-12)
    assert repeated < 0.05 * estimate


def test_tokens_that_need_fewer_experts_cost_less_than_the_estimate(make_model):
    model = make_model(ModernAlbertForMaskedLM, router_type="top_p", router_top_p=0.5)
    assert count_flops(model, LENGTH) < TEXTS * LENGTH * model.config.estimate_flops(LENGTH)


def test_sliding_layers_count_the_keys_that_a_token_in_the_middle_sees(make_model):
    model = make_model(layer_types=["full_attention", "sliding_attention"] * 2, attn_implementation="eager")
    weights = model(torch.arange(3, 3 + LENGTH)[None], output_attentions=True).attentions[1]
    keys = int((weights[0, 0, LENGTH // 2] > 0).sum())
    full = ModernAlbertConfig.from_dict({**model.config.to_dict(), "layer_types": ["full_attention"] * 4})
    saved = full.estimate_flops(LENGTH) - model.config.estimate_flops(LENGTH)
    assert saved == 2 * 4 * model.config.hidden_size * (LENGTH - keys)  # two layers; QK^T and AV
    assert full.estimate_flops(keys) == model.config.estimate_flops(keys)


def test_kept_bytes_equal_a_count_by_hand(scaling, make_config):
    shape = {"mol_groups": [], "num_hidden_groups": 1}
    deep, flat = (scaling.measure(make_config(num_hidden_layers=depth, **shape), 40) for depth in (3, 1))
    config = make_config(**shape)
    hidden, width, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    # Both norms: a float32 copy of the input, mean and deviation, a bf16 copy of the output. Projected q, k and v, of
    # which v stays in use, rotated q and k, output and normaliser of the attention. Gate and value, the activated gate,
    # their product.
    layer = 2 * (4 * hidden + 8 + 2 * hidden) + (6 + 4 + 2) * hidden + 4 * heads + (4 + 2 + 2) * width
    assert deep["kept"] - flat["kept"] == 2 * layer
    assert deep["checkpointed"] - flat["checkpointed"] == 2 * 2 * hidden
    assert flat["checkpointed"] == flat["kept"] + 2 * hidden
    parameters = sum(parameter.numel() for parameter in ModernAlbertForMaskedLM(config).parameters())
    assert 0 < deep["constant"] < 2 * parameters


def test_the_static_mixture_runs_the_inner_products_of_every_expert(scaling, make_config):
    config = make_config()
    inner = 2 * config.expert_rank * 3 * config.mol_intermediate_size
    chosen = config.num_experts_per_tok
    extra = 2 * inner * chosen * (config.num_experts - 1)  # two layers
    assert scaling.measure(config, 40)["flops"] == pytest.approx(config.estimate_flops(40, 0.3) + extra, rel=1e-12)


@pytest.mark.slow
def test_the_page_shows_what_the_command_prints(scaling, capsys):
    scaling.main([])
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    shown = page.split("<!-- begin: python benchmarks/scaling.py -->\n")[1].split("<!-- end -->")[0]
    assert shown.strip() == capsys.readouterr().out.strip(), "run the command and paste what it prints"
