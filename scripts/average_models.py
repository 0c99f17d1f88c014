"""Averages the weights of models that were trained from the same start: a new start, with something of each.

    python scripts/average_models.py --models runs/modernalbert-nano-masks \
        runs/modernalbert-nano-embed-sentences/sentence-transformer --output_dir runs/modernalbert-nano-average

In seconds, two shipped ones:

    python scripts/average_models.py --models checkpoints/modernalbert-nano checkpoints/modernalbert-nano-embed \
        --weights 3 1 --output_dir runs/average

Models that went apart from one model by training can often be averaged without losing what they have in common (Wortsman
et al. 2022, "Model soups", arXiv 2203.05482). Measure whether yours can. What the first alone has, such as a head, stays
as it is, but its experts correct by its share.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import AutoModelForMaskedLM

import modernalbert  # noqa: F401  (registers the Auto classes)
from modernalbert.tokenization import save_tokenizer
from modernalbert.training.alignment import same_tokenizer
from modernalbert.training.cli import Positive, parse_arguments, run_script
from modernalbert.training.export.embedder import read_projection, write_projection
from modernalbert.training.export.folder import draft_folder, new_folder
from modernalbert.training.initialization import average_tensors
from modernalbert.training.loading import check_folder, load_model, load_tokenizer


logger = logging.getLogger(__name__)


@dataclass
class AverageArguments:
    """Which models, and their shares."""

    models: list[str] = field(
        metadata={
            "help": "Hub names or folders of ModernALBERTs, with a masked-LM head or none; the first has all tensors."
        }
    )
    output_dir: str = field(metadata={"help": "Folder to write; must not exist, or be empty."})
    weights: list[Positive] = field(default_factory=list, metadata={"help": "Share of each model; default: equal."})

    def __post_init__(self):
        if len(self.models) < 2:
            raise ValueError(f"an average needs two `models` or more, got {len(self.models)}")
        if self.weights and len(self.weights) != len(self.models):
            raise ValueError(
                f"give one of `weights` for each of the {len(self.models)} models, got {len(self.weights)}"
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the average, with configuration and tokenizer of the first model.

    Raises:
        FileExistsError: `output_dir` is not empty, or another process is writing it.
        ValueError: Tokenizers or shapes differ, or the first model lacks a tensor.
    """
    (args,) = parse_arguments((AverageArguments,), argv, description=__doc__)
    new_folder(args.output_dir)
    tokenizer = load_tokenizer(args.models[0])
    for name in args.models:
        check_folder(name)
        if not same_tokenizer(tokenizer, load_tokenizer(name)):
            raise ValueError(
                f"the tokenizers of '{args.models[0]}' and '{name}' differ: their embeddings stand for other tokens"
            )
    models, states, projections = [], [], []
    for name in args.models:
        model, lacking = load_model(AutoModelForMaskedLM, name)
        if lacking and not models:
            raise ValueError(f"'{name}' lacks {', '.join(lacking)}: give a model that has all tensors first")
        if lacking:
            logger.info("'%s' lacks %s, which the others give", name, ", ".join(lacking))
        models.append(model)
        states.append({key: tensor for key, tensor in model.state_dict().items() if key not in lacking})
        projections.append(read_projection(name))
    first = models[0]
    weights = args.weights or [1.0] * len(states)
    first.load_state_dict(average_tensors(states, weights))
    with draft_folder(args.output_dir) as draft:
        first.save_pretrained(draft)
        save_tokenizer(tokenizer, draft)
        have = [index for index, projection in enumerate(projections) if projection is not None]
        if have:
            projection = projections[have[0]]
            tensors = [projections[index].state_dict() for index in have]
            projection.load_state_dict(average_tensors(tensors, [weights[index] for index in have]))
            write_projection(draft, projection)
    logger.info("'%s' holds the average of %d models", args.output_dir, len(states))


if __name__ == "__main__":
    run_script(main)
