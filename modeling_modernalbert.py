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
"""ModernALBERT, top to bottom in the order data flows.

Padding is removed once before the first layer and put back once after the last, so that every projection, norm and
feed-forward layer runs on real tokens only. Shapes in comments: `batch, seq` as the caller gave them; hidden states in
the encoder are `[1, tokens, hidden]`, all sequences of the batch packed into one row, or `[batch, seq, hidden]` where
there is no padding to remove, a graph is traced, or `unpad_inputs` is False. See `packing_modernalbert.py`.
"""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    ModelOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, logging
from transformers.utils.generic import can_return_tuple

from .configuration_modernalbert import ModernAlbertConfig
from .merging_modernalbert import merge_experts
from .mixture_modernalbert import (
    FEED_FORWARD_LAYERS,
    ModernAlbertAdapters,
    ModernAlbertCorrections,
    ModernAlbertMLP,
)
from .packing_modernalbert import (
    SEQUENCE_LENGTHS,
    PaddedSequences,
    RowAttention,
    UnpaddedSequences,
    arrange_sequences,
    check_inputs,
    choose_attention,
    is_traced,
)
from .routing_modernalbert import ModernAlbertDepthRouter, ModernAlbertRouter, load_balancing_loss


# Interfaces of transformers that are not public and have no public counterpart. Seen in 5.17 to 5.24.
from transformers.modeling_rope_utils import dynamic_rope_update  # isort: skip
from transformers.utils.output_capturing import OutputRecorder, capture_outputs  # isort: skip


logger = logging.get_logger(__name__)


@dataclass
class RoutingOutput(ModelOutput):
    """Fields that routing adds to an output.

    Args:
        aux_loss (`torch.FloatTensor` of shape `()`):
            Load-balancing loss before its coefficient, where router logits were asked for or take part in the loss.
        router_logits (`tuple[torch.FloatTensor, ...]`):
            With `output_router_logits=True`, for every executed MoL layer `[batch, seq, num_experts]`, 0 at padding.
    """

    aux_loss: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None


@dataclass
@auto_docstring(custom_intro="Output of the encoder; hidden states are 0 at padding.")
class ModernAlbertModelOutput(RoutingOutput, BaseModelOutput):
    pass


@dataclass
@auto_docstring(custom_intro="Output of the masked language model.")
class ModernAlbertMaskedLMOutput(RoutingOutput, MaskedLMOutput):
    pass


@dataclass
@auto_docstring(custom_intro="Output of the sequence classifier.")
class ModernAlbertSequenceClassifierOutput(RoutingOutput, SequenceClassifierOutput):
    pass


@dataclass
@auto_docstring(custom_intro="Output of the token classifier.")
class ModernAlbertTokenClassifierOutput(RoutingOutput, TokenClassifierOutput):
    pass


@dataclass
@auto_docstring(custom_intro="Output of the extractive question answerer.")
class ModernAlbertQuestionAnsweringOutput(RoutingOutput, QuestionAnsweringModelOutput):
    pass


@dataclass
@auto_docstring(custom_intro="Output of the multiple-choice model.")
class ModernAlbertMultipleChoiceOutput(RoutingOutput, MultipleChoiceModelOutput):
    pass


class ModernAlbertEmbeddings(nn.Module):
    """Factorised embedding (ALBERT, section 3.1): V x E table, norm, E x H projection."""

    def __init__(self, config: ModernAlbertConfig):
        super().__init__()
        if config.pad_token_id is not None and not 0 <= config.pad_token_id < config.vocab_size:
            raise ValueError(
                f"`pad_token_id` ({config.pad_token_id}) must be below `vocab_size` ({config.vocab_size}); set it to the "
                "`pad_token_id` of your tokenizer, or None"
            )
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id)
        self.norm = nn.LayerNorm(config.embedding_size, eps=config.norm_eps, bias=False)
        self.projection = nn.Linear(config.embedding_size, config.hidden_size, bias=False)
        self.drop = nn.Dropout(config.embedding_dropout)

    def forward(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        if inputs_embeds is None:
            inputs_embeds = self.tok_embeddings(input_ids)
        return self.drop(self.projection(self.norm(inputs_embeds)))  # [..., hidden]


class ModernAlbertRotaryEmbedding(nn.Module):
    """Cosines and sines of RoPE, one table of frequencies for each layer type in use."""

    def __init__(self, config: ModernAlbertConfig, device=None):
        super().__init__()
        self.config = config
        self.layer_types = sorted(set(config.layer_types))
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.rope_type = {}
        for layer_type in self.layer_types:
            self.rope_type[layer_type] = config.rope_parameters[layer_type]["rope_type"]
            inv_freq, scaling = self.compute_frequencies(layer_type, device)
            self.register_buffer(f"{layer_type}_inv_freq", inv_freq, persistent=False)
            self.register_buffer(f"{layer_type}_original_inv_freq", inv_freq.clone(), persistent=False)
            setattr(self, f"{layer_type}_attention_scaling", scaling)

    def compute_frequencies(self, layer_type: str, device=None) -> tuple[torch.Tensor, float]:
        """Inverse frequencies `[head_dim / 2]` in float32, and the factor on cosines and sines."""
        if self.rope_type[layer_type] != "default":
            return ROPE_INIT_FUNCTIONS[self.rope_type[layer_type]](self.config, device, layer_type=layer_type)
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float, device=device) / head_dim
        return self.config.rope_parameters[layer_type]["rope_theta"] ** -exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor, layer_type: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines, and sines with the sign of the rotation, each float32 `[batch, seq, head_dim]`."""
        inv_freq = getattr(self, f"{layer_type}_inv_freq").to(hidden_states.device, torch.float)
        scaling = getattr(self, f"{layer_type}_attention_scaling")
        angles = position_ids[..., None].float() * inv_freq  # [batch, seq, head_dim / 2]
        cos, sin = angles.cos() * scaling, angles.sin() * scaling
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return cos, sin


def apply_rotary_pos_emb(features: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """RoPE on the halves of the last dimension, `(x1 cos - x2 sin, x2 cos + x1 sin)`, in float32 at least.

    With the sign in the sines, swapping the halves is all that is left of the rotation: three passes over memory.
    """
    upcast = features.to(torch.promote_types(features.dtype, torch.float32))
    swapped = upcast.roll(upcast.shape[-1] // 2, dims=-1)
    return torch.addcmul(upcast * cos, swapped, signed_sin.to(upcast)).to(features.dtype)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention spelt out; the only form that returns its weights, `[batch, heads, seq, seq]`."""
    scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class ModernAlbertAttention(nn.Module):
    """Bidirectional self-attention with RoPE."""

    def __init__(self, config: ModernAlbertConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.is_causal = False
        self.Wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.Wo = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.out_drop = nn.Dropout(config.attention_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention: RowAttention,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        qkv = self.Wqkv(hidden_states).view(*input_shape, 3, -1, self.head_dim)
        cos, sin = (table[..., None, None, :] for table in position_embeddings)
        query, key = apply_rotary_pos_emb(qkv[..., :2, :, :], cos, sin).unbind(-3)
        value = qkv[..., 2, :, :]  # each [batch, seq, heads, head_dim]
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        kwargs["dropout"] = self.config.attention_dropout if self.training else 0.0
        output, weights = attention(interface, self, query, key, value, scaling=self.head_dim**-0.5, **kwargs)
        return self.out_drop(self.Wo(output.reshape(*input_shape, -1))), weights


class ModernAlbertLayer(GradientCheckpointingLayer):
    """Pre-norm block. It is registered once and runs as often as its group is deep."""

    def __init__(self, config: ModernAlbertConfig, group: int):
        super().__init__()
        self.attn_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False)
        self.attn = ModernAlbertAttention(config)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False)
        if group in config.mol_groups:
            self.mlp = FEED_FORWARD_LAYERS[config.modulation](config)
        else:
            self.mlp = ModernAlbertMLP(config, config.intermediate_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention: RowAttention,
        depth: int = 0,
        sequence_ids: torch.Tensor | None = None,
        padded: PaddedSequences | UnpaddedSequences | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """One run of the block.

        Args:
            hidden_states: `[1, tokens, hidden]` or `[batch, seq, hidden]`.
            position_embeddings: Cosines and sines of RoPE for this layer type.
            attention: Attention of this layer type over the sequences of the batch.
            depth: Which run of its group this is, from 0.
            sequence_ids: Number of each token's sequence, for a router that chooses once per sequence, `[tokens]`.
            padded: Given where hidden states are recorded: input and output are padded, `[batch, seq, hidden]`, so that
                what is recorded has the caller's shape and stays in the graph.
            **kwargs: Of the attention implementation.
        """
        if padded is not None:
            hidden_states = padded.unpad_input(hidden_states)
        hidden_states = (
            hidden_states + self.attn(self.attn_norm(hidden_states), position_embeddings, attention, **kwargs)[0]
        )
        hidden_states = hidden_states + self.mlp(self.mlp_norm(hidden_states), depth, sequence_ids)
        return hidden_states if padded is None else padded.pad_output(hidden_states)


@auto_docstring
class ModernAlbertPreTrainedModel(PreTrainedModel):
    config_class = ModernAlbertConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ModernAlbertEmbeddings", "ModernAlbertLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _keep_in_fp32_modules_strict = ["router"]
    _can_record_outputs = {
        "hidden_states": ModernAlbertLayer,
        "attentions": ModernAlbertAttention,
        "router_logits": OutputRecorder(ModernAlbertRouter, index=0),
    }

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """[`~PreTrainedModel.from_pretrained`], which refuses a checkpoint that does not fit the encoder.

        transformers initialises missing tensors at random and drops unknown ones, with a warning. For a task head
        that is what fine-tuning needs; for the encoder it means another architecture or a damaged file.

        Raises:
            ValueError: Tensors of the encoder are missing from the checkpoint, or unknown to this model.
        """
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if pretrained_model_name_or_path is None:  # a state dict of the caller's own
            return (model, info) if output_loading_info else model
        parts = tuple(
            prefix + name + "." for prefix in ("", "model.") for name in ("embeddings", "layers", "final_norm")
        )
        for problem in ("missing", "unexpected"):
            keys = sorted(key for key in info[f"{problem}_keys"] if key.startswith(parts))
            if keys:
                raise ValueError(
                    f"{len(keys)} tensors of the encoder are {problem} in {pretrained_model_name_or_path}: "
                    f"{', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}. The file is damaged, or the configuration "
                    "describes another architecture: load with the checkpoint's own config.json, without overriding "
                    "fields that change shapes"
                )
        return (model, info) if output_loading_info else model

    def post_init(self):
        # `_init_weights` sees one module at a time, and not its name.
        for name, module in self.named_modules():
            for part, std in self.initial_stds().items():
                if name.endswith(part):
                    module.init_std = std
        super().post_init()

    def initial_stds(self) -> dict[str, float]:
        """Standard deviation of the initial weight of linear layers by the end of their name, ModernBERT's scheme.

        All others, the embedding and the router start with `initializer_range`; of low-rank factors the A as in PEFT,
        and the B at 0, so that a new correction corrects nothing.
        """
        residual = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
        head = self.config.hidden_size**-0.5
        return {"Wo": residual, "head.dense": head, "decoder_projection": head, "classifier": head}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if hasattr(module, "init_std"):
            init.normal_(module.weight, mean=0.0, std=module.init_std)
        elif isinstance(module, ModernAlbertRouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if isinstance(module, ModernAlbertDepthRouter):
                init.zeros_(module.depth_bias)
        elif isinstance(module, ModernAlbertCorrections | ModernAlbertAdapters):
            for A, B in module.pairs():
                init.uniform_(A, -(A.shape[-1] ** -0.5), A.shape[-1] ** -0.5)
                init.zeros_(B)
        elif isinstance(module, ModernAlbertRotaryEmbedding):
            for layer_type in module.layer_types:
                inv_freq, _ = module.compute_frequencies(layer_type)
                init.copy_(getattr(module, f"{layer_type}_inv_freq"), inv_freq)
                init.copy_(getattr(module, f"{layer_type}_original_inv_freq"), inv_freq)

    def merge_experts(
        self,
        method: str = "uniform",
        fold: bool = True,
        *,
        weights: Sequence[Sequence[float]] | None = None,
        batches: Iterable[dict] | None = None,
        rank: int | None = None,
        num_experts: int | None = None,
        per_depth: bool = False,
        inplace: bool = True,
    ) -> "ModernAlbertPreTrainedModel":
        """Merges the experts of every MoL group into one adapter.

        Args:
            method: A name from `merging_modernalbert.METHODS`, where each says what it computes.
            fold: Whether the adapter is added into the shared projections, which leaves a plain recursive encoder
                (`num_experts=0`), or kept beside them (`num_experts=1`). `"cluster"` leaves experts and a router.
            weights: Of every expert of every MoL group, for `"ema"`, `"svd"` and `"cat"`; default: even.
            batches: Calibration text, for `"frequency"`, `"regression"` and `"cluster"`: inputs of the encoder.
            rank: Of the adapter, for `"svd"`, `"frequency"` and `"regression"`, cut to the width of the layer.
                Default: the experts', and for the latter two, folded, no limit, since any rank costs the same there.
            num_experts: Experts that `"cluster"` leaves.
            per_depth: Whether `"frequency"` and `"regression"` fold an adapter for every run of a group, since routing
                differs between them. That costs memory, a feed-forward layer for each, and no time.
            inplace: Whether this model is merged, or a copy of it.

        Returns:
            The merged model; its configuration says what it is now, so that saving and loading work.

        Raises:
            ValueError: There are no experts to merge, the method is unknown, or it lacks what it needs.
        """
        model = self if inplace else copy.deepcopy(self)
        merge_experts(model, method, fold, weights, batches, rank, num_experts, per_depth)
        return model


@auto_docstring
class ModernAlbertModel(ModernAlbertPreTrainedModel):
    def __init__(self, config: ModernAlbertConfig):
        super().__init__(config)
        config.validate()  # fields that were assigned since it was made
        self.embeddings = ModernAlbertEmbeddings(config)
        self.rotary_emb = ModernAlbertRotaryEmbedding(config)
        self.layers = nn.ModuleList([ModernAlbertLayer(config, group) for group in range(config.num_hidden_groups)])
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.tok_embeddings

    def set_input_embeddings(self, value):
        self.embeddings.tok_embeddings = value

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        seq_idx: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        num_hidden_layers: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModernAlbertModelOutput:
        r"""
        position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Position of every token in its sequence; by default counted from the first token that is not padding. Where
            they are given, position 0 starts a new sequence: rows may hold several, which do not see each other.
        inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`, *optional*):
            Rows of the embedding table (width `embedding_size`) in place of `input_ids`.
        seq_idx (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
            Number of every token's sequence, as `DataCollatorWithFlattening` makes it: a change starts a new sequence.
        cu_seq_lens_q (`torch.Tensor` of shape `(num_sequences + 1,)`, *optional*):
            Start of every sequence among the real tokens of the batch, and the end, in place of `position_ids`.
        num_hidden_layers (`int`, *optional*):
            Layers to run in this call, a multiple of `num_hidden_groups`; by default the configuration's.
        """
        check_inputs(self.config, input_ids, inputs_embeds, attention_mask, position_ids, kwargs)
        inputs = input_ids if input_ids is not None else inputs_embeds
        unpad_inputs = self.config.unpad_inputs
        sequences = arrange_sequences(inputs, attention_mask, position_ids, seq_idx, cu_seq_lens_q, unpad_inputs)
        schedule = self.config.schedule(num_hidden_layers)
        if not is_traced(inputs):
            self.check_length(sequences.max_length)
            self.config.warn_of_depth(len(schedule))

        input_ids, inputs_embeds = (
            None if tensor is None else sequences.unpad_input(tensor) for tensor in (input_ids, inputs_embeds)
        )
        hidden_states = self.embeddings(input_ids, inputs_embeds)  # [1, tokens, hidden] or [batch, seq, hidden]
        attention, position_embeddings = {}, {}
        for layer_type in self.rotary_emb.layer_types:
            window, dropout = self.config.window(layer_type), self.config.attention_dropout if self.training else 0.0
            attention[layer_type] = choose_attention(self.config, sequences, hidden_states, window, dropout)
            position_embeddings[layer_type] = self.rotary_emb(hidden_states, sequences.position_ids, layer_type)

        kwargs = {name: value for name, value in kwargs.items() if name not in SEQUENCE_LENGTHS}
        outputs = self.run_layers(hidden_states, sequences, attention, position_embeddings, schedule, **kwargs)
        if outputs.router_logits:  # recorded as [tokens, num_experts]
            outputs.router_logits = tuple(
                sequences.pad_output(logits.unflatten(0, sequences.hidden_shape)) for logits in outputs.router_logits
            )
            padding_mask = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
            outputs.aux_loss = load_balancing_loss(outputs.router_logits, self.config, padding_mask)
        return outputs

    @capture_outputs
    def run_layers(
        self,
        hidden_states: torch.Tensor,
        sequences: PaddedSequences | UnpaddedSequences,
        attention: dict[str, RowAttention],
        position_embeddings: dict[str, tuple[torch.Tensor, torch.Tensor]],
        schedule: list[tuple[int, int, str]],
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModernAlbertModelOutput:
        """The layers and the final norm.

        Args:
            hidden_states: The embedded input, `[1, tokens, hidden]` or `[batch, seq, hidden]`.
            sequences: How the sequences of the batch lie in it.
            attention: Attention over them, by layer type.
            position_embeddings: Cosines and sines of RoPE, by layer type.
            schedule: Group, run of the group, and layer type of every layer that runs.
            **kwargs: Of the attention implementation, and which outputs are recorded.

        Returns:
            Hidden states, `[batch, seq, hidden]`, and router logits, `[tokens, num_experts]`.
        """
        config = self.config
        routed_by_sequence = config.has_router and config.router_type == "sequence"
        sequence_ids = sequences.number_tokens() if routed_by_sequence else None
        padded = sequences if kwargs.get("output_hidden_states", config.output_hidden_states) else None
        if padded is not None:
            hidden_states = padded.pad_output(hidden_states)
        for group, depth, layer_type in schedule:
            hidden_states = self.layers[group](
                hidden_states,
                position_embeddings=position_embeddings[layer_type],
                attention=attention[layer_type],
                depth=depth,
                sequence_ids=sequence_ids,
                padded=padded,
                **kwargs,
            )
        if padded is not None:
            hidden_states = padded.unpad_input(hidden_states)
        return ModernAlbertModelOutput(last_hidden_state=sequences.pad_output(self.final_norm(hidden_states)))

    def check_length(self, length: int) -> None:
        """Refuses a sequence that is longer than `max_position_embeddings`, unless RoPE is scaled.

        Raises:
            ValueError: It is.
        """
        scaled = any(rope_type != "default" for rope_type in self.rotary_emb.rope_type.values())
        if length > self.config.max_position_embeddings and not scaled:
            raise ValueError(
                f"a sequence has {length} tokens, but the model was made for at most "
                f"{self.config.max_position_embeddings} (`max_position_embeddings`); truncate it, e.g. with "
                f"`tokenizer(..., truncation=True, max_length={self.config.max_position_embeddings})`"
            )


class ModernAlbertPredictionHead(nn.Module):
    """ModernBERT's: dense, activation, norm. The masked language model pretrains it, the classifiers start from it."""

    def __init__(self, config: ModernAlbertConfig):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.act = ACT2FN[config.classifier_activation]
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm(self.act(self.dense(hidden_states)))


class ModernAlbertHeadModel(ModernAlbertPreTrainedModel):
    """Base of the task heads: encoder, prediction head, and the balancing loss beside the task loss."""

    def __init__(self, config: ModernAlbertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ModernAlbertModel(config)
        self.head = ModernAlbertPredictionHead(config)

    def run_encoder(
        self, has_labels: bool, output_router_logits: bool | None, *inputs, **kwargs
    ) -> ModernAlbertModelOutput:
        """Output of the encoder, with the balancing loss where it was asked for or is part of the loss."""
        asked = self.config.output_router_logits if output_router_logits is None else output_router_logits
        balances = self.training and self.config.has_router and self.config.router_aux_loss_coef > 0
        outputs = self.model(*inputs, output_router_logits=asked or (balances and has_labels), **kwargs)
        if not asked:
            outputs.router_logits = None
            if balances and not has_labels and torch.is_grad_enabled():
                logger.warning_once(
                    "A model with a router is in training and gets no labels, so that no loss of it contains the "
                    "balancing loss: pass `output_router_logits=True`, and add `config.router_aux_loss_coef * "
                    "outputs.aux_loss` to your own loss."
                )
        return outputs

    def total_loss(self, loss: torch.Tensor, aux_loss: torch.Tensor | None, share: torch.Tensor | float):
        """Task loss plus, in training, the weighted balancing loss.

        Under gradient accumulation the balancing loss is a mean over each micro-batch; `share` is the part of the
        batch's labelled items that the micro-batch holds, by which the task loss is weighted as well.
        """
        if aux_loss is None or not self.training or self.config.router_aux_loss_coef == 0:
            return loss
        router = self.model.layers[self.config.mol_groups[0]].mlp.router
        trained = any(parameter.requires_grad for parameter in router.parameters())
        if torch.is_grad_enabled() and trained and not aux_loss.requires_grad:
            raise ValueError(
                "the balancing loss has no gradient, as happens with reentrant gradient checkpointing; use "
                "`gradient_checkpointing_kwargs={'use_reentrant': False}`, or set `router_aux_loss_coef=0`"
            )
        return loss + self.config.router_aux_loss_coef * share * aux_loss.to(loss.device)

    def pool(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """`[batch, seq, hidden]` to `[batch, hidden]`: the first real token, or the mean of the real ones."""
        if attention_mask is None or attention_mask.dim() != 2:
            attention_mask = hidden_states.new_ones(hidden_states.shape[:2])
        real = attention_mask.to(hidden_states)
        if self.config.classifier_pooling == "cls":
            first = real.argmax(dim=1)
            return hidden_states[torch.arange(len(first), device=first.device), first]
        return (hidden_states * real[..., None]).sum(dim=1) / real.sum(dim=1, keepdim=True).clamp(min=1)


def recorded(outputs: ModernAlbertModelOutput) -> dict:
    """Fields of the encoder's output that a head returns as they are."""
    return {name: getattr(outputs, name) for name in ("hidden_states", "attentions", "aux_loss", "router_logits")}


def count_labelled(
    labelled: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labelled items by which a loss is divided, and the share of them in this micro-batch.

    A loss is the sum over its labelled items divided by `num_items_in_batch`, the count over all accumulated
    micro-batches if Trainer gives it, else the count here. A batch without labels has a loss of 0.
    """
    here = labelled.sum()
    total = here if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=here.device)
    total = total.clamp(min=1)
    return total, here / total


def check_labels(labels: torch.Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.shape != shape:
        raise ValueError(
            f"`labels` must be integers of shape {list(shape)}, {meaning}; got {labels.dtype} of shape "
            f"{list(labels.shape)}"
        )


@auto_docstring(custom_intro="ModernALBERT with a masked-language-model head, its decoder tied to the embedding.")
class ModernAlbertForMaskedLM(ModernAlbertHeadModel):
    _tied_weights_keys = {"decoder.weight": "model.embeddings.tok_embeddings.weight"}

    def __init__(self, config: ModernAlbertConfig):
        super().__init__(config)
        self.decoder_projection = nn.Linear(config.hidden_size, config.embedding_size, bias=False)
        self.decoder = nn.Linear(config.embedding_size, config.vocab_size, bias=config.decoder_bias)
        self.post_init()

    def get_output_embeddings(self):
        return self.decoder

    def set_output_embeddings(self, new_embeddings: nn.Linear):
        self.decoder = new_embeddings

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModernAlbertMaskedLMOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Token ids to predict, -100 where there is no loss.
        """
        outputs = self.run_encoder(
            labels is not None, output_router_logits, input_ids, attention_mask, position_ids, inputs_embeds, **kwargs
        )
        hidden_states = outputs.last_hidden_state
        if labels is not None:
            check_labels(labels, hidden_states.shape[:2], "token ids, -100 where there is no loss")
            if self.config.sparse_prediction:
                labelled = labels != -100
                hidden_states, labels = hidden_states[labelled], labels[labelled]  # [labelled, hidden]
        logits = self.decoder(self.decoder_projection(self.head(hidden_states)))

        loss = None
        if labels is not None:
            items, share = count_labelled(labels != -100, kwargs.pop("num_items_in_batch", None))
            loss = self.loss_function(
                logits, labels, vocab_size=self.config.vocab_size, num_items_in_batch=items, **kwargs
            )
            loss = self.total_loss(loss, outputs.aux_loss, share)
        return ModernAlbertMaskedLMOutput(loss=loss, logits=logits, **recorded(outputs))


class ModernAlbertClassifierModel(ModernAlbertHeadModel):
    """A prediction head and a linear classifier over pooled or single hidden states."""

    def __init__(self, config: ModernAlbertConfig, num_outputs: int):
        super().__init__(config)
        self.drop = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, num_outputs)
        self.post_init()

    def classify(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.drop(self.head(hidden_states)))


@auto_docstring(custom_intro="ModernALBERT with a classification or regression head over the pooled sequence.")
class ModernAlbertForSequenceClassification(ModernAlbertClassifierModel):
    def __init__(self, config: ModernAlbertConfig):
        super().__init__(config, config.num_labels)

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModernAlbertSequenceClassifierOutput:
        r"""
        labels (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_labels)`, *optional*):
            Integer classes (`[batch]`), or floats: values to regress on (`num_labels=1`, or
            `problem_type="regression"`), or 0 and 1 for each of several labels.
        """
        outputs = self.run_encoder(
            labels is not None, output_router_logits, input_ids, attention_mask, position_ids, inputs_embeds, **kwargs
        )
        logits = self.classify(self.pool(outputs.last_hidden_state, attention_mask))  # [batch, num_labels]

        loss = None
        if labels is not None:
            problem_type = self.infer_problem_type(labels)
            if problem_type == "single_label_classification":
                check_labels(labels.view(-1), logits.shape[:1], f"classes from 0 to {self.num_labels - 1}")
                items, share = count_labelled(labels != -100, kwargs.get("num_items_in_batch"))
                loss = F.cross_entropy(logits, labels.view(-1), reduction="sum") / items
            else:
                if labels.numel() != logits.numel():
                    raise ValueError(
                        f"`labels` for {problem_type} must have the shape of the logits, {list(logits.shape)}; got "
                        f"{list(labels.shape)}"
                    )
                labels = labels.view_as(logits).to(logits.dtype)
                items, share = count_labelled(torch.ones_like(labels), kwargs.get("num_items_in_batch"))
                distance = F.mse_loss if problem_type == "regression" else F.binary_cross_entropy_with_logits
                loss = distance(logits, labels, reduction="sum") / items
            loss = self.total_loss(loss, outputs.aux_loss, share)
        return ModernAlbertSequenceClassifierOutput(loss=loss, logits=logits, **recorded(outputs))

    def infer_problem_type(self, labels: torch.Tensor) -> str:
        """transformers' rule: one output regresses, integers are classes, floats are several labels."""
        if self.config.problem_type is not None:
            return self.config.problem_type
        if self.num_labels == 1:
            return "regression"
        return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


@auto_docstring(custom_intro="ModernALBERT with a classifier over every token.")
class ModernAlbertForTokenClassification(ModernAlbertClassifierModel):
    def __init__(self, config: ModernAlbertConfig):
        super().__init__(config, config.num_labels)

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModernAlbertTokenClassifierOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Class of every token, -100 where there is no loss.
        """
        outputs = self.run_encoder(
            labels is not None, output_router_logits, input_ids, attention_mask, position_ids, inputs_embeds, **kwargs
        )
        logits = self.classify(outputs.last_hidden_state)  # [batch, seq, num_labels]

        loss = None
        if labels is not None:
            check_labels(labels, logits.shape[:2], f"classes from 0 to {self.num_labels - 1}, -100 without loss")
            items, share = count_labelled(labels != -100, kwargs.pop("num_items_in_batch", None))
            loss = self.loss_function(logits, labels, self.config, num_items_in_batch=items, **kwargs)
            loss = self.total_loss(loss, outputs.aux_loss, share)
        return ModernAlbertTokenClassifierOutput(loss=loss, logits=logits, **recorded(outputs))


@auto_docstring(custom_intro="ModernALBERT with a head for the first and the last token of an answer.")
class ModernAlbertForQuestionAnswering(ModernAlbertClassifierModel):
    def __init__(self, config: ModernAlbertConfig):
        super().__init__(config, 2)

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.LongTensor | None = None,
        end_positions: torch.LongTensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModernAlbertQuestionAnsweringOutput:
        r"""
        start_positions, end_positions (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            First and last token of the answer. A position outside the sequence has no loss.
        """
        has_labels = start_positions is not None and end_positions is not None
        outputs = self.run_encoder(
            has_labels, output_router_logits, input_ids, attention_mask, position_ids, inputs_embeds, **kwargs
        )
        logits = self.classify(outputs.last_hidden_state)  # [batch, seq, 2]
        start_logits, end_logits = (half.contiguous() for half in logits.unbind(-1))  # [batch, seq]

        loss = None
        if has_labels:
            length = start_logits.shape[1]
            start_positions, end_positions = (
                positions.masked_fill(positions < 0, length) for positions in (start_positions, end_positions)
            )
            items, share = count_labelled(start_positions < length, kwargs.pop("num_items_in_batch", None))
            loss = self.loss_function(
                start_logits, end_logits, start_positions, end_positions, num_items_in_batch=items, **kwargs
            )
            loss = self.total_loss(loss, outputs.aux_loss, share)
        return ModernAlbertQuestionAnsweringOutput(
            loss=loss, start_logits=start_logits, end_logits=end_logits, **recorded(outputs)
        )


@auto_docstring(custom_intro="ModernALBERT with a head that scores each of several choices.")
class ModernAlbertForMultipleChoice(ModernAlbertClassifierModel):
    def __init__(self, config: ModernAlbertConfig):
        super().__init__(config, 1)

    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModernAlbertMultipleChoiceOutput:
        r"""
        input_ids (`torch.LongTensor` of shape `(batch_size, num_choices, sequence_length)`, *optional*):
            Tokens of every choice; masks, positions and embeddings have the same leading shape.
        labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            The right choice.
        """
        inputs = input_ids if input_ids is not None else inputs_embeds
        if inputs is None:
            raise ValueError("give either `input_ids` or `inputs_embeds`, and not both")
        num_choices = inputs.shape[1]
        input_ids, attention_mask, position_ids, inputs_embeds = (
            None if tensor is None else tensor.flatten(0, 1)
            for tensor in (input_ids, attention_mask, position_ids, inputs_embeds)
        )  # [batch * choices, seq, ...]
        outputs = self.run_encoder(
            labels is not None, output_router_logits, input_ids, attention_mask, position_ids, inputs_embeds, **kwargs
        )
        logits = self.classify(self.pool(outputs.last_hidden_state, attention_mask))
        logits = logits.view(-1, num_choices)  # [batch, choices]

        loss = None
        if labels is not None:
            check_labels(labels, logits.shape[:1], f"the right choice, from 0 to {num_choices - 1}")
            items, share = count_labelled(labels != -100, kwargs.pop("num_items_in_batch", None))
            loss = F.cross_entropy(logits.float(), labels, reduction="sum") / items
            loss = self.total_loss(loss, outputs.aux_loss, share)
        return ModernAlbertMultipleChoiceOutput(loss=loss, logits=logits, **recorded(outputs))


__all__ = [
    "ModernAlbertForMaskedLM",
    "ModernAlbertForMultipleChoice",
    "ModernAlbertForQuestionAnswering",
    "ModernAlbertForSequenceClassification",
    "ModernAlbertForTokenClassification",
    "ModernAlbertModel",
    "ModernAlbertPreTrainedModel",
]
