"""What runs beside training: stopping on a signal, the progress line, the clock, how tokens were routed."""

import json
import logging
import signal
import threading
import time
from pathlib import Path

import torch
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .reports.curves import write_report
from .runs import write_text


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
    """Ctrl-C or SIGTERM ends training after the running step, with a checkpoint; a second Ctrl-C ends it at once.

    Attributes:
        stopped: Whether training was stopped.
    """

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.received = self.stopped = False

    def on_train_begin(self, args, state, control, **kwargs):
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        else:  # only the main thread may set handlers
            self.before = {}

    def handle(self, number, frame):
        # Launchers pass a Ctrl-C on to processes that have had it: one process alone takes the second for a wish.
        if self.received and number == signal.SIGINT and self.accelerator.num_processes == 1:
            raise KeyboardInterrupt
        self.received = True
        logger.warning("stopping after this step, with a checkpoint")

    def on_step_end(self, args, state, control, **kwargs):
        received = self.received
        if self.accelerator.num_processes > 1:  # all stop at the same step
            flag = torch.tensor(int(received), device=args.device)
            received = bool(self.accelerator.reduce(flag, "sum"))
        if received:
            self.stopped = True
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class ConciseProgress(ProgressCallback):
    """The library's progress bar, its log lines without the figures of single experts, which TensorBoard has."""

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

    A step counts the mean over all tokens of its batch, in every process and at every depth of a group; steps are
    averaged with exponentially falling weights. `routing_weights.json` goes into every checkpoint and, at the end,
    into the output folder. Routers see no padding, unless the model is compiled.

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

    def state(self) -> dict:
        average = None if self.average is None else torch.as_tensor(self.average).tolist()
        return {"args": {"decay": self.decay}, "attributes": {"steps": self.steps, "average": average}}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.steps, self.average = 0, None
        # Trainer restores a checkpoint's state only if asked to, and saves none where the checkpoint had none.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step > 0:
            self.steps, self.average = saved["attributes"]["steps"], saved["attributes"]["average"]
        # By name: the class is another one where the model runs its own code from the Hub.
        routers = [module for name, module in model.named_modules() if name.endswith("mlp.router")]
        self.mol_groups = sorted(model.config.mol_groups)
        # Sum of the weights of each expert in this step, and in the last column the tokens.
        self.sums = torch.zeros(len(routers), model.config.num_experts + 1, device=args.device)
        if self.average is None:
            self.average = torch.zeros_like(self.sums[:, :-1])
        self.average = torch.as_tensor(self.average, device=args.device)
        self.handles = [router.register_forward_hook(self.count(index)) for index, router in enumerate(routers)]

    def count(self, index: int):
        def hook(router, inputs, outputs):
            if router.training:  # an evaluation is no step
                _, weights, experts = outputs
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
            write_text(folder / ROUTING_NAME, json.dumps(facts, indent=1))
