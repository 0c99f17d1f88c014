"""What merging does to a model: statistics of its experts, errors of its layers, its score; a report; PEFT's form."""

import copy
import html
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...configuration_modernalbert import ModernAlbertConfig
from ...merging_modernalbert import collect_states, mean_routing, similarity
from ..evaluation.metrics import compute_metrics
from ..export.folder import SENTENCE, write_model
from ..runs import write_text
from .curves import PAGE, draw_matrix, draw_panels, format_table


REPORT_NAME = "merge_report"
CONTROL = "drop"


def read_routing_weights(path: str | Path, config: ModernAlbertConfig) -> list[list[float]]:
    """Weights of the experts of each MoL group, from what [`~training.callbacks.RoutingFrequencies`] wrote.

    Raises:
        ValueError: The file is something else, or of another architecture.
    """
    try:
        facts = json.loads(Path(path).read_text(encoding="utf-8"))
        groups, weights = facts["mol_groups"], facts["weights"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"'{path}' does not hold routing weights; give the `routing_weights.json` that training writes beside its "
            "checkpoints"
        ) from error
    if groups != sorted(config.mol_groups):
        raise ValueError(
            f"'{path}' is of a model with the MoL groups {groups}, this one has {sorted(config.mol_groups)}"
        )
    return weights


def mixtures(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Feed-forward layer of each MoL group, merged or not, by the group's number."""
    return {group: model.base_model.layers[group].mlp for group in sorted(model.config.mol_groups)}


@torch.no_grad()
def states_by_depth(model: PreTrainedModel, batches: Iterable[dict]) -> dict[int, torch.Tensor]:
    """Inputs of each MoL group at each of its depths, `[depth, tokens, H]`, on batches of the encoder's inputs."""
    layers = mixtures(model)
    parts = []
    for batch in batches:  # all depths see the same tokens
        collected = collect_states(model, list(layers.values()), [batch])
        parts.append([states.unflatten(0, (model.config.layers_per_group, -1)) for states in collected])
    return {group: torch.cat(states, dim=1) for group, states in zip(layers, zip(*parts, strict=True), strict=True)}


@torch.no_grad()
def describe_experts(model: PreTrainedModel, states: dict[int, torch.Tensor]) -> dict[str, dict[str, list]]:
    """Mean router weight and similarity of the experts, for each MoL group and depth.

    Args:
        model: With its experts, in evaluation mode.
        states: See [`states_by_depth`].

    Returns:
        By group: `usage [depth, E]` and `similarity [depth, E, E]`.
    """
    facts = {}
    for group, mixture in mixtures(model).items():
        one = torch.ones(1)  # a single adapter has no router
        facts[str(group)] = {
            "usage": [
                (one if mixture.router is None else mean_routing(mixture, depth.float())).tolist()
                for depth in states[group]
            ],
            "similarity": [similarity(mixture, depth).tolist() for depth in states[group]],
        }
    return facts


@torch.no_grad()
def layer_errors(
    model: PreTrainedModel, merged: PreTrainedModel, states: dict[int, torch.Tensor]
) -> dict[str, list[float]]:
    """`|merged(h) - routed(h)| / |routed(h)|` over all tokens, for each MoL group and depth, on the same inputs."""
    errors = {}
    for (group, routed), layer in zip(mixtures(model).items(), mixtures(merged).values(), strict=True):
        errors[str(group)] = []
        for depth in states[group]:
            difference = scale = 0.0
            for h in depth.split(2048):
                expected = routed(h).double()
                difference += (layer(h).double() - expected).square().sum().item()
                scale += expected.square().sum().item()
            errors[str(group)].append((difference / scale) ** 0.5)
    return errors


@torch.no_grad()
def evaluate(model: PreTrainedModel, batches: Iterable[dict], metrics: Sequence[str] = ()) -> dict[str, float]:
    """Named metrics of a sequence classifier, or without names the masked-LM loss, in nats for each masked token."""
    logits, labels, total, count = [], [], 0.0, 0
    for batch in batches:
        output = model(**{name: tensor.to(model.device) for name, tensor in batch.items()})
        if metrics:
            logits.append(output.logits.float().cpu())
            labels.append(batch["labels"])
        else:
            labelled = int((batch["labels"] != -100).sum())
            total, count = total + output.loss.item() * labelled, count + labelled
    if metrics:
        return compute_metrics(tuple(metrics), torch.cat(logits).numpy(), torch.cat(labels).numpy())
    return {"loss": total / count}


def recovered_share(routed: dict[str, float], merged: dict[str, float], dropped: dict[str, float]) -> float | None:
    """Share of the way from the model without experts to the routed one, by the first figure of [`evaluate`].

    1 is as good as routed, 0 as bad as no experts. None where the experts are of no use to begin with.
    """
    name = next(iter(routed))
    gain = dropped[name] - routed[name] if name == "loss" else routed[name] - dropped[name]
    way = dropped[name] - merged[name] if name == "loss" else merged[name] - dropped[name]
    return way / gain if gain > 0 else None


def compare_methods(
    model: PreTrainedModel,
    methods: Sequence[str],
    merge: Callable[[str], PreTrainedModel],
    states: dict[int, torch.Tensor] | None,
    score: Callable[[PreTrainedModel], dict[str, float]] | None,
) -> dict[str, Any]:
    """What each method, and the control, does to the layers and to the score of a model.

    Args:
        model: With its experts.
        methods: Names of the methods.
        merge: Gives the model merged by a method; leaves `model` as it is.
        states: To measure the error of layers on; see [`states_by_depth`].
        score: Figures of a model; the share recovered is that of the first.

    Returns:
        `routed`, the score before merging, and `methods`: for each `layer_error`, `score` and `recovered`, as far as
        they could be measured.
    """
    results = {}
    for method in dict.fromkeys([*methods, CONTROL]):
        merged = merge(method)
        results[method] = {} if states is None else {"layer_error": layer_errors(model, merged, states)}
        if score is not None:
            results[method]["score"] = score(merged)
    if score is None:
        return {"methods": results}
    routed = score(model)
    for result in results.values():
        result["recovered"] = recovered_share(routed, result["score"], results[CONTROL]["score"])
    return {"routed": routed, "methods": results}


def tabulate(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """One line for each method below a line of headings: mean error of the layers, score, share recovered."""
    names = list(report.get("routed", {}))
    rows = [("", "error of a layer", *names, "recovered")]
    if names:
        rows.append(("routed", "0", *(f"{report['routed'][name]:.4f}" for name in names), ""))
    for method, result in report["methods"].items():
        errors = [error for depths in result.get("layer_error", {}).values() for error in depths]
        error = f"{sum(errors) / len(errors):.1%}" if errors else "-"
        share = result.get("recovered")
        scores = (f"{result['score'][name]:.4f}" for name in names)
        rows.append((method, error, *scores, "-" if share is None else f"{share:.1%}"))
    return rows


def write_merge_report(folder: Path, report: dict[str, Any]) -> None:
    """Writes `merge_report.json` and `merge_report.html`, a page that needs no network."""
    write_text(folder / f"{REPORT_NAME}.json", json.dumps(report, indent=1))
    facts = {name: report[name] for name in ("model", "method", "format", "rank", "num_experts") if report.get(name)}
    facts |= {f"parameters, {name}": f"{count:,}" for name, count in report["parameters"].items()}
    facts |= {f"{name} data": ", ".join(sources) for name, sources in report["data"].items()}
    if "error_text" in report:
        facts["errors of layers on"] = f"{report['error_text']} text"
    body = [format_table(facts.items())]
    if report["methods"]:
        body.append(f"<h2>Methods</h2>\n{format_table(tabulate(report))}")
        body.append(
            "<p><small>Error: of a merged layer's output against the routed layer's on the same inputs, mean over "
            f"groups and depths. {CONTROL}: no experts at all. Recovered: share of the way from {CONTROL} to routed."
            "</small></p>"
        )
    if panels := draw_errors(report) + draw_experts(report):
        body.append(draw_panels(panels))
    body += [f"<p>Not measured: {html.escape(reason)}</p>" for reason in report["not_measured"]]
    page = PAGE.format(title=html.escape(f"Merged experts of {report['model']}"), body="\n".join(body))
    write_text(folder / f"{REPORT_NAME}.html", page)


def draw_errors(report: dict[str, Any]) -> list[Callable]:
    """One panel for each group: error of a layer over its depths, by method."""

    def panel(group):
        def draw(axes):
            for method, result in report["methods"].items():
                axes.plot(result["layer_error"][group], marker=".", label=method)
            axes.set(title=f"error of the layer, group {group}", xlabel="depth", ylim=(0, None))
            axes.locator_params(axis="x", integer=True)
            axes.legend(fontsize="small")

        return draw

    measured = next(iter(report["methods"].values()), {}).get("layer_error", {})
    return [panel(group) for group in measured]


def draw_experts(report: dict[str, Any]) -> list[Callable]:
    """For each group a panel of usage over its depths, and one of similarity for each depth."""

    def usage(group, values):
        def draw(axes):
            for expert, weights in enumerate(zip(*values, strict=True)):
                axes.plot(weights, marker=".", label=str(expert))
            axes.set(title=f"mean weight of experts, group {group}", xlabel="depth", ylim=(0, None))
            axes.locator_params(axis="x", integer=True)
            axes.legend(fontsize="small", ncols=2)

        return draw

    def cosines(group, depth, values):
        def draw(axes):
            draw_matrix(axes, values)
            axes.set(title=f"similarity of experts, group {group}, depth {depth}")

        return draw

    panels = []
    for group, facts in report.get("experts", {}).items():
        panels.append(usage(group, facts["usage"]))
        panels += [cosines(group, depth, values) for depth, values in enumerate(facts["similarity"])]
    return panels


def write_adapter(merged: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes `base`, a self-contained model without experts, and `adapter`, a LoRA of PEFT that restores the merged one.

    Adapters of several tasks can share one `base` where their shared weights are equal: where nothing but the experts,
    and in a classifier its `head` and `classifier`, was trained from the same model. The adapter carries those two.

    Args:
        merged: With one adapter in each MoL layer (`num_experts=1`), in evaluation mode.
        tokenizer: Its tokenizer.
        folder: Where to.

    Raises:
        RuntimeError: `PeftModel` gives other outputs than the folded model; or `base` does not load.
    """
    base = copy.deepcopy(merged).merge_experts(CONTROL)
    write_model(base, tokenizer, folder / "base")
    base.name_or_path = "base"  # PEFT writes it down, and this machine's folders are nobody's business
    names = {module: name for name, module in base.named_modules()}
    layers = mixtures(base)
    settings = LoraConfig(
        r=merged.config.expert_rank,
        lora_alpha=merged.config.expert_alpha,
        target_modules=[names[linear] for layer in layers.values() for linear in (layer.Wi, layer.Wo)],
        modules_to_save=[name for name in ("head", "classifier") if hasattr(base, name)] or None,
    )
    adapted = get_peft_model(base, settings)
    with torch.no_grad():
        for group, mixture in mixtures(merged).items():
            for linear, side in ((layers[group].Wi, "in"), (layers[group].Wo, "out")):
                for name in ("A", "B"):
                    weight = getattr(linear, f"lora_{name}")["default"].weight
                    weight.copy_(getattr(mixture.experts, f"{side}_{name}")[0])
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)  # or PEFT asks the Hub for "base"
    (folder / "adapter" / "README.md").unlink()  # PEFT's template, without a fact in it
    check_adapter(merged, tokenizer, folder)


@torch.no_grad()
def check_adapter(merged: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Compares `base` with `adapter`, as they lie in a folder, with the folded model; in float64, free of rounding.

    Raises:
        RuntimeError: Outputs differ by more than 1e-5.
    """
    base = type(merged).from_pretrained(folder / "base")
    adapted = PeftModel.from_pretrained(base, folder / "adapter").double().eval()
    folded = copy.deepcopy(merged).double().merge_experts()
    inputs = tokenizer(SENTENCE, return_tensors="pt")
    found, expected = adapted(**inputs)[0], folded(**inputs)[0]
    if not torch.allclose(found, expected, rtol=1e-5, atol=1e-5):
        difference = (found - expected).abs().max().item()
        raise RuntimeError(f"base and adapter give other outputs than the folded model, by up to {difference:.1e}")
