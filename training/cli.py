"""Arguments of the scripts, from the command line and from a recipe file; and how a script ends.

What a user can fix is a `ValueError`, an `OSError` or an `ImportError`, in our code and in the libraries that it calls:
[`run_script`] prints its message as one line and exits with code 2. Anything else is a bug of ours and shows its stack.
Loaders of files that raise something else for a damaged file are wrapped where they are called (`loading.py`,
`data.py`).
"""

import argparse
import difflib
import inspect
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from transformers import HfArgumentParser, TrainingArguments
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType


logger = logging.getLogger(__name__)

MISTAKES = (ValueError, OSError, ImportError, StrictDataclassError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class Bounds:
    """Bounds of a number, as in `Annotated[int, Bounds(least=1)]`; see [`check_numbers`]."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def allows(self, value: float) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        said = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{words} {bound:g}" for words, bound in said.items() if math.isfinite(bound))


# Upper bounds are far above any sensible value, and below what makes a library run out of memory or loop for ever.
COUNT, POSITIVE, NOT_NEGATIVE = Bounds(least=1, most=10**9), Bounds(above=0, most=1e9), Bounds(least=0, most=1e9)
BETA, SEED = Bounds(least=0, below=1), Bounds(least=0, most=2**32 - 1)

# Types of fields.
Count = Annotated[int, COUNT]
Positive = Annotated[float, POSITIVE]
NotNegative = Annotated[float, NOT_NEGATIVE]
Share = Annotated[float, Bounds(above=0, below=1)]
Seed = Annotated[int, SEED]
Workers = Annotated[int, Bounds(least=1, most=1024)]

TRAINING_BOUNDS = {
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), COUNT),
    **dict.fromkeys(("gradient_accumulation_steps", "save_total_limit", "eval_accumulation_steps"), COUNT),
    **dict.fromkeys(("num_train_epochs", "learning_rate", "adam_epsilon"), POSITIVE),
    **dict.fromkeys(("weight_decay", "max_grad_norm", "warmup_steps", "eval_delay"), NOT_NEGATIVE),
    **dict.fromkeys(("eval_steps", "save_steps", "logging_steps", "neftune_noise_alpha"), POSITIVE),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), BETA),
    **dict.fromkeys(("seed", "data_seed"), SEED),
    "dataloader_num_workers": Bounds(least=0, most=1024),
    "max_steps": Bounds(least=-1, most=10**9),
}

# Arguments of Trainer that no script obeys, and why. Other values are refused.
REFUSED = {
    "resume_from_checkpoint": (None, "the same command goes on from its last whole checkpoint by itself"),
    "push_to_hub": (
        False,
        "it would upload checkpoints as well; upload what the finished folder holds beside them, with `hf upload "
        "--exclude 'checkpoint-*'`, or the merged model with scripts/merge_experts.py",
    ),
    "do_predict": (False, "no script predicts without labels"),
    "save_only_model": (False, "a run could not go on from such checkpoints"),
    "enable_jit_checkpoint": (False, "Ctrl-C and SIGTERM write a checkpoint already"),
    "batch_eval_metrics": (False, "metrics are computed over all rows at once"),
    "eval_do_concat_batches": (True, "metrics are computed over all rows at once"),
}


class ArgumentParser(argparse.ArgumentParser):
    """Raises a mistake as one exception, without the usage of two hundred arguments; names cannot be abbreviated."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str):
        raise ValueError(f"{message}; `--help` lists the arguments")


class _DataclassParser(ArgumentParser, HfArgumentParser):
    """The same for dataclasses."""


class _ExactLoader(yaml.SafeLoader):
    """YAML without silent conversions: duplicate keys are refused, `010` and `1:30` stay text."""


def _exact_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
    loader.flatten_mapping(node)
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"`{key}` is given twice (line {node.start_mark.line + 1} and below)")
    return dict(zip(keys, (loader.construct_object(value, deep=True) for _, value in node.value), strict=True))


def _exact_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int | float | str:
    """A number as Python and JSON read it; other forms of YAML numbers stay text."""
    for number in (int, float):
        try:
            value = number(node.value)
        except ValueError:
            continue
        plain = node.value.lstrip("+-")
        return node.value if "_" in plain or (plain[:1] == "0" and plain[1:2].isdigit()) else value
    return node.value


def _exact_bool(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> bool | str:
    """`true` and `false`; `no` and `on` stay text, since a column or a class may have that name."""
    return {"true": True, "false": False}.get(node.value.lower(), node.value)


_ExactLoader.add_constructor("tag:yaml.org,2002:map", _exact_mapping)
_ExactLoader.add_constructor("tag:yaml.org,2002:bool", _exact_bool)
for _tag in ("int", "float", "timestamp"):
    _ExactLoader.add_constructor(f"tag:yaml.org,2002:{_tag}", _exact_number)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Arguments from a YAML file; duplicate keys are refused.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read, or is not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe '{path}'" + (", but a folder" if path.is_dir() else ""))
    try:
        recipe = yaml.load(path.read_text(encoding="utf-8-sig"), _ExactLoader)
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"cannot read the recipe '{path}': {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"'{path}' is no mapping of arguments, such as `max_length: 512`")
    return recipe


def parse_arguments(
    types: Sequence[type],
    argv: Sequence[str] | None = None,
    defaults: dict | None = None,
    description: str = "",
    fixed: dict[str, tuple[Any, str]] | None = None,
) -> tuple:
    """Fills dataclasses from the command line, then a recipe (`--config FILE`), then `defaults`, in this priority.

    Args:
        types: Dataclasses, as for `HfArgumentParser`.
        argv: Command line; default: the process's own.
        defaults: Values that differ from the dataclasses' own.
        description: Text of `--help`.
        fixed: Arguments that the script itself sets: their value and the reason. Other values are refused.

    Returns:
        One object of each type, whose numbers are in their bounds.

    Raises:
        FileNotFoundError: There is no such recipe.
        ValueError: A recipe cannot be read, an argument is unknown, or a value is not allowed.
    """
    parser = _DataclassParser(dataclass_types=types, description=description)
    parser.add_argument("--config", help="Recipe: a YAML file of arguments; those of the command line go before it.")
    recipe_parser = ArgumentParser(add_help=False)
    recipe_parser.add_argument("--config")
    path, rest = recipe_parser.parse_known_args(argv)
    fixed = {**(REFUSED if any(issubclass(kind, TrainingArguments) for kind in types) else {}), **(fixed or {})}
    values = {**(defaults or {}), **{name: value for name, (value, _) in fixed.items()}}
    if path.config is not None:
        values.update(read_recipe(path.config))
    known = {field.name for kind in types for field in fields(kind) if field.init}
    flags = []
    check_names(values, known, "argument")
    for name, value in values.items():
        if value is None:
            continue
        if value == []:
            parser.set_defaults(**{name: []})
        elif isinstance(value, list):
            if any(item is None or isinstance(item, list | dict) for item in value):
                raise ValueError(f"`{name}` ({json.dumps(value)}) must be a list of plain values")
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    try:
        *parsed, _, unknown = parser.parse_args_into_dataclasses(
            [*flags, *rest], return_remaining_strings=True, look_for_args_file=False
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"an argument is no JSON ({error}): {error.doc}") from error
    except TypeError as error:  # of a class that takes the keys of an argument, such as `accelerator_config`
        raise ValueError(f"an argument has a key or value that there is not: {error}") from error
    if unknown:
        name = unknown[0].lstrip("-").partition("=")[0]
        near = difflib.get_close_matches(name, known, n=1)
        raise ValueError(f"there is no argument `{unknown[0]}`{f'; did you mean `--{near[0]}`?' if near else ''}")
    for arguments in parsed:
        check_numbers(arguments)
        if isinstance(arguments, TrainingArguments) and arguments.n_gpu > 1:
            raise ValueError(
                f"{arguments.n_gpu} GPUs are visible to one process; start one process for each, with `torchrun "
                f"--nproc_per_node {arguments.n_gpu} ...`"
            )
        for name, (value, reason) in fixed.items():
            if getattr(arguments, name, value) != value:
                raise ValueError(f"`{name}` cannot be {getattr(arguments, name)!r} here: {reason}")
    return tuple(parsed)


def check_names(names: Iterable[str], known: Iterable[str], kind: str) -> None:
    """Sees that names are known ones.

    Raises:
        ValueError: One is not; the message has the nearest.
    """
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise ValueError(f"there is no {kind} `{name}`{f'; did you mean `{near[0]}`?' if near else ''}")


def parse_json(name: str, text: str) -> dict[str, Any]:
    """The value of an argument that is a JSON object without duplicate keys.

    Raises:
        ValueError: The text is something else.
    """

    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"a key of {[key for key, _ in pairs]} is given twice")
        return dict(pairs)

    try:
        value = json.loads(text, object_pairs_hook=once)
    except ValueError as error:
        raise ValueError(f"`{name}` is no JSON ({error}): {text}") from error
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` must be a JSON object, such as '{{\"a\": 1}}', got {text}")
    return value


def check_numbers(arguments: Any) -> None:
    """Checks that every number of a dataclass is finite, and within the bounds of its type or of Trainer's argument.

    Raises:
        ValueError: One is not.
    """
    hints = get_type_hints(type(arguments), include_extras=True)
    for field in fields(arguments):
        value = getattr(arguments, field.name)
        bounds = TRAINING_BOUNDS.get(field.name) if isinstance(arguments, TrainingArguments) else None
        bounds = bounds or next(find_bounds(hints.get(field.name)), None)
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if not math.isfinite(number):
                raise ValueError(f"`{field.name}` ({number}) must be a finite number")
            if bounds is not None and not bounds.allows(number):
                raise ValueError(f"`{field.name}` ({number:g}) must be {bounds}")
    if isinstance(arguments, TrainingArguments):
        check_training_arguments(arguments)


def check_training_arguments(arguments: TrainingArguments) -> None:
    """Sees what Trainer would see after the data was read, or never; warns of bf16 on a CPU that emulates it.

    Raises:
        ValueError: Arguments do not go together, or a value is not one that it may have.
    """
    if arguments.max_steps == 0:
        raise ValueError("`max_steps` (0) must be at least 1, or -1 for `num_train_epochs`")
    if arguments.save_strategy == SaveStrategy.BEST and arguments.eval_strategy == IntervalStrategy.NO:
        raise ValueError("`save_strategy best` needs evaluations: give `eval_strategy` `epoch` or `steps`")
    if arguments.lr_scheduler_kwargs:
        plateau = arguments.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU
        schedule = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(arguments.lr_scheduler_type)]
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau if plateau else schedule
        known = set(inspect.signature(schedule).parameters) - {"optimizer", "num_warmup_steps", "num_training_steps"}
        kind = f"`lr_scheduler_kwargs` of `{SchedulerType(arguments.lr_scheduler_type).value}`"
        check_names(arguments.lr_scheduler_kwargs, known, kind)
    for pair in (arguments.optim_args or "").replace(" ", "").split(","):
        if pair and pair.count("=") != 1:
            raise ValueError(f"`optim_args` ({arguments.optim_args}) must be `name=value`, several with commas")
    if arguments.bf16 and arguments.device.type == "cpu" and emulates_bf16():
        logger.warning(
            "this CPU has no instructions for bf16 and emulates them, many times slower than float32: `--bf16 false`"
        )


def emulates_bf16() -> bool:
    """Whether this CPU lacks instructions for bf16 (AVX512 or AMX on x86); its products then take many times float32's."""
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def find_bounds(hint: Any) -> Iterator[Bounds]:
    """Bounds of a type, also inside `X | None` and `list[X]`."""
    for part in getattr(hint, "__metadata__", ()):
        if isinstance(part, Bounds):
            yield part
    for part in get_args(hint):
        yield from find_bounds(part)


def run_script(main: Callable[[Sequence[str]], Any]) -> None:
    """Runs the `main` of a script, whose last line this is, with the command line of the process.

    What a user can fix (`MISTAKES`) is one line on stderr and exit code 2; `--debug`, or `MODERNALBERT_DEBUG=1` in the
    environment, shows the stack as well. Ctrl-C exits with 130, SIGTERM with 143, after temporary files are removed.
    """
    argv = sys.argv[1:]
    debug = os.environ.get("MODERNALBERT_DEBUG", "") not in ("", "0")
    for index, argument in enumerate(argv):
        # Trainer has an argument of this name, which takes a value.
        if argument == "--debug" and (argv[index + 1 : index + 2] or ["-"])[0].startswith("-"):
            debug = True
            del argv[index]
            break
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    process = os.getpid()

    def stop(number, frame):
        if os.getpid() == process:
            sys.exit(128 + number)
        os._exit(128 + number)  # a forked worker

    before = signal.signal(signal.SIGTERM, stop)
    try:
        main(argv)
    except KeyboardInterrupt:
        sys.exit(130)
    except MISTAKES as error:
        if debug:
            raise
        sys.stderr.write(f"error: {' '.join(str(error).split()) or type(error).__name__}\n")
        sys.exit(2)
    finally:
        signal.signal(signal.SIGTERM, before)
