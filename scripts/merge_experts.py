"""Merges the experts of a ModernALBERT and writes a self-contained folder.

    python scripts/merge_experts.py --model_name_or_path runs/mrpc --output_dir runs/mrpc-merged

The folder holds weights, code and tokenizer; a fresh process without this package has loaded it before the command
reports success. By default the merged adapter is folded into the shared weights: a plain recursive encoder, without
routing. `--keep_adapter` leaves it beside them (`num_experts=1`).
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import AutoConfig, AutoTokenizer, HfArgumentParser

import modernalbert
from modernalbert.merging_modernalbert import METHODS
from modernalbert.training.export import export_model, new_folder


logger = logging.getLogger(__name__)


@dataclass
class MergingArguments:
    """What to merge, and how."""

    model_name_or_path: str = field(metadata={"help": "Hub name or folder of a ModernALBERT with experts."})
    output_dir: str = field(metadata={"help": "Folder to write; must not exist, or be empty."})
    method: str = field(default="uniform", metadata={"help": f"Merging method: {', '.join(METHODS)}."})
    keep_adapter: bool = field(default=False, metadata={"help": "Keep the merged adapter beside the shared weights."})


def main(argv: Sequence[str] | None = None) -> None:
    """Loads, merges, writes and checks.

    Raises:
        FileExistsError: `output_dir` is not empty.
        ValueError: The model is no ModernALBERT, has no experts, or the method is unknown.
    """
    (args,) = HfArgumentParser(MergingArguments).parse_args_into_dataclasses(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    new_folder(args.output_dir)
    config = AutoConfig.from_pretrained(args.model_name_or_path)
    if config.model_type != "modernalbert":
        raise ValueError(f"'{args.model_name_or_path}' is a {config.model_type}; only ModernALBERT has experts")
    model = getattr(modernalbert, config.architectures[0]).from_pretrained(args.model_name_or_path)
    model.merge_experts(args.method, fold=not args.keep_adapter)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    folder = export_model(model, tokenizer, args.output_dir)
    logger.info("%s", json.dumps({"folder": str(folder), "method": args.method, "parameters": model.num_parameters()}))


if __name__ == "__main__":
    main()
