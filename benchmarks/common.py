"""Shared code of the benchmarks: resumable studies, interleaved timing, description of the machine, tables."""

import json
import math
import os
import platform
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from transformers import ModernBertConfig

from modernalbert import ModernAlbertConfig
from modernalbert.mixture_modernalbert import ModernAlbertExperts
from modernalbert.training.data import find_files, is_local, read_rows
from modernalbert.training.runs import describe_model, hash_file, lock_folder, read_json, write_json


SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
BATCH, LENGTH, MASKED = 8, 128, 0.3  # sequences of a pretraining step, their tokens, share of masked tokens
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUIET = {"use_cpu": DEVICE == "cpu", "dataloader_pin_memory": False, "disable_tqdm": True, "report_to": "none"}


# ---- Arguments


def count(text: str) -> int:
    """Type of an argument: an integer of at least 1."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


def positive(text: str) -> float:
    """Type of an argument: a finite number above 0."""
    if not 0 < (value := float(text)) < math.inf:
        raise ValueError
    return value


def read_tasks(path: str | None, *required: str) -> dict[str, dict]:
    """Arguments of a script by the name of the task, from a JSON file; none without a file.

    Raises:
        ValueError: It is something else, or a task lacks one of the `required` arguments.
    """
    tasks = read_json(path) if path else {}
    if not isinstance(tasks, dict) or not all(isinstance(task, dict) for task in tasks.values()):
        raise ValueError(f"'{path}' must map the name of each task to its arguments")
    for name, task in tasks.items():
        if missing := [argument for argument in required if name != "*" and argument not in task]:
            raise ValueError(f"task {name} in '{path}' lacks {', '.join(missing)}")
    return tasks


# ---- Studies


def bind_folder(
    args: Namespace,
    tasks: dict[str, dict],
    ignore: Iterable[str] = (),
    models: Iterable[str] = (),
    more: dict[str, Any] | None = None,
) -> None:
    """Binds `--output_dir` to the settings and data of a study, so that runs of another study are never reused.

    Tasks may be added; settings and data must not change.

    Args:
        args: Arguments of the study. `study.json` in the folder keeps them.
        tasks: Arguments of `scripts/run_glue.py` by the name of the task.
        ignore: Arguments that the names of the runs' folders tell apart.
        models: Models, which count with the content of their folders. So do the files of `--train_data`,
            `--validation_data` and the tasks.
        more: Other settings, by name.

    Raises:
        ValueError: The folder belongs to a study with other settings or data.
        BlockingIOError: Another process is at work in the folder.
    """
    ignore = {"output_dir", "processes", "tasks", "job", *ignore}
    settings = {name: value for name, value in vars(args).items() if name not in ignore}
    settings |= {f"task {name}": task for name, task in tasks.items()} | (more or {})
    data = [name for task in tasks.values() for key in ("train_files", "validation_files") for name in task[key]]
    for name in (*args.train_data, *args.validation_data, *data):
        if is_local(name):
            settings[f"content of {name}"] = {path: hash_file(path) for path in find_files([name])}
    settings |= {f"content of {name}": describe_model(name) for name in models}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    lock_folder(args.output_dir)
    path = args.output_dir / "study.json"
    before = read_json(path) if path.exists() else {}
    changed = [name for name, value in settings.items() if before.get(name, value) != value]
    if changed:
        raise ValueError(
            f"'{args.output_dir}' holds runs with other values of {', '.join(changed)}; give another --output_dir"
        )
    write_json(path, before | settings)


def start_script(script: str, *arguments: str) -> None:
    """Runs a script of this repository, or a Python file given by its path, on one thread.

    Raises:
        ValueError: It refused its arguments or its data; the message has the end of what it wrote.
        RuntimeError: It failed otherwise.
    """
    path = script if script.endswith(".py") else SCRIPTS / f"{script}.py"
    command = [sys.executable, str(path), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if result.returncode:
        failure = ValueError if result.returncode == 2 else RuntimeError
        raise failure(f"{' '.join(command)} failed:\n{result.stderr[-4000:]}")


def run_jobs(processes: int, function: Callable, jobs: Iterable[tuple]) -> None:
    """Calls `function(*job)` for each job, `processes` at a time. A failure cancels the waiting jobs."""
    with ThreadPoolExecutor(processes) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def to_flags(arguments: dict) -> list[str]:
    """`{"files": ["a", "b"], "do_train": true}` as `--files a b --do_train true`."""
    flags = []
    for name, value in arguments.items():
        values = value if isinstance(value, list) else [value]
        flags += [f"--{name}", *(part if isinstance(part, str) else json.dumps(part) for part in values)]
    return flags


def train_tokenizer(args: Namespace) -> None:
    """Trains the tokenizer of all runs of a study, unless it is there."""
    folder = args.output_dir / "tokenizer"
    if not folder.exists():
        vocabulary = {"vocab_size": 8192, "model_max_length": 1024}
        start_script("train_tokenizer", *to_flags({"files": args.train_data, **vocabulary, "output_dir": str(folder)}))


def pretrain(
    args: Namespace, folder: Path, steps: int, seed: int, rate: float, *arguments: str, batch_size: int = BATCH
) -> None:
    """One run of `scripts/pretrain.py`, unless it has ended before. `arguments` say which model."""
    if (folder / "results.json").exists():
        return
    every = max(steps // 8, 1)
    settings = {"tokenizer": str(args.output_dir / "tokenizer"), "output_dir": str(folder), "seed": seed}
    settings |= {"train_data": args.train_data, "validation_data": args.validation_data, "max_length": LENGTH}
    settings |= {
        "mlm_probability": MASKED,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": 32,
    }
    settings |= {"learning_rate": rate, "decay_steps": 0.5, "weight_decay": 0.01, "max_steps": steps}
    settings |= {"eval_strategy": "steps", "eval_steps": every, "max_eval_samples": args.max_eval_samples}
    settings |= {"save_steps": every, "save_total_limit": 1, "logging_steps": 25}
    start_script("pretrain", *to_flags(settings | QUIET), *arguments)


def read_curve(folder: Path, batch_size: int = BATCH) -> dict[str, list[tuple[int, float]]]:
    """Tokens and masked-LM loss at each evaluation of a pretraining run that has ended, by validation source."""
    checkpoint = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    curves = {}
    for entry in json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]:
        for name, value in entry.items():
            if name.startswith("eval_") and name.endswith("loss"):
                source = name.removeprefix("eval_").removesuffix("loss").strip("_") or "validation"
                curves.setdefault(source, []).append((entry["step"] * batch_size * LENGTH, value))
    return curves


def limit_rows(args: Namespace, task: dict, folder: Path) -> dict:
    """The arguments of a task with at most `train_rows` and `validation_examples` rows, drawn with a fixed seed."""
    limited = dict(task)
    for name, count in (("train_files", args.train_rows), ("validation_files", args.validation_examples)):
        rows = read_rows(task[name])
        path = folder / f"{name}.parquet"
        rows.shuffle(seed=0).select(range(min(count, len(rows)))).to_parquet(path)
        limited[name] = [str(path)]
    return limited


def fine_tune(model: str | Path, task: dict, output_dir: Path, seed: int, epochs: int) -> None:
    """Runs `scripts/run_glue.py` on a task."""
    settings = {"model_name_or_path": str(model), "output_dir": str(output_dir), "seed": seed, "do_train": True}
    settings |= {"learning_rate": 5e-4, "warmup_steps": 0.1, "num_train_epochs": epochs, "max_length": 96}
    settings |= {"per_device_train_batch_size": 32, "per_device_eval_batch_size": 64, "save_strategy": "no"}
    start_script("run_glue", *to_flags(settings | QUIET | task))


# ---- Models


def modernbert_config(config: ModernAlbertConfig) -> ModernBertConfig:
    """ModernBERT that multiplies as much as a ModernALBERT without experts."""
    mol_share = len(config.mol_groups) / config.num_hidden_groups
    width = mol_share * config.mol_intermediate_size + (1 - mol_share) * config.intermediate_size
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "layer_types", "local_attention")
    names += tuple(f"{token}_token_id" for token in ("pad", "bos", "eos", "cls", "sep"))
    return ModernBertConfig(**{name: getattr(config, name) for name in names}, intermediate_size=8 * round(width / 8))


# ---- Timing


def fill_experts(model: torch.nn.Module) -> torch.nn.Module:
    """Initialises the experts away from zero, where they correct nothing; returns the model."""
    for module in model.modules():
        if isinstance(module, ModernAlbertExperts):
            torch.nn.init.normal_(module.in_B, std=0.02)
            torch.nn.init.normal_(module.out_B, std=0.02)
    return model


def make_batches(batch: int, seq: int) -> dict[str, dict[str, torch.Tensor]]:
    """Inputs by name: a full batch, one at about 60% fill, and one sentence."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (batch, seq), generator=generator).to(DEVICE)
    lengths = torch.linspace(0.2, 1.0, batch).mul(seq).long()  # mean 0.6
    mask = (torch.arange(seq) < lengths[:, None]).long().to(DEVICE)
    return {
        f"{batch} x {seq} full": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        f"{batch} x {seq} at {mask.float().mean():.0%}": {"input_ids": ids, "attention_mask": mask},
        "1 x 24, one sentence": {"input_ids": ids[:1, :24], "attention_mask": torch.ones_like(ids[:1, :24])},
    }


def synchronise() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def interleave(calls: dict[str, Callable], repeats: int, title: str) -> dict[str, list[float]]:
    """Seconds of each call, interleaved: A B C A B C ..., so that a drift of the machine's speed affects all equally."""
    times = {name: [] for name in calls}
    for turn in track(range(repeats + 1), description=title, transient=True, console=Console(stderr=True)):
        for name, call in calls.items():
            synchronise()
            start = time.perf_counter()
            call()
            synchronise()
            if turn:  # the first turn warms up
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: list[float], reference: list[float]) -> float:
    """Median of the ratios within a turn."""
    return median(a / b for a, b in zip(times, reference, strict=True))


def describe_machine() -> dict[str, str]:
    """Device and versions, reported with every measurement."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    return {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else f"{cpu}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


# ---- Tables


def format_table(header: Iterable[str], rows: Iterable[Iterable[str]], numbers: bool = False) -> str:
    """A Markdown table; with `numbers`, all columns but the first are right-aligned."""
    header = list(header)
    rule = ["---", *["---:"] * (len(header) - 1)] if numbers else ["---"] * len(header)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))
