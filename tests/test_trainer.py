"""What every Trainer of the scripts does: numbers that are not finite, routing statistics, label smoothing, signals."""

import json
import math
import os
import signal
from collections import Counter

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from modernalbert import ModernAlbertForSequenceClassification
from modernalbert.training.callbacks import RoutingFrequencies
from modernalbert.training.trainer import NotFiniteError, TrainerMixin, train_to_the_end


class TaskTrainer(TrainerMixin, Trainer):
    pass


LENGTHS = (9, 3, 6, 2, 8, 4, 5, 7)


def collate(rows):
    """Rows padded to one length, with 0."""
    longest = max(len(row["input_ids"]) for row in rows)
    padded = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]
    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    batch = {"input_ids": padded, "attention_mask": mask, "labels": [row["label"] for row in rows]}
    return {name: torch.tensor(values) for name, values in batch.items()}


@pytest.fixture
def make_trainer(make_model, tmp_path):
    def make(model=None, **arguments):
        if model is None:
            model = make_model(ModernAlbertForSequenceClassification, num_labels=3, router_jitter_noise=0.0)
        generator = torch.Generator().manual_seed(0)
        rows = [
            {"input_ids": torch.randint(3, 100, (length,), generator=generator).tolist(), "label": index % 3}
            for index, length in enumerate(LENGTHS)
        ]
        defaults = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "disable_tqdm": True}
        defaults |= {"per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1, "save_strategy": "no"}
        defaults |= {"remove_unused_columns": False}
        args = TrainingArguments(**{**defaults, **arguments})
        rows = Dataset.from_list(rows)
        return TaskTrainer(model=model, args=args, data_collator=collate, train_dataset=rows, eval_dataset=rows)

    return make


def test_training_that_diverges_stops_and_keeps_the_last_good_checkpoint(make_trainer, tmp_path):
    arguments = {
        "max_steps": 9,
        "max_grad_norm": 0.0,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 1,
    }
    trainer = make_trainer(learning_rate=1e-4, lr_scheduler_type="constant", **arguments)

    class Explode(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 3:
                for group in trainer.optimizer.param_groups:
                    group["lr"] = 1e39

    trainer.add_callback(Explode())
    with pytest.raises(NotFiniteError, match="is not finite at step [45]: training has diverged"):
        train_to_the_end(trainer)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-3")
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_loss_that_is_not_finite_stops_training_before_the_step(make_trainer):
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.classifier.weight.fill_(math.inf)
    with pytest.raises(NotFiniteError, match="the loss is not finite at step 1"):
        trainer.train()


def test_outputs_that_are_not_finite_stop_an_evaluation(make_trainer):
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.classifier.bias[1] = math.nan
    for run in (
        trainer.evaluate,
        lambda: trainer.predict(trainer.eval_dataset.remove_columns("label").add_column("label", [0] * 8)),
    ):
        with pytest.raises(NotFiniteError, match="is not finite at step 0"):
            run()


def test_a_model_that_is_not_finite_is_not_written(make_trainer, tmp_path):
    trainer = make_trainer()
    with torch.no_grad():
        trainer.model.classifier.weight[0, 0] = math.nan
    with pytest.raises(NotFiniteError, match="the weight `classifier.weight` is not finite"):
        trainer.save_model(str(tmp_path / "model"))
    assert not (tmp_path / "model").exists()


def test_routing_statistics_are_means_over_real_tokens(make_trainer):
    """Batches of different lengths, padded; against the model run over each sequence alone."""
    trainer = make_trainer(learning_rate=1e-30, logging_steps=2)
    model = trainer.model
    config, counts, entropies, depths = model.config, Counter(), [], 0
    with torch.no_grad():
        for row in trainer.train_dataset:
            outputs = model(torch.tensor([row["input_ids"]]), output_router_logits=True)
            for logits in outputs.router_logits:
                probabilities = logits[0].softmax(-1)
                counts.update(probabilities.topk(config.num_experts_per_tok).indices.flatten().tolist())
                entropies += (-(probabilities * probabilities.log()).sum(-1) / math.log(config.num_experts)).tolist()
                depths += len(probabilities)
    trainer.train()
    logs = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert depths == 2 * sum(LENGTHS)
    assert logs["router_entropy/group_1"] == pytest.approx(sum(entropies) / len(entropies), abs=1e-4)
    for expert in range(config.num_experts):
        share = counts[expert] / sum(counts.values())
        assert logs[f"expert_load/group_1/expert_{expert}"] == pytest.approx(share, abs=1e-4)
    assert any(isinstance(callback, RoutingFrequencies) for callback in trainer.callback_handler.callbacks)


@pytest.mark.parametrize("unpad_inputs", [True, False])
def test_routing_frequencies_do_not_count_padding(make_trainer, make_model, tmp_path, unpad_inputs):
    """The weights of real tokens, whether routers see padding or not."""
    overrides = {"num_labels": 3, "router_jitter_noise": 0.0, "unpad_inputs": unpad_inputs}
    model = make_model(ModernAlbertForSequenceClassification, **overrides)
    expected, seen = torch.zeros(4), []
    handle = model.model.layers[1].mlp.router.register_forward_hook(lambda *call: seen.append(call[2]))
    trainer = make_trainer(model, learning_rate=1e-30, max_steps=1, per_device_train_batch_size=8)
    with torch.no_grad():
        for row in trainer.train_dataset:
            model(torch.tensor([row["input_ids"]]))
    for _, weights, experts in seen:
        expected.index_add_(0, experts.flatten(), weights.flatten())
    handle.remove()
    trainer.train()
    found = json.loads((tmp_path / "routing_weights.json").read_text())["weights"]
    assert found[0] == pytest.approx((expected / (2 * sum(LENGTHS))).tolist(), abs=1e-5)


@pytest.mark.parametrize("steps", [1, 2], ids=["whole-batch", "micro-batches"])
def test_label_smoothing_keeps_the_balancing_loss(make_trainer, make_model, steps):
    losses = {}
    for coefficient in (0.0, 0.7):
        overrides = {"num_labels": 3, "router_jitter_noise": 0.0, "router_aux_loss_coef": coefficient}
        model = make_model(ModernAlbertForSequenceClassification, **overrides)
        sizes = {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps, "max_steps": 1}
        trainer = make_trainer(model, label_smoothing_factor=0.1, **sizes)
        before = model.model.layers[1].mlp.router.weight.clone()
        trainer.train()
        assert not torch.equal(before, model.model.layers[1].mlp.router.weight)
        losses[coefficient] = trainer.state.log_history[0]
    plain, balanced = losses[0.0], losses[0.7]
    assert balanced["loss"] == pytest.approx(plain["loss"] + 0.7 * balanced["aux_loss"], abs=1e-4)
    assert balanced["aux_loss"] > 0.9 and plain["loss"] > 0.5


def test_a_signal_in_an_evaluation_stops_it_at_the_next_batch(make_trainer, tmp_path):
    arguments = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(per_device_eval_batch_size=1, max_steps=3, **arguments)
    seen = []

    class Terminate(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            seen.append(state.global_step)
            if len(seen) == 8 + 2:  # the second evaluation, second of eight batches
                os.kill(os.getpid(), signal.SIGTERM)

    trainer.add_callback(Terminate())
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train_to_the_end(trainer)
    assert stopped.value.code == 143 and len(seen) <= 8 + 3 and seen[-1] == 2
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_training_writes_a_checkpoint(make_trainer, tmp_path, number, code):
    trainer = make_trainer(max_steps=50, save_strategy="steps", save_steps=50)

    class Send(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), number)

    trainer.add_callback(Send())
    with pytest.raises(SystemExit) as stopped:
        train_to_the_end(trainer)
    assert stopped.value.code == code
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["global_step"] == 3
