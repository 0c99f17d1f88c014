"""One checkpoint at several depths: at load, in a call, in every head and in the tools around it; training for it."""

import json
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from helpers import ROWS, TEXTS, VOCAB, lay_out, load_script, make_batch
from transformers import AutoModel, AutoTokenizer, TrainingArguments

import modernalbert
from modernalbert import ModernAlbertConfig, ModernAlbertForMaskedLM, ModernAlbertModel
from modernalbert.tokenization import padded_vocab_size, save_tokenizer, train_tokenizer
from modernalbert.training.distillation import Distiller
from modernalbert.training.packing import PackedCollator, TokenMasker
from modernalbert.training.pretraining import PretrainingTrainer
from modernalbert.training.trainer import depth_loss, draw_depth


IDS = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
SLIDING = ["full_attention", "sliding_attention"]
HEADS = [name for name in modernalbert.__all__ if "For" in name]


@pytest.fixture(scope="module")
def folder(make_model, tmp_path_factory):
    """8 layers of 2 groups, full and sliding in turn, with experts in both groups."""
    path = tmp_path_factory.mktemp("depth")
    fields = {"num_hidden_layers": 8, "layer_types": SLIDING * 4, "mol_groups": [0, 1], "router_jitter_noise": 0.0}
    make_model(ModernAlbertForMaskedLM, **fields).save_pretrained(path)
    return path


def naive(model, ids, runs):
    """The encoder, layer by layer: each group `runs` times, its types repeated."""
    config = model.config
    layers = []
    for group in range(config.num_hidden_groups):
        types = config.layer_types[group * config.layers_per_group : (group + 1) * config.layers_per_group]
        layers += [(group, run, types[run % len(types)]) for run in range(runs)]
    fields = {**config.to_dict(), "num_hidden_layers": len(layers), "layer_types": [layer[-1] for layer in layers]}
    other = ModernAlbertModel(ModernAlbertConfig(**fields)).eval()
    other.load_state_dict(model.state_dict())
    return other(ids).last_hidden_state


@pytest.mark.parametrize("layers", [2, 4, 6, 12])
def test_a_depth_at_load_is_the_depth_of_a_call(folder, layers):
    model = AutoModel.from_pretrained(folder).eval()
    loaded = AutoModel.from_pretrained(folder, num_hidden_layers=layers).eval()
    assert loaded.config.num_hidden_layers == len(loaded.config.layer_types) == layers
    flags = {"output_hidden_states": True, "output_router_logits": True}
    with torch.no_grad():
        called, expected = model(IDS, num_hidden_layers=layers, **flags), loaded(IDS, **flags)
        assert len(called.hidden_states) == layers + 1 and len(called.router_logits) == layers
        for name in ("last_hidden_state", "hidden_states", "router_logits", "aux_loss"):
            torch.testing.assert_close(called[name], expected[name], rtol=0, atol=0)
        torch.testing.assert_close(called.last_hidden_state, naive(model, IDS, layers // 2), rtol=0, atol=0)
        assert (model(IDS).last_hidden_state - called.last_hidden_state).abs().max() > 1e-3
    assert loaded.config.estimate_flops(9) < model.config.estimate_flops(9) or layers > 8
    assert model.config.num_hidden_layers == 8  # a call changes nothing


def test_a_loaded_depth_is_saved(folder, tmp_path):
    loaded = AutoModel.from_pretrained(folder, num_hidden_layers=2)
    loaded.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert again.config.layer_types == ["full_attention"] * 2
    assert again.config.rope_parameters.keys() == {"full_attention"}
    torch.testing.assert_close(again.eval()(IDS).last_hidden_state, loaded.eval()(IDS).last_hidden_state)


@pytest.mark.parametrize("head", HEADS)
def test_every_head_takes_a_depth(folder, head):
    model_class = getattr(modernalbert, head)
    torch.manual_seed(0)
    model = model_class.from_pretrained(folder).eval()
    loaded = model_class.from_pretrained(folder, num_hidden_layers=4).eval()
    loaded.load_state_dict(model.state_dict())
    ids = IDS[None] if "MultipleChoice" in head else IDS
    with torch.no_grad():
        torch.testing.assert_close(model(ids, num_hidden_layers=4)[0], loaded(ids)[0], rtol=0, atol=0)


def test_gradients_at_a_depth(folder):
    model, loaded = (ModernAlbertForMaskedLM.from_pretrained(folder).train() for _ in range(2))
    loaded.config = loaded.model.config = loaded.config.at_depth(4)
    model(IDS, labels=IDS, num_hidden_layers=4).loss.backward()
    loaded(IDS, labels=IDS).loss.backward()
    expected = {name: parameter.grad for name, parameter in loaded.named_parameters()}
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters()}, expected)


def test_threads_run_at_depths_of_their_own(folder):
    model = AutoModel.from_pretrained(folder).eval()
    depths = [2, 4, 8, 12]
    with torch.no_grad():
        expected = {layers: model(IDS, num_hidden_layers=layers).last_hidden_state for layers in depths}
    wrong = []

    def serve(layers):
        with torch.no_grad():
            for _ in range(20):
                if not torch.equal(model(IDS, num_hidden_layers=layers).last_hidden_state, expected[layers]):
                    wrong.append(layers)

    threads = [threading.Thread(target=serve, args=(layers,)) for layers in depths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("layers", [0, -2, 3, 2.0, True])
def test_a_depth_that_the_groups_do_not_divide_is_refused(folder, layers):
    model = AutoModel.from_pretrained(folder)
    with pytest.raises(ValueError, match="must be a multiple of the 2 groups .*: 2, 4"):
        model(IDS, num_hidden_layers=layers)
    with pytest.raises(Exception, match="must be a multiple of the 2 groups|num_hidden_layers"):
        AutoModel.from_pretrained(folder, num_hidden_layers=layers)


def test_what_belongs_to_a_depth_is_refused_at_others(make_model, tmp_path):
    lora = make_model(ModernAlbertModel, ffn_modulation="depth_lora", num_hidden_layers=4)
    with pytest.raises(ValueError, match="every run of a group has a LoRA of its own"):
        lora(IDS, num_hidden_layers=2)
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="every run of a group has a LoRA of its own"):
        AutoModel.from_pretrained(tmp_path / "lora", num_hidden_layers=2)
    layers = make_model(ModernAlbertModel, ffn_modulation="per_depth", num_hidden_layers=4)
    with pytest.raises(ValueError, match="every run of a group has a feed-forward layer of its own"):
        layers(IDS, num_hidden_layers=6)
    router = make_model(ModernAlbertModel, router_type="depth", num_hidden_layers=4)
    with torch.no_grad():
        assert router.eval()(IDS, num_hidden_layers=2).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match=r"must be at most 4: the router has a bias"):
        router(IDS, num_hidden_layers=6)
    router.save_pretrained(tmp_path / "router")
    with pytest.raises(ValueError, match="cannot be changed at load: the router has a bias for each of 2 runs"):
        AutoModel.from_pretrained(tmp_path / "router", num_hidden_layers=2)


def test_a_depth_that_was_not_trained_is_warned_of_once(folder, caplog):
    from transformers.utils import logging

    logging.warning_once.cache_clear()
    library = logging.get_logger("modernalbert")
    library.propagate = True
    logging.enable_propagation()
    try:
        model = AutoModel.from_pretrained(folder)
        assert "trained to run" not in caplog.text
        for _ in range(3):
            model(IDS, num_hidden_layers=4)
    finally:
        logging.disable_propagation()
    assert caplog.text.count("The model was trained to run 8 layers, and runs 4") == 1


# ---- Tools


def test_merged_experts_run_at_a_depth(folder):
    model = AutoModel.from_pretrained(folder, num_hidden_layers=4).eval().merge_experts("cat")
    whole = AutoModel.from_pretrained(folder).eval().merge_experts("cat")
    with torch.no_grad():
        found, expected = model(IDS).last_hidden_state, whole(IDS, num_hidden_layers=4).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_compiled_at_several_depths(folder):
    model = AutoModel.from_pretrained(folder).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for layers in (2, 8, 4):
            torch.testing.assert_close(
                compiled(IDS, num_hidden_layers=layers).last_hidden_state,
                model(IDS, num_hidden_layers=layers).last_hidden_state,
            )


def test_an_embedder_and_a_graph_at_a_depth(make_model, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    tokenizer = train_tokenizer(["A list is sorted in place."] * 3, vocab_size=300)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "cls", "sep")}
    fields = {"num_hidden_layers": 4, "mol_groups": [], "vocab_size": padded_vocab_size(tokenizer), **ids}
    model = make_model(ModernAlbertModel, **fields).eval()
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tokenizer, tmp_path / "model")
    text = "A list is sorted."
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs, num_hidden_layers=2).last_hidden_state
    options = {"device": "cpu", "config_kwargs": {"num_hidden_layers": 2}}
    embedder = sentence_transformers.SentenceTransformer(str(tmp_path / "model"), **options)
    torch.testing.assert_close(embedder.encode(text, convert_to_tensor=True), expected[0].mean(dim=0))

    command = ["--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "onnx")]
    load_script("export_onnx").main([*command, "--num_hidden_layers", "2"])
    session = onnxruntime.InferenceSession(str(tmp_path / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(["last_hidden_state"], {name: inputs[name].numpy() for name in inputs})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


# ---- Training for smaller depths


def make_trainer(model, tokenizer, folder, arguments=None, **settings):
    defaults = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "disable_tqdm": True, "max_steps": 1}
    defaults |= {"remove_unused_columns": False, "save_strategy": "no", "weight_decay": 0.0, "logging_steps": 1}
    return PretrainingTrainer(
        model=model,
        args=TrainingArguments(**defaults | (arguments or {})),
        data_collator=PackedCollator(tokenizer),
        train_dataset=Dataset.from_list(lay_out(ROWS)),
        masker=TokenMasker(tokenizer, 0.3),
        **settings,
    )


@pytest.fixture
def prose_tokenizer():
    return train_tokenizer(TEXTS, vocab_size=VOCAB)


def test_the_drawn_depth_belongs_to_the_step(make_config):
    config = make_config(num_hidden_layers=8)
    drawn = [draw_depth(config, 0, step) for step in range(60)]
    assert set(drawn) == {2, 4, 6}
    assert drawn == [draw_depth(config, 0, step) for step in range(60)]
    assert drawn != [draw_depth(config, 1, step) for step in range(60)]


@pytest.mark.parametrize("teacher", [False, True])
def test_the_smaller_depth_learns_from_the_teacher_and_from_the_logits_of_the_full_one(
    make_student, make_teacher, prose_tokenizer, tmp_path, teacher
):
    """Value and gradient of the loss against two runs by hand; the full depth gets no gradient from the smaller one."""
    model = make_student(num_hidden_layers=4, router_aux_loss_coef=0.0)
    model.config.sparse_prediction = True
    distiller = Distiller(make_teacher(), model) if teacher else None
    weights = {"kl_weight": 2.0, "hidden_weight": 3.0}
    trainer = make_trainer(model, prose_tokenizer, tmp_path, elastic_depth=True, distiller=distiller, **weights)
    batch = make_batch(prose_tokenizer)
    trainer.tokens_in_batch = int(batch["attention_mask"].sum())
    items = (batch["labels"] != -100).sum()
    found = trainer.compute_loss(model.train(), batch, num_items_in_batch=items)

    flags = {"output_hidden_states": True}
    full, smaller = (
        model(**batch, **flags, num_hidden_layers=layers) for layers in (4, draw_depth(model.config, 42, 0))
    )
    expected = F.cross_entropy(full.logits, batch["labels"][batch["labels"] != -100])
    for a, b in zip(smaller.logits, full.logits.detach(), strict=True):
        p, q = b.softmax(0), a.softmax(0)
        expected = expected + (p * (p / q).log()).sum() / items
    if teacher:
        real = batch["attention_mask"].bool()
        theirs = distiller.ask(batch)
        for outputs, runs in ((full, 2), (smaller, 1)):
            p, q = theirs.logits.softmax(-1), outputs.logits.softmax(-1)
            expected = expected + 2 * (p * (p / q).log()).sum() / items
            for group, (_, layer) in enumerate(distiller.layer_map):
                a, b = outputs.hidden_states[(group + 1) * runs][real], theirs.hidden_states[layer][real]
                distance = 1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
                expected = expected + 3 * distance.mean() / len(distiller.layer_map)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    gradients = [torch.autograd.grad(loss, model.parameters(), retain_graph=True) for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_micro_batches_give_the_weights_of_one_large_batch(make_student, prose_tokenizer, tmp_path):
    states = []
    for size, steps in ((3, 1), (1, 3)):
        torch.manual_seed(0)
        model = make_student(num_hidden_layers=8, router_aux_loss_coef=0.0)
        arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "optim": "sgd"}
        trainer = make_trainer(model, prose_tokenizer, tmp_path / str(size), arguments, elastic_depth=True)
        trainer.train()
        assert trainer.state.log_history[0]["depth_loss"] > 0.1
        states.append(model.state_dict())
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


def test_training_brings_the_depths_together(make_student, prose_tokenizer, tmp_path):
    distances = []
    for elastic in (False, True):
        torch.manual_seed(0)
        model = make_student(num_hidden_layers=4)
        arguments = {"max_steps": 30, "learning_rate": 3e-3, "per_device_train_batch_size": 3}
        make_trainer(model, prose_tokenizer, tmp_path / str(elastic), arguments, elastic_depth=elastic).train()
        assert model.config.elastic_depth == elastic
        batch = make_batch(prose_tokenizer, probability=0.0)
        with torch.no_grad():
            states = [model.eval().model(**{k: batch[k] for k in ("input_ids", "attention_mask", "position_ids")},
                                         num_hidden_layers=layers).last_hidden_state for layers in (2, 4)]  # fmt: skip
        distances.append((1 - F.cosine_similarity(*states, dim=-1))[batch["attention_mask"].bool()].mean())
    assert distances[1] < 0.7 * distances[0]


def test_what_has_no_smaller_depth_is_refused(make_student, prose_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="each of the 2 groups runs once already"):
        make_trainer(make_student(num_hidden_layers=2), prose_tokenizer, tmp_path, elastic_depth=True)
    with pytest.raises(ValueError, match="has a LoRA of its own"):
        lora = make_student(num_hidden_layers=4, ffn_modulation="depth_lora")
        make_trainer(lora, prose_tokenizer, tmp_path, elastic_depth=True)


def test_the_script_trains_for_depths(pretrained, tmp_path):
    folder, arguments, _ = pretrained
    results = load_script("pretrain").main(
        [*arguments, "--elastic_depth", "true", "--logging_steps", "1", "--output_dir", str(tmp_path)]
    )
    assert results["depth_loss"] > 0
    assert ModernAlbertConfig.from_pretrained(tmp_path).elastic_depth


# ---- Fine-tuning for smaller depths


def outputs(generator_seed, shape):
    generator = torch.Generator().manual_seed(generator_seed)
    return SimpleNamespace(logits=torch.randn(shape, generator=generator, requires_grad=True))


@pytest.mark.parametrize("kind", ["classes", "tokens", "values", "answers"])
def test_the_term_of_each_head(kind):
    """Against sums over items by hand; only the smaller depth gets a gradient, and parts add up to the whole."""
    shape = {"classes": (4, 3), "tokens": (4, 5, 3), "values": (4, 1), "answers": (4, 5)}[kind]
    smaller, full = outputs(0, shape), outputs(1, shape)
    labels = {"classes": torch.tensor([0, 2, 1, 1]), "values": torch.rand(4), "answers": None}.get(kind)
    if kind == "tokens":
        labels = torch.tensor([[0, 1, -100, 2, -100]] * 3 + [[-100] * 5])
    if kind == "answers":
        smaller, full = (SimpleNamespace(start_logits=o.logits, end_logits=2 * o.logits) for o in (smaller, full))
    found = depth_loss(smaller, full, labels, None, kind == "values")
    pairs = [(getattr(smaller, name), getattr(full, name)) for name in vars(smaller)]
    sums, count = 0.0, 0
    for a, b in pairs:
        rows = zip(a.flatten(0, -2), b.flatten(0, -2), strict=True)
        kept = [True] * len(a) if kind != "tokens" else (labels != -100).flatten().tolist()
        for (x, y), keep in zip(rows, kept, strict=True):
            if keep:
                p, q = y.detach().softmax(0), x.softmax(0)
                sums = sums + ((x - y.detach()).square().mean() if kind == "values" else (p * (p / q).log()).sum())
                count += 1
    torch.testing.assert_close(found, sums / count)
    found.backward()
    whole = [name for name in vars(full)]
    assert all(getattr(full, name).grad is None for name in whole if getattr(full, name).is_leaf)

    if kind in ("classes", "tokens"):
        parts = [
            depth_loss(SimpleNamespace(logits=smaller.logits[s]), SimpleNamespace(logits=full.logits[s]), labels[s], count, False)
            for s in (slice(0, 1), slice(1, None))
        ]  # fmt: skip
        torch.testing.assert_close(sum(parts), found)


def test_answers_of_padded_rows_have_a_finite_term(folder):
    model = modernalbert.ModernAlbertForQuestionAnswering.from_pretrained(folder).train()
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    batch = {"input_ids": IDS * mask, "attention_mask": mask}
    term = depth_loss(model(**batch, num_hidden_layers=2), model(**batch), None, None, False)
    term.backward()
    assert term.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_a_task_is_trained_and_scored_at_depths(pretrained, tmp_path):
    rows = "".join(json.dumps({"text": text, "label": n % 2}) + "\n" for n, text in enumerate(TEXTS[:40]))
    (tmp_path / "train.jsonl").write_text(rows)
    (tmp_path / "rows.jsonl").write_text(rows.replace("Sentence", "Another"))
    script = load_script("run_glue")
    shared = ["--validation_files", str(tmp_path / "rows.jsonl"), "--use_cpu", "true", "--report_to", "none"]
    training = [
        "--train_files",
        str(tmp_path / "train.jsonl"),
        "--do_train",
        "--max_steps",
        "2",
        "--logging_steps",
        "1",
    ]
    start = ["--model_name_or_path", str(pretrained[0] / "model"), "--output_dir", str(tmp_path / "model")]
    script.main([*start, *training, *shared, "--elastic_depth", "true"])
    state = json.loads((tmp_path / "model" / "trainer_state.json").read_text())
    assert state["log_history"][0]["depth_loss"] > 0
    assert ModernAlbertConfig.from_pretrained(tmp_path / "model").elastic_depth
    scored = ["--model_name_or_path", str(tmp_path / "model"), "--output_dir", str(tmp_path / "small")]
    script.main([*scored, *shared, "--num_hidden_layers", "3"])
    found = [
        json.loads(line)["logits"] for line in (tmp_path / "small" / "predictions.jsonl").read_text().splitlines()
    ]
    model = modernalbert.ModernAlbertForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        expected = model(
            **tokenizer(TEXTS[0].replace("Sentence", "Another"), return_tensors="pt"), num_hidden_layers=3
        )
    torch.testing.assert_close(torch.tensor(found[0]), expected.logits[0], rtol=1e-4, atol=1e-4)

    with pytest.raises(ValueError, match="must be a multiple of the 3 groups"):
        script.main([*scored[:2], "--output_dir", str(tmp_path / "other"), *shared, "--num_hidden_layers", "4"])
    with pytest.raises(ValueError, match="`elastic_depth` is for training"):
        script.main([*scored[:2], "--output_dir", str(tmp_path / "other"), *shared, "--elastic_depth", "true"])


def test_training_the_full_depth_alone_takes_the_smaller_ones_away(make_student, prose_tokenizer, tmp_path):
    model = make_student(num_hidden_layers=4, elastic_depth=True)
    make_trainer(model, prose_tokenizer, tmp_path)
    assert not model.config.elastic_depth
