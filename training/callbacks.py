"""Callbacks of Trainer: stopping on a signal, progress line, clock, report, routing weights."""

import inspect
import json
import logging
import math
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..configuration_modernalbert import ModernAlbertConfig
from .reports.curves import write_report
from .runs import write_json


logger = logging.getLogger(__name__)

ROUTING_NAME = "routing_weights.json"


class StepClock(TrainerCallback):
    """Adds up the seconds of training steps, their data included, evaluation and saving excluded."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda" and (state.global_step % state.logging_steps == 0):
            torch.cuda.synchronize()
        self.trainer.window_seconds += time.perf_counter() - self.trainer.step_start


class StopOnSignal(TrainerCallback):
    """Ctrl-C or SIGTERM stops training after the running step, with a checkpoint; a second Ctrl-C stops it at once.

    In an evaluation they stop at the next batch, without a checkpoint: the resumed run repeats the steps since the last
    checkpoint and the evaluation, so it ends with the same weights and the same best checkpoint.

    Attributes:
        received: Number of the signal; 0 before.
        stopped: Whether training was stopped.
    """

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.received = 0
        self.stopped = False
        self.before = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self.before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(self, number, frame):
        # Launchers forward a Ctrl-C to processes that got it already: only a single process obeys a second one.
        if self.received and number == signal.SIGINT and self.accelerator.num_processes == 1:
            raise KeyboardInterrupt
        self.received = number
        logger.warning("stopping after this step, with a checkpoint, or in an evaluation after this batch")

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.received:
            sys.exit(128 + self.received)

    def on_step_end(self, args, state, control, **kwargs):
        if self.accelerator.num_processes > 1:  # all stop at the same step
            flag = torch.tensor(self.received, device=args.device)
            self.received = int(self.accelerator.gather(flag).max())
        if self.received:
            self.stopped = True
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()

    def restore(self) -> None:
        """Restores the previous signal handlers."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


class ConciseProgress(ProgressCallback):
    """Trainer's progress bar, with log lines that leave out the load of single experts; TensorBoard has it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {name: value for name, value in (logs or {}).items() if not name.startswith("expert_load/")}
        super().on_log(args, state, control, logs=shown, **kwargs)


class ReportWriter(TrainerCallback):
    """Writes `training_report.html` at each evaluation, and at the end."""

    def __init__(self, title: str, facts: dict[str, str]):
        self.title = title
        self.facts = facts

    def on_evaluate(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            write_report(Path(args.output_dir) / "training_report.html", state.log_history, self.title, self.facts)

    on_train_end = on_evaluate


class RoutingFrequencies(TrainerCallback, ExportableState):
    """Averages over training how much weight the router gives to each expert, for the merging method `ema`.

    The value of a step is the mean over all tokens of its batch, in every process and at every depth of a group; steps
    enter an exponential moving average. `routing_weights.json` is written into every checkpoint and, at the end, into the
    output folder. Padding, which routers see with `unpad_inputs=False`, is left out.

    Args:
        decay: Of the average; the last `1 / (1 - decay)` steps make up most of it.
    """

    def __init__(self, decay: float = 0.99):
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` ({decay}) must be at least 0 and below 1")
        self.decay = decay
        self.steps = 0
        self.average = None  # [MoL groups, experts], not yet corrected for its start at 0
        self.handles = []
        self.real = None  # of the tokens of the running batch

    def state(self) -> dict:
        average = None if self.average is None else torch.as_tensor(self.average).tolist()
        return {"args": {"decay": self.decay}, "attributes": {"steps": self.steps, "average": average}}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.steps, self.average = 0, None
        # Trainer restores a callback's state only if asked to, and saves none if the checkpoint had none.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step > 0:
            self.steps, self.average = saved["attributes"]["steps"], saved["attributes"]["average"]
        # By name, since a model that runs its code from the Hub has another class.
        routers = [module for name, module in model.named_modules() if name.endswith("mlp.router")]
        self.mol_groups = sorted(model.config.mol_groups)
        # Sum of the weights of each expert in this step, and in the last column the tokens.
        self.sums = torch.zeros(len(routers), model.config.num_experts + 1, device=args.device)
        if self.average is None:
            self.average = torch.zeros_like(self.sums[:, :-1])
        self.average = torch.as_tensor(self.average, device=args.device)
        self.handles = [router.register_forward_hook(self.count(index)) for index, router in enumerate(routers)]
        first = next(name for name, _ in model.named_modules() if name.endswith("mlp.router"))
        encoder = model.get_submodule(first.rpartition("layers.")[0].rstrip("."))
        self.handles.append(encoder.register_forward_pre_hook(self.see, with_kwargs=True))

    def see(self, encoder, inputs, kwargs):
        mask = inspect.signature(encoder.forward).bind_partial(*inputs, **kwargs).arguments.get("attention_mask")
        self.real = mask.flatten().bool() if torch.is_tensor(mask) and mask.dim() == 2 else None

    def count(self, index: int):
        def hook(router, inputs, outputs):
            if router.training:  # an evaluation is no step
                _, weights, experts = outputs
                weights, experts = weights.flatten(0, -2), experts.flatten(0, -2)  # [tokens, choices]
                if self.real is not None and len(self.real) == len(experts):
                    weights, experts = weights[self.real], experts[self.real]
                self.sums[index].index_add_(0, experts.flatten(), weights.detach().flatten().to(self.sums))
                self.sums[index, -1] += len(experts)

        return hook

    def on_step_end(self, args, state, control, **kwargs):
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self.sums)
        mean = self.sums[:, :-1] / self.sums[:, -1:].clamp(min=1)
        self.average = self.decay * self.average + (1 - self.decay) * mean
        self.steps += 1
        self.sums.zero_()

    def on_save(self, args, state, control, **kwargs):
        self.write(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", state)

    def on_train_end(self, args, state, control, **kwargs):
        for handle in self.handles:
            handle.remove()
        self.write(Path(args.output_dir), state)

    def write(self, folder: Path, state) -> None:
        if state.is_world_process_zero and self.steps > 0:
            facts = {
                "mol_groups": self.mol_groups,
                "weights": (self.average / (1 - self.decay**self.steps)).tolist(),
                "decay": self.decay,
                "steps": self.steps,
            }
            write_json(folder / ROUTING_NAME, facts)


def read_routing_weights(path: str | Path, config: ModernAlbertConfig) -> list[list[float]]:
    """Weights of the experts of each MoL group, as [`RoutingFrequencies`] wrote them.

    Raises:
        OSError: There is no such file.
        ValueError: The file is something else, or of another architecture, or its weights are no shares.
    """
    try:
        facts = json.loads(Path(path).read_text(encoding="utf-8"))
        groups, weights = facts["mol_groups"], facts["weights"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"'{path}' does not hold routing weights; give the `{ROUTING_NAME}` that training writes beside its "
            "checkpoints"
        ) from error
    if groups != sorted(config.mol_groups):
        raise ValueError(
            f"'{path}' is of a model with the MoL groups {groups}, this one has {sorted(config.mol_groups)}"
        )
    if not isinstance(weights, list) or not all(isinstance(row, list) for row in weights):
        raise ValueError(f"'{path}': `weights` is {str(weights)[:60]}, expected a list of rows")
    shape = [len(row) for row in weights]
    if shape != [config.num_experts] * len(groups):
        raise ValueError(
            f"'{path}': `weights` has rows of {shape}, expected {len(groups)} rows, one for each MoL group, of "
            f"{config.num_experts} values"
        )
    for group, row in zip(groups, weights, strict=True):
        numbers = [value for value in row if isinstance(value, int | float) and not isinstance(value, bool)]
        if len(numbers) < len(row) or not all(0 <= value < math.inf for value in numbers) or sum(numbers) <= 0:
            raise ValueError(
                f"'{path}': the weights of group {group} are {row}, expected finite numbers of at least 0 that are not "
                "all 0"
            )
    return weights
