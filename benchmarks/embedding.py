"""Sentence embedders without any training, beside each other: similarity, retrieval, size and time, in one run.

    python benchmarks/embedding.py --models checkpoints/modernalbert-nano-embed sentence-transformers/all-MiniLM-L6-v2 \
        --pairs data/glue/stsb/validation.parquet:sentence1:sentence2:label \
            data/sick/test.parquet:premise:hypothesis:relatedness_score \
        --retrieval data/beir/scifact --output_dir runs/embedding

A column of `--pairs` is Spearman's correlation of the cosine with the scores, one of `--retrieval` nDCG@10 by
`scripts/run_beir.py`, which keeps what it has scored; BM25 is beside it. Times are medians of interleaved turns in fp32, with
tokenisation; `--forms` adds a ModernALBERT in bf16, and its encoder as onnxruntime runs it, in float32 and int8,
beside a ModernBERT of equal shape with random weights, which has a size and a time but no score; `--num_hidden_layers` adds the
same weights at other depths, in all forms. Ratios are to the last model of `--models`. Output is
Markdown; `embedding.json` has the figures, and `embedding.svg` shows the first set of pairs over time and over size.
"""

import tempfile
from argparse import ArgumentParser
from pathlib import Path
from statistics import median

import torch
from common import count, describe_machine, format_table, interleave, modernbert_config, ratio, start_script
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import pairwise_cos_sim
from torch import nn
from transformers import AutoModel

import modernalbert  # noqa: F401  (registers the Auto classes)
from modernalbert.training.cli import run_script
from modernalbert.training.data import read_rows
from modernalbert.training.export.onnx import open_session, quantize_onnx, write_onnx
from modernalbert.training.runs import read_json, write_json


SENTENCE = "A man is playing a large flute in the street, and a few people stop to listen."
FORMS = ("ONNX fp32", "ONNX int8")
EQUAL = "ModernBERT of equal shape"


class OnnxEncoder(nn.Module):
    """In the place of the first module of a SentenceTransformer: its encoder, run by onnxruntime."""

    def __init__(self, path: Path):
        super().__init__()
        self.session = open_session(path)

    def forward(self, features: dict, **kwargs) -> dict:
        inputs = {name: features[name].numpy() for name in ("input_ids", "attention_mask")}
        (states,) = self.session.run(["last_hidden_state"], inputs)
        return {**features, "token_embeddings": torch.from_numpy(states)}


def load(name: str, layers: int | None = None, dtype: str = "float32") -> SentenceTransformer:
    """A model, at another depth if one is given."""
    depth = {} if layers is None else {"config_kwargs": {"num_hidden_layers": layers}}
    model = SentenceTransformer(name, device="cpu", model_kwargs={"dtype": dtype}, **depth)
    return weighed(model)


def weighed(model: SentenceTransformer) -> SentenceTransformer:
    """The model, with the size of its parameters as `megabytes`."""
    model.megabytes = sum(parameter.nbytes for parameter in model.parameters()) / 1e6
    return model


def other_forms(name: str, layers: int | None, folder: Path) -> dict[str, SentenceTransformer]:
    """A model in bf16, and with an encoder that onnxruntime runs in float32 and int8."""
    folder.mkdir(parents=True)
    paths = [folder / f"{form}.onnx" for form in FORMS]
    write_onnx(load(name, layers)[0].auto_model.eval(), paths[0])
    quantize_onnx(*paths)
    models = {"bf16": load(name, layers, "bfloat16")}
    for form, path in zip(FORMS, paths, strict=True):
        model = models[form] = load(name, layers)
        model[0].forward = OnnxEncoder(path).forward
        model.megabytes = path.stat().st_size / 1e6
    return models


def equal_modernbert(name: str) -> SentenceTransformer:
    """A model whose encoder is replaced by a ModernBERT of its shape, with random weights."""
    model = load(name)
    model[0].auto_model = AutoModel.from_config(modernbert_config(model[0].auto_model.config)).eval()
    return weighed(model)


def plot(figures: dict[str, dict], column: str, batch: str) -> Figure:
    """One set of pairs over milliseconds and over megabytes, a point for each model and form, a line for what has no score."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    measured = {name: facts for name, facts in figures.items() if column in facts["scores"]}
    for axes, label in zip(panels, (f"{batch} (ms)", "MB"), strict=True):
        for index, (name, facts) in enumerate(measured.items()):
            x = facts[batch]["milliseconds"] if label != "MB" else facts["megabytes"]
            axes.plot(x, facts["scores"][column], "os^Dvp*"[index // 10 % 7], color=f"C{index % 10}", label=name)
        if EQUAL in figures:
            x = figures[EQUAL][batch]["milliseconds"] if label != "MB" else figures[EQUAL]["megabytes"]
            axes.axvline(x, color="gray", linestyle="--", label=f"{EQUAL}, untrained")
        axes.set(xlabel=label, xlim=(0, None))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(f"{column}, Spearman")
    panels[1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def correlate(model: SentenceTransformer, source: str) -> float:
    """Spearman's correlation of the cosines of pairs with their scores, in percent."""
    path, first, second, score = source.rsplit(":", 3)
    rows = read_rows(path)
    pairs = [
        model.encode(list(rows[column]), batch_size=64, convert_to_tensor=True, show_progress_bar=False)
        for column in (first, second)
    ]
    return 100 * spearmanr(pairwise_cos_sim(*pairs).float().numpy(), rows[score])[0]


def retrieve(name: str, dataset: str, folder: Path) -> dict[str, float]:
    """nDCG@10 of a model and of BM25, in percent."""
    start_script(
        *("run_beir", "--model_name_or_path", name, "--dataset", dataset, "--bm25", "true", "--report_to", "none"),
        *("--use_cpu", "true", "--per_device_eval_batch_size", "32", "--output_dir", str(folder)),
    )
    results = read_json(folder / "results.json")
    return {
        "model": 100 * results["scores"]["ndcg_at_10"],
        "BM25": 100 * results["details"]["baselines"]["BM25"]["ndcg_at_10"],
    }


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", required=True, help="SentenceTransformers; the last is the reference")
    parser.add_argument("--pairs", nargs="+", default=[], help="FILE:FIRST:SECOND:SCORE, columns of a file")
    parser.add_argument("--retrieval", nargs="+", default=[], help="sets in BEIR's format")
    parser.add_argument("--forms", action="store_true", help="ModernALBERT models in bf16 and ONNX as well")
    parser.add_argument("--num_hidden_layers", nargs="+", type=count, default=[], help="other depths to run at")
    parser.add_argument("--repeats", type=count, default=15, help="turns of the timing")
    parser.add_argument("--threads", type=count, default=torch.get_num_threads())
    parser.add_argument("--output_dir", type=Path, default=Path("runs/embedding"))
    args = parser.parse_args(argv)
    if wrong := [source for source in args.pairs if source.count(":") < 3]:
        parser.error(f"--pairs takes FILE:FIRST:SECOND:SCORE, got {', '.join(wrong)}")
    torch.set_num_threads(args.threads)
    models = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.models:
            model = load(name)
            known = model[0].auto_model.config.model_type == "modernalbert"
            for layers in [None, *(args.num_hidden_layers if known else [])]:
                title = Path(name).name + (f", {layers} layers" if layers else "")
                models[title] = load(name, layers) if layers else model
                if args.forms and known:
                    found = other_forms(name, layers, Path(scratch) / title)
                    models |= {f"{title}, {form}": model for form, model in found.items()}
            if args.forms and known and EQUAL not in models:
                models[EQUAL] = equal_modernbert(name)
        batches = {"one sentence": [SENTENCE], "32 sentences": [f"{n} {SENTENCE[: 20 + n]}" for n in range(32)]}
        times = {
            batch: interleave(
                {
                    name: lambda model=model, texts=texts: model.encode(texts, show_progress_bar=False)
                    for name, model in models.items()
                },
                args.repeats,
                batch,
            )
            for batch, texts in batches.items()
        }
        columns = {Path(source.rsplit(":", 3)[0]).parent.name: source for source in args.pairs}
        scores = {
            name: {column: correlate(model, source) for column, source in columns.items() if name != EQUAL}
            for name, model in models.items()
        }
    baselines = {}
    for dataset in args.retrieval:
        for name in args.models:
            found = retrieve(name, dataset, args.output_dir / Path(name).name / Path(dataset).name)
            scores[Path(name).name][Path(dataset).name] = found["model"]
            baselines[Path(dataset).name] = found["BM25"]
    if baselines:
        scores["BM25"] = baselines
    sets = [*columns, *(Path(dataset).name for dataset in args.retrieval)]
    header = ["", "parameters", "MB", *sets, *(part for batch in batches for part in (f"{batch} (ms)", "ratio"))]
    reference = Path(args.models[-1]).name
    rows, figures = [], {"machine": describe_machine(), "models": {}}
    for name, found in scores.items():
        shown = [f"{found[column]:.1f}" if column in found else "" for column in sets]
        facts = figures["models"][name] = {"scores": found}
        if name not in models:  # BM25
            rows.append([name, "", "", *shown, *[""] * 2 * len(batches)])
            continue
        parameters = sum(parameter.numel() for parameter in models[name].parameters())
        facts |= {"parameters": parameters, "megabytes": models[name].megabytes}
        row = [name, f"{parameters / 1e6:.1f}M", f"{models[name].megabytes:.1f}", *shown]
        for batch in batches:
            milliseconds = 1e3 * median(times[batch][name])
            relative = ratio(times[batch][name], times[batch][reference])
            facts[batch] = {"milliseconds": milliseconds, "ratio": relative}
            row += [f"{milliseconds:.1f}", f"{relative:.2f}"]
        rows.append(row)
    print(format_table(header, rows, numbers=True))
    print(f"\n{figures['machine']['device']}, torch {figures['machine']['torch']}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "embedding.json", figures)
    if columns:
        plot(figures["models"], next(iter(columns)), "one sentence").savefig(args.output_dir / "embedding.svg")


if __name__ == "__main__":
    run_script(main)
