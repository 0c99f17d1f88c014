"""What runs beside training: stopping on a signal, the progress line, the clock."""

import logging
import signal
import threading
import time
from pathlib import Path

import torch
from transformers import ProgressCallback, TrainerCallback

from .report import write_report


logger = logging.getLogger(__name__)


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
