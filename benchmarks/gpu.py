"""All that needs a GPU, in one command under a time budget: tests, equality, speed, the mixture, a training run.

    python benchmarks/gpu.py --minutes 9 --output_dir runs/gpu --train_arguments "--config recipes/nano.yaml"
    python benchmarks/gpu.py --device cpu --minutes 2          # the same at a small size, to try it

On a rented machine, in minutes:

    pip install -e . pytest parameterized && python benchmarks/gpu.py --minutes 9

Where there is no network, take the wheels that it lacks with you: for an image with torch and transformers those of accelerate,
datasets, dill, multiprocess, xxhash, detect-secrets and sentence-transformers. Try what you will train on a CPU first, beyond its first
steps: one that does not learn shows after fifty.

Stages run in the order of `--stages`. Each prints its tables and writes its JSON as soon as it has them; one that fails does
not end the others, and a part is not begun when the time is up.

- `tests`: the tests of the suite that need a GPU.
- `equality`: `eager`, `sdpa` and, where it is installed, FlashAttention, in float32 and bf16, padded, packed, sliding, routed
  and folded: outputs and gradients against float64 on the CPU, as relative errors.
- `speed`: forward pass and training step beside transformers' ModernBERT of equal shape: tokens/s, MFU, peak memory; once
  with compiled layers; the kernels of a training step.
- `mixture`: a MoL layer in its forms beside the plain layer of its width, and one that groups tokens by
  `torch.nn.functional.grouped_mm`.
- `flex` (only if asked for): as `equality`, for `flex_attention`, which compiles for minutes.
- `train`: `scripts/pretrain.py` with `--train_arguments` for the time that is left, and its model in float16, in files below
  16 MB.
"""

import copy
import shlex
import subprocess
import sys
import time
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
import torch.nn.functional as F
import transformers
from common import (
    SCRIPTS,
    count,
    describe_machine,
    fill_experts,
    format_table,
    interleave,
    modernbert_config,
    positive,
    ratio,
)
from torch import nn
from transformers import AutoModelForMaskedLM
from transformers.utils import is_flash_attn_2_available

from modernalbert import ModernAlbertConfig, ModernAlbertModel, mixture_modernalbert
from modernalbert.mixture_modernalbert import ModernAlbertMLP, ModernAlbertMoL, RecomputedMixture, mix_dense
from modernalbert.training.cli import run_script
from modernalbert.training.pretraining import peak_flops
from modernalbert.training.runs import read_json, write_json


TESTS = SCRIPTS.parent / "tests"
LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # of `eager`, relative
LONGEST_TESTS = 120  # seconds
NOISE = 2.0  # of `eager`'s error, up to which another implementation agrees


class Clock:
    """The time that is left of a budget, in seconds."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        return max(self.end - time.monotonic(), 0.0)


def has_flash_attention(device: str) -> bool:
    return device == "cuda" and is_flash_attn_2_available()


def peak_memory(device: str, call: Callable) -> float | None:
    """Megabytes that a call takes at its peak beyond what was there before; None on a CPU, which does not count them."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


# ---- Tests


def run_tests(args: Namespace, clock: Clock) -> dict:
    """The tests that need a GPU; without one they are collected and skipped. Other files may import what is not there."""
    files = [str(path) for path in sorted(TESTS.glob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *files]
    log = args.output_dir / "tests.log"  # is there whatever becomes of the tests
    with log.open("w", encoding="utf-8") as stream:
        result = subprocess.run(
            command, stdout=stream, stderr=subprocess.STDOUT, timeout=max(min(clock.left, LONGEST_TESTS), 1)
        )
    lines = log.read_text(encoding="utf-8").strip().splitlines()
    print("\n".join(lines[-30:] if result.returncode else lines[-1:]), flush=True)
    if result.returncode not in (0, 5):
        raise RuntimeError(f"pytest ended with {result.returncode}")
    return {"summary": lines[-1]}


# ---- Equality


def equality_cases(vocab_size: int) -> dict[str, tuple[dict, dict]]:
    """Fields of the configuration, and a batch, by name."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocab_size, (4, 96), generator=generator)
    lengths = torch.tensor([96, 64, 40, 17])
    padded = {"input_ids": ids, "attention_mask": (torch.arange(96) < lengths[:, None]).long()}
    positions = torch.arange(96).repeat(4, 1)
    for row, start in enumerate((30, 50, 70, 95)):
        positions[row, start:] -= start
    packed = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    sliding = {"layer_types": ["full_attention", "sliding_attention"] * 2, "local_attention": 16}
    plain = {"mol_groups": []}
    return {
        "padded": (plain, padded),
        "packed": (plain, packed),
        "sliding, padded": ({**plain, **sliding}, padded),
        "sliding, packed": ({**plain, **sliding}, packed),
        "routed": ({}, padded),
        "folded": ({"folded": True}, packed),
    }


def outputs_and_gradients(model: nn.Module, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """States of real tokens, and all gradients of a weighted sum of them, in float64 on the CPU."""
    device = next(model.parameters()).device
    states = model(**{name: tensor.to(device) for name, tensor in batch.items()}).last_hidden_state
    real = states[batch["attention_mask"].bool().to(device)]
    model.zero_grad()
    # Not their mean or mean square, which the final norm has made constant.
    weights = torch.linspace(-1, 1, real.numel(), dtype=torch.float64).view_as(real).to(real)
    (real.float() * weights.float()).sum().backward()
    gradients = [p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None]
    return real.detach().double().cpu(), torch.cat(gradients)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def run_equality(args: Namespace, clock: Clock) -> dict:
    """Of what needs no compiler."""
    flash = ["flash_attention_2"] if has_flash_attention(args.device) else []
    return compare_implementations(["eager", "sdpa", *flash], args.device)


def run_flex(args: Namespace, clock: Clock) -> dict:
    """Of `flex_attention`, which compiles for each case: minutes."""
    return compare_implementations(["eager", "flex_attention"], args.device)


def compare_implementations(names: list[str], device: str) -> dict:
    """Relative errors against float64, in norm over all tokens and over all parameters; the first name is the yardstick.

    Raises:
        RuntimeError: An implementation disagrees with float64 by more than twice what the first one does.
    """
    shape = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4}
    # All experts are chosen: a router's choices between two near scores are not equal in another precision.
    shape |= {"num_hidden_layers": 4, "num_hidden_groups": 2, "mol_groups": [1], "num_experts_per_tok": 8}
    shape |= {"pad_token_id": 3, "initializer_range": 0.1}
    cases, rows, figures, wrong = equality_cases(512), [], {}, []
    for dtype in (torch.float32, torch.bfloat16):
        for name in names:
            if name.startswith("flash") and dtype == torch.float32:
                continue
            cells = []
            for case, (fields, batch) in cases.items():
                torch.manual_seed(0)
                fields = dict(fields)
                folded = fields.pop("folded", False)
                config = ModernAlbertConfig(**{**shape, **fields})
                reference = fill_experts(ModernAlbertModel._from_config(config, attn_implementation="eager"))
                if folded:
                    reference.merge_experts()
                reference = reference.to(dtype).double().eval()  # the same weights, rounded once
                state = reference.state_dict()
                model = ModernAlbertModel._from_config(
                    copy.deepcopy(reference.config), attn_implementation=name, dtype=dtype
                )
                model.load_state_dict(state)
                model = model.to(device).eval()
                found, expected = (outputs_and_gradients(each, batch) for each in (model, reference))
                errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
                figures[f"{name}, {dtype}, {case}"] = errors
                limits = [NOISE * error for error in figures[f"{names[0]}, {dtype}, {case}"]]
                agrees = all(error <= limit for error, limit in zip(errors, limits, strict=True))
                if not (agrees and max(errors) < LARGEST_ERROR[dtype]):
                    wrong.append(f"{name}, {dtype}, {case}")
                cells.append(" / ".join(f"{error:.1e}" for error in errors))
            rows.append([f"{name}, {str(dtype).removeprefix('torch.')}", *cells])
    print(format_table(["outputs / gradients", *cases], rows, numbers=True), flush=True)
    if wrong:
        raise RuntimeError(f"disagree with float64: {'; '.join(wrong)}")
    return figures


# ---- Speed


def speed_models(device: str) -> dict[str, ModernAlbertConfig]:
    if device == "cuda":
        return {name: ModernAlbertConfig.preset(name) for name in ("tiny", "base")}
    return {"nano": ModernAlbertConfig.preset("nano")}


def run_speed(args: Namespace, clock: Clock) -> dict:
    """Tables of each shape: forward pass and training step in bf16, of ModernBERT, ours without experts and routed.

    On a GPU then, for the last model and full rows of the first length: which kernels the time of a training step goes to, and
    the tables with compiled layers beside the others, since each costs its compilation.
    """
    shapes = {512: 32, 8192: 2} if args.device == "cuda" else {128: 4}
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    peak = peak_flops(torch.device(args.device), args.device == "cuda")
    attention = "flash_attention_2" if has_flash_attention(args.device) else "sdpa"
    figures = {}

    def measure(models, inputs, training, title):
        if clock.left:
            figures[title] = time_models(
                models, config, inputs, training, dtype, peak, args.repeats, title, args.device
            )
            write_json(args.output_dir / "speed.json", figures)

    for preset, config in speed_models(args.device).items():
        torch.manual_seed(0)
        builders = {
            "ModernBERT": modernbert_config(config),
            "ours, no experts": ModernAlbertConfig(**{**config.to_dict(), "num_experts": 0}),
            "ours, routed": config,
        }
        models = {
            name: AutoModelForMaskedLM.from_config(each, attn_implementation=attention).to(args.device)
            for name, each in builders.items()
        }
        for model in models.values():
            fill_experts(model).config.sparse_prediction = True
        models["ModernBERT"].sparse_prediction = True
        for length, batch in shapes.items():
            if length > config.max_position_embeddings:
                continue
            for fill in (1.0, 0.6):
                inputs = speed_batch(config.vocab_size, batch, length, fill, args.device)
                for training in (False, True):
                    kind = "training step" if training else "forward"
                    measure(models, inputs, training, f"{preset}, {batch} x {length} at {fill:.0%}, {kind}")
    length, batch = next(iter(shapes.items()))
    inputs = speed_batch(config.vocab_size, batch, length, 1.0, args.device)
    if args.device == "cuda":
        figures["kernels"] = profile_step(models["ours, routed"], inputs, dtype)
        models |= {f"{name}, compiled": compile_layers(copy.deepcopy(model)) for name, model in models.items()}
        for training in (True, False):
            kind = "training step" if training else "forward"
            measure(models, inputs, training, f"{preset}, {batch} x {length}, compiled layers, {kind}")
    return figures


def compile_layers(model: nn.Module) -> nn.Module:
    """Compiles each layer, in place: those of equal code are compiled once, and a model takes seconds in place of minutes."""
    torch._dynamo.config.recompile_limit = 64  # each depth of a group compiles anew, training and inference as well
    for layer in model.base_model.layers:
        layer.compile(dynamic=False)
    return model


def profile_step(model: nn.Module, inputs: dict, dtype: torch.dtype, rows: int = 15) -> str:
    """The kernels that a training step on a GPU spends its time in."""
    model.train()

    def step():
        with torch.autocast("cuda", dtype):
            loss = model(**inputs).loss
        loss.backward()
        model.zero_grad()

    step()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    table = profile.key_averages().table(sort_by="self_device_time_total", row_limit=rows, max_name_column_width=60)
    print(f"\nkernels of a training step\n\n{table}", flush=True)
    return table


def speed_batch(vocab_size: int, batch: int, length: int, fill: float, device: str) -> dict[str, torch.Tensor]:
    """Sequences of lengths around `fill` of the row, 30% of their tokens masked."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.full((batch,), length)
    if fill < 1:
        lengths = torch.linspace(2 * fill - 1, 1.0, batch).mul(length).long().clamp(min=8)
    ids = torch.randint(5, vocab_size, (batch, length), generator=generator)
    mask = (torch.arange(length) < lengths[:, None]).long()
    masked = (torch.rand(batch, length, generator=generator) < 0.3) & mask.bool()
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~masked, -100)}
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def time_models(models, config, inputs, training, dtype, peak, repeats, title, device) -> dict:
    """One table: milliseconds, tokens/s, MFU and peak memory of each model; those that fail are left out and named."""
    calls, memory, failed = {}, {}, {}
    optimizers = {name: torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) for name, model in models.items()}
    for name, model in models.items():

        def call(name=name, model=model):
            model.train(training)
            with torch.set_grad_enabled(training), torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = model(**inputs).loss
            if training:
                loss.backward()
                optimizers[name].step()
                optimizers[name].zero_grad()

        try:
            call()  # compiles
            memory[name] = peak_memory(device, call)
            calls[name] = call
        except Exception as error:  # of one model, of memory for example: the others are still of use
            failed[name] = f"{type(error).__name__}: {error}"[:300]
            if device == "cuda":
                torch.cuda.empty_cache()
    times = interleave(calls, repeats, title)
    real = int(inputs["attention_mask"].sum())
    length = (
        int(inputs["attention_mask"].sum(dim=1).float().square().sum()) / real
    )  # of a token's sequence, in the mean
    flops = real * config.estimate_flops(length, 0.3, training=training)
    plain = ModernAlbertConfig(**{**config.to_dict(), "num_experts": 0})
    plain_flops = real * plain.estimate_flops(length, 0.3, training=training)
    figures, rows = {"failed": failed}, []
    for name, seconds in times.items():
        own = flops if "routed" in name else plain_flops
        figure = {
            "milliseconds": 1e3 * median(seconds),
            "tokens_per_second": real / median(seconds),
            "mfu": own / median(seconds) / peak,
            "megabytes": memory[name],
            "ratio": ratio(seconds, times["ModernBERT"]) if "ModernBERT" in times else None,
        }
        figures[name] = figure
        rows.append(
            [
                name,
                f"{figure['milliseconds']:.1f}",
                f"{figure['tokens_per_second']:,.0f}",
                f"{figure['mfu']:.1%}",
                "" if figure["megabytes"] is None else f"{figure['megabytes']:,.0f}",
                "" if figure["ratio"] is None else f"{figure['ratio']:.2f}",
            ]
        )
    print(f"\n{title}\n")
    print(format_table(["", "ms", "tokens/s", "MFU", "peak MB", "x ModernBERT"], rows, numbers=True), flush=True)
    for name, reason in failed.items():
        print(f"{name} failed: {reason}", flush=True)
    return figures


# ---- The mixture


def mix_grouped(glu, scaling, projected, low_rank, weights, experts, in_B, out_A):
    """[`mix_dense`] over tokens sorted by expert, each with its own expert alone: two grouped products."""
    tokens, slots = experts.shape
    order = experts.flatten().argsort(stable=True)
    owner = order // slots
    ends = torch.bincount(experts.flatten(), minlength=len(in_B)).cumsum(0).to(torch.int32)
    chosen = low_rank[owner, experts.flatten()[order]]  # [tokens * k, r]
    delta = F.grouped_mm(chosen, in_B.transpose(1, 2), offs=ends)
    part = weights.flatten()[order, None] * glu(projected[owner] + scaling * delta)
    activated = projected.new_zeros(tokens, part.shape[1]).index_add(0, owner, part)
    narrow = F.grouped_mm(part, out_A.transpose(1, 2), offs=ends)
    low_rank_out = torch.zeros_like(low_rank).index_put((owner, experts.flatten()[order]), narrow)
    return activated, low_rank_out


def run_mixture(args: Namespace, clock: Clock) -> dict:
    """Milliseconds and memory of a MoL layer in each form, forward and with backward, beside the plain layer."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    preset, tokens = ("base", 16_384) if args.device == "cuda" else ("nano", 512)
    torch.manual_seed(0)
    config = ModernAlbertConfig.preset(preset)
    plain = ModernAlbertMLP(config).to(args.device, dtype)
    layer = ModernAlbertMoL(config)
    for name, parameter in layer.named_parameters():  # corrections as large as what they correct
        nn.init.normal_(parameter, std=0.1 if name.startswith("experts") else 0.02)
    layer.to(args.device, dtype).eval().router.float()  # without the router's noise
    forms = {"kept": mix_dense, "recomputed": RecomputedMixture.apply}
    if hasattr(F, "grouped_mm"):
        forms["grouped_mm"] = mix_grouped
    if args.device == "cpu":
        forms["grouped, CPU"] = mixture_modernalbert.GroupedMixture.apply
    states = torch.randn(1, tokens, config.hidden_size, device=args.device, dtype=dtype)
    figures, rows, expected = {}, [], None

    def choose(form):
        return patch.object(mixture_modernalbert, "choose_mixture", lambda *arguments: form)

    for name in list(forms):
        try:
            with choose(forms[name]):
                output = layer(states).float()
        except RuntimeError as error:  # a type, a device or an alignment that the product does not take
            print(f"{name} cannot run here: {str(error).splitlines()[0][:200]}", flush=True)
            del forms[name]
            continue
        expected = output if expected is None else expected
        figures[f"{name}, error"] = relative_error(output.detach(), expected.detach())
    calls, memory = {}, {}
    for training in (False, True):
        for name, form in [("plain layer", None), *forms.items()]:

            def call(form=form, training=training):
                inputs = states.clone().requires_grad_(training)
                with torch.set_grad_enabled(training):
                    if form is None:
                        output = plain(inputs)
                    else:
                        with choose(form):
                            output = layer(inputs)
                    if training:
                        output.float().square().mean().backward()

            title = f"{name}, {'forward and backward' if training else 'forward'}"
            call()
            memory[title] = peak_memory(args.device, call)
            calls[title] = call
    times = interleave(calls, args.repeats, "mixture")
    for title, seconds in times.items():
        reference = "plain layer, " + title.split(", ")[-1]
        figures[title] = {
            "milliseconds": 1e3 * median(seconds),
            "ratio": ratio(seconds, times[reference]),
            "megabytes": memory[title],
        }
        cell = "" if memory[title] is None else f"{memory[title]:,.0f}"
        rows.append([title, f"{figures[title]['milliseconds']:.2f}", f"{figures[title]['ratio']:.2f}", cell])
    print(f"\nmixture of `{preset}`, {tokens} tokens, {str(dtype).removeprefix('torch.')}\n")
    print(format_table(["", "ms", "x plain layer", "peak MB"], rows, numbers=True), flush=True)
    return figures


# ---- Training


def run_training(args: Namespace, clock: Clock) -> dict:
    """A short run that tells the speed, then one that ends with the time that is left."""
    folder = args.output_dir / "train"
    arguments = shlex.split(args.train_arguments)
    shared = ["--report_to", "none", "--disable_tqdm", "true", "--use_cpu", str(args.device == "cpu").lower()]

    def pretrain(name: str, steps: int) -> dict:
        command = [sys.executable, str(SCRIPTS / "pretrain.py"), *arguments, *shared, "--max_steps", str(steps)]
        output = folder / name
        command += ["--output_dir", str(output), "--save_strategy", "no", "--eval_strategy", "no"]
        started = time.monotonic()
        result = subprocess.run(command, capture_output=True, text=True, timeout=max(2 * clock.left, 60))
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{result.stderr[-3000:]}")
        results = read_json(output / "results.json")
        return {**results, "total_seconds": time.monotonic() - started}

    probe = pretrain("probe", args.probe_steps)
    overhead = probe["total_seconds"] - probe["seconds"]
    per_step = probe["seconds"] / args.probe_steps
    steps = int(0.85 * (clock.left - overhead - 5) / per_step)  # 5 seconds to write the files
    print(f"probe: {args.probe_steps} steps at {per_step:.2f} s, {overhead:.0f} s beside them", flush=True)
    if steps <= args.probe_steps:
        print("no time is left for a longer run", flush=True)
        return {"probe": probe}
    results = pretrain("model", steps)
    model = AutoModelForMaskedLM.from_pretrained(folder / "model", dtype=torch.float16)
    model.save_pretrained(folder / "float16", max_shard_size="15MB")
    for path in (folder / "model").glob("tokenizer*"):
        (folder / "float16" / path.name).write_bytes(path.read_bytes())
    rows = [[name, f"{value:,.4g}"] for name, value in results.items() if isinstance(value, int | float)]
    print(format_table(["", f"{steps} steps"], rows, numbers=True), flush=True)
    return {"probe": probe, "run": results, "steps": steps}


STAGES = {
    "tests": run_tests,
    "equality": run_equality,
    "speed": run_speed,
    "mixture": run_mixture,
    "flex": run_flex,
    "train": run_training,
}


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=positive, default=9.0, help="for everything")
    parser.add_argument(
        "--stages", nargs="+", choices=list(STAGES), default=[s for s in STAGES if s != "flex"], help="in this order"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--repeats", type=count, default=5, help="turns of each timing")
    parser.add_argument(
        "--train_arguments", default="", help="of scripts/pretrain.py, without output and steps; none: no training"
    )
    parser.add_argument("--probe_steps", type=count, default=20, help="steps that tell the speed of training")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gpu"))
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; `--device cpu` runs the same at a small size")
    if not args.train_arguments:
        args.stages = [stage for stage in args.stages if stage != "train"]
    transformers.logging.set_verbosity_error()
    clock = Clock(args.minutes)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    machine = describe_machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    write_json(args.output_dir / "machine.json", machine)
    failed = []
    for stage in args.stages:
        print(f"\n## {stage} ({clock.left:.0f} s left)\n", flush=True)
        if not clock.left:
            print("no time is left", flush=True)
            continue
        started = time.monotonic()
        try:
            figures = STAGES[stage](args, clock)
        except Exception:
            traceback.print_exc()
            failed.append(stage)
            continue
        write_json(args.output_dir / f"{stage}.json", {**figures, "seconds": time.monotonic() - started})
        print(f"\n{stage}: {time.monotonic() - started:.0f} s", flush=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    run_script(main)
