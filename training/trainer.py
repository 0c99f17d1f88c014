"""What every Trainer of the scripts does beside training, and the way from a run's folder to its last step."""

import logging
import math
import random
import sys
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig, ProgressCallback, Trainer

from ..configuration_modernalbert import ModernAlbertConfig
from ..routing_modernalbert import shares_of_choices
from .callbacks import ConciseProgress, RoutingFrequencies, StopOnSignal
from .runs import is_complete, last_checkpoint


logger = logging.getLogger(__name__)


class NotFiniteError(ValueError):
    """Training or evaluation met a number that is not finite."""


def routing_statistics(
    router_logits: tuple[torch.Tensor, ...], config: ModernAlbertConfig, attention_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """How a batch was routed, over the depths of each MoL group and all real tokens.

    Args:
        router_logits: For every executed MoL layer, `[batch, seq, num_experts]`.
        config: Of the model; what a choice is depends on its router, see [`shares_of_choices`].
        attention_mask: 0 at padding, `[batch, seq]`; default: no padding.

    Returns:
        Share of all choices that fell on each expert, `[num_groups, num_experts]`; mean entropy of the router's
        probabilities, 1 where they are even, `[num_groups]`.
    """
    real = torch.ones(router_logits[0].shape[:2]) if attention_mask is None else attention_mask
    logits = torch.stack([layer[real.bool().to(layer.device)] for layer in router_logits]).float()
    # [groups, depths * tokens, experts]
    log_probabilities = logits.unflatten(0, (len(config.mol_groups), -1)).log_softmax(dim=-1).flatten(1, 2)
    probabilities = log_probabilities.exp()
    entropy = -(probabilities * log_probabilities).sum(-1).mean(1) / torch.tensor(logits.shape[-1]).log()
    return shares_of_choices(probabilities, config).mean(dim=1), entropy


def draw_depth(config: ModernAlbertConfig, seed: int, step: int) -> int:
    """A number of layers below the model's, the same for all micro-batches and processes of a step."""
    depths = range(config.num_hidden_groups, config.num_hidden_layers, config.num_hidden_groups)
    return random.Random(f"{seed} {step}").choice(depths)


def set_elastic(config: PreTrainedConfig, elastic_depth: bool) -> None:
    """Marks a model as trained for smaller depths, or as no longer trained for them.

    Raises:
        ValueError: It has none.
    """
    if not elastic_depth:
        if config.model_type == "modernalbert":
            config.elastic_depth = False
        return
    if config.model_type != "modernalbert":
        raise ValueError(
            f"`elastic_depth` is for a ModernALBERT, whose groups run several times; this is a {config.model_type}"
        )
    if config.num_hidden_layers == config.num_hidden_groups:
        raise ValueError(
            f"`elastic_depth` needs smaller depths, and each of the {config.num_hidden_groups} groups runs once already"
        )
    config.schedule(config.num_hidden_groups)  # refuses what belongs to a depth
    config.elastic_depth = True


def depth_loss(
    smaller, full, labels: torch.Tensor | None, num_items: torch.Tensor | int | None, regression: bool
) -> torch.Tensor:
    """What the outputs of a smaller depth differ from those of the full one, which is not trained by it.

    Args:
        smaller: Outputs with `logits`, or with `start_logits` and `end_logits`.
        full: The same of all layers.
        labels: Of items of `logits`, -100 where there is none, `[batch]` or `[batch, seq]`; None: all rows count.
        num_items: Labelled items of the whole batch of which this may be a part; None: those here.
        regression: Whether `logits` are values.
    """
    items = []
    for name in ("logits", "start_logits", "end_logits"):
        if getattr(full, name, None) is None:
            continue
        found, wanted = getattr(smaller, name).float(), getattr(full, name).detach().float()
        if regression:
            items.append((found - wanted).square().mean(dim=-1))
        else:
            found, wanted = found.log_softmax(dim=-1), wanted.log_softmax(dim=-1)
            items.append(F.kl_div(found, wanted, log_target=True, reduction="none").sum(dim=-1))
    item = torch.stack(items).mean(dim=0)  # [batch] or [batch, seq]
    counted = torch.ones_like(item) if labels is None else (labels != -100).to(item).view_as(item)
    total = counted.sum().clamp(min=1) if num_items is None else num_items
    return (item * counted).sum() / total


def labelled_share(labels: torch.Tensor | None, num_items: torch.Tensor | int | None) -> torch.Tensor | float:
    """Share of the labelled items of a batch that a part of it holds; 1 where Trainer does not count them."""
    return 1.0 if labels is None or num_items is None else (labels != -100).sum() / num_items


class TrainerMixin:
    """For any Trainer, sentence-transformers' included: stops at numbers that are not finite, and logs routing.

    For a model with a router, the log has the share of choices of each expert and the entropy of the router, over all
    real tokens since the last log and in all processes; and the balancing loss, which `label_smoothing_factor` keeps in
    the loss. A checkpoint or model with a weight that is not finite is never written, so the last good one remains.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.routed = getattr(getattr(self.model, "config", None), "has_router", False)
        self.means = {}  # name -> sum of value * weight, sum of weights, since the last log
        if self.routed:
            self.add_callback(RoutingFrequencies())
            if not self.args.disable_tqdm:
                self.remove_callback(ProgressCallback)
                self.add_callback(ConciseProgress())

    def compute_loss(self, model, inputs, return_outputs: bool = False, num_items_in_batch=None, **kwargs):
        asked = {"output_router_logits": True} if self.routed and self.model.training and "input_ids" in inputs else {}
        loss, outputs = super().compute_loss(
            model, {**inputs, **asked}, return_outputs=True, num_items_in_batch=num_items_in_batch, **kwargs
        )
        if asked:
            labels = inputs.get("labels")
            share = labelled_share(labels, num_items_in_batch)
            self.record("aux_loss", outputs["aux_loss"], share)
            self.record_routing(outputs["router_logits"], inputs.get("attention_mask"))
            if labels is not None and self.args.label_smoothing_factor > 0:  # Trainer took them away from the model
                scale = share * self.loss_scale(num_items_in_batch)
                loss = loss + self.model.config.router_aux_loss_coef * scale * outputs["aux_loss"]
        return (loss, outputs) if return_outputs else loss

    def loss_scale(self, num_items: torch.Tensor | int | None) -> int:
        """What Trainer multiplies its loss by, and what a term beside it must be, since gradients are averaged."""
        averaged = num_items is not None and self.args.average_tokens_across_devices
        return self.accelerator.num_processes if averaged else 1

    def record_routing(self, router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor | None) -> None:
        """Adds a micro-batch's routing, weighted by its real tokens, to the means of the next log."""
        config = self.model.config
        with torch.no_grad():
            load, entropy = routing_statistics(router_logits, config, attention_mask)
        tokens = router_logits[0][..., 0].numel() if attention_mask is None else attention_mask.sum()
        for index, group in enumerate(sorted(config.mol_groups)):
            self.record(f"router_entropy/group_{group}", entropy[index], tokens)
            for expert in range(config.num_experts):
                self.record(f"expert_load/group_{group}/expert_{expert}", load[index, expert], tokens)

    def record(self, name: str, value: torch.Tensor, weight: torch.Tensor | float = 1.0) -> None:
        """Adds a value to a weighted mean of the next log."""
        value = value.detach().float()
        weight = torch.as_tensor(weight, dtype=torch.float32, device=value.device)
        total, weights = self.means.get(name, (0.0, 0.0))
        self.means[name] = (total + weight * value, weights + weight)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.means:
            sums = torch.stack([torch.stack(pair) for pair in self.means.values()])  # [names, 2]
            sums = self.accelerator.reduce(sums, "sum")
            logs.update(zip(self.means, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))
            self.means.clear()
        finite = {name: value for name, value in logs.items() if not isinstance(value, float) or math.isfinite(value)}
        super().log(finite, start_time)

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.check_finite(loss, "the loss")
        return loss

    def prediction_step(self, *args, **kwargs):
        loss, logits, labels = super().prediction_step(*args, **kwargs)
        self.check_finite(loss, "the loss of an evaluation")
        self.check_finite(logits, "an output of the model")
        return loss, logits, labels

    def save_model(self, *args, **kwargs) -> None:
        for name, parameter in self.model.named_parameters():
            self.check_finite(parameter.detach(), f"the weight `{name}`")
        super().save_model(*args, **kwargs)

    def check_finite(self, value: Any, name: str) -> None:
        """Checks that all numbers of a tensor, or of nested tensors, are finite.

        Raises:
            NotFiniteError: A number is not finite.
        """
        if isinstance(value, dict | list | tuple):
            for one in value.values() if isinstance(value, dict) else value:
                self.check_finite(one, name)
        elif isinstance(value, torch.Tensor) and value.is_floating_point() and not value.isfinite().all():
            step = self.state.global_step + self.is_in_train
            raise NotFiniteError(
                f"{name} is not finite at step {step}: training has diverged, or the model was broken before. Nothing "
                "was written; the last checkpoint is good. Lower `learning_rate`, or clip gradients (`max_grad_norm`)"
            )


def train_to_the_end(trainer: Trainer, patience: int | None = None) -> None:
    """Trains to the last step or the early stop, from the last complete checkpoint if there is one.

    Raises:
        NotFiniteError: Training diverged.
        SystemExit: Ctrl-C (130) or SIGTERM (143) stopped the run; the same command resumes it.
        ValueError: There are damaged checkpoints and no complete one.
    """
    args = trainer.args
    stop = StopOnSignal(trainer.accelerator)
    trainer.add_callback(stop)
    checkpoint = last_checkpoint(args.output_dir)
    if checkpoint is not None:
        trainer.args.eval_on_start = False
        if is_complete(checkpoint, args.max_steps, patience):  # Trainer would take one step more
            args.num_train_epochs, args.max_steps = 0, -1
            if not hasattr(trainer.train_dataset, "__len__"):  # a stream has no length, which epochs need
                trainer.train_dataset = list(trainer.train_dataset.take(1))
    try:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except BaseException:
        stop.restore()
        checkpoint = last_checkpoint(args.output_dir, remove=False)
        if args.should_save and checkpoint is not None:
            logger.error("training broke off; the same command goes on from '%s'", checkpoint.name)
        raise
    if stop.stopped:
        logger.warning("stopped at step %d; the same command goes on from there", trainer.state.global_step)
        sys.exit(128 + stop.received)
