"""What a pretraining run of each preset needs, as arithmetic: operations, days, memory. No GPU takes part.

    python benchmarks/scaling.py                                    # rows of 1024 tokens; a quarter of a minute on a CPU
    python benchmarks/scaling.py --seq_length 512 --mfu 0.3 --tokens 100e9

Operations come from `ModernAlbertConfig.estimate_flops`, speed from an assumed share of a GPU's peak (MFU). Activations
are counted on fake tensors, which have shapes and no data: the bytes that autograd keeps while the model runs forward as
on a GPU, in bf16 by autocast, with the mixture of static shapes and FlashAttention. `docs/scaling.md` shows the output.
"""

import argparse
from typing import NamedTuple
from unittest.mock import patch

import torch
import transformers
from common import MASKED, count, format_table, positive
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import AttentionInterface, AutoModelForMaskedLM

from modernalbert import ModernAlbertConfig, mixture_modernalbert
from modernalbert.configuration_modernalbert import PRESETS
from modernalbert.mixture_modernalbert import RecomputedMixture
from modernalbert.modeling_modernalbert import ModernAlbertLayer
from modernalbert.training.cli import run_script


GPUS = 8
MEMORY = 80e9
USABLE = 0.9  # of the memory; the rest is for gradients on their way, communication and fragmentation
STATE_BYTES = 16  # of a parameter: weight, gradient and AdamW's two moments, each float32
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class Pass(NamedTuple):
    """A forward pass with labels.

    Attributes:
        kept: Bytes that autograd keeps beside the parameters.
        checkpointed: The same with gradient checkpointing: inputs of layers, and one layer at a time.
        flops: Operations that ran.
    """

    kept: int
    checkpointed: int
    flops: int


def flash_attention(module, query, key, value, attention_mask, **kwargs):
    """Keeps inputs, output and a normaliser of each query, as the GPU's kernels do, and no attention weights."""
    return FLASH(query, key, value)[0].transpose(1, 2), None


def run_forward(config: ModernAlbertConfig, rows: int, seq_length: int) -> Pass:
    """Runs the masked-LM model forward on `rows` full sequences, and records what it keeps and computes."""
    AttentionInterface.register("counted", flash_attention)
    storages = {}
    layers = []  # of each executed layer: bytes of the input, bytes kept before and after it

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # the handle tells storages apart: fake ones have no address
        return tensor

    def kept():
        return sum(storage.nbytes() for key, storage in storages.items() if key not in parameters)

    counter = FlopCounterMode(display=False)
    counter.flop_registry[FLASH] = flop_registry[torch.ops.aten._scaled_dot_product_flash_attention]
    on_accelerator = patch.object(mixture_modernalbert, "choose_mixture", lambda *args: RecomputedMixture.apply)
    with on_accelerator, FakeTensorMode(allow_non_fake_inputs=True):
        model = AutoModelForMaskedLM.from_config(config, attn_implementation="counted").train()
        parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):  # float32 under CUDA's autocast, not under the CPU's
                module.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
            elif isinstance(module, ModernAlbertLayer):
                module.register_forward_pre_hook(lambda module, inputs: layers.append([inputs[0].nbytes, kept()]))
                module.register_forward_hook(lambda *args: layers[-1].append(kept()))
        input_ids = torch.zeros(rows, seq_length, dtype=torch.long)
        labels = input_ids.flatten()[: round(MASKED * rows * seq_length)]
        saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with saving, counter, torch.autocast("cpu", torch.bfloat16):
            outputs = model.run_encoder(True, None, input_ids)
            # Which tokens are labelled is data, which fake tensors lack: take the first ones.
            states = model.head(outputs.last_hidden_state.flatten(0, 1)[: len(labels)])
            logits = model.decoder(model.decoder_projection(states))
            loss = model.loss_function(logits, labels, vocab_size=config.vocab_size)
            loss = model.total_loss(loss, outputs.aux_loss, 1.0)
    inputs = sum(size for size, _, _ in layers)
    inside = [after - before for _, before, after in layers]
    return Pass(kept(), kept() - sum(inside) + inputs + max(inside), counter.get_total_flops())


def measure(config: ModernAlbertConfig, seq_length: int) -> dict[str, float]:
    """Bytes and operations of each further token, and `constant` bytes: the weights in bf16 that autocast keeps."""
    one, two = (run_forward(config, rows, seq_length) for rows in (1, 2))
    per_token = {name: (b - a) / seq_length for name, a, b in zip(Pass._fields, one, two, strict=True)}
    return {**per_token, "constant": one.kept - per_token["kept"] * seq_length}


def tables(seq_length: int, mfu: float, peak_tflops: float, tokens: float) -> str:
    """Both tables, of the presets that take sequences of `seq_length`."""
    compute, memory = [], []
    for name in PRESETS:
        config = ModernAlbertConfig.preset(name)
        if seq_length > config.max_position_embeddings:
            continue
        measured = measure(config, seq_length)
        parameters = config.num_parameters()
        flops = config.estimate_flops(seq_length, MASKED, training=True)
        # The backward pass runs the mixture's inner products once more, of all experts for each slot.
        experts = config.num_experts * config.num_experts_per_tok * len(config.mol_groups) * config.layers_per_group
        again = 2 * experts * config.expert_rank * 3 * config.mol_intermediate_size
        extra = (3 * measured["flops"] + again) / flops - 1
        speed = mfu * peak_tflops * 1e12 / flops
        speeds = [speed, GPUS * speed]
        compute.append(
            [
                *(f"`{name}`", f"{parameters / 1e6:.0f}M", str(config.num_hidden_layers), f"{flops / 1e9:.3g}"),
                f"{extra:+.0%}",
                *(f"{rate / 1e3:,.0f}k" for rate in speeds),
                *(f"{tokens / rate / 86400:.2g}" for rate in speeds),
            ]
        )
        # The backward pass of the loss holds float32 gradients of the logits and of their logarithms.
        loss = MASKED * config.vocab_size * 2 * 4
        free = USABLE * MEMORY - STATE_BYTES * parameters - measured["constant"]
        kept = [measured["kept"], measured["checkpointed"]]
        memory.append(
            [
                *(f"`{name}`", f"{STATE_BYTES * parameters / 1e9:.2f}"),
                *(f"{size / 1e3:,.0f}" for size in kept),
                *(f"{int(free / (size + loss) / seq_length):,}" for size in kept),
            ]
        )
    about = f"Rows of {seq_length} tokens, {MASKED:.0%} masked"
    compute_header = [
        *("preset", "parameters", "layers run", "training GFLOP per token", "static mixture"),
        *("tokens/s, 1 GPU", f"{GPUS} GPUs", "days, 1 GPU", f"{GPUS} GPUs"),
    ]
    memory_header = [
        *("preset", "weights, gradients, AdamW (GB)", "activations per token (kB)", "checkpointed (kB)"),
        *(f"rows in {MEMORY / 1e9:.0f} GB", "checkpointed"),
    ]
    return "\n\n".join(
        [
            f"{about}; {mfu:.0%} of {peak_tflops:g} TFLOP/s; days for {tokens / 1e9:g}B tokens.",
            format_table(compute_header, compute, numbers=True),
            f"{about}; bf16 by autocast; {USABLE:.0%} of {MEMORY / 1e9:.0f} GB is filled.",
            format_table(memory_header, memory, numbers=True),
        ]
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq_length", type=count, default=1024, help="tokens of a row, one sequence")
    parser.add_argument("--mfu", type=positive, default=0.25, help="share of the peak that is reached: an assumption")
    parser.add_argument("--peak_tflops", type=positive, default=989, help="dense bf16 peak of a GPU (H100 SXM's)")
    parser.add_argument("--tokens", type=positive, default=30e9, help="tokens of the run")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    print(tables(args.seq_length, args.mfu, args.peak_tflops, args.tokens))


if __name__ == "__main__":
    run_script(main)
