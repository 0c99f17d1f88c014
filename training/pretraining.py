"""The Trainer of `scripts/pretrain.py`: masks, loss terms, throughput and routing statistics."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from transformers import Trainer

from .callbacks import StepClock
from .distillation import Distiller, EncoderDistiller, packed_inputs
from .packing import TokenMasker
from .trainer import TrainerMixin, depth_loss, draw_depth, set_elastic


MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "labels")

# Dense bf16 peaks of the data sheets, in TFLOP/s, by a part of the device's name.
PEAK_TFLOPS = {"H100": 989, "H200": 989, "A100": 312, "L40S": 362, "L4": 121, "RTX 4090": 165}


def peak_flops(device: torch.device, half: bool) -> float:
    """Peak FLOP/s of a device: from its data sheet if known, else measured on a large matrix product."""
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


class PretrainingTrainer(TrainerMixin, Trainer):
    """Masked-language modelling on packed rows, with or without a teacher.

    Masks are drawn here, for each row of the global batch of a step, so they do not depend on micro-batches, the number
    of processes, or resuming. Each loss term is a sum divided by a count over the whole batch, so that gradient
    accumulation and data parallelism give the gradient of one large batch.

    Args:
        masker: Masks the training rows; evaluation rows come masked.
        distiller: Adds a teacher's terms.
        mlm_weight, kl_weight, hidden_weight, pooled_weight, pair_weight: Weights of the loss terms.
        elastic_depth: Whether each step runs a smaller depth as well, drawn for the step. It learns the teacher's terms, as the
            full depth does, and from the full depth the logits of masked tokens, by their KL divergence. Not its states: a
            new model would stay where they are equal for all tokens and so at all depths.
        decay_steps: Last steps of the warmup-stable-decay schedule, in which the rate falls as `1 - sqrt`; below 1, a
            share of the run.
        **kwargs: As for `Trainer`.
    """

    def __init__(
        self,
        *args,
        masker: TokenMasker,
        distiller: Distiller | EncoderDistiller | None = None,
        mlm_weight: float = 1.0,
        kl_weight: float = 1.0,
        hidden_weight: float = 1.0,
        pooled_weight: float = 1.0,
        pair_weight: float = 1.0,
        elastic_depth: bool = False,
        decay_steps: float = 0.1,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.masker = masker
        self.distiller = distiller
        self.weights = {
            "mlm_loss": mlm_weight,
            "kl_loss": kl_weight,
            "hidden_loss": hidden_weight,
            "pooled_loss": pooled_weight,
            "pair_loss": pair_weight,
            "depth_loss": 1.0,
        }
        self.elastic_depth = elastic_depth
        set_elastic(self.model.config, elastic_depth)
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

    # The only method of Trainer that sees all micro-batches of a step. Not documented; seen in transformers 5.17 to 5.24.
    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device):
        self.step_start = time.perf_counter()
        batches, num_items = super().get_batch_samples(self.mask_batches(epoch_iterator), num_batches, device)
        # Real tokens, the sum of the squared lengths of their sequences (attention's share of the work), and what the
        # terms of an encoder as the teacher are divided by.
        counts = torch.zeros(4, dtype=torch.long, device=device)
        for batch in batches:
            positions = batch["position_ids"][batch["attention_mask"].bool()].to(device)
            compared = EncoderDistiller.count(batch) if isinstance(self.distiller, EncoderDistiller) else (0, 0)
            counts += torch.tensor([len(positions), int((2 * positions + 1).sum()), *compared], device=device)
        counts = self.accelerator.reduce(counts, "sum").tolist()
        self.tokens_in_batch, squares, self.words_in_batch, self.sequences_in_batch = counts
        self.window_tokens += self.tokens_in_batch
        self.window_squares += squares
        self.terms_steps += 1
        self.state.num_input_tokens_seen += self.tokens_in_batch
        return batches, num_items if num_items is None else num_items.clamp(min=1)

    def mask_batches(self, batches: Iterable[dict]) -> Iterator[dict]:
        """The micro-batches of a step, masked; a row's key is the step and its index in the global batch."""
        for index, batch in enumerate(batches):
            first = (index * self.args.world_size + self.args.process_index) * self.args.train_batch_size
            keys = [(1 + self.state.global_step, first + row) for row in range(len(batch["input_ids"]))]
            input_ids, labels = self.masker(batch["input_ids"], keys)
            clean = {"clean_ids": batch["input_ids"]} if isinstance(self.distiller, EncoderDistiller) else {}
            yield {**batch, **clean, "input_ids": input_ids, "labels": labels}

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        rows = packed_inputs(self.model, {name: inputs[name] for name in MODEL_INPUTS if name in inputs})
        if not self.model.training:
            return self.compute_evaluation_loss(model, rows, inputs, return_outputs, num_items_in_batch)
        config = self.model.config
        asked = {"output_hidden_states": True} if self.distiller is not None else {}
        # Trainer multiplies the loss by the number of processes, over which gradients are averaged.
        scale = self.accelerator.num_processes
        mlm_loss, outputs = super().compute_loss(model, {**rows, **asked}, True, num_items_in_batch)
        weighted = {}
        if self.routed:
            labelled = (inputs["labels"] != -100).sum() / num_items_in_batch
            mlm_loss = mlm_loss - config.router_aux_loss_coef * scale * labelled * outputs.aux_loss
            # A step may have no masked token, but never no token.
            share = inputs["attention_mask"].sum() / self.tokens_in_batch
            weighted["balancing"] = config.router_aux_loss_coef * scale * share * outputs.aux_loss
        terms = {"mlm_loss": mlm_loss}
        if self.distiller is not None:
            counts = (num_items_in_batch, self.tokens_in_batch)
            if isinstance(self.distiller, EncoderDistiller):
                counts = (self.words_in_batch, self.sequences_in_batch)
            expected = self.distiller.ask(inputs)
            terms |= {name: scale * term for name, term in self.distiller(inputs, outputs, *counts, expected).items()}
        if self.elastic_depth:
            depth = draw_depth(config, self.args.seed, self.state.global_step)
            smaller = model(**rows, **asked, output_router_logits=self.routed, num_hidden_layers=depth)
            term = depth_loss(smaller, outputs, None, num_items_in_batch, regression=False)
            if self.distiller is not None:
                learned = self.distiller(inputs, smaller, *counts, expected)
                term = term + sum(self.weights[name] * value for name, value in learned.items())
            terms["depth_loss"] = scale * term
            if self.routed:  # the mean over both runs
                both = weighted["balancing"] + config.router_aux_loss_coef * scale * share * smaller.aux_loss
                weighted["balancing"] = both / 2
        for name, term in terms.items():
            self.terms[name] += term.detach()
            weighted[name] = self.weights[name] * term
        loss = sum(weighted.values())
        return (loss, outputs) if return_outputs else loss

    @property
    def evaluates_teacher_terms(self) -> bool:
        """Whether the loss of an evaluation is the teacher's terms: nothing is masked, so that there is no other."""
        return isinstance(self.distiller, EncoderDistiller) and self.masker.masked_share == 0

    def compute_evaluation_loss(self, model, rows: dict, inputs: dict, return_outputs: bool, num_items_in_batch):
        """The masked-LM loss or, where no sequence is masked in training, the weighted terms of the teacher."""
        if not self.evaluates_teacher_terms:
            return super().compute_loss(model, rows, return_outputs, num_items_in_batch)
        outputs = model(**rows, output_hidden_states=True)
        inputs = {**inputs, "clean_ids": inputs["input_ids"]}
        terms = self.distiller(inputs, outputs, *EncoderDistiller.count(inputs), self.distiller.ask(inputs))
        loss = sum(self.weights[name] * term for name, term in terms.items())
        return (loss, outputs) if return_outputs else loss

    def save_model(self, *args, **kwargs) -> None:
        """Saves without `sparse_prediction`, so that the head of the saved model runs at all positions."""
        sparse = self.model.config.sparse_prediction
        self.model.config.sparse_prediction = False
        try:
            super().save_model(*args, **kwargs)
        finally:
            self.model.config.sparse_prediction = sparse

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.terms_steps:
            logs.update(self.drain())
        super().log(logs, start_time)

    def drain(self) -> dict[str, float]:
        """Means and totals since the last log, over all processes."""
        means = self.accelerator.reduce(torch.stack(list(self.terms.values())), "mean") / self.terms_steps
        figures = dict(zip(self.terms, means.tolist(), strict=True))
        figures["tokens"] = self.state.num_input_tokens_seen
        figures["tokens_per_second"] = self.window_tokens / self.window_seconds
        if hasattr(self.model.config, "estimate_flops"):
            # A token of a sequence of length n attends to n keys: the mean over tokens is sum n^2 / sum n.
            length = self.window_squares / self.window_tokens
            flops = self.model.config.estimate_flops(length, labelled=self.masker.probability, training=True)
            figures["mfu"] = flops * figures["tokens_per_second"] / self.peak_flops
        self.terms.clear()
        self.terms_steps = self.window_tokens = self.window_squares = 0
        self.window_seconds = 0.0
        return figures
