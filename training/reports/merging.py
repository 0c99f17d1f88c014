"""Report of a merge: statistics of the experts, errors of the merged layers, scores."""

import html
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...merging_modernalbert import collect_states, mean_routing, similarity
from ..runs import write_json
from .html import draw_matrix, draw_panels, write_page
from .tables import html_table


REPORT_NAME = "merge_report"
CONTROL = "drop"


def mixtures(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Feed-forward layer of each MoL group, merged or not, by the group's number."""
    return {group: model.base_model.layers[group].mlp for group in sorted(model.config.mol_groups)}


@torch.no_grad()
def states_by_depth(model: PreTrainedModel, batches: Iterable[dict]) -> dict[int, torch.Tensor]:
    """Inputs of each MoL group at each of its depths, `[depth, tokens, H]`, on batches of the encoder's inputs."""
    layers = mixtures(model)
    parts = []
    for batch in batches:  # all depths see the same tokens
        parts.append([torch.stack(depths) for depths in collect_states(model, list(layers.values()), [batch])])
    return {group: torch.cat(states, dim=1) for group, states in zip(layers, zip(*parts, strict=True), strict=True)}


@torch.no_grad()
def describe_experts(model: PreTrainedModel, states: dict[int, torch.Tensor]) -> dict[str, dict[str, list]]:
    """Mean router weight and similarity of the experts, for each MoL group and depth.

    Args:
        model: Model with experts, in evaluation mode.
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
        for depth, inputs in enumerate(states[group]):
            difference = scale = 0.0
            for h in inputs.split(2048):
                expected = routed(h).double()
                difference += (layer(h, depth).double() - expected).square().sum().item()
                scale += expected.square().sum().item()
            errors[str(group)].append((difference / max(scale, 1e-12)) ** 0.5)
    return errors


def recovered_share(routed: dict[str, float], merged: dict[str, float], dropped: dict[str, float]) -> float | None:
    """Share of the gain of the experts that merging keeps, by the first metric of [`~training.evaluation.metrics.score_model`].

    1 is as good as the routed model, 0 as the model without experts. None if the experts gain nothing.
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
    """Errors of the layers and scores for each method and the control.

    Args:
        model: Model with experts.
        methods: Names of the methods.
        merge: Returns a copy of the model merged by a method.
        states: Inputs on which errors of layers are measured, see [`states_by_depth`].
        score: Scores of a model; the first decides `recovered`.

    Returns:
        `routed`, the scores before merging, and `methods`: for each `parameters` and, as far as they were measured,
        `layer_error`, `score` and `recovered`.
    """
    results = {}
    for method in dict.fromkeys([*methods, CONTROL]):
        merged = merge(method)
        results[method] = {"parameters": merged.num_parameters()}
        if states is not None:
            results[method]["layer_error"] = layer_errors(model, merged, states)
        if score is not None:
            results[method]["score"] = score(merged)
    if score is None:
        return {"methods": results}
    routed = score(model)
    for result in results.values():
        result["recovered"] = recovered_share(routed, result["score"], results[CONTROL]["score"])
    return {"routed": routed, "methods": results}


def tabulate(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """A header and one row per method: parameters, mean error of the layers, scores, share recovered."""
    names = list(report.get("routed", {}))
    rows = [("", "parameters", "error of a layer", *names, "recovered")]
    if names:
        scores = (f"{report['routed'][name]:.4f}" for name in names)
        rows.append(("routed", f"{report['parameters']['routed']:,}", "0", *scores, ""))
    for method, result in report["methods"].items():
        errors = [error for depths in result.get("layer_error", {}).values() for error in depths]
        error = f"{sum(errors) / len(errors):.1%}" if errors else "-"
        share = result.get("recovered")
        scores = (f"{result['score'][name]:.4f}" for name in names)
        rows.append((method, f"{result['parameters']:,}", error, *scores, "-" if share is None else f"{share:.1%}"))
    return rows


def write_merge_report(folder: Path, report: dict[str, Any]) -> None:
    """Writes `merge_report.json` and a self-contained `merge_report.html`."""
    write_json(folder / f"{REPORT_NAME}.json", report)
    names = ("model", "method", "format", "rank", "num_experts", "per_depth")
    facts = {name: report[name] for name in names if report.get(name)}
    facts |= {f"parameters, {name}": f"{count:,}" for name, count in report["parameters"].items()}
    facts |= {f"{name} data": ", ".join(sources) for name, sources in report["data"].items()}
    if "error_text" in report:
        facts["errors of layers on"] = f"{report['error_text']} text"
    parts = [html_table(facts.items())]
    if report["methods"]:
        parts.append(f"<h2>Methods</h2>\n{html_table(tabulate(report))}")
        parts.append(
            "<p><small>Error: of a merged layer's output against the routed layer's on the same inputs, mean over "
            f"groups and depths. {CONTROL}: no experts at all. Recovered: share of the way from {CONTROL} to routed."
            "</small></p>"
        )
    if panels := draw_errors(report) + draw_experts(report):
        parts.append(f"<figure>{draw_panels(panels)}</figure>")
    if report["not_measured"]:
        items = "\n".join(f"<li>{html.escape(reason)}</li>" for reason in report["not_measured"])
        parts.append(f"<h2>Not measured</h2>\n<ul>\n{items}\n</ul>")
    write_page(folder / f"{REPORT_NAME}.html", f"Merged experts of {report['model']}", parts)


def draw_errors(report: dict[str, Any]) -> list[Callable]:
    """One panel per group: error of a layer over its depths, by method."""

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
    """Per group a panel of usage over its depths, and one of similarity for each depth."""

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
