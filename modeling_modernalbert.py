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
feed-forward layer runs on real tokens only. Shapes in comments: `batch, seq` as the caller gave them; `tokens` are the
real tokens of the batch, one text after the other. Inside the encoder hidden states are `[1, tokens, hidden]`, or
`[batch, seq, hidden]` where there is no padding to remove or a graph is being traced.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
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
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring
from transformers.utils.generic import can_return_tuple, is_flash_attention_requested, merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_modernalbert import ModernAlbertConfig
from .merging_modernalbert import merge_experts
from .mixture_modernalbert import FEED_FORWARD_LAYERS, ModernAlbertMLP, ModernAlbertMoL
from .routing_modernalbert import ModernAlbertDepthRouter, ModernAlbertRouter, load_balancing_loss


try:  # torch's own variable-length FlashAttention
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None


@dataclass
class RoutingOutput(ModelOutput):
    """What routing adds to an output.

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


class TextLayout(NamedTuple):
    """Where the texts of a batch lie among its tokens once padding is removed.

    Attributes:
        indices: Place of every real token in the flattened batch, int64 `[tokens]`.
        cu_seq_lens: Where each text starts, and the end, int32 `[texts + 1]`.
        lengths: Tokens of each text.
        shape: `(batch, seq)` as the caller gave them.
        attention: How attention keeps texts apart: `"flash"`, `"varlen"`, `"each"` or `"rows"`.
    """

    indices: torch.Tensor
    cu_seq_lens: torch.Tensor
    lengths: list[int]
    shape: tuple[int, int]
    attention: str

    @property
    def text_ids(self) -> torch.Tensor:
        """Number of the text that each token belongs to, `[tokens]`."""
        return torch.arange(len(self.lengths), device=self.indices.device).repeat_interleave(self.cu_seq_lens.diff())

    def pad(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[tokens, ...]` back to `[batch, seq, ...]`, 0 at padding."""
        batch, seq = self.shape
        padded = tokens.new_zeros(batch * seq, *tokens.shape[1:])
        return padded.index_copy(0, self.indices, tokens).unflatten(0, (batch, seq))

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """`[batch, seq, ...]` to `[tokens, ...]`."""
        return padded.flatten(0, 1).index_select(0, self.indices)


def find_texts(
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cu_seq_lens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Real tokens of a batch and the starts of its texts.

    A text starts with the first real token of a row and, where rows are packed, at every position id 0 or where
    `cu_seq_lens` says.

    Returns:
        `indices` and `cu_seq_lens` of [`TextLayout`]; None where every row is one text without padding, or where
        there is no real token at all.
    """
    batch, seq = shape
    packed = position_ids is not None and bool((position_ids[:, 1:] == 0).any())
    if cu_seq_lens is None and not packed and (attention_mask is None or attention_mask.all()):
        return None
    indices = torch.arange(batch * seq, device=device)
    if attention_mask is not None:
        indices = indices[attention_mask.flatten().bool()]
    if cu_seq_lens is not None:
        return indices, cu_seq_lens.to(torch.int32)
    if len(indices) == 0:
        return None
    starts = F.pad((indices // seq).diff() != 0, (1, 0), value=True)
    if packed:
        starts |= position_ids.expand(batch, seq).flatten()[indices] == 0
    starts = starts.nonzero().flatten()
    return indices, F.pad(starts, (0, 1), value=len(indices)).to(torch.int32)


def same_text(
    text_ids: torch.Tensor | None, places: torch.Tensor | None, window: int | None
) -> Callable[..., torch.Tensor]:
    """Mask function of the library: a query sees keys of its own text, at most `window` tokens away.

    `text_ids` and `places` are `[batch, seq]`; places count real tokens, as FlashAttention does, whatever positions the
    caller gives to RoPE.
    """

    def mask_function(batch, head, query, key):
        seen = query >= 0
        if text_ids is not None:
            seen = seen & (text_ids[batch, query] == text_ids[batch, key])
        if window is not None:
            seen = seen & ((places[batch, query] - places[batch, key]).abs() <= window)
        return seen

    return mask_function


class ModernAlbertEmbeddings(nn.Module):
    """Factorised embedding (ALBERT, section 3.1): V x E table, norm, E x H projection."""

    def __init__(self, config: ModernAlbertConfig):
        super().__init__()
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
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    swapped = wide.roll(wide.shape[-1] // 2, dims=-1)
    return torch.addcmul(wide * cos, swapped, signed_sin.to(wide)).to(features.dtype)


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
    """Bidirectional self-attention with RoPE, over rows or over texts laid end to end."""

    def __init__(self, config: ModernAlbertConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.is_causal = False
        self.Wqkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.Wo = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.Wo.init_std = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
        self.out_drop = nn.Dropout(config.attention_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        layout: TextLayout | None,
        window: int | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        qkv = self.Wqkv(hidden_states).view(*input_shape, 3, -1, self.head_dim)
        cos, sin = (table[..., None, None, :] for table in position_embeddings)
        query, key = apply_rotary_pos_emb(qkv[..., :2, :, :], cos, sin).unbind(-3)
        value = qkv[..., 2, :, :]  # each [batch, seq, heads, head_dim]
        output, weights = self.attend(query, key, value, attention_mask, layout, window, **kwargs)
        return self.out_drop(self.Wo(output.reshape(*input_shape, -1))), weights

    def attend(self, query, key, value, attention_mask, layout, window, **kwargs):
        """Attention of every text to itself, `[batch, seq, heads, head_dim]` in and out.

        What the library's interface takes decides the way: rows as they are; texts end to end under FlashAttention,
        the library's or torch's; text by text on a CPU, where a kernel call costs less than the padding; rows padded
        for this call under anything else.
        """
        scaling = self.head_dim**-0.5
        if layout is not None and layout.attention == "varlen":
            ends, longest = layout.cu_seq_lens, max(layout.lengths)
            span = (-1, -1) if window is None else (window, window)
            texts = (states.squeeze(0) for states in (query, key, value))
            output = varlen_attn(*texts, ends, ends, longest, longest, scale=scaling, window_size=span)
            return output.unsqueeze(0), None

        interface = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        kwargs.update(
            scaling=scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            # The library counts the token itself into the window of FlashAttention.
            sliding_window=None if window is None else window + 1,
        )
        if layout is not None and layout.attention == "rows":
            query, key, value = (layout.pad(states.squeeze(0)) for states in (query, key, value))
        elif layout is not None and layout.attention == "flash":
            kwargs.update(cu_seq_lens_q=layout.cu_seq_lens, cu_seq_lens_k=layout.cu_seq_lens)
            kwargs.update(max_length_q=max(layout.lengths), max_length_k=max(layout.lengths))
        states = [states.transpose(1, 2) for states in (query, key, value)]  # [batch, heads, seq, head_dim]
        if layout is not None and layout.attention == "each":
            outputs = []
            for text in zip(*(tensor.split(layout.lengths, dim=2) for tensor in states), strict=True):
                length = text[0].shape[2]
                mask = None if attention_mask is None else attention_mask[:, :, :length, :length]
                outputs.append(interface(self, *text, mask, **kwargs)[0])
            return torch.cat(outputs, dim=1), None
        output, weights = interface(self, *states, attention_mask, **kwargs)
        if layout is not None and layout.attention == "rows":
            output = layout.unpad(output).unsqueeze(0)
        return output, weights


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
        depth: int = 0,
        text_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.attn_norm(hidden_states), **kwargs)[0]
        return hidden_states + self.mlp(self.mlp_norm(hidden_states), depth=depth, text_ids=text_ids)


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
        if pretrained_model_name_or_path is not None:
            parts = tuple(
                prefix + name + "." for prefix in ("", "model.") for name in ("embeddings", "layers", "final_norm")
            )
            for problem in ("missing", "unexpected"):
                keys = sorted(key for key in info[f"{problem}_keys"] if key.startswith(parts))
                if keys:
                    raise ValueError(
                        f"{len(keys)} tensors of the encoder are {problem} in {pretrained_model_name_or_path}: "
                        f"{', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}. The file is damaged, or the "
                        "configuration describes another architecture: load with the checkpoint's own config.json, "
                        "without overriding fields that change shapes"
                    )
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if hasattr(module, "init_std"):
            init.normal_(module.weight, mean=0.0, std=module.init_std)
        elif isinstance(module, ModernAlbertRouter):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
            if isinstance(module, ModernAlbertDepthRouter):
                init.zeros_(module.depth_bias)
        elif hasattr(module, "pairs"):
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
            inplace: Whether this model is merged, or a copy of it.

        Returns:
            The merged model; its configuration says what it is now, so that saving and loading work.

        Raises:
            ValueError: There are no experts to merge, the method is unknown, or it lacks what it needs.
        """
        model = self if inplace else copy.deepcopy(self)
        merge_experts(model, ModernAlbertMLP, ModernAlbertMoL, method, fold, weights, batches, rank, num_experts)
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

    @merge_with_config_defaults
    @can_return_tuple
    @auto_docstring
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModernAlbertModelOutput:
        r"""
        position_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Position of every token in its text; by default counted from the first token that is not padding. Where
            they are given, position 0 starts a new text: rows may hold several, which do not see each other.
        inputs_embeds (`torch.Tensor` of shape `(batch_size, sequence_length, embedding_size)`, *optional*):
            Rows of the embedding table (width `embedding_size`) in place of `input_ids`.
        """
        inputs = input_ids if input_ids is not None else inputs_embeds
        traced = is_tracing(inputs)
        self.check_inputs(input_ids, inputs_embeds, attention_mask, position_ids, traced, kwargs)
        # A traced graph has static shapes, and a mask of the caller's own is made for rows: both keep their padding.
        keep_rows = traced or (attention_mask is not None and attention_mask.dim() == 4)
        cu_seq_lens = kwargs.pop("cu_seq_lens_q", None)
        for name in ("cu_seq_lens_k", "max_length_q", "max_length_k"):
            kwargs.pop(name, None)

        shape = inputs.shape[:2]
        texts = None
        if not keep_rows:
            texts = find_texts(shape, inputs.device, attention_mask, position_ids, cu_seq_lens)
        if texts is not None:
            indices, cu_seq_lens = texts
            layout = TextLayout(
                indices, cu_seq_lens, cu_seq_lens.diff().tolist(), shape, self.attention_over_texts(inputs.device)
            )
            text_ids = layout.text_ids
            self.check_length(max(layout.lengths))
            if position_ids is None:
                position_ids = torch.arange(len(indices), device=inputs.device) - cu_seq_lens[text_ids]
            else:
                position_ids = layout.unpad(position_ids.expand(shape))
            position_ids = position_ids[None]  # [1, tokens]
            input_ids, inputs_embeds = (
                None if tensor is None else layout.unpad(tensor)[None] for tensor in (input_ids, inputs_embeds)
            )
        else:
            if not traced:
                self.check_length(shape[1])
            layout = text_ids = None
            places = torch.arange(shape[1], device=inputs.device).expand(shape)
            real = torch.ones_like(places)
            if attention_mask is not None and attention_mask.dim() == 2:
                real = attention_mask.long()
                places = (real.cumsum(-1) - 1).clamp(min=0)
            if keep_rows and cu_seq_lens is not None:
                places = (real.flatten().cumsum(0) - 1).clamp(min=0).view(shape)  # lengths run through all rows
                text_ids = torch.searchsorted(cu_seq_lens[1:].to(places), places, right=True)
                places = places - cu_seq_lens.to(places)[text_ids]
            elif keep_rows and position_ids is not None:
                text_ids = ((position_ids == 0) * real).cumsum(-1)
            position_ids = places if position_ids is None else position_ids.expand(shape)

        hidden_states = self.embeddings(input_ids, inputs_embeds)  # [1, tokens, hidden] or [batch, seq, hidden]
        masks, position_embeddings = {}, {}
        for layer_type in self.rotary_emb.layer_types:
            masks[layer_type] = self.make_mask(layer_type, hidden_states, attention_mask, layout, text_ids)
            position_embeddings[layer_type] = self.rotary_emb(hidden_states, position_ids, layer_type)
        routed_texts = None
        if self.config.has_router and self.config.router_type == "sequence":
            routed_texts = self.number_texts(shape, attention_mask, layout, text_ids, inputs.device)
        outputs = self.encode(hidden_states, layout, masks, position_embeddings, routed_texts, **kwargs)
        if layout is not None or attention_mask is None or attention_mask.dim() == 4:
            padding_mask = None
        else:
            padding_mask = attention_mask if traced or not attention_mask.all() else None
        return self.restore(outputs, layout, shape, padding_mask)

    @capture_outputs
    def encode(
        self, hidden_states, layout, masks, position_embeddings, routed_texts, **kwargs: Unpack[TransformersKwargs]
    ) -> ModernAlbertModelOutput:
        """The layers and the final norm, over texts laid end to end or over rows."""
        for index, layer_type in enumerate(self.config.layer_types):
            group, depth = divmod(index, self.config.layers_per_group)
            hidden_states = self.layers[group](
                hidden_states,
                depth=depth,
                text_ids=routed_texts,
                position_embeddings=position_embeddings[layer_type],
                attention_mask=masks[layer_type],
                layout=layout,
                window=self.config.sliding_window if layer_type == "sliding_attention" else None,
                **kwargs,
            )
        return ModernAlbertModelOutput(last_hidden_state=self.final_norm(hidden_states))

    def number_texts(self, shape, attention_mask, layout, text_ids, device) -> torch.Tensor:
        """For a router that chooses once for a text: number of each token's text, `tokens` at padding, `[tokens]`.

        Takes `text_ids` as [`make_mask`] does.
        """
        if layout is not None:
            return text_ids
        if attention_mask is not None and attention_mask.dim() == 4:
            raise ValueError(
                '`router_type="sequence"` must know which tokens are padding, and a 4-dimensional `attention_mask` '
                "does not say; give one of shape [batch, seq]"
            )
        if text_ids is None:
            text_ids = torch.zeros(shape, dtype=torch.long, device=device)
        starts = F.pad(text_ids.diff(dim=-1) != 0, (1, 0), value=True)
        numbers = starts.flatten().cumsum(0) - 1
        if attention_mask is None:
            return numbers
        return numbers.masked_fill(attention_mask.flatten() == 0, shape[0] * shape[1])

    def restore(self, outputs, layout, shape, padding_mask) -> ModernAlbertModelOutput:
        """Whatever the layers gave, in the shape `[batch, seq, ...]` of the input, 0 at padding."""

        def pad(states):  # [1, tokens, ...], or [batch, seq, ...]
            if layout is not None:
                return layout.pad(states.squeeze(0))
            return states if padding_mask is None else states * padding_mask[..., None].bool()

        outputs.last_hidden_state = pad(outputs.last_hidden_state)
        if outputs.hidden_states is not None:
            outputs.hidden_states = tuple(None if states is None else pad(states) for states in outputs.hidden_states)
        if outputs.router_logits is not None:  # recorded as [tokens, num_experts]
            rows = (1, -1) if layout is not None else shape
            outputs.router_logits = tuple(pad(logits.unflatten(0, rows)) for logits in outputs.router_logits)
        return outputs

    def attention_over_texts(self, device: torch.device) -> str:
        """How attention runs over texts laid end to end; see [`TextLayout`]."""
        if is_flash_attention_requested(self.config):
            return "flash"
        if self.config._attn_implementation == "sdpa" and device.type == "cpu":
            return "each"
        dtype = self.embeddings.projection.weight.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        half_on_cuda = device.type == "cuda" and dtype in (torch.float16, torch.bfloat16)
        drops = self.training and self.config.attention_dropout > 0
        if self.config._attn_implementation == "sdpa" and half_on_cuda and not drops and varlen_attn is not None:
            return "varlen"
        return "rows"

    def make_mask(self, layer_type, hidden_states, attention_mask, layout, text_ids):
        """Mask of a layer type in the form that the attention implementation takes, or None.

        `text_ids` say which tokens belong together, `[tokens]` with a layout; without one, `[batch, seq]` where rows
        may hold several texts, or None.
        """
        if attention_mask is not None and attention_mask.dim() == 4:
            return attention_mask
        window = self.config.sliding_window if layer_type == "sliding_attention" else None
        device = hidden_states.device
        if layout is None:
            rows = hidden_states
            places = torch.arange(rows.shape[1], device=device).expand(rows.shape[:2])
            if attention_mask is not None:
                places = attention_mask.long().cumsum(-1)
            if is_flash_attention_requested(self.config):
                window = None  # the kernel has its own
                if text_ids is not None:
                    raise ValueError(
                        "several texts in a row cannot be kept apart by FlashAttention in a traced graph; pad each text "
                        'in a row of its own, or use `attn_implementation="sdpa"`'
                    )
        elif layout.attention in ("flash", "varlen"):
            return None
        elif layout.attention == "each":  # a band that each text takes its corner of
            places = torch.arange(max(layout.lengths), device=device)
            if window is None or len(places) <= window + 1:
                return None
            return ((places[:, None] - places).abs() <= window)[None, None]
        else:
            rows = hidden_states.new_empty(*layout.shape, 0)
            places, attention_mask = (
                layout.pad(tensor) for tensor in (torch.arange(len(text_ids), device=device), text_ids >= 0)
            )
            # Where no row holds two texts, padding says all.
            text_ids = layout.pad(text_ids) if len(layout.lengths) > attention_mask.any(dim=1).sum() else None
        restricted = text_ids is not None or window is not None
        return create_bidirectional_mask(
            config=self.config,
            inputs_embeds=rows,
            attention_mask=attention_mask,
            and_mask_function=same_text(text_ids, places, window) if restricted else None,
        )

    def check_length(self, length: int) -> None:
        scales = "dynamic" in self.rotary_emb.rope_type.values()  # made for longer texts
        if length > self.config.max_position_embeddings and not scales:
            raise ValueError(
                f"a text has {length} tokens, but the model was made for at most {self.config.max_position_embeddings} "
                "(`max_position_embeddings`); truncate it, e.g. with `tokenizer(..., truncation=True, max_length="
                f"{self.config.max_position_embeddings})`"
            )

    def check_inputs(self, input_ids, inputs_embeds, attention_mask, position_ids, traced: bool, others: dict) -> None:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either `input_ids` or `inputs_embeds`, and not both")
        inputs = input_ids if input_ids is not None else inputs_embeds
        if input_ids is not None and input_ids.dim() != 2:
            raise ValueError(f"`input_ids` must be [batch, seq], got {list(input_ids.shape)}; add a batch dimension")
        if inputs_embeds is not None and (
            inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != self.config.embedding_size
        ):
            raise ValueError(
                f"`inputs_embeds` must be [batch, seq, {self.config.embedding_size}] (`embedding_size`, the width of "
                f"the embedding table), got {list(inputs_embeds.shape)}"
            )
        if traced:
            return
        known = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "num_items_in_batch")
        unknown = [name for name, value in others.items() if torch.is_tensor(value) and name not in known]
        if unknown:
            raise ValueError(
                f"the model does not take {', '.join(map(repr, unknown))}; if a tokenizer makes it, set "
                '`tokenizer.model_input_names = ["input_ids", "attention_mask"]`'
            )
        shape = inputs.shape[:2]
        if attention_mask is not None and attention_mask.dim() != 4 and attention_mask.shape != shape:
            raise ValueError(
                f"`attention_mask` must be [batch, seq] = {list(shape)} as the input, got {list(attention_mask.shape)}"
            )
        if position_ids is not None and tuple(position_ids.shape) not in (tuple(shape), (1, shape[1])):
            raise ValueError(
                f"`position_ids` must be [batch, seq] = {list(shape)} as the input, got {list(position_ids.shape)}"
            )
        # On an accelerator the check would make the host wait for it.
        if input_ids is not None and input_ids.device.type == "cpu" and input_ids.numel():
            low, high = (int(value) for value in input_ids.aminmax())
            size = self.embeddings.tok_embeddings.num_embeddings
            if low < 0 or high >= size:
                raise ValueError(
                    f"`input_ids` run from {low} to {high}, but the vocabulary has {size} tokens, from 0; is this the "
                    "tokenizer that the model was trained with?"
                )


class ModernAlbertPredictionHead(nn.Module):
    """Dense, activation, norm."""

    def __init__(self, config: ModernAlbertConfig, out_features: int):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, out_features, bias=False)
        self.dense.init_std = config.hidden_size**-0.5
        self.act = ACT2FN[config.classifier_activation]
        self.norm = nn.LayerNorm(out_features, eps=config.norm_eps, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm(self.act(self.dense(hidden_states)))


class ModernAlbertHeadModel(ModernAlbertPreTrainedModel):
    """What the task heads share: running the encoder, and adding the balancing loss to the task's."""

    def __init__(self, config: ModernAlbertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ModernAlbertModel(config)

    def run_encoder(self, has_labels: bool, attention_mask, kwargs: dict, **inputs) -> ModernAlbertModelOutput:
        """Output of the encoder, with the balancing loss where it was asked for or is part of the loss."""
        asked = kwargs.pop("output_router_logits", None)
        asked = self.config.output_router_logits if asked is None else asked
        balanced = has_labels and self.training and self.config.has_router and self.config.router_aux_loss_coef > 0
        outputs = self.model(**inputs, attention_mask=attention_mask, output_router_logits=asked or balanced, **kwargs)
        if outputs.router_logits:
            outputs.aux_loss = load_balancing_loss(
                outputs.router_logits,
                self.config,
                attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None,
            )
        if not asked:
            outputs.router_logits = None
        return outputs

    def total_loss(self, loss: torch.Tensor, aux_loss: torch.Tensor | None, share: torch.Tensor | float):
        """Task loss plus, in training, the weighted balancing loss.

        Under gradient accumulation the balancing loss is a mean over each micro-batch; `share` is the part of the
        batch's labelled items that the micro-batch holds, by which the task loss is weighted as well.
        """
        if aux_loss is None or not self.training or self.config.router_aux_loss_coef == 0:
            return loss
        router = next(module for module in self.modules() if isinstance(module, ModernAlbertRouter))
        if torch.is_grad_enabled() and router.weight.requires_grad and not aux_loss.requires_grad:
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
    """What a head hands on of the encoder's output."""
    return {name: getattr(outputs, name) for name in ("hidden_states", "attentions", "aux_loss", "router_logits")}


def count_labelled(labelled: torch.Tensor, num_items_in_batch: torch.Tensor | int | None):
    """Labelled items by which a loss is divided, and the share of them that is here.

    A loss is the sum over its labelled items divided by `num_items_in_batch`, the count over all accumulated
    micro-batches where Trainer gives it, else the count here. A batch without any gives 0.
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
        # Another shape than the classifiers' `head`, hence another name: each starts from the other's checkpoint.
        self.lm_head = ModernAlbertPredictionHead(config, config.embedding_size)
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModernAlbertMaskedLMOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Token ids to predict, -100 where there is no loss.
        """
        outputs = self.run_encoder(
            labels is not None, attention_mask, kwargs,
            input_ids=input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds,
        )  # fmt: skip
        hidden_states = outputs.last_hidden_state
        if labels is not None:
            check_labels(labels, hidden_states.shape[:2], "token ids, -100 where there is no loss")
            if self.config.sparse_prediction:
                labelled = labels != -100
                hidden_states, labels = hidden_states[labelled], labels[labelled]  # [labelled, hidden]
        logits = self.decoder(self.lm_head(hidden_states))

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
        self.head = ModernAlbertPredictionHead(config, config.hidden_size)
        self.drop = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, num_outputs)
        self.classifier.init_std = config.hidden_size**-0.5
        self.post_init()

    def classify(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.drop(self.head(hidden_states)))


@auto_docstring(custom_intro="ModernALBERT with a classification or regression head over the pooled text.")
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModernAlbertSequenceClassifierOutput:
        r"""
        labels (`torch.Tensor` of shape `(batch_size,)` or `(batch_size, num_labels)`, *optional*):
            Integer classes (`[batch]`), or floats: values to regress on (`num_labels=1`, or
            `problem_type="regression"`), or 0 and 1 for each of several labels.
        """
        outputs = self.run_encoder(
            labels is not None, attention_mask, kwargs,
            input_ids=input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds,
        )  # fmt: skip
        logits = self.classify(self.pool(outputs.last_hidden_state, attention_mask))  # [batch, num_labels]

        loss = None
        if labels is not None:
            problem_type = self.infer_problem_type(labels)
            num_items_in_batch = kwargs.pop("num_items_in_batch", None)
            if problem_type == "single_label_classification":
                check_labels(labels.view(-1), logits.shape[:1], f"classes from 0 to {self.num_labels - 1}")
                items, share = count_labelled(labels != -100, num_items_in_batch)
            else:
                if labels.numel() != logits.numel():
                    raise ValueError(
                        f"`labels` for {problem_type} must have the shape of the logits, {list(logits.shape)}; got "
                        f"{list(labels.shape)}"
                    )
                labels = labels.view_as(logits).to(logits.dtype)
                items, share = count_labelled(torch.ones_like(labels), num_items_in_batch)
            # The library's loss would write the inferred type into the model's configuration.
            config = SimpleNamespace(num_labels=self.num_labels, problem_type=problem_type)
            loss = self.loss_function(
                labels=labels, pooled_logits=logits, config=config, num_items_in_batch=items, **kwargs
            )
            if problem_type != "single_label_classification":
                loss = loss * share  # there the library's loss is a mean, whatever the batch is part of
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModernAlbertTokenClassifierOutput:
        r"""
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
            Class of every token, -100 where there is no loss.
        """
        outputs = self.run_encoder(
            labels is not None, attention_mask, kwargs,
            input_ids=input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds,
        )  # fmt: skip
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
        **kwargs: Unpack[TransformersKwargs],
    ) -> ModernAlbertQuestionAnsweringOutput:
        r"""
        start_positions, end_positions (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
            First and last token of the answer. A position outside the sequence has no loss.
        """
        has_labels = start_positions is not None and end_positions is not None
        outputs = self.run_encoder(
            has_labels, attention_mask, kwargs,
            input_ids=input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds,
        )  # fmt: skip
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
            labels is not None, attention_mask, kwargs,
            input_ids=input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds,
        )  # fmt: skip
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
