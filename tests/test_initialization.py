"""A student started from a small random ModernBERT: where the shapes allow it, it computes what the teacher does."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from helpers import load_script
from transformers import AutoConfig, BertConfig, ModernBertConfig, ModernBertForMaskedLM

from modernalbert import ModernAlbertConfig, ModernAlbertForMaskedLM
from modernalbert.tokenization import padded_vocab_size, save_tokenizer, train_tokenizer
from modernalbert.training.initialization import (
    add_experts,
    initialize_from_teacher,
    source_layers,
    student_config,
    teacher_segments,
)


VOCAB, HIDDEN, WIDTH = 100, 32, 24
INPUT_IDS = torch.randint(3, VOCAB, (2, 20), generator=torch.Generator().manual_seed(0))
# Wide enough that the factorised embedding loses nothing: a normed row of 32 has 31 degrees of freedom.
STUDENT = {
    "embedding_size": HIDDEN,
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "num_attention_heads": 2,
    "mol_intermediate_size": WIDTH,
    "num_experts": 4,
    "expert_rank": 3,
    "expert_alpha": 6,
}
# The student norms once more than the teacher's first layer, which is the same but for the epsilon.
EXACT = 1e-10
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
each_rule = pytest.mark.parametrize("layers", ["stepwise", "average", "lower"])


def teacher_config(**overrides):
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 5,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "local_attention": 6,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "cls_token_id": 1,
        "eos_token_id": 2,
        "sep_token_id": 2,
    }
    return ModernBertConfig(**{**fields, **overrides})


@pytest.fixture
def make_teacher(randomize):
    """A random teacher. A `uniform` embedding norm is what the student's first norm can undo."""

    @torch.no_grad()
    def make(uniform=1.3, **overrides):
        teacher = randomize(ModernBertForMaskedLM(teacher_config(**overrides))).eval()
        embeddings = teacher.model.embeddings
        embeddings.tok_embeddings.weight[0] = 0
        if uniform is not None:
            embeddings.norm.weight.fill_(uniform)
        return teacher

    return make


def start(teacher, layers="stepwise", experts="zero", **overrides):
    config = student_config(teacher.config, "tiny", layers, **{**STUDENT, **overrides})
    torch.manual_seed(0)
    student, report = initialize_from_teacher(teacher, config, layers, experts)
    return student.eval(), report


def ends_of_layers(layers, model):
    """What each executed layer gives, and the final norm after it."""
    ends = []
    hooks = [layer.register_forward_hook(lambda module, args, output: ends.append(output)) for layer in layers]
    with torch.no_grad():
        last = model(INPUT_IDS).last_hidden_state
    for hook in hooks:
        hook.remove()
    return [*ends, last]


def compare_with(teacher, student, **tolerance):
    expected = ends_of_layers(teacher.model.layers, teacher.model)
    found = ends_of_layers(student.model.layers, student.model)
    torch.testing.assert_close(found, expected, **(tolerance or CLOSE))


@torch.no_grad()
def feed_forward(layer, states):
    """Of a teacher's layer, with its norm's weight, on states of mean 0 and variance 1."""
    return layer.mlp(states * layer.mlp_norm.weight)


def normed_states():
    states = torch.randn(50, HIDDEN, generator=torch.Generator().manual_seed(1))
    return F.layer_norm(states, (HIDDEN,))


@each_rule
@pytest.mark.parametrize("embedding_size", [HIDDEN, HIDDEN + 9])
def test_student_as_deep_as_the_teacher_computes_the_same(make_teacher, layers, embedding_size):
    teacher = make_teacher(norm_eps=EXACT)
    before = {name: weight.clone() for name, weight in teacher.state_dict().items()}
    student, report = start(teacher, layers, num_hidden_layers=5, num_hidden_groups=5, embedding_size=embedding_size)
    assert student.config.layer_types == teacher.config.layer_types and len(set(student.config.layer_types)) == 2
    compare_with(teacher, student)
    assert report["embedding"] == pytest.approx({"energy_kept": 1, "relative_error": 0}, abs=1e-5)
    assert [group["layers"] for group in report["groups"]] == [[0], [1], [2], [3], [4]]
    torch.testing.assert_close(student.decoder.bias, teacher.decoder.bias, rtol=0, atol=0)
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)
    assert torch.isfinite(student(torch.zeros_like(INPUT_IDS)).logits).all()  # the row of the padding token is 0


def test_low_precision_teacher(make_teacher):
    teacher = make_teacher(norm_eps=EXACT)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.copy_(parameter.bfloat16())
    student, _ = start(copy.deepcopy(teacher).bfloat16(), num_hidden_layers=5, num_hidden_groups=5)
    compare_with(teacher, student)


@each_rule
@pytest.mark.parametrize("width", [WIDTH, 3 * WIDTH // 2, 2 * WIDTH, 2 * WIDTH + 5])
def test_shared_teacher_is_met_at_the_end_of_every_group(make_teacher, layers, width):
    """A teacher whose layers are equal is a recursive model already."""
    teacher = make_teacher(uniform=1.0, norm_eps=EXACT, num_hidden_layers=6, layer_types=["full_attention"] * 6)
    first = teacher.model.layers[0]
    for layer in teacher.model.layers[1:]:
        layer.attn.load_state_dict(first.attn.state_dict())
        layer.mlp.load_state_dict(first.mlp.state_dict())
        layer.mlp_norm.load_state_dict(first.mlp_norm.state_dict())
        torch.nn.init.ones_(layer.attn_norm.weight)
    student, _ = start(
        teacher,
        layers,
        num_hidden_layers=6,
        num_hidden_groups=3,
        mol_intermediate_size=width,
        intermediate_size=width + 1,
    )
    compare_with(teacher, student)


# Of 5 layers in 2 groups, the last one a MoL: the layers its feed-forward layer is made of.
HALVES = {"stepwise": ([4], [3]), "average": ([2, 3], [3, 4]), "lower": ([1], [2])}


@each_rule
@pytest.mark.parametrize("width", [WIDTH + 7, 2 * WIDTH, 2 * WIDTH + 5])
def test_wider_feed_forward_layer_is_the_mean_of_two(make_teacher, layers, width):
    teacher = make_teacher()
    student, report = start(
        teacher, layers, num_hidden_layers=4, num_hidden_groups=2, mol_groups=[1], mol_intermediate_size=width
    )
    first, second = HALVES[layers]
    assert report["groups"][1]["widened_from"] == [first, second]
    states, outputs = normed_states(), []
    doubled = min(width - WIDTH, WIDTH)
    for indices, weights in ((first, (0.5, 1.0)), (second, (0.5, 0.0))):  # of neurons that exist twice, and once
        chosen = [teacher.model.layers[index] for index in indices]
        Wi = torch.stack([layer.mlp.Wi.weight * layer.mlp_norm.weight for layer in chosen]).mean(dim=0)
        Wo = torch.stack([layer.mlp.Wo.weight for layer in chosen]).mean(dim=0)
        gate, value = (states @ Wi.T).chunk(2, dim=-1)
        share = torch.tensor([weights[0]] * doubled + [weights[1]] * (WIDTH - doubled))
        outputs.append((F.gelu(gate) * value * share) @ Wo.T)
    mixture = student.model.layers[1].mlp
    torch.testing.assert_close(mixture(states), sum(outputs), **CLOSE)
    if layers != "average" and width >= 2 * WIDTH:
        a, b = (feed_forward(teacher.model.layers[index], states) for index in (*first, *second))
        torch.testing.assert_close(mixture(states), (a + b) / 2, **CLOSE)
    # Neurons that are fresh can learn.
    fresh = mixture.Wi.weight.unflatten(0, (2, -1))[:, 2 * WIDTH :]
    assert fresh.abs().gt(0).all() and not mixture.Wo.weight[:, 2 * WIDTH :].any()


def test_average_of_a_layer_as_wide(make_teacher):
    """The mean over the whole segment, and over matrices that have the norms folded in."""
    teacher = make_teacher(num_hidden_layers=7)
    student, _ = start(teacher, "average", num_hidden_layers=2, num_hidden_groups=2)
    rms = teacher.model.embeddings.norm.weight.square().mean().sqrt()
    for block, segment in zip(student.model.layers, teacher_segments(7, 2), strict=True):
        source = [teacher.model.layers[index] for index in segment]
        scales = [getattr(layer.attn_norm, "weight", rms) for layer in source]
        for found, matrices in (
            (block.attn.Wqkv, [layer.attn.Wqkv.weight * scale for layer, scale in zip(source, scales, strict=True)]),
            (block.attn.Wo, [layer.attn.Wo.weight for layer in source]),
            (block.mlp.Wi, [layer.mlp.Wi.weight * layer.mlp_norm.weight for layer in source]),
            (block.mlp.Wo, [layer.mlp.Wo.weight for layer in source]),
        ):
            torch.testing.assert_close(found.weight, sum(matrices) / len(segment), **CLOSE)
        for norm in (block.attn_norm, block.mlp_norm):
            assert (norm.weight == 1).all()


def run_expert(mixture, expert, states):
    """Output of a mixture whose router gives every token to one expert."""
    mixture.router.forward = lambda states, *context: (
        None,
        torch.ones(len(states), 1),
        torch.full((len(states), 1), expert, dtype=torch.long),
    )
    with torch.no_grad():
        return mixture(states)


@each_rule
@pytest.mark.parametrize("width", [HIDDEN, 2 * WIDTH + 5])  # narrower ones cannot have the full rank
def test_experts_of_full_rank_are_the_layers_of_the_segment(make_teacher, layers, width):
    teacher = make_teacher(num_hidden_layers=6)
    student, report = start(
        teacher,
        layers,
        "svd",
        num_hidden_layers=4,
        num_hidden_groups=2,
        mol_groups=[1],
        mol_intermediate_size=width,
        expert_rank=HIDDEN,
        expert_alpha=11,
        num_experts=5,
    )
    assert "expert_energy" not in report["groups"][0]
    assert report["groups"][1]["expert_energy"] == pytest.approx(1, abs=1e-6)
    states = normed_states()
    mixture = student.model.layers[1].mlp
    for expert in range(5):
        expected = feed_forward(teacher.model.layers[3 + expert % 3], states)
        torch.testing.assert_close(run_expert(mixture, expert, states), expected, **CLOSE)


def test_experts_of_low_rank_are_the_best_of_their_rank(make_teacher):
    """Eckart-Young: what they miss is what the smaller singular values hold, on either projection."""
    teacher, rank = make_teacher(num_hidden_layers=6), 5
    student, report = start(
        teacher, "average", "svd", num_hidden_layers=2, num_hidden_groups=2, mol_groups=[1], expert_rank=rank
    )
    mixture = student.model.layers[1].mlp
    experts = mixture.experts
    missed = total = 0
    for expert in range(4):
        source = teacher.model.layers[3 + expert % 3]
        for A, B, shared, goal in (
            (experts.in_A, experts.in_B, mixture.Wi.weight, source.mlp.Wi.weight * source.mlp_norm.weight),
            (experts.out_A, experts.out_B, mixture.Wo.weight, source.mlp.Wo.weight),
        ):
            values = torch.linalg.svdvals(goal - shared)
            error = (shared + experts.scaling * B[expert] @ A[expert] - goal).norm()
            torch.testing.assert_close(error, values[rank:].norm(), **CLOSE)
            if expert < 3:
                missed, total = missed + values[rank:].square().sum(), total + values.square().sum()
    assert report["groups"][1]["expert_energy"] == pytest.approx((1 - missed / total).item(), abs=1e-5)


def test_experts_without_a_difference_can_learn(make_teacher):
    """Expert 0 of a segment that starts from its own layer has nothing to correct; A and B of 0 would stay so."""
    student, report = start(
        make_teacher(num_hidden_layers=2), "lower", "svd", num_hidden_layers=2, num_hidden_groups=2
    )
    experts = student.model.layers[1].mlp.experts
    assert report["groups"][1]["expert_energy"] == 1
    for A, B in ((experts.in_A, experts.in_B), (experts.out_A, experts.out_B)):
        assert A.abs().gt(0).any(dim=-1).all() and not B.any()


@each_rule
@pytest.mark.parametrize("width", [HIDDEN, 2 * WIDTH, 2 * WIDTH + 5])
def test_a_lora_of_full_rank_makes_every_depth_its_teacher_layer(make_teacher, layers, width):
    teacher = make_teacher(num_hidden_layers=6)
    student, report = start(
        teacher,
        layers,
        "svd",
        num_hidden_layers=6,
        num_hidden_groups=2,
        mol_groups=[1],
        mol_intermediate_size=width,
        expert_rank=min(HIDDEN, width),
        expert_alpha=11,
        ffn_modulation="depth_lora",
    )
    assert "expert_energy" not in report["groups"][0]
    assert report["groups"][1]["expert_energy"] == pytest.approx(1, abs=1e-6)
    states = normed_states()
    for depth in range(3):
        expected = feed_forward(teacher.model.layers[3 + depth], states)
        with torch.no_grad():
            found = student.model.layers[1].mlp(states, depth=depth)
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize(
    ("teacher_layers", "depth", "expected"),
    [(3, 2, [0, 2]), (4, 2, [1, 3]), (2, 4, [0, 0, 1, 1]), (1, 3, [0, 0, 0]), (7, 3, [1, 3, 5])],
)
def test_depths_stand_for_even_parts_of_the_segment(make_teacher, teacher_layers, depth, expected):
    teacher = make_teacher(num_hidden_layers=teacher_layers)
    student, _ = start(
        teacher,
        "average",
        "svd",
        num_hidden_layers=depth,
        num_hidden_groups=1,
        expert_rank=WIDTH,
        ffn_modulation="depth_lora",
    )
    mlp, scaling = student.model.layers[0].mlp, 6 / WIDTH
    for index, source in enumerate(expected):
        layer = teacher.model.layers[source]
        correction = scaling * mlp.experts.out_B[index] @ mlp.experts.out_A[index]
        torch.testing.assert_close(mlp.Wo.weight + correction, layer.mlp.Wo.weight, **CLOSE)


def reference_embedding(teacher):
    """`z` and `w * z` of the teacher, in numpy's precision."""
    embeddings = teacher.model.embeddings
    z = F.layer_norm(embeddings.tok_embeddings.weight.detach().double(), (HIDDEN,), eps=embeddings.norm.eps)
    return z, z * embeddings.norm.weight.detach()


def test_embedding_keeps_the_energy_of_the_truncated_svd(make_teacher):
    teacher = make_teacher(uniform=None)
    size = 12
    student, report = start(teacher, num_hidden_layers=2, num_hidden_groups=2, embedding_size=size)
    z, target = reference_embedding(teacher)
    energies = torch.linalg.svdvals(z).square()
    kept = (energies[: size - 1].sum() / energies.sum()).item()
    assert report["embedding"]["energy_kept"] == pytest.approx(kept, abs=1e-6) and kept < 0.9

    embeddings = student.model.embeddings
    with torch.no_grad():
        normed = embeddings.norm(embeddings.tok_embeddings.weight).double()
        found = embeddings.projection(normed.float()).double()
    error = ((found - target).norm() / target.norm()).item()
    assert report["embedding"]["relative_error"] == pytest.approx(error, abs=1e-5)
    best = normed @ torch.linalg.lstsq(normed, target, rcond=1e-5, driver="gelsd").solution
    torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-4)

    # The decoder reads rows of the teacher's scale.
    raw = teacher.model.embeddings.tok_embeddings.weight
    scales = embeddings.tok_embeddings.weight.std(dim=1, correction=0)
    torch.testing.assert_close(scales, raw.std(dim=1, correction=0), **CLOSE)
    assert student.decoder.weight is embeddings.tok_embeddings.weight


@pytest.mark.parametrize("scale", [1.0, 3e-3])  # the second is of the size of the norm's epsilon
def test_embedding_of_low_rank_is_exact(make_teacher, scale):
    teacher = make_teacher(uniform=None)
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(*shape, generator=generator) for shape in ((VOCAB, 11), (11, HIDDEN)))
    table = left @ (right - right.mean(dim=1, keepdim=True)) * scale
    table[4] = 0.5  # all equal
    teacher.model.embeddings.tok_embeddings.weight.data.copy_(table)
    student, report = start(teacher, num_hidden_layers=2, num_hidden_groups=2, embedding_size=12)
    assert report["embedding"] == pytest.approx({"energy_kept": 1, "relative_error": 0}, abs=1e-5)
    with torch.no_grad():
        found = student.model.embeddings(INPUT_IDS, None)
    torch.testing.assert_close(found, teacher.model.embeddings(INPUT_IDS).detach(), **CLOSE)
    assert torch.isfinite(student.model.embeddings.tok_embeddings.weight).all()
    # The head is the teacher's, and so are the scores that the decoder gives, but for the row of equal values.
    states = normed_states()
    with torch.no_grad():
        found = student.decoder(student.decoder_projection(student.head(states)))
        expected = teacher.decoder(teacher.head(states))
    other = torch.arange(VOCAB) != 4
    torch.testing.assert_close(found[:, other], expected[:, other], rtol=1e-3, atol=1e-3 * scale)


def test_decoder_is_the_best_fit_for_its_table(make_teacher):
    teacher = make_teacher()
    student, report = start(teacher, num_hidden_layers=2, num_hidden_groups=2, embedding_size=9)
    table, target = (model.decoder.weight.detach().double() for model in (student, teacher))
    best = torch.linalg.lstsq(table, target, rcond=1e-5, driver="gelsd").solution
    torch.testing.assert_close(student.decoder_projection.weight.double(), best, rtol=1e-4, atol=1e-4)
    error = ((table @ best - target).norm() / target.norm()).item()
    assert report["decoder"]["relative_error"] == pytest.approx(error, abs=1e-5) and error > 0.1


def test_segments_divide_the_teacher():
    assert teacher_segments(5, 2) == [range(0, 2), range(2, 5)]
    assert [len(segment) for segment in teacher_segments(22, 7)] == [3, 3, 3, 4, 3, 3, 3]
    for num_layers in range(1, 30):
        for num_groups in range(1, num_layers + 1):
            segments = teacher_segments(num_layers, num_groups)
            assert [index for segment in segments for index in segment] == list(range(num_layers))
            assert all(segments)
    with pytest.raises(ValueError, match=r"`num_hidden_groups` \(4\) exceeds the 3 layers .* lower it"):
        teacher_segments(3, 4)


def test_sources():
    picked = [sources.layers for sources in source_layers(22, 7, "stepwise")]
    assert picked == [[0], [3], [7], [10], [14], [17], [21]]
    assert [sources.second for sources in source_layers(5, 3, "stepwise")] == [[1], [3], [3]]
    assert source_layers(5, 1, "stepwise")[0].layers == [2]
    assert source_layers(1, 1, "lower")[0] == ([0], [0], [0])
    assert source_layers(4, 2, "average")[1] == ([2, 3], [2], [3])


def test_configuration_is_the_teachers_where_it_can_be():
    rope = {
        "full_attention": {"rope_type": "default", "rope_theta": 1234.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 56.0},
    }
    teacher = teacher_config(
        norm_eps=1e-4, hidden_activation="silu", initializer_range=0.5, rope_parameters=rope, num_hidden_layers=8
    )
    shape = {**STUDENT, "num_hidden_layers": 6, "num_hidden_groups": 3}
    config = student_config(teacher, "tiny", **shape)
    for name in ("vocab_size", "pad_token_id", "bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id"):
        assert getattr(config, name) == getattr(teacher, name)
    for name in ("norm_eps", "hidden_activation", "initializer_range", "max_position_embeddings", "local_attention"):
        assert getattr(config, name) == getattr(teacher, name)
    assert config.rope_parameters == rope
    full, sliding = ["full_attention"] * 2, ["sliding_attention"] * 2  # 0, 3 and 6 are full
    assert config.layer_types == full + full + sliding  # 0, 3, 7
    assert student_config(teacher, "tiny", "lower", **shape).layer_types == full + sliding + sliding  # 0, 1, 2
    assert student_config(teacher, "tiny", "average", **shape).layer_types == sliding + full + sliding  # 012, 34, 567
    overridden = student_config(teacher, "tiny", **shape, norm_eps=1e-3, layer_types=["full_attention"] * 6)
    assert overridden.norm_eps == 1e-3 and set(overridden.layer_types) == {"full_attention"}


@pytest.mark.parametrize(
    ("teacher", "student", "rules", "message"),
    [
        ({"hidden_size": 64}, {}, {}, r"`hidden_size` is 32, the teacher's is 64; set it"),
        ({"num_attention_heads": 4}, {}, {}, r"`num_attention_heads` is 2, the teacher's is 4; set it"),
        ({}, {"vocab_size": 128}, {}, r"`vocab_size` is 128, the teacher's is 100; set it"),
        ({"intermediate_size": 25}, {}, {}, r"`mol_intermediate_size` \(24\) is narrower .*\n- `intermediate_size`"),
        ({"attention_bias": True}, {}, {}, "the teacher has `attention_bias`.* choose a teacher without"),
        ({"mlp_bias": True}, {}, {}, "the teacher has `mlp_bias`"),
        ({"norm_bias": True}, {}, {}, "the teacher has `norm_bias`"),
        ({"num_hidden_layers": 1}, {}, {}, r"`num_hidden_groups` \(2\) exceeds the 1 layers of the teacher; lower it"),
        ({}, {"num_experts": 1}, {"experts": "svd"}, '`num_experts` is 1 in 1 MoL groups; use `experts="zero"`'),
        ({}, {"num_experts": 0}, {"experts": "svd"}, "`num_experts` is 0"),
        ({}, {"mol_groups": []}, {"experts": "svd"}, "`num_experts` is 4 in 0 MoL groups"),
        ({}, {"ffn_modulation": "moa"}, {"experts": "svd"}, "`svd` starts LoRAs, and `ffn_modulation` is 'moa'"),
        ({}, {"ffn_modulation": "none"}, {"experts": "svd"}, "`svd` starts LoRAs, and `ffn_modulation` is 'none'"),
        ({}, {}, {"layers": "upper"}, "no rule 'upper' for the layers; the rules are stepwise, average, lower"),
        ({}, {}, {"experts": "copy"}, "no rule 'copy' for the experts; the rules are zero, svd"),
        ({"hidden_size": 64, "mlp_bias": True}, {}, {"experts": "copy"}, "(?s)'copy'.*`hidden_size`.*`mlp_bias`"),
    ],
)
def test_misfits_are_refused_together(teacher, student, rules, message):
    fields = {**STUDENT, "num_hidden_layers": 2, "num_hidden_groups": 2, "mol_groups": [1]}
    teacher = ModernBertForMaskedLM(teacher_config(**teacher))
    config = student_config(teacher_config(), "tiny", **fields)
    for name, value in student.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=message):
        initialize_from_teacher(teacher, config, **rules)
    if "experts" not in rules:
        with pytest.raises(ValueError, match=message):
            student_config(teacher.config, "tiny", **{**fields, **student}, **rules)


def test_other_teachers_are_refused():
    with pytest.raises(ValueError, match="the teacher is a bert; only a modernbert"):
        student_config(BertConfig(), "tiny")


def test_script(make_teacher, tmp_path):
    tokenizer = train_tokenizer([f"Sentence number {n} says that {n} times {n} is {n * n}." for n in range(40)], 320)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
    ids.update(bos_token_id=ids["cls_token_id"], eos_token_id=ids["sep_token_id"])
    teacher = make_teacher(vocab_size=padded_vocab_size(tokenizer), **ids)
    teacher.save_pretrained(tmp_path / "teacher")
    save_tokenizer(tokenizer, tmp_path / "teacher")
    script = load_script("init_from_teacher")
    fields = {**STUDENT, "num_hidden_layers": 4, "num_hidden_groups": 2, "mol_groups": [1]}
    arguments = ["--teacher", str(tmp_path / "teacher"), "--config_overrides", json.dumps(fields), "--experts", "svd"]
    arguments += ["--layers", "average", "--output_dir", str(tmp_path / "student")]
    report = script.main(arguments)

    folder = tmp_path / "student"
    assert json.loads((folder / "initialization.json").read_text()) == report
    assert not list(folder.glob("*.tmp")) and (folder / "tokenizer.json").exists()
    assert [group["segment"] for group in report["groups"]] == [[0, 1], [2, 3, 4]]
    assert AutoConfig.from_pretrained(folder).pad_token_id == tokenizer.pad_token_id
    student = ModernAlbertForMaskedLM.from_pretrained(folder)
    torch.manual_seed(42)
    config = student_config(teacher.config, "tiny", "average", **fields)
    expected, _ = initialize_from_teacher(teacher, config, "average", "svd")
    torch.testing.assert_close(student.state_dict(), expected.state_dict())

    with pytest.raises(FileExistsError, match="exists and is not empty"):
        script.main(arguments)
    refused = [*arguments, "--output_dir", str(tmp_path / "other"), "--layers", "upper"]
    with pytest.raises(ValueError, match="no rule 'upper'"):
        script.main(refused)
    assert not (tmp_path / "other").exists()


def test_experts_are_added_without_changing_the_model(make_model):
    plain = make_model(ModernAlbertForMaskedLM, mol_groups=[], mol_intermediate_size=24, router_jitter_noise=0.0)
    fields = {**plain.config.to_dict(), "mol_groups": [1], "num_experts": 4}
    model = add_experts(plain, ModernAlbertConfig(**fields))
    ids = torch.randint(5, 60, (2, 9))
    torch.testing.assert_close(model.eval()(ids).logits, plain.eval()(ids).logits)
    model.train()(ids, labels=ids).loss.backward()
    assert model.model.layers[1].mlp.experts.in_B.grad.abs().sum() > 0  # they learn
    assert model.decoder.weight is model.get_input_embeddings().weight
    with pytest.raises(ValueError, match="together with other shapes"):
        add_experts(plain, ModernAlbertConfig(**{**fields, "mol_intermediate_size": 40}))
    with pytest.raises(ValueError, match="together with other tensors"):
        add_experts(plain, ModernAlbertConfig(**{**fields, "num_hidden_groups": 4}))


def test_pretraining_adds_experts(pretrained, tmp_path):
    """The second stage of a model that was trained without them."""
    folder = pretrained[0] / "model"
    config = AutoConfig.from_pretrained(folder)
    plain = ModernAlbertForMaskedLM(
        ModernAlbertConfig(**{**config.to_dict(), "mol_groups": [], "intermediate_size": 576})
    )
    plain.save_pretrained(tmp_path / "plain")
    script = load_script("pretrain")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"Sentence number {n} of some."}) + "\n" for n in range(60)))
    arguments = ["--tokenizer", str(folder), "--train_data", str(texts), "--max_length", "32", "--max_steps", "1"]
    arguments += ["--per_device_train_batch_size", "4", "--use_cpu", "true", "--report_to", "none"]
    overrides = ["--config_overrides", json.dumps({"mol_groups": [1], "num_experts": 3})]
    start = ["--model_name_or_path", str(tmp_path / "plain")]
    results = script.main([*start, *arguments, *overrides, "--output_dir", str(tmp_path / "run")])
    assert ModernAlbertForMaskedLM.from_pretrained(tmp_path / "run").config.mol_groups == [1]
    assert results["parameters"] > plain.num_parameters()
