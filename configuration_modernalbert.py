# Copyright 2026 The ModernALBERT contributors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Configuration of ModernALBERT: the fields, the presets, the parameter count, and every rule between fields."""

import copy
import difflib
from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import logging


logger = logging.get_logger(__name__)


# Every saved config.json names these classes, so that every head of every checkpoint loads with
# `trust_remote_code=True`. Each value is `file.Class`; the files lie beside `config.json`.
AUTO_MAP = {
    "AutoConfig": "configuration_modernalbert.ModernAlbertConfig",
    "AutoModel": "modeling_modernalbert.ModernAlbertModel",
    "AutoModelForMaskedLM": "modeling_modernalbert.ModernAlbertForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_modernalbert.ModernAlbertForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_modernalbert.ModernAlbertForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_modernalbert.ModernAlbertForQuestionAnswering",
    "AutoModelForMultipleChoice": "modeling_modernalbert.ModernAlbertForMultipleChoice",
}

_LARGE_WIDTHS = {"hidden_size": 1024, "intermediate_size": 2624, "num_attention_heads": 16}

# `tiny` follows the published work-in-progress configuration of that size, with the paper's top-2 of 8 experts. The
# paper's text does not give the shapes of the other three: they are reconstructed from their published parameter
# counts (docs of `ModernAlbertConfig.preset`). `nano` is ours, for demos, tests and studies on a CPU.
PRESETS = {
    "nano": {
        "vocab_size": 8192,
        "hidden_size": 192,
        "intermediate_size": 288,
        "num_attention_heads": 3,
        "num_hidden_layers": 6,
        "num_hidden_groups": 3,
        "mol_groups": [1, 2],
        "mol_intermediate_size": 576,
        "max_position_embeddings": 1024,
        "pad_token_id": 3,
        "bos_token_id": 1,
        "cls_token_id": 1,
        "eos_token_id": 2,
        "sep_token_id": 2,
    },
    "tiny": {"mol_intermediate_size": 2624},
    "medium": {
        **_LARGE_WIDTHS,
        "num_hidden_layers": 12,
        "num_hidden_groups": 4,
        "mol_groups": [2, 3],
        "mol_intermediate_size": 2624,
    },
    "base": {
        **_LARGE_WIDTHS,
        "num_hidden_layers": 24,
        "num_hidden_groups": 4,
        "mol_groups": [2, 3],
        "mol_intermediate_size": 5248,
    },
    "large": {
        **_LARGE_WIDTHS,
        "num_hidden_layers": 48,
        "num_hidden_groups": 6,
        "mol_groups": [2, 3, 4, 5],
        "mol_intermediate_size": 5248,
    },
}


@strict
class ModernAlbertConfig(PreTrainedConfig):
    """Configuration of a ModernALBERT encoder.

    Sizes come from [`ModernAlbertConfig.preset`]. The defaults are those of `tiny`, except `mol_intermediate_size`, which
    follows `intermediate_size`. Fields that are not listed are transformers' own.

    Args:
        vocab_size (`int`): Rows of the embedding table; ModernBERT's tokenizer, padded to a multiple of 64.
        embedding_size (`int`): Width E of the factorised embedding, V x E then E x H (ALBERT).
        hidden_size (`int`): Width H of the residual stream.
        intermediate_size (`int`): Width of the feed-forward layers outside `mol_groups`.
        num_hidden_layers (`int`): Layers that are **executed**. Another multiple of `num_hidden_groups`, given at load or
            to the forward pass, runs the same weights more or fewer times.
        elastic_depth (`bool`): Whether training ran smaller depths beside the full one (`--elastic_depth`), so that the
            model may be run at them without a warning. Our choice.
        num_hidden_groups (`int`): Blocks that own weights. Layer `i` runs block
            `i // (num_hidden_layers // num_hidden_groups)`: contiguous sharing, AAABBB. Equal to `num_hidden_layers`,
            nothing is shared.
        ffn_modulation (`str`): What the feed-forward layer of `mol_groups` is. `"mol"`: Mixture of LoRAs, the paper's.
            `"moa"`: mixture of bottleneck adapters behind the layer. `"depth_lora"`: a LoRA for every depth, no router
            (Relaxed Recursive Transformers). `"none"`: plain (ALBERT). `"per_depth"`: a plain layer for every depth, what
            `merge_experts(per_depth=True)` makes.
        mol_groups (`list[int]`): Groups, from 0, whose feed-forward layer `ffn_modulation` names. Default: the last
            two (the only one where there is one).
        mol_intermediate_size (`int`): Feed-forward width in `mol_groups`; wider than `intermediate_size` in the
            published tiny configuration. Default: `intermediate_size`.
        num_experts (`int`): Experts of a `"mol"` or `"moa"` group. 1: a single adapter without router (experts
            merged); 0: a plain feed-forward layer (experts merged and folded into it).
        num_experts_per_tok (`int`): Experts that a token chooses, if the router does not decide how many.
        norm_topk_prob (`bool`): Whether the weights of the chosen experts are divided by their sum. If not, the mass
            of the others goes to the shared feed-forward layer alone. Our choice: the paper does not state it.
        expert_rank (`int`): Rank r of every expert, or of every depth's LoRA, on both projections; in `"moa"` the width
            of the bottleneck.
        expert_alpha (`float`): LoRA alpha; an expert's correction is scaled by `expert_alpha / expert_rank`.
        router_type (`str`): How experts are chosen. `"top_k"`: the most probable for each token, the paper's. `"soft"`:
            all. `"top_p"`: as many as a token needs until their probabilities reach `router_top_p`. `"sequence"`: top-k
            once per sequence, from the mean of its states. `"depth"`: top-k with a learned bias for every depth.
        router_top_p (`float`): Threshold of `"top_p"`. Our choice.
        router_aux_loss_coef (`float`): Weight of the load-balancing loss in training. The published configurations
            have 0.1 and 0.2, for a formula that they do not state; 0.01 is Switch Transformer's, for its own.
        router_jitter_noise (`float`): In training the router's input is multiplied by uniform noise in `1 ± this`.
        output_router_logits (`bool`): Whether outputs contain the router logits of every executed MoL layer.
        hidden_activation (`str`): Activation of the gate; `"gelu"` makes GeGLU.
        norm_eps (`float`): Epsilon of the layer norms, which have no bias.
        layer_types (`list[str]`): `"full_attention"` or `"sliding_attention"` for each executed layer. Default: full.
        local_attention (`int`): Window of sliding layers: a token sees `local_attention // 2` tokens on each side,
            and itself.
        rope_parameters (`dict`): RoPE settings for each layer type. Default: ModernBERT's thetas, 160000 for full
            and 10000 for sliding layers (the paper states none).
        unpad_inputs (`bool`): Whether padding is removed before the first layer and put back after the last, so that
            layers see real tokens only, `[1, tokens, hidden]`. False keeps rows, `[batch, seq, hidden]`, for tools that
            index the batch inside the layers (PEFT's `adapter_names`, attribution, hooks). Results are the same.
        embedding_dropout, attention_dropout, mlp_dropout, classifier_dropout (`float`): Dropout after the embedding,
            in the attention (weights and output), after the feed-forward layer, before the classifier. ModernBERT's
            names; 0 because dropout hurts shared-weight encoders at scale (ALBERT, section 4.7).
        classifier_pooling (`str`): `"cls"` (first token that is not padding) or `"mean"` (over those tokens).
        classifier_activation (`str`): Activation in the prediction heads.
        decoder_bias (`bool`): Whether the masked-LM decoder, tied to the embedding table, has a bias.
        sparse_prediction (`bool`): Whether, when labels are given, the masked-LM head runs only where a label is not
            -100; `logits` is then `[labelled tokens, vocab_size]`. Saves most of the head's time and memory.

    Raises:
        StrictDataclassFieldValidationError: A field has the wrong type.
        StrictDataclassClassValidationError: Fields contradict each other; the message names the cure.
        ValueError: An unknown field resembles a known one.
    """

    model_type = "modernalbert"
    keys_to_ignore_at_inference = ["hidden_states", "attentions", "aux_loss", "router_logits"]
    default_theta = {"full_attention": 160_000.0, "sliding_attention": 10_000.0}

    # Shape
    vocab_size: int = 50368
    embedding_size: int = 128
    hidden_size: int = 768
    intermediate_size: int = 1152
    num_attention_heads: int = 12
    hidden_activation: str = "gelu"
    norm_eps: float = 1e-6
    initializer_range: float = 0.02

    # Recursion
    num_hidden_layers: int = 14
    num_hidden_groups: int = 7
    elastic_depth: bool = False

    # Mixture of LoRAs, or its alternatives
    ffn_modulation: Literal["mol", "moa", "depth_lora", "none", "per_depth"] = "mol"
    mol_groups: list[int] | None = None
    mol_intermediate_size: int | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 2
    norm_topk_prob: bool = True
    expert_rank: int = 16
    expert_alpha: float | int = 32
    router_type: Literal["top_k", "soft", "top_p", "sequence", "depth"] = "top_k"
    router_top_p: float | int = 0.4
    router_aux_loss_coef: float | int = 0.01
    router_jitter_noise: float | int = 0.01
    output_router_logits: bool = False

    # Attention
    max_position_embeddings: int = 8192
    layer_types: list[str] | None = None
    local_attention: int = 128
    rope_parameters: dict | None = None
    unpad_inputs: bool = True

    # Dropout
    embedding_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    mlp_dropout: float | int = 0.0

    # Heads
    classifier_pooling: Literal["cls", "mean"] = "cls"
    classifier_dropout: float | int = 0.0
    classifier_activation: str = "gelu"
    decoder_bias: bool = True
    sparse_prediction: bool = False
    tie_word_embeddings: bool = True

    # Tokens: ModernBERT's ids
    pad_token_id: int | None = 50283
    bos_token_id: int | None = 50281
    eos_token_id: int | list[int] | None = 50282
    cls_token_id: int | None = 50281
    sep_token_id: int | None = 50282

    @classmethod
    def preset(cls, name: str, **overrides) -> "ModernAlbertConfig":
        """Configuration of a named size: `nano` (3M), `tiny` (52M), `medium` (59M), `base` (78M), `large` (123M).

        `tiny` is the published work-in-progress configuration, with 8 experts of which a token takes 2. `medium`,
        `base` and `large` are reconstructions: of the paper's models of 55M, 75M and 120M parameters only widths,
        layer counts and the indices of the MoL groups are known, and these shapes fit them. `nano` is not the paper's.

        Args:
            name: One of the five sizes.
            **overrides: Any field.

        Raises:
            ValueError: The name is unknown.
        """
        if name not in PRESETS:
            raise ValueError(f"there is no preset {name!r}; the presets are {', '.join(PRESETS)}")
        return cls(**{**copy.deepcopy(PRESETS[name]), **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """[`~PreTrainedConfig.from_dict`], with fields that are overridden at load under the same rules.

        The library sets them on the finished configuration, past the rules and the defaults that depend on them.
        `num_hidden_layers` alone is another depth of the same model, see [`at_depth`].
        """
        own = cls.__dataclass_fields__.keys() - PreTrainedConfig.__dataclass_fields__.keys()
        overrides = {name: kwargs.pop(name) for name in own & kwargs.keys()}
        depth = None
        if "num_hidden_layers" in config_dict and not {"num_hidden_groups", "layer_types"} & overrides.keys():
            depth = overrides.pop("num_hidden_layers", None)
        result = super().from_dict({**config_dict, **overrides}, **kwargs)
        if depth is None:
            return result
        config, *unused = result if isinstance(result, tuple) else (result,)
        config = config.at_depth(depth)
        return (config, *unused) if unused else config

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs):
        """[`~PreTrainedConfig.save_pretrained`], with the classes of every head in `auto_map`."""
        self.auto_map = {**AUTO_MAP, **(getattr(self, "auto_map", None) or {})}
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def __post_init__(self, **kwargs):
        self._reject_misspelt_fields(kwargs)
        if self.mol_groups is None:
            self.mol_groups = list(range(max(self.num_hidden_groups - 2, 0), self.num_hidden_groups))
        if self.mol_intermediate_size is None:
            self.mol_intermediate_size = self.intermediate_size
        if self.layer_types is None:
            self.layer_types = ["full_attention"] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    def _reject_misspelt_fields(self, kwargs: dict) -> None:
        # transformers keeps unknown keys as attributes, so a typo would pass and the default would run.
        for key in kwargs:
            if not key.startswith("_") and not hasattr(type(self), key):
                near = difflib.get_close_matches(key, self.__dataclass_fields__, n=1, cutoff=0.85)
                if near:
                    raise ValueError(f"ModernAlbertConfig has no field `{key}`; did you mean `{near[0]}`?")

    def convert_rope_params_to_dict(self, **kwargs):
        for name in ("rope_theta", "rope_scaling"):
            if name in kwargs:
                raise ValueError(f"`{name}` is not a field; set it in `rope_parameters`, e.g. {self.default_rope()}")
        given = copy.deepcopy(self.rope_parameters) or {}
        if not all(isinstance(value, dict) for value in given.values()):  # one setting for every layer type
            given = {layer_type: dict(given) for layer_type in self.default_theta}
        if not set(given) <= set(self.default_theta):
            raise ValueError(
                f"`rope_parameters` has the keys {sorted(given)}; give a dict for each of {sorted(self.default_theta)}"
            )
        self.rope_parameters = {
            layer_type: {**default, **given.get(layer_type, {})}
            for layer_type, default in self.default_rope().items()
            if layer_type in self.layer_types
        }
        self.standardize_rope_params()
        return kwargs

    @classmethod
    def default_rope(cls) -> dict[str, dict]:
        """`rope_parameters` where none are given."""
        return {name: {"rope_type": "default", "rope_theta": theta} for name, theta in cls.default_theta.items()}

    @property
    def layers_per_group(self) -> int:
        """How many times in a row a block runs."""
        return self.num_hidden_layers // self.num_hidden_groups

    def schedule(self, num_hidden_layers: int | None = None) -> list[tuple[int, int, str]]:
        """Group, run of the group, and layer type of every layer that runs.

        Args:
            num_hidden_layers: Another depth than the configuration's. More runs repeat the layer types of a group.

        Raises:
            ValueError: The groups cannot run so often.
        """
        if num_hidden_layers is None:
            num_hidden_layers = self.num_hidden_layers
        elif num_hidden_layers != self.num_hidden_layers:
            self._check_depth(num_hidden_layers)
        trained = self.layers_per_group
        return [
            (group, run, self.layer_types[group * trained + run % trained])
            for group in range(self.num_hidden_groups)
            for run in range(num_hidden_layers // self.num_hidden_groups)
        ]

    def at_depth(self, num_hidden_layers: int) -> "ModernAlbertConfig":
        """A copy whose groups run more or fewer times, for the same weights.

        Raises:
            ValueError: They cannot run so often, or the weights depend on how often they do.
        """
        config = copy.deepcopy(self)
        if num_hidden_layers == self.num_hidden_layers:
            return config
        layer_types = [layer_type for *_, layer_type in self.schedule(num_hidden_layers)]
        if self.has_router and self.router_type == "depth":
            raise ValueError(
                f"`num_hidden_layers` ({num_hidden_layers}) cannot be changed at load: the router has a bias for each of "
                f"{self.layers_per_group} runs; load all, and pass `num_hidden_layers` to the forward pass"
            )
        self.warn_of_depth(num_hidden_layers)
        config.num_hidden_layers, config.layer_types = num_hidden_layers, layer_types
        used = dict.fromkeys(layer_types)
        config.rope_parameters = {name: value for name, value in self.rope_parameters.items() if name in used}
        config.validate()
        return config

    def warn_of_depth(self, num_hidden_layers: int) -> None:
        """Says, once, what to expect of a depth that the model was not trained for."""
        trained = self.elastic_depth and num_hidden_layers < self.num_hidden_layers
        if num_hidden_layers != self.num_hidden_layers and not trained:
            logger.warning_once(
                f"The model was trained to run {self.num_hidden_layers} layers, and runs {num_hidden_layers}. Its outputs are "
                "others: measure what they are worth before you use them, or train it with `--elastic_depth`."
            )

    def _check_depth(self, num_hidden_layers: int) -> None:
        groups = self.num_hidden_groups
        if type(num_hidden_layers) is not int or num_hidden_layers < 1 or num_hidden_layers % groups:
            raise ValueError(
                f"`num_hidden_layers` ({num_hidden_layers}) must be a multiple of the {groups} groups of the model, each "
                f"of which runs equally often: {groups}, {2 * groups}, ..."
            )
        if self.modulation in ("depth_lora", "per_depth") and self.mol_groups:
            own = "LoRA" if self.modulation == "depth_lora" else "feed-forward layer"
            raise ValueError(
                f"`num_hidden_layers` ({num_hidden_layers}) must be {self.num_hidden_layers}: every run of a group has a "
                f"{own} of its own"
            )
        if self.has_router and self.router_type == "depth" and num_hidden_layers > self.num_hidden_layers:
            raise ValueError(
                f"`num_hidden_layers` ({num_hidden_layers}) must be at most {self.num_hidden_layers}: the router has a bias "
                "for that many"
            )

    @property
    def modulation(self) -> str:
        """What runs in `mol_groups`: `ffn_modulation`, or `"none"` where its experts were folded (`num_experts=0`)."""
        folded = self.num_experts == 0 and self.ffn_modulation in ("mol", "moa")
        return "none" if folded else self.ffn_modulation

    @property
    def largest_rank(self) -> int:
        """Largest `expert_rank` that makes sense: the narrowest side of what it corrects."""
        return self.hidden_size if self.modulation == "moa" else min(self.hidden_size, self.mol_intermediate_size)

    @property
    def has_router(self) -> bool:
        """Whether the model routes tokens: it has groups that choose from more than one expert."""
        return self.num_experts > 1 and self.modulation in ("mol", "moa") and len(self.mol_groups) > 0

    @property
    def sliding_window(self) -> int:
        """Tokens seen on each side in sliding layers, transformers' meaning of the name for encoders."""
        return self.local_attention // 2

    @sliding_window.setter
    def sliding_window(self, value: int):
        self.local_attention = 2 * value

    def window(self, layer_type: str) -> int | None:
        """Tokens that a token sees on each side in layers of that type; None for all."""
        return self.sliding_window if layer_type == "sliding_attention" else None

    def num_parameters(self) -> int:
        """Parameters of `ModernAlbertForMaskedLM` with tied embeddings, without building it."""
        hidden, embedding, rank = self.hidden_size, self.embedding_size, self.expert_rank
        embeddings = self.vocab_size * embedding + embedding + embedding * hidden
        groups = 0
        for group in range(self.num_hidden_groups):
            width = self.mol_intermediate_size if group in self.mol_groups else self.intermediate_size
            groups += 4 * hidden**2 + 3 * hidden * width + 2 * hidden
            if group in self.mol_groups:
                if self.modulation in ("mol", "depth_lora"):
                    count = self.layers_per_group if self.modulation == "depth_lora" else self.num_experts
                    groups += count * rank * (2 * hidden + 3 * width)
                elif self.modulation == "moa":
                    groups += self.num_experts * rank * 2 * hidden
                elif self.modulation == "per_depth":
                    groups += (self.layers_per_group - 1) * 3 * hidden * width
                if self.has_router:
                    biases = self.layers_per_group if self.router_type == "depth" else 0
                    groups += self.num_experts * (hidden + biases)
        head = hidden**2 + hidden + hidden * embedding + (self.vocab_size if self.decoder_bias else 0)
        decoder = 0 if self.tie_word_embeddings else self.vocab_size * embedding
        return embeddings + groups + hidden + head + decoder

    def estimate_flops(self, seq_length: int, labelled: float = 1.0, training: bool = False) -> float:
        """Floating-point operations per token of `ModernAlbertForMaskedLM`, a multiplication and an addition being two.

        Our count, of matrix products and attention alone: norms, activations, softmax, RoPE, loss and optimizer are
        left out. Every executed layer counts, since recursion saves parameters and no compute. The mixture is counted
        as its fast form runs it: down-projections into, and up-projections out of, the rank for all experts, what lies
        between for the chosen ones; `router_type="top_p"` counts as if all were, an upper bound. Adapters (`"moa"`) run
        for all experts. Sliding layers count a whole window for every token, though it is cut at the edges of a sequence.

        Args:
            seq_length: Tokens of a sequence.
            labelled: Share of the tokens that the head runs on, with `sparse_prediction` the masked ones.
            training: Whether a backward pass follows; it is taken as twice the forward pass.

        Returns:
            Operations (FLOP) per token.
        """
        hidden, embedding, rank = self.hidden_size, self.embedding_size, self.expert_rank
        products = embedding * hidden + labelled * (hidden**2 + embedding * (hidden + self.vocab_size))
        for index, layer_type in enumerate(self.layer_types):
            mol = index // self.layers_per_group in self.mol_groups
            width = self.mol_intermediate_size if mol else self.intermediate_size
            keys = seq_length if layer_type == "full_attention" else min(seq_length, 2 * self.sliding_window + 1)
            products += 4 * hidden**2 + 3 * hidden * width + 2 * hidden * keys
            if mol:
                if self.modulation == "mol":
                    every = self.router_type in ("soft", "top_p")
                    chosen = self.num_experts if every else min(self.num_experts_per_tok, self.num_experts)
                    products += rank * (2 * hidden * self.num_experts + 3 * width * chosen)
                elif self.modulation == "moa":
                    products += rank * 2 * hidden * self.num_experts
                elif self.modulation == "depth_lora":
                    products += rank * (2 * hidden + 3 * width)
                products += self.num_experts * hidden if self.has_router else 0
        return 2 * products * (3 if training else 1)

    def validate_architecture(self):
        """Every rule between fields.

        One validator: the library runs them in the order of their names, and some rules divide by what others check.
        """
        self._check_sizes()
        self._check_recursion()
        self._check_attention()
        self._check_activations()
        self._check_experts()
        super().validate_architecture()

    def _check_recursion(self) -> None:
        if self.num_hidden_layers % self.num_hidden_groups:
            raise ValueError(
                f"`num_hidden_layers` ({self.num_hidden_layers}) must be a multiple of `num_hidden_groups` "
                f"({self.num_hidden_groups}), since every group runs equally often; change one of them"
            )

    def _check_sizes(self) -> None:
        for name in (
            *("vocab_size", "embedding_size", "hidden_size", "intermediate_size", "num_attention_heads"),
            *("num_hidden_layers", "num_hidden_groups", "mol_intermediate_size", "max_position_embeddings"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` ({getattr(self, name)}) must be at least 1")
        for name in ("embedding_dropout", "attention_dropout", "mlp_dropout", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` ({getattr(self, name)}) must be in [0, 1)")

    def _check_attention(self) -> None:
        if self.hidden_size % self.num_attention_heads or (self.hidden_size // self.num_attention_heads) % 2:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) must be `num_attention_heads` ({self.num_attention_heads}) times "
                "an even number, since RoPE rotates pairs of features; change one of them"
            )
        unknown = set(self.layer_types) - set(self.default_theta)
        if unknown:
            raise ValueError(f"`layer_types` contains {sorted(unknown)}; the types are {sorted(self.default_theta)}")
        if self.local_attention < 2 or self.local_attention % 2:
            raise ValueError(f"`local_attention` ({self.local_attention}) must be even and at least 2")

    def _check_activations(self) -> None:
        for name in ("hidden_activation", "classifier_activation"):
            if getattr(self, name) not in ACT2FN:
                raise ValueError(f"`{name}` ({getattr(self, name)!r}) is not an activation; use one of {list(ACT2FN)}")

    def _check_experts(self) -> None:
        if len(set(self.mol_groups)) != len(self.mol_groups) or not set(self.mol_groups) <= set(
            range(self.num_hidden_groups)
        ):
            raise ValueError(
                f"`mol_groups` ({self.mol_groups}) must be different numbers from 0 to {self.num_hidden_groups - 1}, "
                f"since there are {self.num_hidden_groups} groups; change it or `num_hidden_groups`"
            )
        if self.num_experts < 0:
            raise ValueError(f"`num_experts` ({self.num_experts}) must be at least 0")
        if self.modulation not in ("none", "per_depth") and not 1 <= self.expert_rank <= self.largest_rank:
            raise ValueError(
                f"`expert_rank` ({self.expert_rank}) must be from 1 to {self.largest_rank}, the narrowest side of the "
                "projections that it corrects"
            )
        if self.num_experts > 1 and self.modulation in ("mol", "moa"):
            self._check_choice()
        if not 0 < self.router_top_p <= 1:
            raise ValueError(f"`router_top_p` ({self.router_top_p}) must be above 0 and at most 1")
        if not 0 <= self.router_jitter_noise < 1:
            raise ValueError(f"`router_jitter_noise` ({self.router_jitter_noise}) must be in [0, 1)")
        if self.router_aux_loss_coef < 0:
            raise ValueError(f"`router_aux_loss_coef` ({self.router_aux_loss_coef}) must be at least 0")

    def _check_choice(self) -> None:
        # What a router leaves unused may have any value.
        if self.router_type == "top_p":
            if self.router_top_p <= 1 / self.num_experts and self.norm_topk_prob:
                raise ValueError(
                    f"`router_top_p` ({self.router_top_p}) is reached by one of {self.num_experts} experts, so that "
                    "`norm_topk_prob` (True) makes every weight 1 and the router would get no gradient; raise it above "
                    "1 / `num_experts`, or set `norm_topk_prob=False`"
                )
        elif self.router_type != "soft":
            if not 1 <= self.num_experts_per_tok <= self.num_experts:
                raise ValueError(
                    f"`num_experts_per_tok` ({self.num_experts_per_tok}) must be from 1 to `num_experts` "
                    f"({self.num_experts}); change one of them"
                )
            if self.num_experts_per_tok == 1 and self.norm_topk_prob:
                raise ValueError(
                    "`num_experts_per_tok` (1) with `norm_topk_prob` (True) makes every weight 1, so the router would "
                    "get no gradient; set `norm_topk_prob=False` or choose at least 2 experts"
                )


__all__ = ["ModernAlbertConfig"]
