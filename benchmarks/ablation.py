"""What the modulation of shared layers is worth: the paper's ablation, at equal tokens and at equal parameters.

    python benchmarks/ablation.py --train_data "prose/train-*.parquet" --validation_data prose/validation.parquet \
        --tasks tasks.json --output_dir runs/benchmark-ablation

Every variant is pretrained on the same tokens, by `scripts/pretrain.py`: with the first seed at each of
`--learning_rates`, then with all `--seeds` at its best rate, so that none is compared at the rate of another. All variants of a seed
start as one function, that of `none`: corrections that are 0, layers that are copies, neurons without an output. Else chance in the
first weights would be more than what they are compared for. Its weights are random, or with `--start` those of trained models, one
for each seed. With `--teacher` the variants start from the layers of a ModernBERT, by `scripts/init_from_teacher.py`; only `depth_lora`
takes its LoRAs from there as well (as Relaxed Recursive Transformers do).
`unshared` has the widths of the others, and weights for every layer it runs; it says what sharing costs. Variants that end in
`-matched` are brought to the parameters of `mol`. `--changes` adds variants that change fields of `mol`, `--num_hidden_groups` pairs
without and with experts whose groups of layers are more and run less often.
With `--distil`, they learn the states of an encoder, on clean text, which has less noise than masked words: the loss is 1 - cosine of
tokens plus that of pooled texts. With `--tasks`, written as for `benchmarks/merging.py`, the models are then fine-tuned.

The command can be given again: a run that has ended is kept, one that was stopped is resumed. Writes `ablation.json`,
`ablation.md`, and plots: `ablation.svg`, loss over tokens and quality over parameters, `ablation-usage.svg`, use of the
experts over depth, `ablation-sharing.svg`, what sharing costs and what experts give back, over the runs of a group.
"""

import copy
import json
import math
import re
import statistics
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib
import torch
from common import (
    BATCH,
    LENGTH,
    MASKED,
    bind_folder,
    count,
    fine_tune,
    format_table,
    limit_rows,
    positive,
    pretrain,
    read_curve,
    read_tasks,
    run_jobs,
    start_script,
    train_tokenizer,
)
from scipy.stats import t
from transformers import set_seed

from modernalbert import ModernAlbertConfig, ModernAlbertForMaskedLM, ModernAlbertModel
from modernalbert.configuration_modernalbert import PRESETS
from modernalbert.tokenization import load_tokenizer, padded_vocab_size, vocabulary_fields
from modernalbert.training.cli import parse_json, run_script
from modernalbert.training.distillation import Teacher, start_from_table
from modernalbert.training.export.embedder import read_projection, write_projection
from modernalbert.training.export.folder import draft_folder
from modernalbert.training.reports.html import draw_panels
from modernalbert.training.reports.routing import describe_routing, draw_group, read_batches
from modernalbert.training.runs import describe_model, write_json, write_text


# Fields that differ from the preset's, which is `mol`. `overrides` adds what `unshared` and `-matched` need.
VARIANTS = {
    "unshared": {"ffn_modulation": "none"},
    "none": {"ffn_modulation": "none"},
    "depth_lora": {"ffn_modulation": "depth_lora"},
    "moa": {"ffn_modulation": "moa"},
    "mol": {"ffn_modulation": "mol"},
    "mol-depth": {"router_type": "depth"},
    "mol-soft": {"router_type": "soft"},
    "mol-top_p": {"router_type": "top_p"},
    "mol-sequence": {"router_type": "sequence"},
    "none-matched": {"ffn_modulation": "none"},
    "depth_lora-matched": {"ffn_modulation": "depth_lora"},
    "moa-matched": {"ffn_modulation": "moa"},
}
OPTIONAL = ("mol-soft", "mol-top_p", "mol-sequence")
PAIRS = [("mol", other + kind) for kind in ("", "-matched") for other in ("none", "depth_lora", "moa")]
PAIRS += [(name, "mol") for name in VARIANTS if name.startswith("mol-")]
USAGE_TOKENS = 20_000
COLOURS = matplotlib.colormaps["tab20"].colors  # for more variants than the default has colours


def match_parameters(config: ModernAlbertConfig, total: int) -> ModernAlbertConfig:
    """A copy of a configuration with as many parameters as another model, within 2%, for a fair comparison.

    One field is changed: `expert_rank`, with `"none"` `mol_intermediate_size`. `expert_alpha` stays.

    Args:
        config: Configuration to copy.
        total: Parameters of the other model, see `ModernAlbertConfig.num_parameters`.

    Raises:
        ValueError: No value of the field comes near enough.
    """
    field = "mol_intermediate_size" if config.modulation == "none" else "expert_rank"

    def replace(value: int) -> ModernAlbertConfig:
        changed = copy.deepcopy(config)
        setattr(changed, field, value)
        return changed

    least = replace(1).num_parameters()
    step = replace(2).num_parameters() - least
    # The count is linear in the field.
    value = 1 + max(round((total - least) / step), 0) if step else getattr(config, field)
    if step and field == "expert_rank":
        value = min(value, config.largest_rank)
    matched = replace(value)
    reached = matched.num_parameters()
    if abs(reached - total) > 0.02 * total:
        raise ValueError(
            f"`{field}` cannot bring this model to {total:,} parameters: the nearest is {reached:,} at {value}; "
            "change `mol_groups`, or other fields that set its size"
        )
    matched.validate()
    return matched


def sharing_variants(numbers: Iterable[int]) -> dict[str, dict[str, Any]]:
    """Variants without and with experts for other numbers of groups, as fields that differ from those of `mol`."""
    kinds = ("none", "mol")
    return {
        f"{kind}-{groups}-groups": {"ffn_modulation": kind, "num_hidden_groups": groups}
        for groups in numbers
        for kind in kinds
    }


def overrides(
    name: str, preset: str, vocab_size: int, shape: dict[str, Any] | None = None, change: dict[str, Any] | None = None
) -> dict[str, Any]:
    """All fields in which a variant's configuration differs from its preset's.

    Args:
        name: Of the variant.
        preset: Shape, of which the variants differ.
        vocab_size: Of the tokenizer.
        shape: Fields of all variants.
        change: Fields of one that is not in `VARIANTS`.
    """
    shape = shape or {}
    fields = {**shape, **(VARIANTS[name] if change is None else change)}
    sizes = {"vocab_size": vocab_size, "pad_token_id": None}  # the preset's may lie outside another vocabulary
    sizes |= shape
    base = ModernAlbertConfig.preset(preset, **sizes)
    if name == "unshared":
        fields["num_hidden_groups"] = base.num_hidden_layers
    groups = fields.get("num_hidden_groups", base.num_hidden_groups)
    if groups != base.num_hidden_groups and "mol_groups" not in (change or {}):  # experts at the preset's depths
        fields["mol_groups"] = [g for g in range(groups) if g * base.num_hidden_groups // groups in base.mol_groups]
    if name.endswith("-matched"):
        config = match_parameters(ModernAlbertConfig.preset(preset, **{**sizes, **fields}), base.num_parameters())
        fields |= {field: getattr(config, field) for field in ("expert_rank", "mol_intermediate_size")}
        fields["expert_alpha"] = base.expert_alpha * config.expert_rank / base.expert_rank  # the scale of `mol`
    return fields


# Fields that a trained model to start from must have in common with `none`.
SHAPE = (
    *("vocab_size", "embedding_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"),
    *("num_hidden_groups", "mol_groups", "mol_intermediate_size", "modulation"),
)


def run_folder(args: Namespace, name: str, rate: float, seed: int) -> Path:
    return args.output_dir / f"{name}-{args.steps}-{rate:g}-{seed}"


def initial_folder(args: Namespace, name: str, seed: int) -> Path:
    return args.output_dir / f"{name}-start-{seed}"


def variant_fields(args: Namespace, name: str) -> dict[str, Any]:
    """Fields in which a variant differs from its preset, for the tokenizer of the study."""
    vocab_size = padded_vocab_size(load_tokenizer(args.output_dir / "tokenizer"))
    shape = parse_json("config_overrides", args.config_overrides)
    changes = args.changes | sharing_variants(args.num_hidden_groups)
    return overrides(name, args.preset, vocab_size, shape, changes.get(name))


def variant_config(args: Namespace, name: str) -> ModernAlbertConfig:
    """Configuration of a variant, with the vocabulary of the tokenizer of the study."""
    known = vocabulary_fields(load_tokenizer(args.output_dir / "tokenizer"))
    return ModernAlbertConfig.preset(args.preset, **{**variant_fields(args, name), **known})


@torch.no_grad()
def grow(model: ModernAlbertForMaskedLM, config: ModernAlbertConfig) -> ModernAlbertForMaskedLM:
    """A model that computes what one without experts does, with more weights to learn.

    Layers that shared weights get copies of them, neurons that are added have an output of 0, experts correct nothing.

    Args:
        model: Without experts.
        config: Of the new one, with as many layers, and feed-forward layers at least as wide.
    """
    grown = ModernAlbertForMaskedLM._from_config(config)
    given = model.state_dict()
    for name, tensor in grown.state_dict().items():
        if name.startswith("model.layers."):
            group, rest = name.removeprefix("model.layers.").split(".", 1)
            source = int(group) * config.layers_per_group // model.config.layers_per_group
            name = f"model.layers.{source}.{rest}"
        if name.endswith("mlp.Wi.weight"):  # [2I, hidden]: gates, then values
            for new, old in zip(tensor.chunk(2), given[name].chunk(2), strict=True):
                new[: len(old)] = old
        elif name.endswith("mlp.Wo.weight"):  # [hidden, I]
            tensor.zero_()[:, : given[name].shape[1]] = given[name]
        elif name in given:  # not experts and routers
            tensor.copy_(given[name])
    return grown


def initialise(args: Namespace, name: str, seed: int) -> None:
    """Writes a variant as it starts, unless it is there."""
    folder = initial_folder(args, name, seed)
    if folder.exists():
        return
    if args.teacher:
        source = ("--teacher", args.teacher, "--experts", "svd" if name.startswith("depth_lora") else "zero")
        model = ("--preset", args.preset, "--config_overrides", json.dumps(variant_fields(args, name)))
        start_script("init_from_teacher", *source, *model, "--seed", str(seed), "--output_dir", str(folder))
        return
    set_seed(seed)
    config, projection = variant_config(args, "none"), None
    if args.start:
        trained = args.start[args.seeds.index(seed)]
        model = ModernAlbertForMaskedLM.from_pretrained(trained, dtype=torch.float32)
        projection = read_projection(trained)
        if differing := [name for name in SHAPE if getattr(model.config, name) != getattr(config, name)]:
            raise ValueError(
                f"'{trained}' differs from `none` in {', '.join(differing)}; give its fields as --config_overrides"
            )
    else:
        model = ModernAlbertForMaskedLM._from_config(config)
        if args.distil:
            start_from_table(Teacher(args.distil).encoder.get_input_embeddings().weight, model)
    with draft_folder(folder) as draft:
        grow(model, variant_config(args, name)).save_pretrained(draft)
        if projection is not None:  # to the states of the encoder that it was distilled from
            write_projection(draft, projection)


def train(args: Namespace, name: str, rate: float, seed: int) -> None:
    """One run of pretraining, unless it has ended before."""
    begin, folder = time.perf_counter(), run_folder(args, name, rate, seed)
    model = ("--model_name_or_path", str(initial_folder(args, name, seed)))
    if args.distil:
        model += ("--teacher", args.distil, "--masked_share", "0", "--bf16", "true")
        model += ("--teacher_cache", str(args.teacher_cache or args.output_dir / "teacher.sqlite"))
    pretrain(args, folder, args.steps, seed, rate, *model, batch_size=args.batch_size)
    print(f"{folder.name}: {read_losses(folder)}, {time.perf_counter() - begin:.0f} s", flush=True)


def read_losses(folder: Path) -> dict[str, float]:
    """Last loss of a run that has ended, by validation source."""
    return {source: curve[-1][1] for source, curve in read_curve(folder).items()}


def sweep(args: Namespace, name: str) -> dict[float, float]:
    """Mean loss over the validation sources at each learning rate, first seed, best first; infinite if it diverged."""
    losses = {}
    for rate in args.learning_rates:
        loss = statistics.mean(read_losses(run_folder(args, name, rate, args.seeds[0])).values())
        losses[rate] = loss if math.isfinite(loss) else math.inf
    return dict(sorted(losses.items(), key=lambda item: item[1]))


def best_run(args: Namespace, name: str, seed: int, task: str = "") -> Path:
    """Folder of the run at the variant's best rate, or of what was fine-tuned from it on a task."""
    folder = run_folder(args, name, next(iter(sweep(args, name))), seed)
    return folder.with_name(f"{folder.name}-{task}") if task else folder


def tune(args: Namespace, name: str, seed: int, task: str) -> None:
    """Fine-tunes a pretrained model on a task, unless that was done before."""
    output_dir = best_run(args, name, seed, task)
    if not (output_dir / "results.json").exists():
        fields = json.loads((args.output_dir / f"task-{task}" / "task.json").read_text())
        fine_tune(best_run(args, name, seed), fields, output_dir, seed, args.epochs)


def compare(ours: list[float], others: list[float]) -> dict[str, float | None]:
    """Mean of paired differences, and half the width of its 95% t-interval; None for a single pair."""
    differences = [a - b for a, b in zip(ours, others, strict=True)]
    half = None
    if len(differences) > 1:
        half = t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
    return {"mean": statistics.mean(differences), "half_width": half}


def summarise(values: dict[str, list[float]], larger_is_better: bool, changes: Iterable[str] = ()) -> dict[str, Any]:
    """Figures of one measure.

    Args:
        values: Of each variant, one for each seed, in the same order.
        larger_is_better: Whether it is a score, and not a loss.
        changes: Variants that are compared with `mol`.

    Returns:
        `variants`: `mean`, `standard_error`, the paired difference `minus_none`, and `gap_closed`, the share of the way
        from the mean of `none` to that of `unshared`, None where `unshared` is no better. `pairs`: `PAIRS` and those of
        `changes`, as far as they were run.
    """
    means = {name: statistics.mean(own) for name, own in values.items()}
    gap = None
    if {"none", "unshared"} <= means.keys():
        gap = means["unshared"] - means["none"]
        gap = gap if gap != 0 and (gap > 0) == larger_is_better else None
    variants = {
        name: {
            "mean": means[name],
            "standard_error": statistics.stdev(own) / len(own) ** 0.5 if len(own) > 1 else None,
            "minus_none": compare(own, values["none"]) if "none" in values else None,
            "gap_closed": (means[name] - means["none"]) / gap if gap is not None else None,
        }
        for name, own in values.items()
    }
    pairs = PAIRS + [(name, "mol") for name in changes]
    pairs = {f"{a} - {b}": compare(values[a], values[b]) for a, b in pairs if {a, b} <= values.keys()}
    return {"values": values, "variants": variants, "pairs": pairs}


def summarise_sharing(
    values: dict[str, list[float]], configs: dict[str, ModernAlbertConfig]
) -> dict[int, dict[str, Any]]:
    """What sharing costs, against `unshared`, and what experts give back, by how often a group of layers runs.

    Args:
        values: Losses of each variant, one for each seed, in the same order.
        configs: Of each variant.

    Returns:
        By runs of a group, fewest first: `cost` and `gain`, differences with half the width of their intervals, and
        `share`, their ratio, None where sharing costs nothing.
    """
    found = {}
    for none, own in values.items():
        mol = none.replace("none", "mol", 1)
        if re.fullmatch(r"none(-\d+-groups)?", none) and {mol, "unshared"} <= values.keys():
            cost, gain = compare(own, values["unshared"]), compare(own, values[mol])
            share = gain["mean"] / cost["mean"] if cost["mean"] > 0 else None
            found[configs[none].layers_per_group] = {"cost": cost, "gain": gain, "share": share}
    return dict(sorted(found.items()))


def collect(args: Namespace, tasks: list[str]) -> dict[str, Any]:
    """All figures, from what the runs have left in their folders."""
    variants, measures, configs = {}, {}, {}
    for name in args.variants:
        folders, swept = [best_run(args, name, seed) for seed in args.seeds], sweep(args, name)
        rate = next(iter(swept))
        config = configs[name] = ModernAlbertConfig.from_pretrained(folders[0])
        curves = {}
        for folder in folders:
            for source, curve in read_curve(folder, args.batch_size).items():
                curves.setdefault(source, []).append(curve)
        variants[name] = {
            "parameters": config.num_parameters(),
            "flops_per_token": config.estimate_flops(LENGTH, MASKED),
            "learning_rate": rate,
            "at_edge_of_sweep": len(swept) > 1 and rate in (min(swept), max(swept)),
            "sweep": {f"{rate:g}": loss if math.isfinite(loss) else None for rate, loss in swept.items()},
            "curves": {  # means over seeds
                source: [
                    (points[0][0], statistics.mean(loss for _, loss in points)) for points in zip(*own, strict=True)
                ]
                for source, own in curves.items()
            },
        }
        for folder in folders:
            for source, loss in read_losses(folder).items():
                kind = "distillation" if args.distil else "masked-LM"
                measures.setdefault(f"{kind} loss, {source}", {}).setdefault(name, []).append(loss)
        for task in tasks:
            found = [best_run(args, name, seed, task) / "results.json" for seed in args.seeds]
            scores = [100 * next(iter(json.loads(path.read_text())["scores"].values())) for path in found]
            measures.setdefault(task, {})[name] = scores
    losses = [values for name, values in measures.items() if name not in tasks]
    mean = {
        name: [statistics.mean(own) for own in zip(*(loss[name] for loss in losses), strict=True)] for name in configs
    }
    measures = {name: summarise(values, name in tasks, args.changes) for name, values in measures.items()}
    return {
        "tokens": args.steps * args.batch_size * LENGTH,
        "seeds": args.seeds,
        "variants": variants,
        "measures": measures,
        "sharing": summarise_sharing(mean, configs),
    }


def tabulate(results: dict[str, Any]) -> str:
    """Markdown: for each measure a table of the variants and one of the pairs; one of what sharing costs."""

    def number(value, half, digits, sign=""):
        return f"{value:{sign}.{digits}f}" + (f" ± {half:.{digits}f}" if half is not None else "")

    tables = []
    for measure, figures in results["measures"].items():
        digits = 4 if "distillation" in measure else 3 if "loss" in measure else 1

        rows = []
        for name, own in figures["variants"].items():
            variant, difference = results["variants"][name], own["minus_none"]
            rows.append(
                [
                    name,
                    f"{variant['parameters'] / 1e6:.3f}",
                    f"{variant['flops_per_token'] / 1e6:.2f}",
                    f"{variant['learning_rate']:g}" + (" (edge)" if variant["at_edge_of_sweep"] else ""),
                    number(own["mean"], own["standard_error"], digits),
                    "" if difference is None or name == "none" else number(*difference.values(), digits, "+"),
                    "" if own["gap_closed"] is None or name == "none" else f"{own['gap_closed']:.0%}",
                ]
            )
        heading = f"{measure}, {results['tokens'] / 1e6:.2f}M tokens, {len(results['seeds'])} seeds"
        columns = ("parameters (M)", "MFLOP per token", "learning rate", "mean ± standard error")
        tables.append(format_table([heading, *columns, "minus none, 95% interval", "gap closed"], rows))
        if figures["pairs"]:
            pairs = [[pair, number(*found.values(), digits, "+")] for pair, found in figures["pairs"].items()]
            tables.append(format_table(["pair", "difference, 95% interval"], pairs))
    if results["sharing"]:
        rows = [
            [str(runs), number(*own["cost"].values(), 4, "+"), number(*own["gain"].values(), 4, "+")]
            + ["" if own["share"] is None else f"{own['share']:.0%}"]
            for runs, own in results["sharing"].items()
        ]
        columns = ("runs of a group", "cost of sharing, 95% interval", "given back by experts, 95% interval", "share")
        tables.append(format_table(columns, rows, numbers=True))
    return "\n\n".join(tables) + "\n"


def draw_results(results: dict[str, Any]) -> list[Callable]:
    """Panels: loss over tokens for each source, and as differences to `none`; each measure over the parameters."""
    variants = results["variants"]

    def over_tokens(source, minus=None):
        def panel(axes):
            axes.set_prop_cycle(color=COLOURS)
            for name, variant in variants.items():
                points = variant["curves"][source][1:]  # the first is of untrained models
                others = variants[minus]["curves"][source][1:] if minus else [(0, 0)] * len(points)
                losses = [loss - other for (_, loss), (_, other) in zip(points, others, strict=True)]
                axes.plot([count / 1e6 for count, _ in points], losses, marker=".", label=name)
            title = f"loss, {source}" + (f", minus {minus}" if minus else "")
            axes.set(title=title, xlabel="tokens (M)", ylabel="loss")
            axes.legend(fontsize="x-small")

        return panel

    def over_parameters(measure, figures):
        def panel(axes):
            axes.set_prop_cycle(color=COLOURS)
            for name, own in figures["variants"].items():
                size = variants[name]["parameters"] / 1e6
                axes.errorbar(size, own["mean"], own["standard_error"], marker="o", capsize=3, label=name)
            axes.set(title=measure, xlabel="parameters (M)")
            axes.legend(fontsize="x-small")

        return panel

    panels = []
    for source in next(iter(variants.values()))["curves"]:
        panels.append(over_tokens(source))
        if "none" in variants:
            panels.append(over_tokens(source, minus="none"))
    return panels + [over_parameters(*item) for item in results["measures"].items()]


def draw_sharing(sharing: dict[int, dict[str, Any]]) -> list[Callable]:
    """Panels over the runs of a group: what sharing costs and what experts give back, and the share of it."""
    runs = list(sharing)

    def losses(axes):
        for name, label in (("cost", "cost of sharing"), ("gain", "given back by experts")):
            figures = [own[name] for own in sharing.values()]
            halves = [figure["half_width"] or 0 for figure in figures]
            axes.errorbar(runs, [figure["mean"] for figure in figures], halves, marker="o", capsize=3, label=label)
        axes.axhline(0, color="grey", linewidth=0.5)
        axes.set(title="loss", xlabel="runs of a group", ylabel="difference, 95% interval", xticks=runs)
        axes.legend(fontsize="x-small")

    def shares(axes):
        known = {count: 100 * own["share"] for count, own in sharing.items() if own["share"] is not None}
        axes.plot(list(known), list(known.values()), marker="o")
        axes.axhline(0, color="grey", linewidth=0.5)
        axes.set(title="share that experts give back", xlabel="runs of a group", ylabel="%", xticks=runs)

    return [losses, shares]


def draw_usage(args: Namespace) -> list[Callable]:
    """Panels: share of choices of each expert over depth, for each routed variant and group, first seed."""

    def titled(draw, title):
        return lambda axes: (draw(axes), axes.set_title(title))

    panels = []
    for name in args.variants:
        folder = best_run(args, name, args.seeds[0])
        if ModernAlbertConfig.from_pretrained(folder).has_router:
            batches = read_batches(args.validation_data, load_tokenizer(folder), LENGTH, USAGE_TOKENS)
            routing = describe_routing(ModernAlbertModel.from_pretrained(folder), batches)
            panels += [titled(draw_group(facts)[0], f"{name}, group {g}") for g, facts in routing["groups"].items()]
    return panels


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_data", nargs="+", required=True)
    parser.add_argument("--validation_data", nargs="+", required=True)
    parser.add_argument("--teacher", help="ModernBERT to start from; from scratch without one")
    parser.add_argument("--start", nargs="+", help="trained models of `none` to go on from, one for each seed")
    parser.add_argument("--distil", help="encoder or SentenceTransformer to distil from, in place of masked words")
    parser.add_argument(
        "--config_overrides", default="{}", help="fields of all variants that differ from the preset's"
    )
    parser.add_argument("--teacher_cache", type=Path, help="with --distil: states of the encoder, for several studies")
    parser.add_argument(
        "--changes", default="{}", help='more variants as JSON: {"large-alpha": {"expert_alpha": 128}}'
    )
    parser.add_argument(
        "--num_hidden_groups",
        type=count,
        nargs="+",
        default=[],
        help="more variants, with more groups than the others",
    )
    parser.add_argument("--tasks", help="JSON file, see above")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmark-ablation"))
    parser.add_argument("--preset", choices=PRESETS, default="nano", help="shape, of which the variants differ")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[v for v in VARIANTS if v not in OPTIONAL])
    parser.add_argument("--steps", type=count, default=1000, help=f"of each run, of rows of {LENGTH} tokens")
    parser.add_argument("--batch_size", type=count, default=BATCH, help="rows of a step")
    parser.add_argument("--learning_rates", type=positive, nargs="+", default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--max_eval_samples", type=count, default=256)
    parser.add_argument("--epochs", type=count, default=3, help="of fine-tuning")
    parser.add_argument("--train_rows", type=count, default=4000, help="of each task")
    parser.add_argument("--validation_examples", type=count, default=2000, help="of each task")
    parser.add_argument("--processes", type=count, default=2, help="runs at a time, one thread each")
    args = parser.parse_args(argv)
    if args.teacher and (args.distil or args.start):
        parser.error("--teacher is a start of its own: leave --distil and --start out")
    if args.start and len(args.start) != len(args.seeds):
        parser.error(f"--start takes a model for each of the {len(args.seeds)} seeds, got {len(args.start)}")
    args.changes, sharing = parse_json("changes", args.changes), sharing_variants(args.num_hidden_groups)
    for name, fields in args.changes.items():
        if not re.fullmatch(r"[\w.-]+", name) or name in VARIANTS | sharing or not isinstance(fields, dict):
            parser.error(
                f"--changes maps new names of letters, digits, '.', '_' and '-' to fields of `mol`, got {name!r}: {fields}"
            )
    shape = {"pad_token_id": None, **parse_json("config_overrides", args.config_overrides)}
    base = ModernAlbertConfig.preset(args.preset, **shape)
    fewest, most = base.num_hidden_groups, base.num_hidden_layers
    for groups in args.num_hidden_groups:
        if not fewest < groups < most or groups % fewest or most % groups:
            parser.error(
                f"--num_hidden_groups takes multiples of the {fewest} of the other variants that divide the {most} layers of a "
                f"model, more than {fewest} and less than {most}, got {groups}"
            )
    args.variants = [*args.variants, *args.changes, *sharing]
    tasks = read_tasks(args.tasks, "train_files", "validation_files")
    # The folders of the runs tell these apart.
    chosen = ("variants", "steps", "learning_rates", "seeds", "start", "teacher_cache", "changes", "num_hidden_groups")
    more = {f"change {name}": fields for name, fields in args.changes.items()}
    starts = args.start or []
    more |= {f"start of seed {args.seeds[i]}": describe_model(name) for i, name in enumerate(starts)}
    models = [model for model in (args.teacher, args.distil) if model]
    bind_folder(args, tasks, ignore=chosen, models=models, more=more)

    def run_all(function: Callable, jobs: list[tuple]) -> None:
        run_jobs(args.processes, function, [(args, *job) for job in jobs])

    if known := models or starts:
        load_tokenizer(known[0]).save_pretrained(args.output_dir / "tokenizer")
    else:
        train_tokenizer(args)
    for name in args.variants:  # one after the other: they draw from one generator
        for seed in args.seeds:
            initialise(args, name, seed)
    run_all(train, [(name, rate, args.seeds[0]) for name in args.variants for rate in args.learning_rates])
    rates = {name: next(iter(sweep(args, name))) for name in args.variants}
    run_all(train, [(name, rates[name], seed) for seed in args.seeds[1:] for name in args.variants])
    for name, task in tasks.items():
        folder = args.output_dir / f"task-{name}"
        folder.mkdir(exist_ok=True)
        write_json(folder / "task.json", limit_rows(args, task, folder))
    run_all(tune, [(name, seed, task) for task in tasks for seed in args.seeds for name in args.variants])

    results = collect(args, list(tasks))
    write_json(args.output_dir / "ablation.json", results)
    write_text(args.output_dir / "ablation.md", tabulate(results))
    write_text(args.output_dir / "ablation.svg", draw_panels(draw_results(results)))
    if results["sharing"]:
        write_text(args.output_dir / "ablation-sharing.svg", draw_panels(draw_sharing(results["sharing"])))
    if panels := draw_usage(args):
        write_text(args.output_dir / "ablation-usage.svg", draw_panels(panels))
    print(tabulate(results))


if __name__ == "__main__":
    run_script(main)
