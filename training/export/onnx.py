"""Export to ONNX with configuration and tokenizer: compared with PyTorch in onnxruntime, written atomically."""

import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...configuration_modernalbert import ModernAlbertConfig
from ...tokenization import save_tokenizer
from .folder import draft_folder, drop_auto_map, fit_tokenizer


try:
    import onnx
    import onnxruntime
    import onnxscript  # noqa: F401  (torch.onnx needs it)
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process
except ImportError as error:
    raise ImportError(
        f'{error}; the export needs onnx, onnxruntime and onnxscript: `pip install ".[export]"`'
    ) from error


TOLERANCE = 1e-4
OLDEST_OPSET = 18  # torch exports to this opset, and converts to newer ones


class Difference(NamedTuple):
    """Largest difference between the outputs of two models, and largest output."""

    largest: float
    scale: float


class NamedOutputs(nn.Module):
    """A model with a fixed signature: named tensors in, a tuple of the named outputs out."""

    def __init__(self, model: PreTrainedModel, names: list[str]):
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
        return tuple(outputs[name] for name in self.names)


def export_onnx(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    quantize: bool = False,
    opset: int | None = None,
) -> dict[str, Difference]:
    """Writes a folder with `model.onnx`, `config.json` and a tokenizer, once onnxruntime has run the model.

    Args:
        model: A ModernALBERT without experts, with any head, in float32.
        tokenizer: Its tokenizer.
        folder: Folder to write; must not exist, or be empty.
        quantize: Whether to write `model_int8.onnx` as well, see [`quantize_onnx`].
        opset: Version of the operator set; default: torch's.

    Returns:
        Difference from PyTorch, by file.

    Raises:
        FileExistsError: The folder exists and is not empty.
        RuntimeError: onnxruntime got other outputs than PyTorch; nothing is left behind.
        ValueError: The model has experts or another type than float32, or there is no such opset.
    """
    check_onnx(model.config, opset)
    if model.dtype != torch.float32:
        raise ValueError(f"the model is in {model.dtype}, expected torch.float32; load it with `dtype='float32'`")
    with draft_folder(folder) as draft:
        write_onnx(model, draft / "model.onnx", opset)
        differences = {"model.onnx": compare(model, draft / "model.onnx")}
        difference, scale = differences["model.onnx"]
        if difference > TOLERANCE * max(1.0, scale):
            raise RuntimeError(f"onnxruntime's outputs differ from PyTorch's by {difference:.1e} (up to {scale:.1e})")
        if quantize:
            quantize_onnx(draft / "model.onnx", draft / "model_int8.onnx")
            differences["model_int8.onnx"] = compare(model, draft / "model_int8.onnx")
        model.config.save_pretrained(draft)
        # The folder has no model code, which `auto_map` would make AutoTokenizer look for.
        drop_auto_map(draft)
        save_tokenizer(fit_tokenizer(tokenizer, model.config), draft)
    return differences


def check_onnx(config: ModernAlbertConfig, opset: int | None = None) -> None:
    """Refuses, before any work, a model that cannot be exported.

    Raises:
        ValueError: The model has experts, or there is no such opset.
    """
    if config.mol_groups and config.modulation in ("moa", "depth_lora"):
        raise ValueError(
            f"`ffn_modulation` is {config.ffn_modulation!r}, and a plain encoder is expected; only a Mixture of LoRAs can "
            "be made one"
        )
    if config.mol_groups and config.modulation == "mol":
        raise ValueError(
            f"the model has MoL groups with `num_experts={config.num_experts}`, and a plain encoder is expected; fold "
            "the experts into the shared weights with `scripts/merge_experts.py` or `model.merge_experts()`"
        )
    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not OLDEST_OPSET <= opset <= newest:
        raise ValueError(
            f"`opset` ({opset}) must be from {OLDEST_OPSET} to {newest}, the newest of the installed onnx"
        )


def write_onnx(model: PreTrainedModel, path: Path, opset: int | None = None) -> None:
    """Exports a transformers model with any head to one file; batch size and length are dynamic.

    Raises:
        ValueError: There is no such opset.
    """
    model.eval()
    inputs = draw_inputs(model, batch=2, length=8)
    with torch.no_grad():
        names = [name for name, value in model(**inputs, return_dict=True).items() if torch.is_tensor(value)]
    axes = ("batch", "num_choices", "sequence") if has_choices(model) else ("batch", "sequence")
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")  # the fewest operators: no guard against NaN, an additive mask
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # from torch, about its own code
            program = torch.onnx.export(
                NamedOutputs(model, names).eval(),
                kwargs=inputs,
                input_names=list(inputs),
                output_names=names,
                dynamic_shapes={name: dict(enumerate(axes)) for name in inputs},
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
            for node in program.model.graph:
                node.metadata_props.clear()  # source locations, with local paths
            program.save(path)
    finally:
        model.set_attn_implementation(attention)
    written = program.model.opset_imports[""]
    if opset is not None and written != opset:
        raise ValueError(f"torch cannot write opset {opset}, only {written}; give that, or leave `opset` out")


def quantize_onnx(source: Path, target: Path) -> None:
    """Quantises weights of matrix products to int8, one scale per column, and activations at run time.

    The embedding table is quantised as well, with a single scale.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        # torch exports a weight and a transpose node, and only constants are quantised. A weight shared by several layers
        # stays a single constant.
        prepared = Path(scratch) / source.name
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        model = onnx.load(prepared)
    # The quantiser transposes some weights, which would contradict their recorded shapes.
    del model.graph.value_info[:]
    # Seven bits of the weights: a CPU without VNNI (AVX2 alone) adds two products in 16 bits, which eight bits overflow.
    quantize_dynamic(model, target, per_channel=True, reduce_range=True)


def compare(model: PreTrainedModel, path: Path) -> Difference:
    """Runs an exported model and its original on other sizes than it was traced with, with padding on both sides.

    Raises:
        RuntimeError: Outputs have other names or shapes, or are not finite.
    """
    session = open_session(path)
    names = [output.name for output in session.get_outputs()]
    # Longer than the window of sliding layers.
    longest = min(model.config.max_position_embeddings, 2 * model.config.local_attention + 3)
    largest = scale = 0.0
    for batch, length in ((1, 1), (1, 7), (4, 19), (5, longest)):
        inputs = draw_inputs(model, batch, min(length, longest))
        with torch.no_grad():
            outputs = model(**inputs, return_dict=True)
        found = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        for name, value in zip(names, found, strict=True):
            expected = outputs[name].numpy()
            if value.shape != expected.shape or not np.isfinite(value).all():
                raise RuntimeError(
                    f"onnxruntime gives `{name}` of shape {list(value.shape)}, finite: {np.isfinite(value).all()}; "
                    f"PyTorch gives {list(expected.shape)}"
                )
            largest = max(largest, float(np.abs(value - expected).max()))
            scale = max(scale, float(np.abs(expected).max()))
    return Difference(largest, scale)


def open_session(path: str | Path) -> onnxruntime.InferenceSession:
    """A session on the CPU, with as many threads as torch has.

    Raises:
        ValueError: onnxruntime cannot run the file, for example for its opset.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Spinning threads would slow down code between two calls.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no public class for it
        raise ValueError(f"the installed onnxruntime cannot run '{Path(path).name}': {error}") from error


def draw_inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random tokens `[batch, (choices,) length]`; rows are full, or padded on the left, the right, both, in turn."""
    shape = (batch, 3, length) if has_choices(model) else (batch, length)
    input_ids = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(length))
    rows = torch.arange(input_ids[..., 0].numel()).view(*shape[:-1], 1)
    left, right = (rows // step % 2 * (length // 3) for step in (1, 2))
    positions = torch.arange(length)
    return {"input_ids": input_ids, "attention_mask": ((positions >= left) & (positions < length - right)).long()}


def has_choices(model: PreTrainedModel) -> bool:
    """Whether inputs are `[batch, choices, length]`."""
    return type(model).__name__.endswith("ForMultipleChoice")
