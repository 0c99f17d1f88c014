"""The Trainer of pretraining, and its script."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from helpers import ROWS, SPANS, TEXTS, VOCAB, lay_out, load_script, make_batch, make_text
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import TrainingArguments, pipeline

import modernalbert
from modernalbert.tokenization import load_tokenizer, train_tokenizer
from modernalbert.training.distillation import Distiller
from modernalbert.training.packing import PackedCollator, TokenMasker
from modernalbert.training.pretraining import PretrainingTrainer
from modernalbert.training.trainer import routing_statistics


pytestmark = pytest.mark.usefixtures("fresh_cache")


@pytest.fixture
def tokenizer():
    """A new one for each test, since calls leave traces in it."""
    return train_tokenizer(TEXTS, vocab_size=VOCAB)


def make_trainer(model, tokenizer, folder, rows=None, probability=0.3, arguments=None, teacher=None, **settings):
    defaults = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "disable_tqdm": True}
    defaults |= {"remove_unused_columns": False, "save_strategy": "no", "max_steps": 1, "weight_decay": 0.0}
    args = arguments if isinstance(arguments, TrainingArguments) else TrainingArguments(**defaults | (arguments or {}))
    trainer = PretrainingTrainer(
        model=model,
        args=args,
        data_collator=PackedCollator(tokenizer),
        train_dataset=Dataset.from_list(lay_out(ROWS if rows is None else rows)),
        masker=TokenMasker(tokenizer, probability),
        distiller=teacher and Distiller(teacher, model),
        **settings,
    )
    return trainer


def learning_rates(trainer, steps):
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=trainer.args.learning_rate)
    scheduler = trainer.create_scheduler(steps)
    rates = []
    for _ in range(steps + 1):
        rates.append(scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(("decay", "decay_steps"), [(0.25, 10), (12, 12), (1, 1), (0.0, 0)])
def test_the_learning_rate_warms_up_stays_and_falls_as_one_minus_the_root(
    tokenizer, make_student, tmp_path, decay, decay_steps
):
    arguments = {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 5, "learning_rate": 0.2}
    trainer = make_trainer(make_student(), tokenizer, tmp_path, arguments=arguments, decay_steps=decay)

    def rate(step):
        if step < 5:
            return 0.2 * step / 5
        if step <= 40 - decay_steps and step < 40:
            return 0.2
        return 0.2 * (1 - math.sqrt((step - (40 - decay_steps)) / decay_steps)) if decay_steps else 0.0

    assert learning_rates(trainer, 40) == pytest.approx([rate(step) for step in range(41)], abs=1e-9)


def test_other_schedules_are_left_alone(tokenizer, make_student, tmp_path):
    arguments = {"lr_scheduler_type": "linear", "warmup_steps": 0, "learning_rate": 0.2}
    trainer = make_trainer(make_student(), tokenizer, tmp_path, arguments=arguments, decay_steps=5)
    rates = learning_rates(trainer, 10)
    assert (
        rates == pytest.approx([0.2 * (1 - step / 10) for step in range(11)]) and not trainer.args.lr_scheduler_kwargs
    )


def test_given_settings_of_the_schedule_win(tokenizer, make_student, tmp_path):
    arguments = {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"decay_type": "linear"}}
    arguments |= {"learning_rate": 0.2}
    trainer = make_trainer(make_student(), tokenizer, tmp_path, arguments=arguments, decay_steps=4)
    assert learning_rates(trainer, 8)[4:] == pytest.approx([0.2, 0.15, 0.1, 0.05, 0.0])


def test_trainers_with_the_same_arguments_have_schedules_of_their_own(tokenizer, make_student, tmp_path):
    first = make_trainer(
        make_student(), tokenizer, tmp_path, arguments={"lr_scheduler_type": "warmup_stable_decay"}, decay_steps=0.5
    )
    learning_rates(first, 10)
    second = make_trainer(make_student(), tokenizer, tmp_path, arguments=first.args, decay_steps=0.5)
    rates = learning_rates(second, 20)
    assert rates[10] == rates[0] > rates[11]


@pytest.mark.parametrize("top_k", [1, 2])
def test_routing_statistics_are_those_of_tokens_one_by_one(top_k):
    """Two groups of three executed layers, five experts, three rows of which two are padded, one on the left."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 1, 1]])
    logits = 2 * torch.randn(6, *mask.shape, 5, generator=torch.Generator().manual_seed(0))
    config = SimpleNamespace(router_type="top_k", mol_groups=[0, 1], num_experts_per_tok=top_k)
    load, entropy = routing_statistics(tuple(logits), config, mask)
    for group in range(2):
        chosen, entropies = [0] * 5, []
        for layer in range(3 * group, 3 * group + 3):
            for row in range(3):
                for position in range(4):
                    if mask[row, position]:
                        values = [math.exp(value) for value in logits[layer, row, position].tolist()]
                        shares = [value / sum(values) for value in values]
                        entropies.append(-sum(p * math.log(p) for p in shares) / math.log(5))
                        for expert in sorted(range(5), key=lambda e, p=shares: -p[e])[:top_k]:
                            chosen[expert] += 1
        assert load[group].tolist() == pytest.approx([count / sum(chosen) for count in chosen])
        assert entropy[group].item() == pytest.approx(sum(entropies) / len(entropies), abs=1e-5)


def test_even_routing_has_an_entropy_of_one():
    config = SimpleNamespace(router_type="top_k", mol_groups=[0], num_experts_per_tok=2)
    _, entropy = routing_statistics((torch.zeros(1, 3, 4),), config, torch.ones(1, 3))
    assert entropy.tolist() == pytest.approx([1.0])


UNEVEN = [[make_text(4 + 3 * (n % 5), n), make_text(3 + n % 7, 100 + n)] for n in range(24)]


@pytest.mark.parametrize("distilled", [True, False])
def test_a_run_logs_every_term_of_its_loss(tokenizer, make_student, make_teacher, tmp_path, distilled):
    student = make_student(router_aux_loss_coef=0.1, mol_groups=[0, 1], mol_intermediate_size=40)
    arguments = {"max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 3, "learning_rate": 1e-3}
    arguments |= {"gradient_accumulation_steps": 2}
    weights = {"mlm_weight": 0.7, "kl_weight": 2.0, "hidden_weight": 0.5}
    teacher = make_teacher() if distilled else None
    trainer = make_trainer(student, tokenizer, tmp_path, UNEVEN, arguments=arguments, teacher=teacher, **weights)
    trainer.train()

    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [2, 4]
    assert logs[-1]["tokens"] == sum(len(text) for row in UNEVEN for text in row)  # 4 steps of 6 rows are all
    for entry in logs:
        expected = 0.7 * entry["mlm_loss"] + 0.1 * entry["aux_loss"]
        if distilled:
            expected += 2 * entry["kl_loss"] + 0.5 * entry["hidden_loss"]
        assert entry["loss"] == pytest.approx(expected, abs=1e-4) and entry["mlm_loss"] > 1
        assert ("kl_loss" in entry) == ("hidden_loss" in entry) == distilled
        assert entry["aux_loss"] >= 1 and entry["tokens_per_second"] > 0 and entry["mfu"] > 0
        for group in range(2):
            assert 0 <= entry[f"router_entropy/group_{group}"] <= 1
            loads = [entry[f"expert_load/group_{group}/expert_{expert}"] for expert in range(4)]
            assert min(loads) >= 0 and sum(loads) == pytest.approx(1, abs=1e-5)


def test_a_modernbert_is_trained_in_the_same_way(tokenizer, make_teacher, tmp_path):
    """The loss of a step is that of its texts apart."""
    model = make_teacher(sparse_prediction=True)
    arguments = {"per_device_train_batch_size": 3, "logging_steps": 1, "learning_rate": 0.0}
    trainer = make_trainer(model, tokenizer, tmp_path, arguments=arguments)
    seen = []
    compute_loss = trainer.compute_loss
    trainer.compute_loss = lambda model, inputs, *rest, **named: (
        seen.append(inputs) or compute_loss(model, inputs, *rest, **named)
    )
    trainer.train()
    (batch,), total = seen, 0.0
    model.eval().sparse_prediction = False
    starts = [(row, position) for row, position in (batch["position_ids"] == 0).nonzero().tolist()]
    for row, start in starts:
        row_positions = batch["position_ids"][row, start:].tolist()
        end = start + next((n for n in range(1, len(row_positions)) if row_positions[n] == 0), len(row_positions))
        end = min(end, int(batch["attention_mask"][row].sum()))
        with torch.no_grad():
            logits = model(batch["input_ids"][row : row + 1, start:end]).logits[0]
        labels = batch["labels"][row, start:end]
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100).item()
    assert len(starts) == len(SPANS)
    expected = total / (batch["labels"] != -100).sum().item()
    assert trainer.state.log_history[0]["mlm_loss"] == pytest.approx(expected, abs=1e-4)


def test_a_modernalbert_is_a_teacher_as_well(tokenizer, make_student, tmp_path):
    """It refuses inputs that it does not know, so that it sees what the student sees and nothing else."""
    arguments = {"max_steps": 1, "logging_steps": 1}
    trainer = make_trainer(
        make_student(), tokenizer, tmp_path, UNEVEN[:8], arguments=arguments, teacher=make_student()
    )
    trainer.train()
    assert any("hidden_loss" in entry for entry in trainer.state.log_history)


@pytest.mark.parametrize("distilled", [True, False])
def test_micro_batches_give_the_weights_of_one_large_batch(tokenizer, make_student, make_teacher, tmp_path, distilled):
    """Rows of a batch have 7 to 25 tokens, so that micro-batches are padded to different lengths."""
    weights = []
    for size in (8, 4, 2):
        model = make_student(router_aux_loss_coef=0.0)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        arguments = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "optim": "sgd"}
        arguments |= {"learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
        teacher = make_teacher() if distilled else None
        trainer = make_trainer(model, tokenizer, tmp_path, UNEVEN[:8], arguments=arguments, teacher=teacher)
        trainer.train()
        assert not torch.equal(model.head.dense.weight, before["head.dense.weight"])
        weights.append(model.state_dict())
    for other in weights[1:]:
        for name, value in weights[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("distilled", [True, False])
def test_a_step_without_a_masked_token_leaves_the_weights_finite(
    tokenizer, make_student, make_teacher, tmp_path, distilled
):
    """The last row of a thousand texts may be that short."""
    model = make_student()
    arguments = {"per_device_train_batch_size": 1, "logging_steps": 1, "logging_nan_inf_filter": False}
    teacher = make_teacher() if distilled else None
    trainer = make_trainer(
        model, tokenizer, tmp_path, [[make_text(4, 0)]], probability=1e-9, arguments=arguments, teacher=teacher
    )
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"])
    assert all(value.isfinite().all() for value in model.state_dict().values())


def test_routing_is_reported_under_the_group_that_routed(tokenizer, make_student, tmp_path):
    """MoL groups are executed by their number, in whichever order the configuration names them."""
    model = make_student(mol_groups=[1, 0], mol_intermediate_size=40)
    trainer = make_trainer(model, tokenizer, tmp_path)
    batch = make_batch(tokenizer)
    with torch.no_grad():
        model.model.layers[0].mlp.router.weight.zero_()  # even probabilities
        outputs = model.model(
            batch["input_ids"], batch["attention_mask"], batch["position_ids"], output_router_logits=True
        )
    trainer.record_routing(outputs.router_logits, batch["attention_mask"])
    means = {name: (total / weight).item() for name, (total, weight) in trainer.means.items()}
    assert means["router_entropy/group_0"] == pytest.approx(1, abs=1e-5)
    assert means["router_entropy/group_1"] < 0.999


@pytest.mark.parametrize(
    ("overrides", "routed"),
    [
        ({"ffn_modulation": "moa", "router_type": "soft"}, True),
        ({"router_type": "sequence"}, True),
        ({"router_type": "top_p"}, True),
        ({"ffn_modulation": "depth_lora"}, False),
        ({"ffn_modulation": "none"}, False),
    ],
    ids=str,
)
def test_alternatives_to_the_mixture_train(tokenizer, make_student, tmp_path, overrides, routed):
    trainer = make_trainer(make_student(**overrides), tokenizer, tmp_path, arguments={"logging_steps": 1})
    trainer.train()
    logs = trainer.state.log_history[0]
    assert math.isfinite(logs["loss"])
    loads = [value for name, value in logs.items() if name.startswith("expert_load/")]
    assert bool(loads) == routed
    if routed:
        assert sum(loads) == pytest.approx(len(trainer.model.config.mol_groups), rel=1e-5)


def test_the_script_trains_and_writes_a_model(pretrained):
    folder, _, results = pretrained
    assert results["eval_loss"] < results["eval_loss_start"]
    assert json.loads((folder / "model" / "results.json").read_text()) == results
    model = modernalbert.ModernAlbertForMaskedLM.from_pretrained(folder / "model")
    assert not model.config.sparse_prediction and model.num_parameters() == results["parameters"]
    assert {"modeling_modernalbert.py", "tokenizer.json"} <= {path.name for path in (folder / "model").iterdir()}


def test_a_finished_run_is_found_by_its_command_alone(pretrained):
    folder, arguments, results = pretrained
    before = {path: path.stat().st_mtime_ns for path in (folder / "model").rglob("*")}
    pretrain = load_script("pretrain")
    assert pretrain.main([*arguments, "--logging_steps", "7"]) == results
    with pytest.raises(ValueError, match="holds a finished run with other settings .data_seed: None before, 7 now"):
        pretrain.main([*arguments, "--data_seed", "7"])
    assert {path: path.stat().st_mtime_ns for path in (folder / "model").rglob("*")} == before


def test_what_is_saved_agrees_with_itself(pretrained):
    folder = pretrained[0] / "model"
    model = modernalbert.ModernAlbertForMaskedLM.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 1024
    fill = pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")
    assert fill(tokenizer.mask_token + " many words" * 1000, tokenizer_kwargs={"truncation": True})
    (checkpoint,) = folder.glob("checkpoint-*")
    assert not json.loads((checkpoint / "config.json").read_text())["sparse_prediction"]
    assert "Training report of model" in (folder / "training_report.html").read_text()


def test_masks_are_new_at_every_step_and_the_same_in_every_run(tokenizer, make_student, tmp_path):
    """The one row there is, seen three times."""
    runs = []
    for _ in range(2):
        arguments = {"max_steps": 3, "per_device_train_batch_size": 1}
        trainer = make_trainer(make_student(), tokenizer, tmp_path, [[make_text(40, 0)]], arguments=arguments)
        seen, compute_loss = [], trainer.compute_loss
        trainer.compute_loss = lambda model, inputs, *rest, run=compute_loss, seen=seen, **named: (
            seen.append(tuple(inputs["labels"][0].tolist())) or run(model, inputs, *rest, **named)
        )
        trainer.train()
        runs.append(seen)
    assert runs[0] == runs[1] and len(set(runs[0])) == 3


def test_the_masked_lm_loss_is_logged_without_the_balancing_loss(tokenizer, make_student, tmp_path):
    logs = []
    for coefficient in (0.0, 10.0):
        model = make_student(router_aux_loss_coef=coefficient)
        trainer = make_trainer(model, tokenizer, tmp_path, arguments={"logging_steps": 1})
        trainer.train()
        logs.append(trainer.state.log_history[0])
    assert logs[0]["mlm_loss"] == pytest.approx(logs[1]["mlm_loss"], abs=1e-4) == logs[0]["loss"]
    assert logs[1]["loss"] == pytest.approx(logs[1]["mlm_loss"] + 10 * logs[1]["aux_loss"], abs=1e-3)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--remove_unused_columns", "true"], "`remove_unused_columns` cannot be True here: rows are packed"),
        (["--config_overrides", "{"], "`config_overrides` is no JSON"),
        (["--config_overrides", '{"hidden_size": 6000000000000}'], "does not fit in .* of memory"),
        (["--streaming", "--max_steps", "-1"], "a stream has no length: give `max_steps`"),
        (["--metric_for_best_model", "f1"], "there is no `metric_for_best_model` 'f1'; give one of loss"),
        (["--metric_for_best_model", "loss", "--greater_is_better", "True"], "`greater_is_better` .True. is wrong"),
        (["--save_strategy", "best", "--metric_for_best_model", "loss"], "`save_strategy best` needs evaluations"),
        (["--label_names", "x"], "`label_names` cannot be ..x.. here"),
        (["--config_overrides", '{"hiden_size": 64}'], "`hiden_size`; did you mean `hidden_size`"),
        (["--max_length", "2"], "`max_length` .2. must be at least 3"),
        (["--max_eval_samples", "0"], "`max_eval_samples` .0. must be at least 1"),
        (["--hidden_loss", "l1"], "`hidden_loss` must be 'cosine' or 'mse', got 'l1'"),
        (["--max_length", "2048"], r"`max_length` \(2048\) exceeds .* \(1024\)"),
        (["--preset", "huge"], "there is no preset 'huge'"),
        (["--config_name", "some/model"], "exactly one of `preset`, `config_name` and `model_name_or_path`"),
    ],
)
def test_pretraining_refuses(pretrained, tmp_path, extra, message):
    with pytest.raises(ValueError, match=message):
        load_script("pretrain").main([*pretrained[1], "--output_dir", str(tmp_path), *extra])


def test_validation_text_that_is_trained_on_is_named(pretrained, tmp_path, caplog):
    with pytest.raises(ValueError, match="no `metric_for_best_model` 'x'"):
        load_script("pretrain").main([*pretrained[1], "--output_dir", str(tmp_path), "--metric_for_best_model", "x"])
    assert "texts.jsonl: in training and validation; losses on it say little" in caplog.text


def test_fields_of_a_trained_model_can_be_overridden(pretrained, tokenizer):
    pretrain = load_script("pretrain")
    start = {"tokenizer": "", "train_data": ["x"], "model_name_or_path": str(pretrained[0] / "model")}
    overrides = json.dumps({"router_aux_loss_coef": 0.5})
    model = pretrain.build_model(pretrain.PretrainingArguments(**start, config_overrides=overrides), tokenizer)
    assert model.config.router_aux_loss_coef == 0.5
    with pytest.raises(StrictDataclassClassValidationError, match="`router_jitter_noise`"):
        overrides = json.dumps({"router_jitter_noise": -1})
        pretrain.build_model(pretrain.PretrainingArguments(**start, config_overrides=overrides), tokenizer)
