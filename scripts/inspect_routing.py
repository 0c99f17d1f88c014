"""Shows how a ModernALBERT with a router routes text: an HTML page, and its figures as JSON beside it.

    python scripts/inspect_routing.py runs/tiny --text held-out.jsonl --output runs/tiny-routing.html

On a CPU within a minute:

    python scripts/inspect_routing.py runs/nano --text README.md --max_tokens 20000 --output runs/nano-routing.html

For each MoL group and depth: use of the experts, which of them serve the same tokens, the tokens that are typical of
each, whether a few serve everything, and how much the choice of a token changes with depth. The model may have any
head, or none.
"""

import logging
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer

import modernalbert  # noqa: F401  (registers the Auto classes)
from modernalbert.training.export.cards import clean
from modernalbert.training.reports.routing import (
    check_router,
    describe_routing,
    read_batches,
    show_token,
    write_routing_report,
)


logger = logging.getLogger(__name__)


def with_progress(batches: Iterator[dict], max_tokens: int) -> Iterator[dict]:
    """The batches, with a bar that counts their tokens."""
    with tqdm(total=max_tokens, unit=" tokens", unit_scale=True) as bar:
        for batch in batches:
            yield batch
            bar.update(int(batch["attention_mask"].sum()))


def main(argv: Sequence[str] | None = None) -> dict:
    """Loads the encoder, routes the text and writes page and figures; returns the figures.

    Raises:
        FileExistsError: `--output`, or the JSON beside it, exists.
        FileNotFoundError: A text file is missing.
        ValueError: The model has no router, the text is empty, or an argument is out of range.
    """
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hub name or folder of a ModernALBERT with a router, and its tokenizer.")
    parser.add_argument("--text", nargs="+", required=True, help="Files or globs: parquet, jsonl, csv, txt, md.")
    parser.add_argument("--text_column", default="text", help="Column that holds the texts.")
    parser.add_argument("--max_tokens", type=int, default=200_000, help="Tokens to route, of texts drawn at random.")
    parser.add_argument("--max_length", type=int, default=128, help="Tokens of a packed row.")
    parser.add_argument("--output", type=Path, default=Path("routing_report.html"), help="The page.")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if args.output.suffix != ".html":
        raise ValueError(
            f"`output` is '{args.output}'; it must end in .html, since the figures go into a .json beside it"
        )
    for path in (args.output, args.output.with_suffix(".json")):
        if path.exists():
            raise FileExistsError(f"'{path}' exists; choose another `output` or remove it")
    config = AutoConfig.from_pretrained(args.model)
    check_router(args.model, config)
    for name, most in (("max_tokens", None), ("max_length", config.max_position_embeddings)):
        value = getattr(args, name)
        if value < 1 or (most is not None and value > most):
            raise ValueError(f"`{name}` ({value}) must be at least 1" + (f" and at most {most}" if most else ""))

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModel.from_pretrained(args.model, dtype="float32")
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    batches = read_batches(args.text, tokenizer, args.max_length, args.max_tokens, args.text_column)
    report = {
        "model": clean(args.model),
        "ffn_modulation": config.ffn_modulation,
        "router_type": config.router_type,
        "text": clean(args.text),
        **describe_routing(model, with_progress(batches, args.max_tokens), partial(show_token, tokenizer)),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_routing_report(args.output, report)
    logger.info("%d tokens of %d texts; see %s", report["tokens"], report["texts"], args.output)
    return report


if __name__ == "__main__":
    main()
