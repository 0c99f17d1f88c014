"""Builds a ModernALBERT from a ModernBERT and writes a self-contained folder, ready for training.

`tiny` from ModernBERT-base:

    python scripts/init_from_teacher.py --teacher answerdotai/ModernBERT-base --preset tiny --output_dir runs/tiny-init

A shallower student whose experts start as corrections towards the teacher's layers, on a CPU:

    python scripts/init_from_teacher.py --teacher answerdotai/ModernBERT-base --preset tiny --experts svd \
        --config_overrides '{"num_hidden_layers": 4, "num_hidden_groups": 4}' --output_dir runs/shallow-init

`initialization.json` in the folder says which teacher layers each group started from, and what was kept of them.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from transformers import ModernBertForMaskedLM, set_seed

from modernalbert import ModernAlbertConfig
from modernalbert.training.cli import Seed, check_names, parse_arguments, parse_json, run_script
from modernalbert.training.export.folder import export_model, new_folder
from modernalbert.training.initialization import (
    EXPERT_RULES,
    LAYER_RULES,
    check_fit,
    initialize_from_teacher,
    student_config,
)
from modernalbert.training.loading import load_config, load_model, load_tokenizer
from modernalbert.training.runs import write_json


logger = logging.getLogger(__name__)


@dataclass
class InitializationArguments:
    """Teacher, student, and rules of the initialisation."""

    teacher: str = field(metadata={"help": "Hub name or folder of a ModernBERT, with its tokenizer."})
    output_dir: str = field(metadata={"help": "Folder to write; must not exist, or be empty."})
    preset: str = field(default="tiny", metadata={"help": "Size: nano, tiny, medium, base or large."})
    config_overrides: str = field(default="{}", metadata={"help": "Fields of the configuration, as JSON."})
    layers: str = field(default="stepwise", metadata={"help": f"Source layers: {', '.join(LAYER_RULES)}."})
    experts: str = field(default="zero", metadata={"help": f"Start of the experts: {', '.join(EXPERT_RULES)}."})
    seed: Seed = field(default=42, metadata={"help": "Seed of the weights that the teacher has nothing for."})


def main(argv: Sequence[str] | None = None) -> dict:
    """Loads the teacher, builds the student, writes and checks it; returns the report.

    Raises:
        FileExistsError: `output_dir` is not empty.
        ValueError: The teacher is no ModernBERT, or the student does not fit it.
    """
    (args,) = parse_arguments((InitializationArguments,), argv, description=__doc__)
    new_folder(args.output_dir, args.teacher)
    overrides = parse_json("config_overrides", args.config_overrides)
    check_names(overrides, {field.name for field in fields(ModernAlbertConfig)}, "field in `config_overrides`,")
    # Check that the two fit before weights are downloaded.
    teacher_config = load_config(args.teacher)
    config = student_config(teacher_config, args.preset, args.layers, **overrides)
    check_fit(teacher_config, config, args.layers, args.experts)
    tokenizer = load_tokenizer(args.teacher)
    teacher, new = load_model(ModernBertForMaskedLM, args.teacher)
    if new:
        raise ValueError(f"'{args.teacher}' has no {', '.join(new)}: its masked-LM head was never trained")
    set_seed(args.seed)
    student, report = initialize_from_teacher(teacher, config, args.layers, args.experts)
    report = {"teacher": args.teacher, "seed": args.seed, "parameters": student.num_parameters(), **report}

    folder = export_model(student, tokenizer, args.output_dir)
    write_json(folder / "initialization.json", report)
    log_report(report)
    logger.info("%s: %.1fM parameters", folder, report["parameters"] / 1e6)
    return report


def log_report(report: dict) -> None:
    """Logs, group by group, the source layers and the errors."""
    embedding = report["embedding"]
    logger.info("embedding: %.1f%% of the energy kept", 100 * embedding["energy_kept"])
    logger.info("embedding: relative error %.3f after the norm", embedding["relative_error"])
    logger.info("decoder: relative error %.3f", report["decoder"]["relative_error"])
    for number, group in enumerate(report["groups"]):
        line = f"group {number}: teacher layers {group['layers']}"
        if "widened_from" in group:
            line += f", feed-forward layer widened from {group['widened_from'][0]} and {group['widened_from'][1]}"
        if "expert_energy" in group:
            line += f", experts catch {group['expert_energy']:.1%} of the layers in {group['segment']}"
        logger.info("%s", line)


if __name__ == "__main__":
    run_script(main)
