import gc
import json

import datasets
import pytest
import torch
from helpers import SEP, TOKENS, load_script
from transformers import ModernBertConfig, ModernBertForMaskedLM

from modernalbert import (
    ModernAlbertConfig,
    ModernAlbertForMaskedLM,
    ModernAlbertModel,
    mixture_modernalbert,
    modeling_modernalbert,
    packing_modernalbert,
)
from modernalbert.tokenization import save_tokenizer, train_tokenizer


# Every size differs from every other, so that a swapped dimension cannot go unseen.
TINY = {
    "vocab_size": 100,
    "embedding_size": 16,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "num_hidden_groups": 2,
    "mol_groups": [1],
    "mol_intermediate_size": 40,
    "num_experts": 4,
    "expert_rank": 3,
    "expert_alpha": 6,
    "max_position_embeddings": 64,
    "local_attention": 6,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "cls_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
}


def build_config(**overrides) -> ModernAlbertConfig:
    return ModernAlbertConfig(**{**TINY, **overrides})


@torch.no_grad()
def fill_randomly(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Fills every parameter with random values of a size that keeps activations near one.

    The initial weights hide mistakes: the experts' B are 0, norms are 1, and attention is almost uniform. The mean is
    not 0, since symmetric values cancel.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = 0.1 + torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() == 1:
            noise = 0.2 * noise + ("norm" in name)
        elif "embeddings" not in name or "projection" in name:
            noise = noise * parameter.shape[-1] ** -0.5
        parameter.copy_(noise)
    return module


def build_model(model_class: type = ModernAlbertModel, *, dtype=torch.float32, seed: int = 0, **overrides):
    """A tiny model with random weights, in evaluation mode."""
    return fill_randomly(model_class(build_config(**overrides)), seed).to(dtype).eval()


@pytest.fixture(scope="module", autouse=True)
def frozen_imports():
    """Every training collects garbage several times; what imports have made need not be looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def trace(monkeypatch):
    """Makes the model behave as in a traced graph."""

    def pretend():
        for module in (modeling_modernalbert, mixture_modernalbert, packing_modernalbert):
            monkeypatch.setattr(module, "is_traced", lambda tensor: True)

    return pretend


@pytest.fixture(scope="session")
def make_config():
    """Builds configurations of the tiny model: 4 layers in 2 groups, the last one a MoL of 4 experts."""
    return build_config


@pytest.fixture(scope="session")
def make_model():
    """Builds tiny models with random weights, see [`build_model`]."""
    return build_model


@pytest.fixture(scope="session")
def randomize():
    """Fills the parameters of a module in place, see [`fill_randomly`]."""
    return fill_randomly


@pytest.fixture
def fresh_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    # `datasets` sleeps at the end of each stream of Parquet files.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


@pytest.fixture
def make_student(make_model):
    def make(dtype=torch.float32, **overrides):
        settings = {**TOKENS, "sparse_prediction": True, "router_jitter_noise": 0.0, **overrides}
        return make_model(ModernAlbertForMaskedLM, dtype=dtype, **settings)

    return make


@pytest.fixture
def make_teacher(randomize):
    def make(dtype=torch.float32, **overrides):
        settings = {"hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
        settings |= {**TOKENS, "eos_token_id": SEP, "sep_token_id": SEP, "local_attention": 6}
        settings |= {"max_position_embeddings": 64, "attn_implementation": "sdpa", **overrides}
        return randomize(ModernBertForMaskedLM(ModernBertConfig(**settings)), seed=1).to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """A model after two steps of the pretraining script, and the folder with its files."""
    texts = [f"Sentence number {n} says that {n} times {n} is {n * n}." for n in range(40)]
    folder = tmp_path_factory.mktemp("pretrained")
    save_tokenizer(train_tokenizer(texts, vocab_size=320), folder / "tokenizer")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    arguments = ["--preset", "nano", "--tokenizer", str(folder / "tokenizer"), "--output_dir", str(folder / "model")]
    arguments += ["--train_data", str(folder / "*.jsonl"), "--validation_data", str(folder / "texts.jsonl")]
    arguments += [
        "--max_length",
        "32",
        "--max_steps",
        "2",
        "--per_device_train_batch_size",
        "4",
        "--report_to",
        "none",
    ]
    arguments += ["--use_cpu", "True", "--disable_tqdm", "True", "--learning_rate", "1e-3"]
    results = load_script("pretrain").main(arguments)
    return folder, arguments, results
