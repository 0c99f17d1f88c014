"""Speed, memory and size of ModernALBERT beside its references, measured in one run.

    python benchmarks/speed.py                # everything; about 12 minutes on 2 CPU cores
    python benchmarks/speed.py --quick        # fewer repetitions, smaller batches; about 2 minutes
    python benchmarks/speed.py --only mol     # one part: mol, encoder or memory

The rows of a table are timed in turn; a figure is the median, a ratio the median of the ratios within a turn. The tables
go to the terminal, and with `--output FILE` to JSON, with the machine and the versions. On a CUDA device models run in
bf16 with sdpa (torch's variable-length attention) and, where flash-attn is installed, with `flash_attention_2`.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch
import transformers
from common import DEVICE, count, describe_machine, fill_experts, interleave, make_batches, ratio
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AlbertConfig, AutoModel, BertConfig, ModernBertConfig

from modernalbert import ModernAlbertConfig
from modernalbert.mixture_modernalbert import ModernAlbertMLP, ModernAlbertMoL
from modernalbert.training.cli import run_script


sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from reference import naive_mol  # noqa: E402


DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32

# Same depth and widths for the pair that is compared block by block: 14 layers, 768 wide, feed-forward 1152, full
# attention everywhere.
SHAPE = {"hidden_size": 768, "intermediate_size": 1152, "num_hidden_layers": 14, "num_attention_heads": 12}


def modernbert_config() -> ModernBertConfig:
    return ModernBertConfig(**SHAPE, layer_types=["full_attention"] * SHAPE["num_hidden_layers"])


ENCODERS = {
    "ModernALBERT 14x768/1152": lambda: ModernAlbertConfig(**SHAPE, mol_groups=[]),
    "ModernBERT 14x768/1152": modernbert_config,
    "tiny": lambda: ModernAlbertConfig.preset("tiny"),
    "tiny, no experts": lambda: ModernAlbertConfig.preset("tiny", num_experts=0),
    "tiny, experts folded": lambda: ModernAlbertConfig.preset("tiny"),
    "ALBERT-base": lambda: AlbertConfig(
        hidden_size=768, num_attention_heads=12, intermediate_size=3072, num_hidden_layers=12
    ),
    "BERT-base": lambda: BertConfig(),
}


def build(name: str, attention: str = "sdpa") -> torch.nn.Module:
    """Encoder of [`ENCODERS`] with random weights."""
    torch.manual_seed(0)
    model = fill_experts(AutoModel.from_config(ENCODERS[name](), attn_implementation=attention, dtype=DTYPE))
    if "folded" in name:
        model.merge_experts()
    return model.to(DEVICE).eval()


def report(console: Console, title: str, times: dict, references: dict) -> list[dict]:
    """Prints the table of a comparison and returns its rows; `references` maps each row to those it is set against."""
    table = Table(title=title, title_justify="left")
    for column in ("", "median ms", "min", "max", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    rows = []
    for name, values in times.items():
        ratios = {other: ratio(values, times[other]) for other in references.get(name, ())}
        rows.append({"case": title, "name": name, "milliseconds": [1e3 * value for value in values], "ratios": ratios})
        table.add_row(
            name,
            *(f"{1e3 * figure(values):.1f}" for figure in (median, min, max)),
            "\n".join(f"{value:.2f} x {other}" for other, value in ratios.items()),
        )
    console.print(table)
    return rows


def passes(model, inputs: dict, train: bool, optimizer: torch.optim.Optimizer | None = None):
    """One forward pass, or forward and backward, of an encoder or a layer; with an optimizer, a training step."""
    if not train:
        with torch.no_grad():
            model(**inputs)
        return
    model.zero_grad(set_to_none=True)
    output = model(**inputs)
    (output if torch.is_tensor(output) else output.last_hidden_state).float().square().mean().backward()
    if optimizer is not None:
        optimizer.step()


def benchmark_mol(console: Console, repeats: int, tokens: int = 2048) -> list[dict]:
    """(a) The MoL layer against the plain feed-forward layer of its width and the naive form."""
    torch.manual_seed(0)
    config = ModernAlbertConfig.preset("tiny")
    mol = ModernAlbertMoL(config)
    for parameter in mol.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    mol = mol.to(DEVICE, DTYPE).eval()
    ffn = ModernAlbertMLP(config, config.mol_intermediate_size).to(DEVICE, DTYPE).eval()
    rows = []
    for train in (False, True):
        hidden_states = torch.randn(1, tokens, config.hidden_size, device=DEVICE, dtype=DTYPE, requires_grad=train)

        class Naive(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.mol = mol

            def forward(self, hidden_states):
                return naive_mol(self.mol, hidden_states)

        layers = {"FFN 768/2624": ffn, "MoL, 8 experts, top-2, rank 16": mol, "MoL, naive form": Naive()}
        calls = {
            name: lambda layer=layer: passes(layer, {"hidden_states": hidden_states}, train)  # noqa: B023
            for name, layer in layers.items()
        }
        title = f"layer, {tokens} tokens, {'forward and backward' if train else 'forward'}"
        times = interleave(calls, repeats, title)
        rows += report(console, title, times, {name: ["FFN 768/2624"] for name in list(layers)[1:]})
    return rows


def benchmark_encoders(console: Console, repeats: int, batch: int, seq: int) -> list[dict]:
    """(b) Encoders against each other, and (c, in part) their parameters."""
    models = {name: build(name) for name in ENCODERS}
    if DEVICE == "cuda" and transformers.utils.is_flash_attn_2_available():
        models |= {f"{name}, flash": build(name, "flash_attention_2") for name in list(ENCODERS)[:3]}
    references = {
        "ModernALBERT 14x768/1152": ["ModernBERT 14x768/1152"],
        "tiny": ["tiny, no experts", "ModernBERT 14x768/1152"],
        "tiny, experts folded": ["tiny, no experts"],
    }
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) for name, model in models.items()}
    rows = []
    for shape, inputs in make_batches(batch, seq).items():
        for train in (False, True):
            calls = {
                name: lambda name=name: passes(models[name], inputs, train, optimizers[name])  # noqa: B023
                for name in models
            }
            title = f"encoder, {shape}, {'training step (forward, backward, fused AdamW)' if train else 'forward'}"
            rows += report(console, title, interleave(calls, repeats, title), references)
    return rows


def measure_memory(name: str, train: bool, batch: int, seq: int) -> None:
    """In a process of its own: prints parameters and peak memory beyond the start, as JSON."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model = build(name)
    inputs = next(iter(make_batches(batch, seq).values()))
    passes(model, inputs, train)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    if DEVICE == "cuda":
        peak = torch.cuda.max_memory_allocated()
    print(json.dumps({"parameters": sum(p.numel() for p in model.parameters()), "peak_bytes": peak}))


def benchmark_memory(console: Console, batch: int, seq: int) -> list[dict]:
    """(c) Parameters and peak memory, each figure from a fresh process."""
    title = f"memory, {batch} x {seq} full, with the weights"
    table = Table(title=title, title_justify="left")
    for column in ("", "parameters (M)", "forward (MiB)", "forward and backward (MiB)"):
        table.add_column(column, justify="left" if not column else "right")
    rows = []
    for name in track(ENCODERS, description=title, transient=True, console=Console(stderr=True)):
        figures = []
        for train in (False, True):
            command = [sys.executable, __file__, "--measure", name, "--train", str(int(train))]
            command += ["--batch", str(batch), "--seq", str(seq)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            figures.append(json.loads(output.splitlines()[-1]))
        rows.append({"case": title, "name": name, "forward": figures[0], "forward_backward": figures[1]})
        table.add_row(
            name,
            f"{figures[0]['parameters'] / 1e6:.1f}",
            *(f"{figure['peak_bytes'] / 2**20:.0f}" for figure in figures),
        )
    console.print(table)
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, smaller batches")
    parser.add_argument("--only", choices=["mol", "encoder", "memory"], help="one part")
    parser.add_argument("--repeats", type=count, help="counted repetitions (9; quick: 3)")
    parser.add_argument("--batch", type=count, help="sequences of a batch (8; quick: 4)")
    parser.add_argument("--seq", type=count, help="tokens of a sequence (256; quick: 128)")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--train", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    batch, seq = args.batch or (4 if args.quick else 8), args.seq or (128 if args.quick else 256)
    repeats = args.repeats or (3 if args.quick else 9)
    if args.measure:
        return measure_memory(args.measure, bool(args.train), batch, seq)

    transformers.logging.set_verbosity_error()
    console = Console(width=110)
    about = {**describe_machine(), "dtype": str(DTYPE).removeprefix("torch.")}
    console.print(", ".join(f"{key} {value}" for key, value in about.items()))
    rows = []
    if args.only in (None, "mol"):
        rows += benchmark_mol(console, repeats if args.quick else 2 * repeats + 1)
    if args.only in (None, "encoder"):
        rows += benchmark_encoders(console, repeats, batch, seq)
    if args.only in (None, "memory"):
        rows += benchmark_memory(console, batch, seq)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({"machine": about, "rows": rows}, indent=1))


if __name__ == "__main__":
    run_script(main)
