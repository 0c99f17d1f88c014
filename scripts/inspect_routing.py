"""Shows how a ModernALBERT with a router routes text: an HTML page, and its figures as JSON beside it.

    python scripts/inspect_routing.py runs/tiny --text held-out.jsonl --output runs/tiny-routing.html

On a CPU within a minute:

    python scripts/inspect_routing.py runs/nano --text README.md --max_tokens 20000 --output runs/nano-routing.html

For each MoL group and depth: use of the experts, which of them serve the same tokens, the tokens that are typical of
each, whether a few serve everything, and how much the choice of a token changes with depth. The model may have any
head, or none.
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModel

import modernalbert  # noqa: F401  (registers the Auto classes)
from modernalbert.training.cli import Count, parse_arguments, run_script
from modernalbert.training.export.folder import check_finite, check_writable
from modernalbert.training.export.redaction import redact
from modernalbert.training.loading import load_config, load_model, load_tokenizer
from modernalbert.training.reports.routing import (
    check_router,
    describe_routing,
    read_batches,
    show_token,
    write_routing_report,
)


logger = logging.getLogger(__name__)


@dataclass
class RoutingArguments:
    """Model, text and output."""

    model: str = field(
        metadata={"help": "Hub name or folder of a ModernALBERT with a router; may come first, without a name."}
    )
    text: list[str] = field(metadata={"help": "Files or globs with the text."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the texts."})
    max_tokens: Count = field(default=200_000, metadata={"help": "Tokens to route, of texts drawn at random."})
    max_length: Count = field(default=128, metadata={"help": "Tokens of a packed row."})
    output: str = field(default="routing_report.html", metadata={"help": "The page."})


def with_progress(batches: Iterator[dict], max_tokens: int) -> Iterator[dict]:
    """The batches, with a bar that counts their tokens."""
    with tqdm(total=max_tokens, unit=" tokens", unit_scale=True) as bar:
        for batch in batches:
            yield batch
            bar.update(int(batch["attention_mask"].sum()))


def check_output(output: Path) -> None:
    """Checks, before any work, that page and figures can be written.

    Raises:
        FileExistsError: One of them exists.
        PermissionError: Their folder cannot be written to.
        ValueError: The page has another ending than `.html`.
    """
    if output.suffix != ".html":
        raise ValueError(f"`output` is '{output}'; it must end in .html, since the figures go into a .json beside it")
    for path in (output, output.with_suffix(".json")):
        if path.exists():
            raise FileExistsError(f"'{path}' exists; choose another `output` or remove it")
    check_writable(output)


def main(argv: Sequence[str] | None = None) -> dict:
    """Loads the encoder, routes the text and writes page and figures; returns the figures.

    Raises:
        OSError: `output` exists or cannot be written, or a text file is missing.
        ValueError: The model has no router, the text is empty, or an argument is out of range.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        argv.insert(0, "--model")
    (args,) = parse_arguments((RoutingArguments,), argv, description=__doc__)
    output = Path(args.output)
    check_output(output)
    config = load_config(args.model)
    check_router(args.model, config)
    if args.max_length > config.max_position_embeddings:
        raise ValueError(
            f"`max_length` ({args.max_length}) must be at most the {config.max_position_embeddings} tokens that the model "
            "takes"
        )
    tokenizer = load_tokenizer(args.model)
    model, _ = load_model(AutoModel, args.model)
    check_finite(model, args.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    batches = read_batches(args.text, tokenizer, args.max_length, args.max_tokens, args.text_column)
    report = {
        "model": redact(args.model),
        "ffn_modulation": config.ffn_modulation,
        "router_type": config.router_type,
        "text": redact(args.text),
        **describe_routing(model, with_progress(batches, args.max_tokens), partial(show_token, tokenizer)),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_routing_report(output, report)
    logger.info("%d tokens of %d sequences; see %s", report["tokens"], report["sequences"], output)
    return report


if __name__ == "__main__":
    run_script(main)
