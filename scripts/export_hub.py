"""Makes a self-contained folder for the Hub of a ModernALBERT or of a SentenceTransformer with one, and uploads it.

    python scripts/export_hub.py --model_name_or_path checkpoints/modernalbert-nano --output_dir runs/hub/nano

The folder holds weights, configuration, tokenizer, card and the model's code, so that it loads with
`trust_remote_code=True` where this package is not installed. It appears only after a fresh process has loaded it so, with
the outputs of the model. `--push_to_hub namespace/name` uploads it, `--dry_run` shows what would be uploaded.

`--dtype float16` halves the files: weights are stored in half precision, and load in float32. `--code false` leaves the
code out; `checkpoints/` is made so.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub.utils import validate_repo_id

from modernalbert.training.cli import parse_arguments, run_script
from modernalbert.training.export.folder import new_folder, push_folder
from modernalbert.training.export.hub import export_to_hub


logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class HubArguments:
    """Which model, and how its folder is made."""

    model_name_or_path: str = field(
        metadata={"help": "Hub name or folder of a ModernALBERT, or a SentenceTransformer."}
    )
    output_dir: str = field(metadata={"help": "Folder to write; must not exist, or be empty."})
    dtype: str | None = field(
        default=None,
        metadata={"help": f"What weights are stored in: {', '.join(DTYPES)}; default: what a folder's are in."},
    )
    code: bool = field(default=True, metadata={"help": "Write the model's code into the folder."})
    push_to_hub: str | None = field(default=None, metadata={"help": "Repository to upload the folder to."})
    dry_run: bool = field(default=False, metadata={"help": "List what would be uploaded, and upload nothing."})

    def __post_init__(self):
        if self.dtype not in (None, *DTYPES):
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got '{self.dtype}'")
        if self.push_to_hub is not None:
            validate_repo_id(self.push_to_hub)
            if not self.code:
                raise ValueError("without the code nobody can load the repository: leave `code` or `push_to_hub` out")
        elif self.dry_run:
            raise ValueError("`dry_run` shows what `push_to_hub` would upload: give both")


def main(argv: Sequence[str] | None = None) -> None:
    """Loads, writes, checks and uploads.

    Raises:
        FileExistsError: `output_dir` is not empty, or another process is writing it.
        RuntimeError: A process without the package could not load the folder, or got other outputs.
        ValueError: The model is no ModernALBERT, or a file to upload is not for the public.
    """
    (args,) = parse_arguments((HubArguments,), argv, description=__doc__)
    new_folder(args.output_dir, args.model_name_or_path)
    folder = export_to_hub(args.model_name_or_path, args.output_dir, DTYPES.get(args.dtype), args.code)
    weights = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    logger.info("%s", json.dumps({"folder": Path(folder).name, "bytes": size, "bytes_of_weights": weights}))
    if args.push_to_hub is not None:
        push_folder(folder, args.push_to_hub, args.dry_run)


if __name__ == "__main__":
    run_script(main)
