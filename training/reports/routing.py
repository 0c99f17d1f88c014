"""How a model routes text: use of the experts, their tokens, co-activation, and change with depth."""

import html
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...configuration_modernalbert import ModernAlbertConfig
from ..data import load_texts
from ..packing import PackedCollator, pack_texts
from ..runs import write_json
from .html import INK, draw_matrix, draw_panels, write_page
from .tables import html_table


COVERAGES = (0.5, 0.8, 0.9)  # shares of all choices that the covering sets take
TYPICAL = 8  # tokens listed for an expert
MIN_COUNT = 10  # rarer tokens are not listed
SMOOTHING = 10  # pseudo-occurrences with average routing, added to those of every token
BATCH_SIZE = 16

NOTES = """<p><small>An expert is chosen where its weight is not 0; with the router <code>soft</code>, which weighs all
experts, where its weight is at least even. Router entropy: of its probabilities, mean over tokens, 1 = undecided. Usage
entropy: of the shares of choices, 1 = even. Leading: the expert has the largest summed weight of a sequence.
Co-activation: how often two experts serve the same token, divided by what independent choices with the same usage, and
of as many pairs, would give. Same set, Jaccard: the chosen sets of a token at this depth and the next; chance pairs the
two depths at random. Lift: share of a token's occurrences that the expert serves over its share of all tokens, smoothed.
A sequence is a text, or a part of one where the end of a packed row cuts it; nothing is masked.</small></p>"""


def check_router(name: str, config: ModernAlbertConfig) -> None:
    """Refuses a model without a router.

    Raises:
        ValueError: It is not a ModernALBERT, or has no router.
    """
    if config.model_type != "modernalbert":
        raise ValueError(f"'{name}' is a {config.model_type}; only ModernALBERT has a router")
    if not config.has_router:
        raise ValueError(
            f"'{name}' has no router: `ffn_modulation` is {config.ffn_modulation!r}, with {config.num_experts} experts "
            f"in {len(config.mol_groups)} groups; take a model of 'mol' or 'moa' from before its experts were merged"
        )


def read_batches(
    files: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_tokens: int,
    text_column: str = "text",
) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of packed rows with at most `max_tokens` tokens in all, of texts drawn at random from all files.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file cannot be read or holds no texts.
    """

    def cut():
        left = max_tokens
        for row in pack_texts(texts, tokenizer, max_length, text_column):
            yield {"input_ids": row["input_ids"][:left]}
            left -= len(row["input_ids"])
            if left <= 0:
                return

    texts = load_texts(files, text_column=text_column).shuffle(seed=0).to_iterable_dataset()
    rows, collate = cut(), PackedCollator(tokenizer)
    while batch := list(islice(rows, BATCH_SIZE)):
        yield collate(batch)


class RoutingSums:
    """Sums over the tokens of one run of a MoL layer; their size depends on the model, not on the text.

    Args:
        num_experts: E.
        vocab_size: V.
    """

    def __init__(self, num_experts: int, vocab_size: int):
        self.tokens = self.sequences = 0
        self.entropy = 0.0
        self.weights = torch.zeros(num_experts, dtype=torch.float64)
        self.pairs = torch.zeros(num_experts, num_experts, dtype=torch.long)  # tokens that two experts serve
        self.served = torch.zeros(vocab_size, num_experts, dtype=torch.int32)  # occurrences of a token
        self.leading = torch.zeros(num_experts, dtype=torch.long)  # sequences in which an expert has the most weight
        self.sets = Counter()  # tokens by the set of their experts
        self.sequence_sets = Counter()  # sequences by the set of experts that serve any of their tokens

    def add(self, logits, weights, chosen, token_ids, sequence_ids) -> None:
        """Adds the tokens of a batch.

        Args:
            logits: `[tokens, E]`.
            weights: 0 for experts that are not chosen, `[tokens, E]`.
            chosen: Bool `[tokens, E]`.
            token_ids: `[tokens]`.
            sequence_ids: Number of a token's sequence in the batch, from 0, `[tokens]`.
        """
        log_probabilities = logits.double().log_softmax(dim=-1)
        self.entropy -= (log_probabilities.exp() * log_probabilities).sum().item() / math.log(logits.shape[-1])
        self.tokens += len(weights)
        self.weights += weights.double().sum(dim=0)
        self.pairs += (chosen.double().T @ chosen.double()).long()
        self.served.index_add_(0, token_ids, chosen.int())
        by_sequence = weights.new_zeros(int(sequence_ids.max()) + 1, weights.shape[1])
        self.sequences += len(by_sequence)
        self.leading += torch.bincount(
            by_sequence.index_add(0, sequence_ids, weights).argmax(dim=-1), minlength=len(chosen.T)
        )
        self.sets += count_sets(chosen)
        self.sequence_sets += count_sets(by_sequence.index_add(0, sequence_ids, chosen.to(weights)) > 0)

    @property
    def usage(self) -> torch.Tensor:
        """Share of tokens that each expert serves, `[E]`."""
        return self.pairs.diagonal().double() / self.tokens


class ChangeSums:
    """Sums over tokens of the similarity of the chosen sets at one depth and the next."""

    def __init__(self):
        self.same = 0
        self.jaccard = 0.0

    def add(self, chosen: torch.Tensor, following: torch.Tensor) -> None:
        """Adds the tokens of a batch, bool `[tokens, E]` each."""
        self.same += int((chosen == following).all(dim=-1).sum())
        self.jaccard += ((chosen & following).sum(dim=-1) / (chosen | following).sum(dim=-1)).double().sum().item()


def count_sets(chosen: torch.Tensor) -> Counter:
    """Number of rows of bool `[rows, E]` with each set of experts."""
    rows, counts = torch.unique(chosen.byte(), dim=0, return_counts=True)
    sets = (tuple(row.nonzero().flatten().tolist()) for row in rows)
    return Counter(dict(zip(sets, counts.tolist(), strict=True)))


@torch.no_grad()
def describe_routing(
    model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]], show: Callable[[int], str] = str
) -> dict[str, Any]:
    """Routes batches and describes the routing at every depth of every MoL group.

    Args:
        model: The encoder, or a model with one, that has a router; it is left in evaluation mode.
        batches: Of `PackedCollator`; padding is not counted.
        show: Text of a token id.

    Returns:
        `tokens`, `sequences` and `groups`: for each group `depths`, one [`describe_depth`] each, and `changes`, one
        [`describe_change`] for each depth but the last.

    Raises:
        ValueError: There is no token.
    """
    encoder, config = model.base_model.eval(), model.config
    groups = sorted(config.mol_groups)
    sums = {
        group: [RoutingSums(config.num_experts, config.vocab_size) for _ in range(config.layers_per_group)]
        for group in groups
    }
    changes = {group: [ChangeSums() for _ in sums[group][1:]] for group in groups}
    token_counts = torch.zeros(config.vocab_size, dtype=torch.long)
    runs = defaultdict(list)  # router outputs of a batch at each depth, by group

    def keep(group):
        return lambda router, inputs, outputs: runs[group].append([tensor.flatten(0, -2).cpu() for tensor in outputs])

    handles = [encoder.layers[group].mlp.router.register_forward_hook(keep(group)) for group in groups]
    try:
        for batch in batches:
            runs.clear()
            encoder(**{name: tensor.to(model.device) for name, tensor in batch.items()})
            real = batch["attention_mask"].bool()
            token_ids, sequence_ids = batch["input_ids"][real], (batch["position_ids"][real] == 0).cumsum(0) - 1
            token_counts += torch.bincount(token_ids, minlength=config.vocab_size)
            # Routers see real tokens only, in this order; or, where rows are kept, padding as well.
            for group in groups:
                runs[group] = [
                    [tensor if len(tensor) == len(token_ids) else tensor[real.flatten()] for tensor in run]
                    for run in runs[group]
                ]
                choices = [spread(*choice, config) for _, *choice in runs[group]]
                for depth, (logits, *_), choice in zip(sums[group], runs[group], choices, strict=True):
                    depth.add(logits, *choice, token_ids, sequence_ids)
                for change, (_, chosen), (_, following) in zip(changes[group], choices, choices[1:], strict=False):
                    change.add(chosen, following)
    finally:
        for handle in handles:
            handle.remove()
    if not token_counts.any():
        raise ValueError("the texts are empty: there is no token to route")
    return {
        "tokens": sums[groups[0]][0].tokens,
        "sequences": sums[groups[0]][0].sequences,
        "groups": {
            str(group): {
                "depths": [describe_depth(depth, token_counts, show) for depth in depths],
                "changes": [
                    describe_change(*three) for three in zip(changes[group], depths, depths[1:], strict=False)
                ],
            }
            for group, depths in sums.items()
        },
    }


def spread(weights: torch.Tensor, experts: torch.Tensor, config: ModernAlbertConfig) -> tuple[torch.Tensor, ...]:
    """Weights by expert and which are chosen, `[tokens, E]`, from a router's weights and experts, `[tokens, k]`."""
    weights = weights.new_zeros(len(weights), config.num_experts).scatter(1, experts, weights)
    # The rounding of an even softmax is no preference.
    return weights, weights >= (1 - 1e-4) / config.num_experts if config.router_type == "soft" else weights > 0


def describe_depth(sums: RoutingSums, token_counts: torch.Tensor, show: Callable[[int], str]) -> dict[str, Any]:
    """Routing of one run of a MoL layer.

    Args:
        sums: Sums of this run.
        token_counts: Occurrences of each token, `[V]`.
        show: Text of a token id.

    Returns:
        `usage`, share of all choices, and `mean_weight`, both `[E]`; `experts_per_token`; `router_entropy`,
        `usage_entropy`, 1 where even; `coactivation` and `coactivation_lift`, `[E, E]`, the latter None on the diagonal and
        where nothing is expected; `covering_sets`, see [`find_covering_set`]; `typical`, see [`typical_tokens`].
    """
    usage = sums.usage / sums.usage.sum()
    joint = sums.pairs.double() / sums.tokens
    apart = 1 - torch.eye(len(usage), dtype=torch.float64)
    expected = apart * torch.outer(usage, usage)
    # Experts that a token chooses are different, so that fewer pairs are possible than independence counts.
    expected *= (apart * joint).sum() / expected.sum()
    return {
        "usage": usage.tolist(),
        "mean_weight": (sums.weights / sums.tokens).tolist(),
        "experts_per_token": sums.usage.sum().item(),
        "router_entropy": sums.entropy / sums.tokens,
        "usage_entropy": torch.special.entr(usage).sum().item() / math.log(len(usage)),
        "coactivation": joint.tolist(),
        "coactivation_lift": [
            [found / likely if likely > 0 else None for found, likely in zip(*rows, strict=True)]
            for rows in zip(joint.tolist(), expected.tolist(), strict=True)
        ],
        "covering_sets": [find_covering_set(sums, coverage) for coverage in COVERAGES],
        "typical": [typical_tokens(sums, expert, token_counts, show) for expert in range(len(usage))],
    }


def find_covering_set(sums: RoutingSums, coverage: float) -> dict[str, Any]:
    """The smallest set of experts that takes a share of all choices, and the tokens and sequences that it serves.

    Returns:
        `coverage`; `experts`; `even`, the size of the set if all experts were used equally; share of `tokens` and of
        `sequences` that at least one of them serves; `leading`, share of sequences in which one of them has the most weight.
    """
    choices = sums.pairs.diagonal()
    order = choices.argsort(descending=True, stable=True)
    short = choices[order].cumsum(0) < coverage * choices.sum() * (1 - 1e-9)
    experts = sorted(order[: int(short.sum()) + 1].tolist())

    def share(sets: Counter) -> float:
        return sum(count for members, count in sets.items() if not set(experts).isdisjoint(members)) / sets.total()

    return {
        "coverage": coverage,
        "experts": experts,
        "even": math.ceil(coverage * len(choices) - 1e-9),
        "tokens": share(sums.sets),
        "sequences": share(sums.sequence_sets),
        "leading": sums.leading[experts].sum().item() / sums.sequences,
    }


def typical_tokens(
    sums: RoutingSums, expert: int, token_counts: torch.Tensor, show: Callable[[int], str]
) -> list[dict[str, Any]]:
    """At most `TYPICAL` tokens that an expert serves more often than the average token, by decreasing lift.

    With n occurrences, c of them served, and the expert's share p of all tokens, the lift is `(c + m p) / (n + m) / p`,
    m being `SMOOTHING`: a rare token needs more to stand out.
    """
    usage = sums.usage[expert].item()
    if usage == 0:
        return []
    served = sums.served[:, expert].double()
    lifts = (served + SMOOTHING * usage) / (token_counts + SMOOTHING) / usage
    lifts[token_counts < MIN_COUNT] = 0
    best = lifts.argsort(descending=True, stable=True)[:TYPICAL]
    return [
        {"token": show(token), "count": int(token_counts[token]), "lift": lifts[token].item()}
        for token in best.tolist()
        if lifts[token] > 1
    ]


def describe_change(change: ChangeSums, sums: RoutingSums, following: RoutingSums) -> dict[str, float]:
    """Similarity of a token's sets at two successive depths: share of equal sets and mean Jaccard, each with chance.

    Chance is the exact mean over all pairs of a token at the first depth and any token at the second.
    """
    sets, counts = indicators(sums)
    next_sets, next_counts = indicators(following)
    jaccard = 0.0
    for part, part_counts in zip(sets.split(256), counts.split(256), strict=True):
        common = part @ next_sets.T
        union = part.sum(dim=-1, keepdim=True) + next_sets.sum(dim=-1) - common
        jaccard += (part_counts @ (common / union) @ next_counts).item()
    same = sum(count * following.sets[members] for members, count in sums.sets.items())
    return {
        "same_set": change.same / sums.tokens,
        "same_set_chance": same / sums.tokens**2,
        "jaccard": change.jaccard / sums.tokens,
        "jaccard_chance": jaccard / sums.tokens**2,
    }


def indicators(sums: RoutingSums) -> tuple[torch.Tensor, torch.Tensor]:
    """Sets that occur, as 0 and 1 `[sets, E]`, and their counts, `[sets]`."""
    members = [F.one_hot(torch.tensor(experts), len(sums.weights)).sum(dim=0) for experts in sums.sets]
    return torch.stack(members).double(), torch.tensor(list(sums.sets.values())).double()


def show_token(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """A token as text, with `␣` for a space; incomplete characters are shown as in the vocabulary."""
    text = tokenizer.decode([token_id])
    if "\ufffd" in text or not text:
        return tokenizer.convert_ids_to_tokens(token_id)
    text = "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
    return text.replace(" ", "␣")


def write_routing_report(path: str | Path, report: dict[str, Any]) -> None:
    """Writes a self-contained page, and the report as JSON beside it, both atomically.

    Args:
        path: HTML file.
        report: Output of [`describe_routing`], with the facts `model`, `ffn_modulation`, `router_type` and `text`.
    """
    path = Path(path)
    write_json(path.with_suffix(".json"), report)
    facts = {name: report[name] for name in ("model", "ffn_modulation", "router_type")}
    facts |= {"text": ", ".join(report["text"])}
    facts |= {name: f"{report[name]:,}" for name in ("tokens", "sequences")}
    parts = [html_table(facts.items()), NOTES]
    for group, routing in report["groups"].items():
        group = html.escape(group)
        parts += [f"<h2>Group {group}</h2>", html_table(tabulate_depths(routing))]
        parts.append(f"<figure>{draw_panels(draw_group(routing))}</figure>")
        parts += ["<h3>Do a few experts serve everything?</h3>", html_table(tabulate_covering_sets(routing["depths"]))]
        for depth, facts in enumerate(routing["depths"]):
            parts += [
                f"<h3>Typical tokens, group {group}, depth {depth}</h3>",
                html_table(tabulate_tokens(facts["typical"])),
            ]
    write_page(path, f"Routing of {report['model']}", parts)


def tabulate_depths(routing: dict[str, list]) -> list[tuple[str, ...]]:
    """A header and one row per depth; similarity to the next depth has chance in brackets."""
    rows = [("", "router entropy", "usage entropy", "experts a token", "least, most used", "same set next", "Jaccard")]
    for depth, facts in enumerate(routing["depths"]):
        figures = [f"{facts[name]:.3f}" for name in ("router_entropy", "usage_entropy", "experts_per_token")]
        figures.append(", ".join(f"{extreme(facts['usage']):.1%}" for extreme in (min, max)))
        for change in routing["changes"][depth : depth + 1]:
            figures.append(f"{change['same_set']:.1%} ({change['same_set_chance']:.1%})")
            figures.append(f"{change['jaccard']:.2f} ({change['jaccard_chance']:.2f})")
        rows.append((f"depth {depth}", *figures))
    return rows


def tabulate_covering_sets(depths: list[dict]) -> list[tuple[str, ...]]:
    """A header and one row per depth and share of choices."""
    rows = [
        ("", "share of choices", "experts", "if even", "which", "tokens served", "sequences served", "sequences led")
    ]
    for depth, facts in enumerate(depths):
        for covering in facts["covering_sets"]:
            shares = (f"{covering[name]:.0%}" for name in ("tokens", "sequences", "leading"))
            experts = covering["experts"]
            which = ", ".join(map(str, experts))
            counts = (f"{covering['coverage']:.0%}", len(experts), covering["even"])
            rows.append((f"depth {depth}", *counts, which, *shares))
    return rows


def tabulate_tokens(typical: list[list[dict]]) -> list[tuple[str, ...]]:
    """One row per expert: its tokens, truncated, with their lifts."""
    rows = []
    for expert, tokens in enumerate(typical):
        texts = [token["token"] if len(token["token"]) <= 20 else token["token"][:19] + "…" for token in tokens]
        cells = (f"{text} ({token['lift']:.1f})" for text, token in zip(texts, tokens, strict=True))
        rows.append((f"expert {expert}", " · ".join(cells) or "none that occurs often enough"))
    return rows


def draw_group(routing: dict[str, list]) -> list[Callable]:
    """Panels of a group: usage and weight over depth, change with depth, and co-activation for each depth."""

    def over_depth(name, title):
        def draw(axes):
            curves = list(zip(*(facts[name] for facts in routing["depths"]), strict=True))
            for expert, values in enumerate(curves):
                axes.plot(values, marker=".", label=str(expert))
            axes.axhline(1 / len(curves), color=INK, linestyle="--", label="even")
            axes.set(title=title, xlabel="depth", ylim=(0, None), xticks=range(len(routing["depths"])))
            axes.legend(fontsize="x-small", ncols=3)

        return draw

    def change(axes):
        names = {"same_set": "same set", "jaccard": "Jaccard"}
        for color, (name, label) in enumerate(names.items()):
            for suffix, style in (("", ".-"), ("_chance", "x:")):
                values = [facts[name + suffix] for facts in routing["changes"]]
                axes.plot(values, f"C{color}{style}", label=label + suffix.replace("_", ", "))
        axes.set(title="alike at this depth and the next", xlabel="depth", ylim=(0, 1.05))
        axes.set_xticks(range(len(routing["changes"])))
        axes.legend(fontsize="x-small")

    def coactivation(depth, facts):
        def draw(axes):
            lifts = [[math.nan if lift is None else lift for lift in row] for row in facts["coactivation_lift"]]
            draw_matrix(axes, lifts, center=1)
            axes.set(title=f"co-activation, over chance, depth {depth}")

        return draw

    panels = [over_depth("usage", "share of choices"), over_depth("mean_weight", "mean weight")]
    panels += [change] if routing["changes"] else []
    return panels + [coactivation(depth, facts) for depth, facts in enumerate(routing["depths"])]
