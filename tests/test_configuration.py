import copy
import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from modernalbert import ModernAlbertConfig, ModernAlbertForMaskedLM, ModernAlbertModel
from modernalbert.configuration_modernalbert import PRESETS


SIZES_IN_MILLIONS = {"nano": (1, 5), "tiny": (50, 52), "medium": (55, 60), "base": (74, 78), "large": (117, 123)}


def parameters_of_built_model(config):
    with torch.device("meta"):
        model = ModernAlbertForMaskedLM(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_the_size_it_promises(name):
    config = ModernAlbertConfig.preset(name)
    low, high = SIZES_IN_MILLIONS[name]
    assert low * 1e6 <= config.num_parameters() <= high * 1e6
    assert config.num_parameters() == parameters_of_built_model(config)


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_experts": 0},
        {"num_experts": 1},
        {"num_experts": 3, "expert_rank": 5},
        {"tie_word_embeddings": False},
        {"decoder_bias": False},
        {"num_hidden_layers": 6, "num_hidden_groups": 6, "mol_groups": [0, 3, 5]},
        {"mol_groups": []},
        {"mol_intermediate_size": None},
    ],
    ids=str,
)
def test_parameter_count_equals_the_built_model(overrides):
    config = ModernAlbertConfig.preset("nano", **overrides)
    assert config.num_parameters() == parameters_of_built_model(config)


def test_the_defaults_are_those_of_tiny_but_for_the_wider_mol_groups():
    assert ModernAlbertConfig.preset("tiny").to_dict() == ModernAlbertConfig(mol_intermediate_size=2624).to_dict()


def test_mol_groups_are_as_wide_as_the_others_by_default():
    assert ModernAlbertConfig(intermediate_size=384).mol_intermediate_size == 384


def test_preset_takes_overrides():
    config = ModernAlbertConfig.preset("base", num_hidden_layers=8, mlp_dropout=0.1)
    assert (config.hidden_size, config.num_hidden_layers, config.layers_per_group) == (1024, 8, 2)
    assert config.mlp_dropout == 0.1
    assert len(config.layer_types) == 8


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"no preset 'huge'; the presets are nano, tiny, medium, base, large"):
        ModernAlbertConfig.preset("huge")


def test_instances_share_no_lists():
    presets, expected = copy.deepcopy(PRESETS), ModernAlbertConfig.preset("medium").to_dict()
    first, second = (ModernAlbertConfig.preset("medium") for _ in range(2))
    first.mol_groups.append(7)
    first.layer_types[0] = "sliding_attention"
    first.rope_parameters["full_attention"]["rope_theta"] = 3.0
    assert second.to_dict() == ModernAlbertConfig.preset("medium").to_dict() == expected
    assert presets == PRESETS


def test_given_rope_parameters_are_not_written_to(make_config):
    given = {"full_attention": {"rope_theta": 5.0}}
    make_config(rope_parameters=given).rope_parameters["full_attention"]["rope_theta"] = 6.0
    assert given == {"full_attention": {"rope_theta": 5.0}}


def test_defaults_that_follow_other_fields(make_config):
    config = make_config(num_hidden_layers=6, num_hidden_groups=3, mol_groups=None, mol_intermediate_size=None)
    assert config.mol_groups == [1, 2]
    assert config.mol_intermediate_size == config.intermediate_size
    assert config.layer_types == ["full_attention"] * 6
    assert make_config(num_hidden_groups=1, mol_groups=None).mol_groups == [0]


def test_json_round_trip(make_config, tmp_path):
    config = make_config(
        mol_groups=[0],
        layer_types=["full_attention", "sliding_attention"] * 2,
        rope_parameters={"sliding_attention": {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0}},
        num_experts_per_tok=1,
        norm_topk_prob=False,
        classifier_pooling="mean",
        num_labels=5,
        sparse_prediction=True,
        router_aux_loss_coef=0.5,
    )
    config.save_pretrained(tmp_path)
    loaded = ModernAlbertConfig.from_pretrained(tmp_path)
    assert {**loaded.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "modernalbert"
    assert ModernAlbertConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


RULES = [
    *(
        ({name: 0}, rf"`{name}` \(0\) must be at least 1")
        for name in (
            *("vocab_size", "embedding_size", "hidden_size", "intermediate_size", "num_attention_heads"),
            *("num_hidden_layers", "num_hidden_groups", "mol_intermediate_size", "max_position_embeddings"),
        )
    ),
    *(
        ({name: 1.0}, rf"`{name}` \(1.0\) must be in \[0, 1\)")
        for name in ("embedding_dropout", "attention_dropout", "mlp_dropout", "classifier_dropout")
    ),
    ({"mlp_dropout": -0.1}, r"`mlp_dropout` \(-0.1\) must be in \[0, 1\)"),
    ({"num_hidden_layers": 5}, r"`num_hidden_layers` \(5\) must be a multiple of `num_hidden_groups` \(2\).*change"),
    ({"hidden_size": 33}, r"`hidden_size` \(33\) must be `num_attention_heads` \(2\) times an even number.*change"),
    ({"hidden_size": 34}, r"`hidden_size` \(34\) must be `num_attention_heads` \(2\) times an even number.*change"),
    ({"layer_types": ["chunked_attention"] * 4}, r"`layer_types` contains \['chunked_attention'\]; the types are"),
    ({"layer_types": ["full_attention"] * 3}, r"`num_hidden_layers` \(4\) must be equal.*`layer_types` \(3\)"),
    ({"local_attention": 7}, r"`local_attention` \(7\) must be even and at least 2"),
    ({"local_attention": 0}, r"`local_attention` \(0\) must be even and at least 2"),
    ({"hidden_activation": "geglu"}, r"`hidden_activation` \('geglu'\) is not an activation; use one of .*'gelu'"),
    ({"classifier_activation": "x"}, r"`classifier_activation` \('x'\) is not an activation; use one of"),
    ({"mol_groups": [2]}, r"`mol_groups` \(\[2\]\) must be different numbers from 0 to 1.*change it or"),
    ({"mol_groups": [0, 0]}, r"`mol_groups` \(\[0, 0\]\) must be different numbers from 0 to 1.*change it or"),
    ({"mol_groups": [-1]}, r"`mol_groups` \(\[-1\]\) must be different numbers from 0 to 1.*change it or"),
    ({"num_experts": -1}, r"`num_experts` \(-1\) must be at least 0"),
    ({"expert_rank": 0}, r"`expert_rank` \(0\) must be from 1 to 32"),
    ({"expert_rank": 33}, r"`expert_rank` \(33\) must be from 1 to 32"),
    ({"expert_rank": 21, "mol_intermediate_size": 20}, r"`expert_rank` \(21\) must be from 1 to 20"),
    ({"num_experts_per_tok": 0}, r"`num_experts_per_tok` \(0\) must be from 1 to `num_experts` \(4\); change one"),
    ({"num_experts_per_tok": 5}, r"`num_experts_per_tok` \(5\) must be from 1 to `num_experts` \(4\); change one"),
    ({"num_experts_per_tok": 1}, r"`num_experts_per_tok` \(1\) with `norm_topk_prob` \(True\).*set `norm_topk_prob=F"),
    ({"router_jitter_noise": 1.0}, r"`router_jitter_noise` \(1.0\) must be in \[0, 1\)"),
    ({"router_jitter_noise": -0.1}, r"`router_jitter_noise` \(-0.1\) must be in \[0, 1\)"),
    ({"router_aux_loss_coef": -1}, r"`router_aux_loss_coef` \(-1\) must be at least 0"),
]


@pytest.mark.parametrize(("overrides", "message"), RULES, ids=[str(overrides) for overrides, _ in RULES])
def test_contradicting_fields_are_refused(make_config, overrides, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        make_config(**overrides)


def test_no_groups_is_refused_where_the_mol_groups_follow_from_them(make_config):
    with pytest.raises(StrictDataclassClassValidationError, match=r"`num_hidden_groups` \(0\) must be at least 1"):
        make_config(num_hidden_groups=0, mol_groups=None)


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_experts": 0, "expert_rank": 0},  # no experts: their fields say nothing
        {"num_experts": 1, "num_experts_per_tok": 1},
        {"num_experts": 1, "num_experts_per_tok": 2},
        {"num_experts_per_tok": 4},
        {"num_experts_per_tok": 1, "norm_topk_prob": False},
        {"pad_token_id": None},
        {"mol_groups": []},
        {"mol_groups": [1, 0]},
        {"router_aux_loss_coef": 0},
        {"expert_rank": 32},
    ],
    ids=str,
)
def test_fields_at_the_edge_of_a_rule_pass(make_config, overrides):
    ModernAlbertModel(make_config(**overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": "wide"}, "Field 'hidden_size' expected int, got str"),
        ({"num_experts": 2.0}, "Field 'num_experts' expected int, got float"),
        ({"classifier_pooling": "max"}, r"expected one of \('cls', 'mean'\), got max"),
        ({"mol_groups": "last"}, "mol_groups"),
    ],
    ids=str,
)
def test_wrong_types_are_refused(make_config, overrides, message):
    with pytest.raises(StrictDataclassFieldValidationError, match=message):
        make_config(**overrides)


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("num_expert", "num_experts"),
        ("hiden_size", "hidden_size"),
        ("mol_group", "mol_groups"),
        ("router_aux_loss_coeff", "router_aux_loss_coef"),
        ("expert_alpah", "expert_alpha"),
    ],
)
def test_misspelt_fields_are_refused(make_config, misspelt, meant):
    with pytest.raises(ValueError, match=rf"no field `{misspelt}`; did you mean `{meant}`\?"):
        make_config(**{misspelt: 2})


def test_other_extra_keys_pass(make_config):
    config = make_config(
        teacher="answerdotai/ModernBERT-base", num_labels=3, _name_or_path="here", torch_dtype="float16"
    )
    assert config.teacher == "answerdotai/ModernBERT-base"
    assert config.num_labels == 3


@pytest.mark.parametrize(
    ("overrides", "has_router"),
    [({}, True), ({"num_experts": 1}, False), ({"num_experts": 0}, False), ({"mol_groups": []}, False)],
    ids=str,
)
def test_has_router(make_config, overrides, has_router):
    assert make_config(**overrides).has_router == has_router


def test_sliding_window_is_the_tokens_on_each_side(make_config):
    config = make_config(local_attention=10)
    assert config.sliding_window == 5
    config.sliding_window = 3
    assert config.local_attention == 6
    assert make_config(sliding_window=4).local_attention == 8


MIXED_LAYERS = ["full_attention", "sliding_attention"] * 2


def test_each_layer_type_in_use_has_its_theta(make_config):
    full = {"full_attention": {"rope_type": "default", "rope_theta": 160_000.0}}
    assert make_config().rope_parameters == full
    sliding = {"sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
    assert make_config(layer_types=MIXED_LAYERS).rope_parameters == full | sliding
    given = {"sliding_attention": {"rope_theta": 5.0}}
    one_given = make_config(layer_types=MIXED_LAYERS, rope_parameters=given).rope_parameters
    assert one_given["full_attention"]["rope_theta"] == 160_000.0
    assert one_given["sliding_attention"] == {"rope_type": "default", "rope_theta": 5.0}


@pytest.mark.parametrize(
    ("flat", "expected"),
    [
        ({"rope_theta": 5.0}, ("default", 5.0, 5.0)),
        ({"rope_type": "linear", "factor": 2.0}, ("linear", 160_000.0, 10_000.0)),
    ],
    ids=str,
)
def test_flat_rope_parameters_apply_to_both_layer_types(make_config, flat, expected):
    both = make_config(layer_types=MIXED_LAYERS, rope_parameters=flat).rope_parameters
    rope_type, full_theta, sliding_theta = expected
    assert both == {
        "full_attention": {**flat, "rope_type": rope_type, "rope_theta": full_theta},
        "sliding_attention": {**flat, "rope_type": rope_type, "rope_theta": sliding_theta},
    }
    assert both["full_attention"] is not both["sliding_attention"]


def test_fields_overridden_at_load_obey_the_rules(make_config, tmp_path):
    make_config().save_pretrained(tmp_path)
    loaded = ModernAlbertConfig.from_pretrained(tmp_path, rope_parameters={"rope_type": "linear", "factor": 2.0})
    assert loaded.rope_parameters["full_attention"]["rope_theta"] == 160_000.0
    with pytest.raises(StrictDataclassClassValidationError, match="must be a multiple of `num_hidden_groups`"):
        ModernAlbertConfig.from_pretrained(tmp_path, num_hidden_groups=3)


ROPE_TYPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.5},
}


@pytest.mark.parametrize("name", ROPE_TYPES)
def test_the_librarys_rope_types_run(make_model, name):
    layer_types = ["full_attention", "sliding_attention"] * 2
    input_ids = torch.arange(3, 63).view(2, 30)
    mask = torch.ones_like(input_ids)
    mask[0, 20:] = 0
    output = make_model(layer_types=layer_types, rope_parameters=ROPE_TYPES[name])(input_ids, mask).last_hidden_state
    assert output.isfinite().all()
    default = make_model(layer_types=layer_types)(input_ids, mask).last_hidden_state
    # Within the length that a model was made for, dynamic scaling leaves RoPE as it is; the others change it.
    assert torch.allclose(output, default, atol=1e-4) == (name == "dynamic")


@pytest.mark.parametrize("name", ["linear", "yarn", "llama3", "proportional"])
def test_rope_has_the_librarys_frequencies_and_scale(make_model, name):
    model = make_model(rope_parameters=ROPE_TYPES[name])
    inv_freq, scale = ROPE_INIT_FUNCTIONS[name](model.config, layer_type="full_attention")
    assert (scale != 1) == (name == "yarn")
    positions = torch.tensor([[0, 1, 5, 30]])
    angles = (positions[..., None] * inv_freq).repeat(1, 1, 2)
    cos, signed_sin = model.rotary_emb(torch.zeros(1), positions, "full_attention")
    sign = torch.tensor([-1.0] * 8 + [1.0] * 8)
    torch.testing.assert_close(cos, scale * angles.cos(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(signed_sin, scale * sign * angles.sin(), rtol=1e-5, atol=1e-6)


def test_linear_rope_divides_positions(make_model):
    input_ids = torch.arange(3, 33).view(1, 30)
    scaled = make_model(rope_parameters={"rope_type": "linear", "factor": 2.0})(
        input_ids, position_ids=2 * torch.arange(30)[None]
    )
    plain = make_model()(input_ids)
    torch.testing.assert_close(scaled.last_hidden_state, plain.last_hidden_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_theta": 3.0}, "`rope_theta` is not a field; set it in `rope_parameters`"),
        ({"rope_scaling": {"factor": 2.0}}, "`rope_scaling` is not a field"),
        (
            {"rope_parameters": {"full_atention": {"rope_theta": 3.0}}},
            r"keys \['full_atention'\]; give a dict for each",
        ),
    ],
)
def test_rope_settings_that_would_have_no_effect_are_refused(make_config, fields, message):
    with pytest.raises(ValueError, match=message):
        make_config(**fields)


def test_a_key_with_an_underscore_is_the_librarys_own(make_config):
    assert make_config(_num_expert=1).num_experts == make_config().num_experts
