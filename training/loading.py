"""Loads configurations, tokenizers and models for all scripts; refuses damaged or incomplete ones."""

import copy
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


logger = logging.getLogger(__name__)

ADAPTER_NAME = "adapter_config.json"
# Modules inside some encoders that belong to the task, so that a checkpoint may lack them.
TASK_LAYERS = ("pooler",)


def is_adapter(name: str | Path) -> bool:
    """Whether a folder holds a LoRA instead of a model."""
    return (Path(name) / ADAPTER_NAME).is_file()


def is_sentence_transformer(name: str | Path) -> bool:
    """Whether a folder holds the modules of a SentenceTransformer."""
    return (Path(name) / "modules.json").is_file()


def base_of(name: str | Path) -> str:
    """Hub name or folder of the base model of a LoRA; a model is its own base."""
    return PeftConfig.from_pretrained(name).base_model_name_or_path if is_adapter(name) else str(name)


def check_folder(name: str | Path) -> None:
    """Checks that a local folder exists, and that its JSON and safetensors files are readable.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It is a file, or a file in it is damaged.
    """
    if not str(name):
        raise FileNotFoundError("the name of a model is empty; give a folder, or a name on the Hub")
    folder = Path(name)
    if folder.is_file():
        raise ValueError(f"'{name}' is a file; give the folder of a model, or a name on the Hub")
    if not folder.is_dir():
        if str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
            raise FileNotFoundError(f"there is no folder '{name}'")
        return
    for path in sorted((*folder.glob("*.json"), *folder.glob("*.safetensors"))):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
            else:
                with safe_open(path, "pt"):
                    pass
        except (ValueError, SafetensorError) as error:
            raise ValueError(f"'{path}' is damaged ({error}); restore it from a copy") from error


@contextmanager
def named(part: str, name: str | Path) -> Iterator[None]:
    """Lets the errors of a loader say what was loaded, and in one way what cannot be read.

    Raises:
        OSError: There is no such thing.
        ValueError: A file of it is damaged.
    """
    try:
        yield
    except (OSError, ValueError, ImportError) as error:
        if str(name) in str(error):
            raise
        kind = next(kind for kind in (OSError, ValueError, ImportError) if isinstance(error, kind))
        raise kind(f"cannot load the {part} of '{name}': {error}") from error


def load_config(name: str | Path, trust_remote_code: bool = False, **overrides) -> PreTrainedConfig:
    """Configuration of a model, or of the model that a LoRA belongs to.

    Args:
        name: Hub name or folder.
        trust_remote_code: Whether the model may run its own code from the Hub.
        **overrides: Fields to change.

    Raises:
        OSError: There is no such model.
        ValueError: A file is damaged, or the configuration is of no known model.
    """
    check_folder(name)
    source = name if (Path(name) / "config.json").is_file() else base_of(name)
    with named("configuration", source):
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **overrides)


def check_size(config: PreTrainedConfig) -> None:
    """Checks that a new model fits in memory, before it is built.

    Raises:
        ValueError: It does not fit.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    largest = max((value for value in config.to_dict().values() if type(value) is int), default=0)
    if largest < 10**9:
        with torch.device("meta"):
            size = 4 * AutoModel.from_config(config).num_parameters()
        if size <= memory:
            return
        raise ValueError(
            f"the model has {size / 4:.2g} parameters, which do not fit in {memory / 1e9:.0f} GB of memory"
        )
    raise ValueError(f"a model with a size of {largest:.2g} does not fit in {memory / 1e9:.0f} GB of memory")


def load_tokenizer(name: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Tokenizer of a model or a LoRA.

    Raises:
        OSError: There is no such tokenizer.
        ValueError: A file of it is damaged, or there is no vocabulary.
    """
    check_folder(name)
    try:
        with named("tokenizer", name):
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # tokenizers raises `Exception` itself for a file that it cannot read
        raise ValueError(f"cannot read the tokenizer of '{name}' ({error}); restore its files from a copy") from error
    # transformers 5 builds an empty tokenizer for a folder that has a model's config but no tokenizer file.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(f"'{name}' has no vocabulary; save the model's tokenizer in it")
    return tokenizer


def load_model(
    auto_class: type,
    name: str | Path,
    config: PreTrainedConfig | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> tuple[PreTrainedModel | PeftModel, list[str]]:
    """A model in float32, whatever the dtype of its checkpoint, and the names of randomly initialised tensors.

    Only tensors of the head may be: a checkpoint in which a tensor of the encoder is missing or has another shape is
    refused. Pickled weights are refused as well.

    Args:
        auto_class: Auto class of the head, or a model class.
        name: Hub name or folder, of a model or of a LoRA that the scripts wrote.
        config: With the fields of the head; default: the checkpoint's.
        trust_remote_code: Whether the model may run its own code from the Hub.
        **kwargs: As for `from_pretrained`.

    Returns:
        The model; sorted names, none for a LoRA.

    Raises:
        OSError: There is no such model, or no safetensors.
        ValueError: A file is damaged, or the encoder would start at random.
    """
    adapted, base = is_adapter(name), base_of(name)
    for folder in {str(name), base}:
        check_folder(folder)
    if adapted and not (Path(name) / "adapter_model.safetensors").is_file():
        raise ValueError(f"the LoRA '{name}' has no adapter_model.safetensors; pickled weights are not read")
    config = load_config(name, trust_remote_code) if config is None else copy.deepcopy(config)
    options = {"dtype": "float32", **kwargs}
    try:
        model, info = auto_class.from_pretrained(
            base,
            config=config,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except RuntimeError as error:  # of the loader: shapes that cannot be reconciled
        raise ValueError(f"cannot load '{base}' with its config.json: {error}") from error
    prefix = f"{model.base_model_prefix}."
    mismatched = {
        key: f"{key} ({list(there)} there, {list(here)} here)" for key, there, here in info["mismatched_keys"]
    }
    new = sorted({*info["missing_keys"], *mismatched})
    inner = [
        mismatched.get(key, key)
        for key in new
        if (key.startswith(prefix) or model.base_model is model)
        and (key in mismatched or not any(part in TASK_LAYERS for part in key.split(".")))
    ]
    if inner:
        more = f" and {len(inner) - 3} more" if len(inner) > 3 else ""
        raise ValueError(
            f"the encoder would start at random: '{base}' does not hold {', '.join(inner[:3])}{more} as its config.json "
            "says; restore the config.json that was saved with the weights"
        )
    if adapted:
        return PeftModel.from_pretrained(model, name), []
    return model, new
