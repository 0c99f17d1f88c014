"""Exports a ModernALBERT without experts to ONNX.

    python scripts/merge_experts.py --model_name_or_path runs/mrpc --output_dir runs/mrpc-merged
    python scripts/export_onnx.py --model_name_or_path runs/mrpc-merged --output_dir runs/mrpc-onnx --quantize

The folder holds `model.onnx`, configuration and tokenizer. Batch and length are free; inputs are `input_ids` and
`attention_mask`, outputs those of the head. The folder appears only after onnxruntime has run the model with the same outputs as
PyTorch. `--num_hidden_layers` exports the model at another depth. `--quantize` adds `model_int8.onnx`, for CPUs, and reports
how far it is from the model.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from modernalbert.training.cli import Count, parse_arguments, run_script
from modernalbert.training.export.folder import check_exportable, load_exportable, new_folder
from modernalbert.training.export.onnx import check_onnx, export_onnx


logger = logging.getLogger(__name__)


@dataclass
class OnnxArguments:
    """Model, output, and form of the export."""

    model_name_or_path: str = field(metadata={"help": "Hub name or folder of a ModernALBERT without experts."})
    output_dir: str = field(metadata={"help": "Folder to write; must not exist, or be empty."})
    num_hidden_layers: Count | None = field(
        default=None, metadata={"help": "Layers to run, a multiple of the model's groups; default: the model's."}
    )
    quantize: bool = field(default=False, metadata={"help": "Write `model_int8.onnx` as well."})
    opset: Count | None = field(default=None, metadata={"help": "Version of the operator set; default: torch's."})


def main(argv: Sequence[str] | None = None) -> None:
    """Loads, exports and checks.

    Raises:
        FileExistsError: `output_dir` is not empty.
        RuntimeError: onnxruntime got other outputs than PyTorch.
        ValueError: The model is no ModernALBERT, or has experts, or there is no such opset.
    """
    (args,) = parse_arguments((OnnxArguments,), argv, description=__doc__)
    # onnxruntime's quantiser logs every tensor, at INFO on the root logger.
    logging.getLogger().setLevel(logging.WARNING)
    logger.setLevel(logging.INFO)
    new_folder(args.output_dir, args.model_name_or_path)
    config = check_exportable(args.model_name_or_path)
    check_onnx(config, args.opset)
    if args.num_hidden_layers is not None:
        config = config.at_depth(args.num_hidden_layers)
    model, tokenizer = load_exportable(args.model_name_or_path, config=config)
    for name, difference in export_onnx(model, tokenizer, args.output_dir, args.quantize, args.opset).items():
        file = Path(args.output_dir) / name
        report = {"file": str(file), "bytes": file.stat().st_size, "class": type(model).__name__}
        report |= {"largest_difference": difference.largest, "largest_output": difference.scale}
        logger.info("%s", json.dumps(report))


if __name__ == "__main__":
    run_script(main)
