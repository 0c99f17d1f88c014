"""A text's states and gradients are the same however it is batched, under every way to run attention."""

import functools
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch.nn.attention.flex_attention import create_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations import flex_attention
from transformers.masking_utils import flash_attention_mask

from modernalbert import ModernAlbertForMaskedLM, packing_modernalbert
from modernalbert.packing_modernalbert import (
    FlashAttention,
    PerSequenceAttention,
    RepaddedAttention,
    VarlenAttention,
    choose_attention,
)


# transformers asks torch for what torch is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")

MIXED_LAYERS = ["full_attention", "sliding_attention"] * 2
MODELS = {
    "plain": {"num_hidden_groups": 4, "mol_groups": []},
    "recursive": {"mol_groups": []},
    "routed": {},
    "sliding": {"layer_types": MIXED_LAYERS, "local_attention": 4},
}
each_model = pytest.mark.parametrize("name", MODELS)


# ---- Ways to run attention. The kernels for accelerators are replaced by slow ones that take the same arguments.


def attend(query, key, value, allowed, scale):
    """Attention of `[..., queries, head_dim]`, 0 for a query that may see nothing."""
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~allowed, -torch.inf)
    scores = scores.masked_fill(~allowed.any(-1, keepdim=True), 0)
    return (scores.softmax(-1) * allowed) @ value


def band(length, before, after):
    distance = torch.arange(length) - torch.arange(length)[:, None]
    return (before < 0 or distance >= -before) & (after < 0 or distance <= after) & (distance == distance)


def naive_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    """torch's `varlen_attn`, `[tokens, heads, head_dim]` in and out."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert torch.equal(cu_seq_q, cu_seq_k) and cu_seq_q[-1] == len(query)
    assert max_q == max_k == cu_seq_q.diff().max()
    outputs = []
    for start, end in zip(cu_seq_q[:-1], cu_seq_q[1:], strict=True):
        states = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))
        outputs.append(attend(*states, band(end - start, *window_size), scale).transpose(0, 1))
    return torch.cat(outputs)


def naive_flash(module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window=None, **kwargs):
    """The library's FlashAttention interface: `[batch, heads, seq, head_dim]` in, `[batch, seq, heads, head_dim]` out."""
    assert not module.is_causal
    # The library turns its window, which counts the token itself, into FlashAttention's.
    window = (-1, -1) if sliding_window is None else (sliding_window - 1, sliding_window - 1)
    if kwargs.get("cu_seq_lens_q") is None:
        assert attention_mask is None or not attention_mask.any()  # who has padding and tokens gives lengths
        allowed = band(query.shape[2], *window)
        allowed = allowed if attention_mask is None else allowed & attention_mask[:, None, None]
        return attend(query, key, value, allowed, scaling).transpose(1, 2), None
    assert attention_mask is None
    states = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    lengths = (kwargs[name] for name in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"))
    return naive_varlen(*states, *lengths, scale=scaling, window_size=window)[None], None


def naive_flex(query, key, value, *, block_mask, scale, **kwargs):
    """torch's `flex_attention`, which on a CPU takes a minute to compile and has no backward pass."""
    (batch, _, length, _), mask_mod = query.shape, block_mask.mask_mod
    allowed = create_mask(mask_mod, batch, 1, length, length, device="cpu")
    return attend(query, key, value, allowed, scale)


AttentionInterface.register("naive_flash", naive_flash)
AttentionMaskInterface.register("naive_flash", flash_attention_mask)

BACKENDS = {
    "eager": "eager",
    "sdpa": "sdpa",
    "flex": "flex_attention",
    "flash": "naive_flash",
    "varlen": "sdpa",
    "traced_eager": "eager",
    "traced_sdpa": "sdpa",
    "rows_eager": "eager",
    "rows_sdpa": "sdpa",
}


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch, trace):
    """A way to run attention, ready to be used: the library's name for it, and whether padding is removed."""
    if request.param == "flex":
        monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", naive_flex)
    elif request.param == "varlen":
        monkeypatch.setattr(packing_modernalbert, "varlen_attn", naive_varlen)
        monkeypatch.setattr(packing_modernalbert, "PerSequenceAttention", VarlenAttention)
    elif request.param.startswith("traced"):
        trace()
    # The library compiles the making of flex_attention's masks, for seconds each.
    with torch.compiler.set_stance("force_eager"):
        yield BACKENDS[request.param], not request.param.startswith("rows")


@pytest.fixture
def make_backend_model(make_model, backend):
    def make(name, **overrides):
        implementation, unpad_inputs = backend
        model = make_model(**{**MODELS[name], "unpad_inputs": unpad_inputs, **overrides})
        # Past the library's check that an implementation with "flash" in its name is installed.
        model.config._attn_implementation = implementation
        return model

    return make


def additive(allowed):
    """A mask in the form that eager attention takes, of float64."""
    mask = torch.zeros(allowed.shape, dtype=torch.float64)
    return mask.masked_fill(~allowed, torch.finfo(torch.float64).min)


# ---- Ways to batch texts


class Batch(NamedTuple):
    """Inputs of a model, and where the tokens of each text lie in them: row and columns."""

    inputs: dict
    spans: list


def random_tokens(*shape, seed=0):
    return torch.randint(3, 100, shape, generator=torch.Generator().manual_seed(seed))


TEXTS = [random_tokens(length, seed=length) for length in (5, 9, 1, 6)]


def rows(placed, seq, **inputs):
    """Rows of texts, each text given with its row and columns; what is not a text is padding, of random tokens."""
    size = 1 + max(row for _, row, _ in placed)
    input_ids, mask = random_tokens(size, seq), torch.zeros(size, seq, dtype=torch.long)
    positions = torch.zeros(size, seq, dtype=torch.long)
    for text, row, columns in placed:
        input_ids[row, columns], mask[row, columns], positions[row, columns] = text, 1, torch.arange(len(text))
    batch = {"input_ids": input_ids, "attention_mask": mask}
    return batch, positions, [(row, columns) for _, row, columns in placed]


def span(start, length):
    return torch.arange(start, start + length)


def padded_right(**inputs):
    batch, _, spans = rows([(text, row, span(0, len(text))) for row, text in enumerate(TEXTS)], 11)
    return Batch({**batch, **inputs}, spans)


def padded_left(**inputs):
    batch, _, spans = rows([(text, row, span(11 - len(text), len(text))) for row, text in enumerate(TEXTS)], 11)
    return Batch({**batch, **inputs}, spans)


def without_margin():
    """The longest text has no padding, as tokenizers pad."""
    batch, _, spans = rows([(text, row, span(0, len(text))) for row, text in enumerate(TEXTS)], 9)
    return Batch(batch, spans)


def with_given_positions(make, shape):
    batch = make()
    positions = (batch.inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    if shape == "ones at padding":  # transformers' generation writes 1 there
        positions = positions.masked_fill(batch.inputs["attention_mask"] == 0, 1)
    elif shape == "one row":
        positions = torch.arange(positions.shape[1])[None]
    return Batch({**batch.inputs, "position_ids": positions}, batch.spans)


def beside_a_longer_mate():
    mate = random_tokens(20, seed=20)
    texts = [mate, *TEXTS]
    batch, _, spans = rows([(text, row, span(0, len(text))) for row, text in enumerate(texts)], 20)
    return Batch(batch, spans[1:])


def with_mask_of(dtype):
    batch = padded_right()
    return Batch({**batch.inputs, "attention_mask": batch.inputs["attention_mask"].to(dtype)}, batch.spans)


def with_holes():
    """Removed tokens close up, also where they stand between those that stay."""
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randperm(14, generator=generator)[: len(text)].sort().values for text in TEXTS]
    batch, _, spans = rows([(text, row, columns[row]) for row, text in enumerate(TEXTS)], 14)
    return Batch(batch, spans)


def one_packed_row():
    start, placed = 0, []
    for text in TEXTS:
        placed.append((text, 0, span(start, len(text))))
        start += len(text)
    return rows(placed, start)


def packed_by_positions():
    batch, positions, spans = one_packed_row()
    return Batch({"input_ids": batch["input_ids"], "position_ids": positions}, spans)


def packed_by_lengths(with_positions):
    batch, positions, spans = one_packed_row()
    lengths = torch.tensor([0, *(len(text) for text in TEXTS)])
    ends = {name: lengths.cumsum(0).to(torch.int32) for name in ("cu_seq_lens_q", "cu_seq_lens_k")}
    longest = {name: int(lengths.max()) for name in ("max_length_q", "max_length_k")}
    inputs = {"input_ids": batch["input_ids"], **ends, **longest}
    return Batch({**inputs, "position_ids": positions} if with_positions else inputs, spans)


def packed_in_rows(row_of_text):
    """Two texts in a row, with padding before, between and after them."""
    placed, ends = [], {}
    for text, row in zip(TEXTS, row_of_text, strict=True):
        start = ends.get(row, 0) + 2
        placed.append((text, row, span(start, len(text))))
        ends[row] = start + len(text)
    batch, positions, spans = rows(placed, 21)
    return Batch({**batch, "position_ids": positions}, spans)


def packed_in_rows_by_lengths():
    """Lengths run through all rows, over real tokens."""
    inputs, spans = packed_in_rows((0, 0, 1, 1))
    ends = packed_by_lengths(with_positions=False).inputs
    return Batch({**ends, **{name: inputs[name] for name in ("input_ids", "attention_mask")}}, spans)


BATCHES = {
    "right": padded_right,
    "left": padded_left,
    "no_margin": without_margin,
    "right_with_positions": functools.partial(with_given_positions, padded_right, "zeros at padding"),
    "right_with_one_row_of_positions": functools.partial(with_given_positions, padded_right, "one row"),
    "left_with_positions": functools.partial(with_given_positions, padded_left, "zeros at padding"),
    "left_with_ones_at_padding": functools.partial(with_given_positions, padded_left, "ones at padding"),
    "longer_mate": beside_a_longer_mate,
    "bool_mask": functools.partial(with_mask_of, torch.bool),
    "float_mask": functools.partial(with_mask_of, torch.float),
    "holes": with_holes,
    "holes_with_positions": functools.partial(with_given_positions, with_holes, "zeros at padding"),
    "packed_by_positions": packed_by_positions,
    "packed_by_lengths": functools.partial(packed_by_lengths, False),
    "packed_by_lengths_and_positions": functools.partial(packed_by_lengths, True),
    "packed_in_rows": functools.partial(packed_in_rows, (0, 1, 1, 0)),
    "packed_in_rows_by_lengths": packed_in_rows_by_lengths,
    # As many texts as rows, though no row has one text.
    "packed_beside_empty_rows": functools.partial(packed_in_rows, (0, 3, 3, 0)),
}


def values_and_gradients(model, states):
    """Values of the texts, and the gradients of a loss on all of them."""
    cotangents = [
        torch.randn(state.shape, generator=torch.Generator().manual_seed(len(state)), dtype=torch.float64).to(state)
        for state in states
    ]
    model.zero_grad()
    sum((state * cotangent).sum() for state, cotangent in zip(states, cotangents, strict=True)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {**{f"text {index}": state.detach() for index, state in enumerate(states)}, **gradients}


@pytest.fixture(scope="module")
def expected(make_model):
    """Values and gradients of every text alone, with attention spelt out."""

    @functools.cache
    def compute(name):
        model = make_model(dtype=torch.float64, attn_implementation="eager", **MODELS[name])
        return values_and_gradients(model, [model(text[None]).last_hidden_state[0] for text in TEXTS])

    return compute


@each_model
def test_texts_alone(make_backend_model, expected, name):
    model = make_backend_model(name, dtype=torch.float64)
    actual = values_and_gradients(model, [model(text[None]).last_hidden_state[0] for text in TEXTS])
    torch.testing.assert_close(actual, expected(name), rtol=1e-9, atol=1e-9)


# Forms differ in what packing makes of them, which two models see whole; the others prove that layers take it.
@pytest.mark.parametrize(
    ("name", "form"),
    [
        (name, form)
        for name in MODELS
        for form in (BATCHES if name in ("routed", "sliding") else ("right", "packed_in_rows"))
    ],
)
def test_batched_texts_equal_texts_alone(make_backend_model, expected, name, form):
    model = make_backend_model(name, dtype=torch.float64)
    batch = BATCHES[form]()
    output = model(**batch.inputs).last_hidden_state
    assert output.shape == (*batch.inputs["input_ids"].shape, 32)
    actual = values_and_gradients(model, [output[row, columns] for row, columns in batch.spans])
    torch.testing.assert_close(actual, expected(name), rtol=1e-9, atol=1e-9)
    if "attention_mask" in batch.inputs:
        assert output[batch.inputs["attention_mask"] == 0].count_nonzero() == 0


@pytest.mark.parametrize("form", ["right", "packed_in_rows"])
def test_float32_is_as_exact_as_it_can_be(make_backend_model, expected, form):
    model = make_backend_model("sliding")
    batch = BATCHES[form]()
    output = model(**batch.inputs).last_hidden_state
    actual = values_and_gradients(model, [output[row, columns] for row, columns in batch.spans])
    for key, tensor in expected("sliding").items():
        scale = tensor.abs().max().item()
        torch.testing.assert_close(actual[key].double(), tensor, rtol=0, atol=2e-5 * scale, msg=key)


@pytest.mark.parametrize("form", ["right", "left", "packed_in_rows"])
def test_everything_that_is_recorded_is_zero_at_padding(make_backend_model, form):
    model = make_backend_model("sliding")
    inputs = BATCHES[form]().inputs
    output = model(**inputs, output_hidden_states=True, output_router_logits=True)
    padding = inputs["attention_mask"] == 0
    for tensor in (output.last_hidden_state, *output.hidden_states, *output.router_logits):
        assert tensor[padding].count_nonzero() == 0
        assert tensor[~padding].count_nonzero() > 0


def over_rows(mask):
    """Attention with a given mask, in place of what the model chooses."""

    def attention(interface, module, query, key, value, **kwargs):
        return interface(module, *(states.transpose(1, 2) for states in (query, key, value)), mask, **kwargs)

    return attention


def test_positions_with_gaps_are_for_rope_only(make_model, make_backend_model):
    """The sliding window counts tokens, as FlashAttention does, and not the positions that a caller gives."""
    text, positions = random_tokens(8), torch.tensor([0, 1, 2, 7, 8, 9, 20, 21])
    reference = make_model(**MODELS["sliding"], dtype=torch.float64, attn_implementation="eager")
    near = (torch.arange(8)[:, None] - torch.arange(8)).abs() <= 2
    states = reference.embeddings(text[None], None)
    for index, layer_type in enumerate(MIXED_LAYERS):
        allowed = near if layer_type == "sliding_attention" else torch.ones_like(near)
        mask = additive(allowed)[None, None]
        embeddings = reference.rotary_emb(states, positions[None], layer_type)
        states = reference.layers[index // 2](
            states, position_embeddings=embeddings, attention=over_rows(mask), depth=index % 2, sequence_ids=None
        )
    states = reference.final_norm(states)[0]

    model = make_backend_model("sliding", dtype=torch.float64)
    alone = model(text[None], position_ids=positions[None]).last_hidden_state[0]
    torch.testing.assert_close(alone, states, rtol=1e-9, atol=1e-9)
    batch, _, [(row, columns), _] = rows([(text, 0, span(0, 8)), (TEXTS[0], 1, span(0, 5))], 8)
    given = torch.stack([positions, torch.arange(8)])
    padded = model(**batch, position_ids=given).last_hidden_state[row, columns]
    torch.testing.assert_close(padded, states, rtol=1e-9, atol=1e-9)


# ---- Padding only


@pytest.mark.parametrize("name", ["routed", "sliding"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("empty", ["a row", "the batch"])
def test_rows_without_any_token_stay_finite(make_backend_model, name, training, empty):
    model = make_backend_model(name).train(training)
    batch = padded_right().inputs
    batch["attention_mask"][slice(1, 2) if empty == "a row" else slice(None)] = 0
    output = model(**batch, output_hidden_states=True, output_router_logits=True)
    for tensor in (*output.hidden_states, *output.router_logits):
        assert tensor.isfinite().all()
    assert output.last_hidden_state[1].count_nonzero() == 0
    output.last_hidden_state.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.count_nonzero() > 0 for gradient in gradients) == (empty == "a row")


def test_loss_of_a_batch_without_any_token_is_finite(make_model):
    model = make_model(ModernAlbertForMaskedLM).train()
    batch = padded_right().inputs
    mask, labels = torch.zeros_like(batch["attention_mask"]), torch.full_like(batch["input_ids"], -100)
    loss = model(batch["input_ids"], mask, labels=labels).loss
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# ---- The sliding window


def dependence(model, inputs, row, columns):
    """Which tokens of the batch the output at each of `columns` depends on, bool `[columns, batch * seq]`."""
    inputs = dict(inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
    output = model(inputs_embeds=embeds, **inputs).last_hidden_state
    cotangent = torch.randn(32, generator=torch.Generator().manual_seed(0))
    gradients = [
        torch.autograd.grad((output[row, column] * cotangent).sum(), embeds, retain_graph=True)[0]
        for column in columns
    ]
    return torch.stack([gradient.abs().sum(-1).flatten() > 0 for gradient in gradients])


@pytest.mark.parametrize("local_attention", [2, 4, 14, 40])  # 14: the longest sequence is just beyond the window
@pytest.mark.parametrize("form", ["alone", "right", "left", "holes", "packed_by_positions", "packed_in_rows"])
def test_one_sliding_layer_sees_half_the_window_on_each_side(make_backend_model, form, local_attention):
    model = make_backend_model(
        "plain",
        num_hidden_layers=1,
        num_hidden_groups=1,
        layer_types=["sliding_attention"],
        local_attention=local_attention,
    )
    if form == "alone":
        batch = Batch({"input_ids": TEXTS[1][None]}, [None, (0, span(0, 9))])
    else:
        batch = BATCHES[form]()
    row, columns = batch.spans[1]  # nine tokens
    seq = batch.inputs["input_ids"].shape[1]
    seen = torch.zeros(9, batch.inputs["input_ids"].numel(), dtype=torch.bool)
    near = (torch.arange(9)[:, None] - torch.arange(9)).abs() <= local_attention // 2
    seen[:, row * seq + columns] = near
    assert torch.equal(dependence(model, batch.inputs, row, columns), seen)


@pytest.mark.parametrize(
    "cu_seq_lens",
    [[0, 9], [1, 9, 18], [0, 9, 17], [0, 12, 18], [0, 9, 7, 18]],
    ids=["too few", "late", "short", "over the end of a row", "falling"],
)
@pytest.mark.parametrize("unpad_inputs", [True, False])
def test_lengths_that_do_not_divide_the_rows_are_refused(make_model, cu_seq_lens, unpad_inputs):
    model = make_model(unpad_inputs=unpad_inputs)
    with pytest.raises(ValueError, match=r"`cu_seq_lens_q` must rise from 0 to the number of real tokens \(18\)"):
        model(random_tokens(2, 9), cu_seq_lens_q=torch.tensor(cu_seq_lens, dtype=torch.int32))


# ---- Dropout, masks of the caller's own, the choice of a way


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("form", ["right", "packed_in_rows"])
@pytest.mark.parametrize("dropped", ["weights", "output"])
def test_attention_dropout(make_model, implementation, form, dropped):
    overrides = {**MODELS["sliding"], "attn_implementation": implementation, "router_jitter_noise": 0.0}
    model = make_model(**overrides, attention_dropout=0.5).train()
    plain = make_model(**overrides)
    # One field is both: the other of them is taken out.
    if dropped == "output":
        model.config.attention_dropout = 0.0
    else:
        for layer in model.layers:
            layer.attn.out_drop.p = 0.0
    inputs = BATCHES[form]().inputs
    output, expected = model(**inputs).last_hidden_state, plain(**inputs).last_hidden_state
    output.sum().backward()
    assert output.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert (output - expected).abs().max() > 0.1
    torch.testing.assert_close(model.eval()(**inputs).last_hidden_state, expected, rtol=0, atol=0)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_mask_of_the_callers_own(make_model, implementation):
    """A causal mask, `[batch, 1, seq, seq]`, as the implementation takes it."""
    model = make_model(dtype=torch.float64, attn_implementation=implementation)
    input_ids = random_tokens(2, 7)
    allowed = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    mask = allowed if implementation == "sdpa" else additive(allowed)
    states = model(input_ids, mask).last_hidden_state
    for length in range(1, 7):
        prefix = model(input_ids[:, :length], mask[..., :length, :length]).last_hidden_state
        torch.testing.assert_close(prefix, states[:, :length], rtol=1e-9, atol=1e-9)
    assert (model(input_ids).last_hidden_state - states)[:, 0].abs().max() > 0.01


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_mask_of_the_callers_own_may_say_what_padding_says(make_model, implementation):
    model = make_model(dtype=torch.float64, attn_implementation=implementation)
    inputs = padded_right().inputs
    expected = model(**inputs).last_hidden_state
    real = inputs["attention_mask"].bool()
    allowed = real[:, None, None, :].expand(-1, 1, 11, -1)
    mask = allowed if implementation == "sdpa" else additive(allowed)
    actual = model(inputs["input_ids"], mask).last_hidden_state
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("implementation", "device", "dtype", "dropout", "kernel", "kind"),
    [
        ("sdpa", "cpu", torch.float32, 0.0, naive_varlen, PerSequenceAttention),
        ("sdpa", "cpu", torch.bfloat16, 0.0, naive_varlen, PerSequenceAttention),
        ("sdpa", "cuda", torch.bfloat16, 0.0, naive_varlen, VarlenAttention),
        ("sdpa", "cuda", torch.float16, 0.0, naive_varlen, VarlenAttention),
        ("sdpa", "cuda", torch.float32, 0.0, naive_varlen, RepaddedAttention),  # the kernel takes half precision only
        ("sdpa", "cuda", torch.bfloat16, 0.0, None, RepaddedAttention),
        ("sdpa", "cuda", torch.bfloat16, 0.1, naive_varlen, RepaddedAttention),  # the kernel has no dropout
        ("eager", "cpu", torch.float32, 0.0, naive_varlen, RepaddedAttention),
        ("eager", "cuda", torch.bfloat16, 0.0, naive_varlen, RepaddedAttention),
        ("flex_attention", "cuda", torch.bfloat16, 0.0, naive_varlen, RepaddedAttention),
        ("flash_attention_2", "cuda", torch.bfloat16, 0.0, naive_varlen, FlashAttention),
        ("kernels-community/vllm-flash-attn3", "cuda", torch.bfloat16, 0.0, naive_varlen, FlashAttention),
    ],
)
def test_choice_of_attention_over_unpadded_sequences(
    monkeypatch, implementation, device, dtype, dropout, kernel, kind
):
    monkeypatch.setattr(packing_modernalbert, "varlen_attn", kernel)
    monkeypatch.setattr(packing_modernalbert.RowAttention, "__init__", lambda *arguments: None)
    config = SimpleNamespace(_attn_implementation=implementation)
    states = SimpleNamespace(device=torch.device(device), dtype=dtype)
    assert type(choose_attention(config, None, states, None, dropout)) is kind


# ---- On an accelerator


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs CUDA: torch's varlen_attn, flex_attention, FlashAttention"
)
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention", "flash_attention_2"])
@pytest.mark.parametrize("form", ["right", "left", "packed_in_rows"])
def test_kernels_of_an_accelerator(make_model, implementation, form):
    if implementation == "flash_attention_2":
        pytest.importorskip("flash_attn", reason="needs flash-attn")
    # The router in float32, and little between its choices and those of float64: all experts are chosen.
    overrides = {**MODELS["sliding"], "num_experts_per_tok": 4}
    model = make_model(dtype=torch.bfloat16, attn_implementation=implementation, **overrides).cuda()
    batch = BATCHES[form]()
    output = model(**{name: tensor.cuda() for name, tensor in batch.inputs.items()}).last_hidden_state.cpu()
    reference = make_model(dtype=torch.bfloat16, attn_implementation="eager", **overrides).double()
    for text, (row, columns) in zip(TEXTS, batch.spans, strict=True):
        expected = reference(text[None]).last_hidden_state[0]
        torch.testing.assert_close(output[row, columns].double(), expected, rtol=0.05, atol=0.1)
