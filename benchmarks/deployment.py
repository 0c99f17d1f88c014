"""Latency, size and accuracy of the forms in which a model can be served, measured in one run.

    python benchmarks/deployment.py              # `tiny` as a sequence classifier, random weights
    python benchmarks/deployment.py --quick      # fewer repetitions
    python benchmarks/deployment.py --model runs/tiny --text held_out.jsonl     # masked-LM loss instead

The first form compares with transformers' ModernBERT of the same depth, hidden width and layer types, its feed-forward
layers as wide as ours are on average, and a folded model with one of its shape that never had experts. The forms are
timed in turn, all with the same number of threads; a figure is the median, a ratio the median of the ratios within a
turn. `--model` takes a masked language model with or without experts, whose folder has a tokenizer. Output is Markdown.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from statistics import median

import onnxruntime
import torch
import torch.nn.functional as F
import transformers
from common import (
    count,
    describe_machine,
    fill_experts,
    format_table,
    interleave,
    make_batches,
    modernbert_config,
    ratio,
)
from transformers import ModernBertForSequenceClassification

from modernalbert import ModernAlbertConfig, ModernAlbertForMaskedLM, ModernAlbertForSequenceClassification
from modernalbert.tokenization import load_tokenizer
from modernalbert.training.cli import run_script
from modernalbert.training.data import load_texts
from modernalbert.training.export.onnx import open_session, quantize_onnx, write_onnx
from modernalbert.training.packing import TokenMasker, pack_texts


BASE = "ModernBERT, PyTorch fp32"


def forms_of(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """A ModernALBERT in PyTorch, as it is and merged; folded is the last."""
    config = model.config
    forms = {}
    if config.has_router:
        forms["routed, PyTorch fp32"] = model
        forms["merged, adapter kept, PyTorch fp32"] = copy.deepcopy(model).merge_experts(fold=False)
    if config.mol_groups and config.num_experts > 0:
        model = copy.deepcopy(model).merge_experts()
    return {**forms, "folded, PyTorch fp32": model}


def half(model: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(model).to(torch.bfloat16)


def megabytes(model: torch.nn.Module) -> float:
    return sum(parameter.nbytes for parameter in model.parameters()) / 1e6


def export(model: torch.nn.Module, folder: Path, name: str) -> dict[str, Path]:
    """Files of a model in fp32 and int8."""
    paths = {f"{name}, ONNX {kind}": folder / f"{name}-{kind}.onnx" for kind in ("fp32", "int8")}
    write_onnx(model, folder / f"{name}-fp32.onnx")
    quantize_onnx(folder / f"{name}-fp32.onnx", folder / f"{name}-int8.onnx")
    return paths


def in_torch(model: torch.nn.Module):
    """A function from named inputs to logits."""

    def run(inputs: dict) -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs).logits

    return run


def in_onnx(path: Path):
    session = open_session(path)

    def run(inputs: dict) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})[0])

    return run


def benchmark_latency(preset: str, repeats: int) -> list[list[str]]:
    """Rows of the table: size, and milliseconds and ratio to ModernBERT for each batch."""
    torch.manual_seed(0)
    config = ModernAlbertConfig.preset(preset)
    model = fill_experts(ModernAlbertForSequenceClassification(config).eval())  # at zero there is nothing to fold
    bert = ModernBertForSequenceClassification(modernbert_config(config)).eval()
    ours = forms_of(model)
    folded = ours["folded, PyTorch fp32"]
    plain = type(model)(ModernAlbertConfig.preset(preset, num_experts=0)).eval()
    models = {BASE: bert, "ModernBERT, PyTorch bf16": half(bert), **ours}
    models |= {"never had experts, PyTorch fp32": plain, "folded, PyTorch bf16": half(folded)}
    sizes = {name: megabytes(model) for name, model in models.items()}
    runs = {name: in_torch(model) for name, model in models.items()}
    with tempfile.TemporaryDirectory() as folder:
        paths = export(bert, Path(folder), "ModernBERT") | export(folded, Path(folder), "folded")
        for name, path in paths.items():
            sizes[name] = path.stat().st_size / 1e6
            runs[name] = in_onnx(path)
    runs = dict(sorted(runs.items(), key=lambda run: not run[0].startswith("ModernBERT")))

    columns = []
    for shape, inputs in reversed(make_batches(8, 128).items()):
        inputs["input_ids"] %= config.vocab_size
        calls = {name: lambda run=run: run(inputs) for name, run in runs.items()}  # noqa: B023
        columns.append((shape, interleave(calls, repeats, shape)))
    rows = [["", "MB", *(cell for shape, _ in columns for cell in (f"{shape} (ms)", "ratio"))]]
    for name in runs:
        rows.append([name, f"{sizes[name]:.0f}"])
        for _, times in columns:
            rows[-1] += [f"{1e3 * median(times[name]):.1f}", f"{ratio(times[name], times[BASE]):.2f}"]
    return rows


def benchmark_quality(name: str, files: list[str], max_rows: int) -> list[list[str]]:
    """Rows of the table: masked-LM loss and accuracy on the same masked tokens."""
    tokenizer = load_tokenizer(name)
    packed = pack_texts(load_texts(files), tokenizer, max_length=128)
    packed = packed.filter(lambda row: len(row["input_ids"]) == 128)
    packed = packed.select(range(min(max_rows, len(packed))))
    input_ids, labels = TokenMasker(tokenizer)(
        torch.tensor(packed["input_ids"][:]), [(i,) for i in range(len(packed))]
    )
    forms = forms_of(ModernAlbertForMaskedLM.from_pretrained(name, dtype="float32").eval())
    folded = forms["folded, PyTorch fp32"]
    runs = {form: in_torch(model) for form, model in forms.items()}
    runs["folded, PyTorch bf16"] = in_torch(half(folded))
    with tempfile.TemporaryDirectory() as folder:
        runs |= {form: in_onnx(path) for form, path in export(folded, Path(folder), "folded").items()}
    count = (labels != -100).sum().item()
    rows = [["", "masked-LM loss", f"accuracy at {count} masked tokens"]]
    for form, run in runs.items():
        loss = right = 0.0
        for ids, targets in zip(input_ids.split(8), labels.split(8), strict=True):
            logits = run({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[targets != -100].float()
            targets = targets[targets != -100]
            loss += F.cross_entropy(logits, targets, reduction="sum").item()
            right += (logits.argmax(-1) == targets).sum().item()
        rows.append([form, f"{loss / count:.4f}", f"{right / count:.2%}"])
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny", help="size of the model with random weights")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--repeats", type=count, help="counted repetitions (15; quick: 3)")
    parser.add_argument("--threads", type=count, help="of torch and onnxruntime; default: torch's")
    parser.add_argument("--model", help="folder of a masked language model, for its loss in place of latency")
    parser.add_argument("--text", nargs="+", help="texts for the loss, which the model was not trained on")
    parser.add_argument("--max_rows", type=count, default=256, help="rows of 128 tokens to take the loss of")
    args = parser.parse_args(argv)
    if (args.model is None) != (args.text is None):
        parser.error("give `--model` and `--text` together")
    if args.threads:
        torch.set_num_threads(args.threads)

    transformers.logging.set_verbosity_error()
    if args.model:
        rows = benchmark_quality(args.model, args.text, args.max_rows)
    else:
        rows = benchmark_latency(args.preset, args.repeats or (3 if args.quick else 15))
    about = {**describe_machine(), "onnxruntime": onnxruntime.__version__}
    print(", ".join(f"{key} {value}" for key, value in about.items()) + "\n")
    print(format_table(rows[0], rows[1:]))


if __name__ == "__main__":
    run_script(main)
