"""Exports a ModernALBERT without experts to ONNX.

    python scripts/merge_experts.py --model_name_or_path runs/mrpc --output_dir runs/mrpc-merged
    python scripts/export_onnx.py --model_name_or_path runs/mrpc-merged --output_dir runs/mrpc-onnx --quantize

The folder holds `model.onnx`, configuration and tokenizer. Batch and length are free; inputs are `input_ids` and
`attention_mask`, outputs those of the head. onnxruntime has run the model, and got what PyTorch gets, before the command
reports success. `--quantize` adds `model_int8.onnx`, for CPUs, and reports how far it is from the model.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoConfig, AutoTokenizer, HfArgumentParser

import modernalbert
from modernalbert.training.export.folder import new_folder
from modernalbert.training.export.onnx import export_onnx


logger = logging.getLogger(__name__)


@dataclass
class OnnxArguments:
    """What to export, and how."""

    model_name_or_path: str = field(metadata={"help": "Hub name or folder of a ModernALBERT without experts."})
    output_dir: str = field(metadata={"help": "Folder to write; must not exist, or be empty."})
    quantize: bool = field(default=False, metadata={"help": "Write `model_int8.onnx` as well."})
    opset: int | None = field(default=None, metadata={"help": "Version of the operator set; default: torch's."})


def main(argv: Sequence[str] | None = None) -> None:
    """Loads, exports and checks.

    Raises:
        FileExistsError: `output_dir` is not empty.
        RuntimeError: onnxruntime got other outputs than PyTorch.
        ValueError: The model is no ModernALBERT, or has experts, or there is no such opset.
    """
    (args,) = HfArgumentParser(OnnxArguments).parse_args_into_dataclasses(argv)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logger.setLevel(logging.INFO)  # not everyone's: onnxruntime's quantiser tells of every tensor
    new_folder(args.output_dir)
    config = AutoConfig.from_pretrained(args.model_name_or_path)
    if config.model_type != "modernalbert":
        raise ValueError(f"'{args.model_name_or_path}' is a {config.model_type}, expected a ModernALBERT")
    model_class = getattr(modernalbert, config.architectures[0])
    model = model_class.from_pretrained(args.model_name_or_path, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    for name, difference in export_onnx(model, tokenizer, args.output_dir, args.quantize, args.opset).items():
        file = Path(args.output_dir) / name
        report = {"file": str(file), "bytes": file.stat().st_size, "class": model_class.__name__}
        report |= {"largest_difference": difference.largest, "largest_output": difference.scale}
        logger.info("%s", json.dumps(report))


if __name__ == "__main__":
    main()
