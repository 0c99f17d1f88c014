"""The Trainer of `scripts/pretrain.py`: masks, loss terms, throughput and routing statistics."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers import Trainer

from ..configuration_modernalbert import ModernAlbertConfig
from ..routing_modernalbert import shares_of_choices
from .callbacks import StepClock
from .data import TokenMasker
from .distillation import Distiller, packed_inputs


# Dense bf16 peaks of the data sheets, in TFLOP/s, by a part of the device's name.
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165}


def peak_flops(device: torch.device, half: bool) -> float:
    """FLOP/s that a device can do: the data sheet's where it is known, else those of a large matrix product."""
    if device.type == "cuda" and half:
        name = torch.cuda.get_device_name(device)
        for part, tflops in PEAK_TFLOPS.items():
            if part in name:
                return tflops * 1e12
    size = 4096 if device.type == "cuda" else 1024
    matrix = torch.ones(size, size, device=device, dtype=torch.bfloat16 if half else torch.float32)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def routing_statistics(
    router_logits: tuple[torch.Tensor, ...], config: ModernAlbertConfig, attention_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How a batch was routed, over the depths of each MoL group and all real tokens.

    Args:
        router_logits: For every executed MoL layer, `[batch, seq, num_experts]`.
        config: Of the model; what a choice is depends on its router, see [`shares_of_choices`].
        attention_mask: 0 at padding, `[batch, seq]`.

    Returns:
        Share of all choices that fell on each expert, `[num_groups, num_experts]`; mean entropy of the router's
        probabilities, 1 where they are even, `[num_groups]`.
    """
    real = attention_mask.bool()
    logits = torch.stack([layer[real] for layer in router_logits]).float()  # [layers, tokens, experts]
    log_probabilities = logits.unflatten(0, (len(config.mol_groups), -1)).log_softmax(dim=-1).flatten(1, 2)
    probabilities = log_probabilities.exp()
    entropy = -(probabilities * log_probabilities).sum(-1).mean(1) / torch.tensor(logits.shape[-1]).log()
    return shares_of_choices(probabilities, config).mean(dim=1), entropy


class PretrainingTrainer(Trainer):
    """Masked-language modelling on packed rows, with or without a teacher.

    Masks are drawn here, for a row of the global batch of a step: they are the same whatever the micro-batches, the
    number of processes, or the number of times that the run was resumed. Each term of the loss is a sum divided by a
    count over the whole batch, so that gradient accumulation and data parallelism give the gradient of one large batch.

    Args:
        masker: Masks the training rows; evaluation rows come masked.
        distiller: Adds a teacher's terms.
        mlm_weight, kl_weight, hidden_weight: Weights of the loss terms.
        decay_steps: Last steps of the warmup-stable-decay schedule, in which the rate falls as `1 - sqrt`; below 1, a
            share of the run.
        **kwargs: As for `Trainer`.
    """

    def __init__(
        self,
        *args,
        masker: TokenMasker,
        distiller: Distiller | None = None,
        mlm_weight: float = 1.0,
        kl_weight: float = 1.0,
        hidden_weight: float = 1.0,
        decay_steps: float = 0.1,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.masker = masker
        self.distiller = distiller
        self.mlm_weight, self.kl_weight, self.hidden_weight = mlm_weight, kl_weight, hidden_weight
        self.decay_steps = decay_steps
        if distiller is not None:
            distiller.teacher.to(self.args.device)
        self.peak_flops = peak_flops(self.args.device, self.args.bf16 or self.args.fp16) * self.args.world_size
        self.terms = defaultdict(float)
        self.terms_steps = self.window_tokens = self.window_squares = 0
        self.window_seconds = 0.0
        self.add_callback(StepClock(self))

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.args.lr_scheduler_type == "warmup_stable_decay":
            warmup_steps = self.args.get_warmup_steps(num_training_steps)
            decay_steps = round(self.decay_steps * (num_training_steps if self.decay_steps < 1 else 1))
            if warmup_steps + decay_steps > num_training_steps:
                raise ValueError(
                    f"{warmup_steps} warmup steps and {decay_steps} decay steps do not fit in {num_training_steps} steps; "
                    "lower `warmup_steps` or `decay_steps`, or raise `max_steps`"
                )
            schedule = {"decay_type": "1-sqrt", "num_decay_steps": decay_steps}
            given = self.args.lr_scheduler_kwargs
            self.args.lr_scheduler_kwargs = {**schedule, **(given or {})}
            try:
                return super().create_scheduler(num_training_steps, optimizer)
            finally:
                self.args.lr_scheduler_kwargs = given
        return super().create_scheduler(num_training_steps, optimizer)

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        self.step_start = time.perf_counter()
        batches, num_items = super().get_batch_samples(self.mask_batches(epoch_iterator), num_batches, device)
        # Real tokens, and the sum of the squared lengths of their texts: attention's share of the work.
        counts = torch.zeros(2, dtype=torch.long, device=device)
        for batch in batches:
            places = batch["position_ids"][batch["attention_mask"].bool()].to(device)
            counts += torch.stack([torch.tensor(len(places), device=device), (2 * places + 1).sum()])
        self.tokens_in_batch, squares = self.accelerator.reduce(counts, "sum").tolist()
        self.window_tokens += self.tokens_in_batch
        self.window_squares += squares
        self.terms_steps += 1
        self.state.num_input_tokens_seen += self.tokens_in_batch
        return batches, num_items if num_items is None else num_items.clamp(min=1)

    def mask_batches(self, batches: Iterable[dict]) -> Iterator[dict]:
        """The micro-batches of a step, masked; a row's key is the step and its place in the global batch."""
        for index, batch in enumerate(batches):
            first = (index * self.args.world_size + self.args.process_index) * self.args.train_batch_size
            keys = [(1 + self.state.global_step, first + row) for row in range(len(batch["input_ids"]))]
            input_ids, labels = self.masker(batch["input_ids"], keys)
            yield {**batch, "input_ids": input_ids, "labels": labels}

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        rows = packed_inputs(self.model, inputs)
        if not self.model.training:
            return super().compute_loss(model, rows, return_outputs, num_items_in_batch)
        config = self.model.config
        routed = getattr(config, "has_router", False)
        asked = {"output_router_logits": True} if routed else {}
        asked |= {"output_hidden_states": True} if self.distiller is not None else {}
        # Trainer multiplies the loss by the number of processes, over which gradients are averaged.
        scale = self.accelerator.num_processes
        mlm_loss, outputs = super().compute_loss(model, {**rows, **asked}, True, num_items_in_batch)
        weighted = {}
        if routed:
            share = (inputs["labels"] != -100).sum() / num_items_in_batch
            self.terms["aux_loss"] += scale * share * outputs.aux_loss.detach()
            balancing = config.router_aux_loss_coef * scale * share * outputs.aux_loss
            mlm_loss = mlm_loss - balancing
            weighted["balancing"] = balancing
            self.record_routing(outputs.router_logits, inputs["attention_mask"])
        self.terms["mlm_loss"] += mlm_loss.detach()
        weighted["mlm_loss"] = self.mlm_weight * mlm_loss
        if self.distiller is not None:
            for name, term in self.distiller(inputs, outputs, num_items_in_batch, self.tokens_in_batch).items():
                self.terms[name] += scale * term.detach()
                weighted[name] = getattr(self, name.replace("_loss", "_weight")) * scale * term
        loss = sum(weighted.values())
        return (loss, outputs) if return_outputs else loss

    def record_routing(self, router_logits: tuple[torch.Tensor, ...], attention_mask: torch.Tensor) -> None:
        """Adds a micro-batch's routing statistics, weighted by its tokens, to the terms."""
        config = self.model.config
        with torch.no_grad():
            load, entropy = routing_statistics(router_logits, config, attention_mask)
            weight = self.accelerator.num_processes * attention_mask.sum() / self.tokens_in_batch
        for index, group in enumerate(sorted(config.mol_groups)):
            self.terms[f"router_entropy/group_{group}"] += weight * entropy[index]
            for expert in range(config.num_experts):
                self.terms[f"expert_load/group_{group}/expert_{expert}"] += weight * load[index, expert]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.terms_steps:
            logs.update(self.drain())
        super().log(logs, start_time)

    def drain(self) -> dict[str, float]:
        """What was seen since the last log, over all processes."""
        means = self.accelerator.reduce(torch.stack(list(self.terms.values())), "mean") / self.terms_steps
        figures = dict(zip(self.terms, means.tolist(), strict=True))
        figures["tokens"] = self.state.num_input_tokens_seen
        figures["tokens_per_second"] = self.window_tokens / self.window_seconds
        if hasattr(self.model.config, "estimate_flops"):
            # A text of length n costs attention n keys a token: the mean over tokens is sum n^2 / sum n.
            length = self.window_squares / self.window_tokens
            flops = self.model.config.estimate_flops(length, labelled=self.masker.probability, training=True)
            figures["mfu"] = flops * figures["tokens_per_second"] / self.peak_flops
        self.terms.clear()
        self.terms_steps = self.window_tokens = self.window_squares = 0
        self.window_seconds = 0.0
        return figures
