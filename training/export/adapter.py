"""Merged experts as a PEFT LoRA beside the shared weights."""

import copy
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .folder import SENTENCE, write_model


def write_adapter(merged: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes `base`, a self-contained model without experts, and `adapter`, a PEFT LoRA that restores the merged model.

    Adapters of several tasks can share one `base` if their shared weights are equal, that is if only the experts and, in a
    classifier, `head` and `classifier` were trained from the same model. The adapter contains these two.

    Args:
        merged: Model with one adapter in each MoL layer (`num_experts=1`), in evaluation mode.
        tokenizer: Its tokenizer.
        folder: Folder to write.

    Raises:
        RuntimeError: `PeftModel` gives other outputs than the folded model; or `base` does not load.
    """
    base = copy.deepcopy(merged).merge_experts("drop")
    write_model(base, tokenizer, folder / "base")
    base.name_or_path = "base"  # PEFT saves it, and it must not be a local path
    names = {module: name for name, module in base.named_modules()}
    groups = merged.config.mol_groups
    layers = [base.base_model.layers[group].mlp for group in groups]
    settings = LoraConfig(
        r=merged.config.expert_rank,
        lora_alpha=merged.config.expert_alpha,
        target_modules=[names[linear] for layer in layers for linear in (layer.Wi, layer.Wo)],
        modules_to_save=[name for name in ("head", "classifier") if hasattr(base, name)] or None,
    )
    adapted = get_peft_model(base, settings)
    with torch.no_grad():
        for group, layer in zip(groups, layers, strict=True):
            experts = merged.base_model.layers[group].mlp.experts
            for linear, side in ((layer.Wi, "in"), (layer.Wo, "out")):
                for name in ("A", "B"):
                    weight = getattr(linear, f"lora_{name}")["default"].weight
                    weight.copy_(getattr(experts, f"{side}_{name}")[0])
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)  # or PEFT asks the Hub for "base"
    (folder / "adapter" / "README.md").unlink()  # PEFT's empty template
    check_adapter(merged, tokenizer, folder)


@torch.no_grad()
def check_adapter(merged: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Compares saved `base` and `adapter` with the folded model, in float64 to exclude rounding.

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
