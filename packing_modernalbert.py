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
"""Layout of the sequences of a batch in the encoder, and the attention that keeps them apart.

A batch comes as rows, `[batch, seq]`, with padding or with several packed sequences per row. The encoder runs either on
these rows or, by default, on real tokens only: all sequences packed into one row, `[1, tokens]`, without padding.
[`arrange_sequences`] decides once per forward; [`choose_attention`] then picks the attention that fits.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers.masking_utils import create_bidirectional_mask


try:  # torch's own variable-length FlashAttention
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None


# Further arguments about packed sequences, which follow from `cu_seq_lens_q`; they are accepted and not read.
SEQUENCE_LENGTHS = ("cu_seq_lens_k", "max_length_q", "max_length_k", "num_items_in_batch")


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether a graph is being recorded, whose shapes and control flow cannot depend on the values of tensors.

    True under `torch.compile`, `torch.export`, `torch.jit.trace`, CUDA graph capture and the transforms of `torch.func`,
    and for stand-ins of tensors: fake tensors and proxies of `torch.fx`.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or type(tensor) not in (torch.Tensor, nn.Parameter)
        or inside_torch_func()
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def inside_torch_func() -> bool:
    """Whether a transform of `torch.func` runs (`vmap`, `grad`, ...).

    torch has no public form of this; `torch.autograd.Function` asks the same. Seen in 2.9 to 2.13.
    """
    return torch._C._are_functorch_transforms_active()


def uses_flash_attention(config: PreTrainedConfig) -> bool:
    """Whether attention runs in one of the library's FlashAttention implementations.

    The field has no public name; transformers' own models read it. Seen in 5.17 to 5.24.
    """
    return "flash" in (config._attn_implementation or "")


def check_inputs(
    config: PreTrainedConfig,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    others: dict,
) -> None:
    """Refuses inputs that do not fit each other or the model.

    Raises:
        ValueError: A tensor is missing, of another shape, unknown, or has ids outside the vocabulary.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either `input_ids` or `inputs_embeds`, and not both")
    inputs = input_ids if input_ids is not None else inputs_embeds
    if input_ids is not None and input_ids.dim() != 2:
        raise ValueError(f"`input_ids` must be [batch, seq], got {list(input_ids.shape)}; add a batch dimension")
    if inputs_embeds is not None and (inputs_embeds.dim() != 3 or inputs_embeds.shape[-1] != config.embedding_size):
        raise ValueError(
            f"`inputs_embeds` must be [batch, seq, {config.embedding_size}] (`embedding_size`, the width of "
            f"the embedding table), got {list(inputs_embeds.shape)}"
        )
    if is_traced(inputs):
        return
    unknown = [name for name, value in others.items() if torch.is_tensor(value) and name not in SEQUENCE_LENGTHS]
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
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"`input_ids` run from {low} to {high}, but the vocabulary has {config.vocab_size} tokens, "
                "from 0; is this the tokenizer that the model was trained with?"
            )


class PaddedSequences:
    """Sequences in rows, `[batch, seq, ...]`, as the caller gave them.

    Attributes:
        shape: `(batch, seq)`, also the leading shape of hidden states.
        attention_mask: The caller's: `[batch, seq]`, `[batch, heads, seq, seq]` or None.
        offsets: Index of each token in its sequence, up to a constant per sequence. Padding is not counted.
        position_ids: Positions for RoPE, `[batch, seq]`.
        sequence_ids: Number of each token's sequence within its row, `[batch, seq]`; None where a row is one sequence.
        padding_mask: 0 at padding, `[batch, seq]`; None where there is no padding.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        device: torch.device,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        starts: torch.Tensor | None,
        cu_seq_lens: torch.Tensor | None,
        traced: bool,
    ):
        self.shape = self.hidden_shape = shape
        self.attention_mask = attention_mask
        self.padding_mask = self.sequence_ids = None
        self.offsets = torch.arange(shape[1], device=device).expand(shape)
        real = torch.ones_like(self.offsets)
        if attention_mask is not None and attention_mask.dim() == 2:
            real = attention_mask.long()
            self.offsets = (real.cumsum(-1) - 1).clamp(min=0)
            if traced or not attention_mask.all():
                self.padding_mask = attention_mask
        if cu_seq_lens is not None:  # lengths run through all rows
            tokens = (real.flatten().cumsum(0) - 1).clamp(min=0).view(shape)
            self.sequence_ids = torch.searchsorted(cu_seq_lens[1:].to(tokens), tokens, right=True)
            self.offsets = tokens - cu_seq_lens.to(tokens)[self.sequence_ids]
        elif starts is not None:
            self.sequence_ids = (starts * real).cumsum(-1)
        self.position_ids = self.offsets if position_ids is None else position_ids.expand(shape)

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence, padding included."""
        return self.shape[1]

    def unpad_input(self, states: torch.Tensor) -> torch.Tensor:
        """From the caller's shape `[batch, seq, ...]` to that of hidden states; here the same."""
        return states

    def pad_output(self, states: torch.Tensor) -> torch.Tensor:
        """From the shape of hidden states to `[batch, seq, hidden]`, 0 at padding."""
        return states if self.padding_mask is None else states * self.padding_mask[..., None].to(states.device).bool()

    def number_tokens(self) -> torch.Tensor:
        """For a router that chooses once per sequence: number of each token's sequence in the batch, int64 `[tokens]`.

        Padding has the number `tokens`, which no sequence has.

        Raises:
            ValueError: The attention mask does not say which tokens are padding.
        """
        if self.attention_mask is not None and self.attention_mask.dim() == 4:
            raise ValueError(
                '`router_type="sequence"` must know which tokens are padding, and a 4-dimensional `attention_mask` '
                "does not say; give one of shape [batch, seq]"
            )
        ids = torch.zeros_like(self.offsets) if self.sequence_ids is None else self.sequence_ids
        numbers = F.pad(ids.diff(dim=-1) != 0, (1, 0), value=True).flatten().cumsum(0) - 1
        if self.attention_mask is None:
            return numbers
        return numbers.masked_fill(self.attention_mask.flatten() == 0, len(numbers))


class UnpaddedSequences:
    """Sequences without padding, one after the other in a single row, `[1, tokens, ...]`.

    Attributes:
        shape: `(batch, seq)` of the caller.
        hidden_shape: `(1, tokens)`, the leading shape of hidden states.
        indices: Index of each real token in the flattened batch, int64 `[tokens]`.
        cu_seq_lens: Start of each sequence, and the end, int32 `[sequences + 1]`.
        lengths: Tokens of each sequence.
        offsets: Index of each token in its sequence, `[1, tokens]`.
        position_ids: Positions for RoPE, `[1, tokens]`.
        sequence_ids: Number of each token's sequence, `[1, tokens]`.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        indices: torch.Tensor,
        cu_seq_lens: torch.Tensor,
        position_ids: torch.Tensor | None,
    ):
        self.shape = shape
        self.hidden_shape = (1, len(indices))
        self.indices = indices
        self.cu_seq_lens = cu_seq_lens
        self.lengths = cu_seq_lens.diff().tolist()
        sequence_ids = torch.arange(len(self.lengths), device=indices.device).repeat_interleave(cu_seq_lens.diff())
        self.sequence_ids = sequence_ids[None]
        self.offsets = (torch.arange(len(indices), device=indices.device) - cu_seq_lens[sequence_ids])[None]
        self.position_ids = self.offsets if position_ids is None else self.unpad_input(position_ids.expand(shape))

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    def unpad_input(self, states: torch.Tensor) -> torch.Tensor:
        """`[batch, seq, ...]` to `[1, tokens, ...]`."""
        return states.flatten(0, 1).index_select(0, self.indices.to(states.device))[None]

    def pad_output(self, states: torch.Tensor) -> torch.Tensor:
        """`[1, tokens, ...]` to `[batch, seq, ...]`, 0 at padding."""
        batch, seq = self.shape
        padded = states.new_zeros(batch * seq, *states.shape[2:])
        return padded.index_copy(0, self.indices.to(states.device), states.squeeze(0)).unflatten(0, (batch, seq))

    def number_tokens(self) -> torch.Tensor:
        """Number of each token's sequence in the batch, int64 `[tokens]`."""
        return self.sequence_ids.squeeze(0)


def arrange_sequences(
    inputs: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    seq_idx: torch.Tensor | None,
    cu_seq_lens: torch.Tensor | None,
    unpad_inputs: bool,
) -> PaddedSequences | UnpaddedSequences:
    """Finds the sequences of a batch, and decides whether the encoder runs on its rows or on real tokens only.

    A sequence starts with the first real token of a row and, in packed rows, at every position id 0, where `seq_idx`
    changes, or where `cu_seq_lens` says. Rows stay as they are where `unpad_inputs` is False, where they have neither
    padding nor several sequences, where the caller gives a mask of `[batch, heads, seq, seq]`, and in a traced graph.

    Args:
        inputs: Token ids `[batch, seq]` or their embeddings `[batch, seq, ...]`.
        attention_mask: 0 at padding, `[batch, seq]`; or `[batch, heads, seq, seq]`, which only attention reads.
        position_ids: `[batch, seq]` or `[1, seq]`.
        seq_idx: Number of each token's sequence, `[batch, seq]`.
        cu_seq_lens: Start of each sequence among the real tokens of the batch, and the end, `[sequences + 1]`.
        unpad_inputs: Whether padding may be removed.

    Raises:
        ValueError: `cu_seq_lens` do not divide the real tokens of each row into sequences.
    """
    (batch, seq), device = inputs.shape[:2], inputs.device
    traced = is_traced(inputs)
    starts = None  # whether a token starts a sequence, [batch, seq]
    if position_ids is not None:
        starts = position_ids.expand(batch, seq) == 0
    if seq_idx is not None:
        changes = F.pad(seq_idx.expand(batch, seq).diff(dim=-1) != 0, (1, 0), value=True)
        starts = changes if starts is None else starts | changes
    if starts is not None and not traced and not starts[:, 1:].any():
        starts = None  # every row is one sequence

    if cu_seq_lens is not None and not traced:
        check_lengths(cu_seq_lens, inputs.shape[:2], attention_mask)

    if traced or not unpad_inputs or (attention_mask is not None and attention_mask.dim() == 4):
        keep_rows = True
    elif cu_seq_lens is not None:
        keep_rows = False
    elif attention_mask is None or attention_mask.all():
        keep_rows = starts is None
    else:
        keep_rows = not attention_mask.any()  # no token is left without padding
    if keep_rows:
        return PaddedSequences((batch, seq), device, attention_mask, position_ids, starts, cu_seq_lens, traced)

    indices = torch.arange(batch * seq, device=device)
    if attention_mask is not None:
        indices = indices[attention_mask.flatten().bool()]
    if cu_seq_lens is None:
        first = F.pad((indices // seq).diff() != 0, (1, 0), value=True)
        if starts is not None:
            first = first | starts.flatten()[indices]
        cu_seq_lens = F.pad(first.nonzero().flatten(), (0, 1), value=len(indices))
    return UnpaddedSequences((batch, seq), indices, cu_seq_lens.to(torch.int32), position_ids)


def check_lengths(cu_seq_lens: torch.Tensor, shape: tuple[int, int], attention_mask: torch.Tensor | None) -> None:
    """Refuses lengths that do not divide the real tokens of each row into sequences.

    Raises:
        ValueError: They do not.
    """
    batch, seq = shape
    tokens = [seq] * batch if attention_mask is None else attention_mask.sum(dim=-1).tolist()
    ends = cu_seq_lens.tolist()
    rows_end = {sum(tokens[: row + 1]) for row in range(batch)}
    if ends[0] != 0 or ends[-1] != sum(tokens) or ends != sorted(ends) or not rows_end <= set(ends):
        raise ValueError(
            f"`cu_seq_lens_q` must rise from 0 to the number of real tokens ({sum(tokens)}), and a sequence must not run "
            f"over the end of a row (after {sorted(rows_end)} tokens); got {ends}"
        )


def bidirectional_mask(
    config: PreTrainedConfig,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sequence_ids: torch.Tensor | None,
    offsets: torch.Tensor,
    window: int | None,
) -> torch.Tensor | None:
    """The library's mask for rows: a token sees real tokens of its own sequence, at most `window` tokens away.

    Args:
        config: Its attention implementation decides the form of the mask.
        hidden_states: Any tensor of their dtype and device, `[batch, seq, ...]`.
        attention_mask: 0 at padding, `[batch, seq]`.
        sequence_ids: Number of each token's sequence, `[batch, seq]`; None where every row is one sequence.
        offsets: Index of each token in its sequence, `[batch, seq]`. They count real tokens, as FlashAttention does,
            whatever positions the caller gives to RoPE.
        window: Tokens seen on each side; None for all.
    """

    def mask_function(batch, head, query, key):
        seen = query >= 0
        if sequence_ids is not None:
            seen = seen & (sequence_ids[batch, query] == sequence_ids[batch, key])
        if window is not None:
            seen = seen & ((offsets[batch, query] - offsets[batch, key]).abs() <= window)
        return seen

    restricted = sequence_ids is not None or window is not None
    if attention_mask is not None and inside_torch_func():
        restricted = True  # else the library looks whether the mask is needed at all, which `vmap` refuses
    return create_bidirectional_mask(
        config=config,
        inputs_embeds=hidden_states,
        attention_mask=attention_mask,
        and_mask_function=mask_function if restricted else None,
    )


class RowAttention:
    """Attention of one layer type over the rows of [`PaddedSequences`], in the implementation that `config` names.

    Args:
        config: Of the model.
        sequences: Of the batch.
        hidden_states: Of the batch, for their dtype and device.
        window: Tokens that a token sees on each side; None for all.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        sequences: PaddedSequences | UnpaddedSequences,
        hidden_states: torch.Tensor,
        window: int | None,
    ):
        self.config = config
        self.sequences = sequences
        self.window = window
        self.mask = self.make_mask(hidden_states)

    def make_mask(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The mask in the form that the implementation takes."""
        sequences, window = self.sequences, self.window
        if sequences.attention_mask is not None and sequences.attention_mask.dim() == 4:
            return sequences.attention_mask
        if uses_flash_attention(self.config):
            window = None  # the kernel has its own
            if sequences.sequence_ids is not None:
                raise ValueError(
                    "FlashAttention cannot keep several sequences of a row apart in a traced graph or with "
                    "`unpad_inputs=False`; pad each sequence in a row of its own, or use "
                    '`attn_implementation="sdpa"`'
                )
        ids, offsets = sequences.sequence_ids, sequences.offsets
        return bidirectional_mask(self.config, hidden_states, sequences.attention_mask, ids, offsets, window)

    def __call__(
        self,
        interface: Callable,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of every sequence to itself.

        Args:
            interface: The library's implementation.
            module: The attention module, which implementations ask for `is_causal` and `training`.
            query: `[..., heads, head_dim]`, the leading shape that of hidden states.
            key: As `query`.
            value: As `query`.
            **kwargs: Of the implementation: `scaling`, `dropout`, ...

        Returns:
            `[..., heads, head_dim]`, and the weights `[batch, heads, seq, seq]` where the implementation returns them.
        """
        return self.attend(interface, module, query, key, value, self.mask, **kwargs)

    def attend(self, interface, module, query, key, value, mask, **kwargs):
        """One call of the implementation, on rows `[batch, seq, heads, head_dim]`."""
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))  # [batch, heads, seq, head_dim]
        # The library counts the token itself into the window of FlashAttention.
        sliding_window = None if self.window is None else self.window + 1
        mask = mask.to(query.device) if torch.is_tensor(mask) else mask  # layers may lie on several devices
        return interface(module, query, key, value, mask, sliding_window=sliding_window, **kwargs)


class RepaddedAttention(RowAttention):
    """Attention over [`UnpaddedSequences`], padded for this call alone: for implementations that take rows only."""

    def make_mask(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        sequences = self.sequences
        padding_mask = sequences.pad_output(torch.ones_like(sequences.sequence_ids, dtype=torch.bool))
        several = len(sequences.lengths) > padding_mask.any(dim=1).sum()  # in one row
        ids = sequences.pad_output(sequences.sequence_ids) if several else None
        offsets = sequences.pad_output(sequences.offsets)
        rows = hidden_states.new_empty(*sequences.shape, 0)
        return bidirectional_mask(self.config, rows, padding_mask, ids, offsets, self.window)

    def __call__(self, interface, module, query, key, value, **kwargs):
        query, key, value = (self.sequences.pad_output(states) for states in (query, key, value))
        output, weights = super().__call__(interface, module, query, key, value, **kwargs)
        return self.sequences.unpad_input(output), weights


class PerSequenceAttention(RowAttention):
    """Attention over [`UnpaddedSequences`], one sequence after the other: on a CPU a call costs less than padding."""

    def make_mask(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        offsets = torch.arange(self.sequences.max_length, device=hidden_states.device)
        if self.window is None or len(offsets) <= self.window + 1:
            return None
        # Every sequence takes its corner.
        return ((offsets[:, None] - offsets).abs() <= self.window)[None, None]  # [1, 1, max_length, max_length]

    def __call__(self, interface, module, query, key, value, **kwargs):
        outputs = []
        for states in zip(
            *(states.split(self.sequences.lengths, dim=1) for states in (query, key, value)), strict=True
        ):
            length = states[0].shape[1]
            mask = None if self.mask is None else self.mask[:, :, :length, :length]
            outputs.append(self.attend(interface, module, *states, mask, **kwargs)[0])
        return torch.cat(outputs, dim=1), None


class FlashAttention(RowAttention):
    """The library's FlashAttention over [`UnpaddedSequences`], which knows sequences by their lengths."""

    def make_mask(self, hidden_states: torch.Tensor) -> None:
        return None

    def __call__(self, interface, module, query, key, value, **kwargs):
        cu_seq_lens, longest = self.sequences.cu_seq_lens.to(query.device), self.sequences.max_length
        kwargs |= {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens}
        kwargs |= {"max_length_q": longest, "max_length_k": longest}
        return super().__call__(interface, module, query, key, value, **kwargs)


class VarlenAttention(FlashAttention):
    """torch's own variable-length FlashAttention over [`UnpaddedSequences`]; it has no dropout."""

    def __call__(self, interface, module, query, key, value, *, scaling, **kwargs):
        cu_seq_lens, longest = self.sequences.cu_seq_lens.to(query.device), self.sequences.max_length
        states = (states.squeeze(0) for states in (query, key, value))  # [tokens, heads, head_dim]
        sides = (-1, -1) if self.window is None else (self.window, self.window)
        output = varlen_attn(*states, cu_seq_lens, cu_seq_lens, longest, longest, scale=scaling, window_size=sides)
        return output.unsqueeze(0), None


def choose_attention(
    config: PreTrainedConfig,
    sequences: PaddedSequences | UnpaddedSequences,
    hidden_states: torch.Tensor,
    window: int | None,
    dropout: float,
) -> RowAttention:
    """The attention that keeps the sequences of this batch apart.

    Args:
        config: Names the implementation.
        sequences: Of the batch.
        hidden_states: The embedded input; its device and dtype decide which kernels can run.
        window: Tokens that a token sees on each side; None for all.
        dropout: Of the attention weights in this forward.
    """
    kind = RepaddedAttention
    if isinstance(sequences, PaddedSequences):
        kind = RowAttention
    elif uses_flash_attention(config):
        kind = FlashAttention
    elif config._attn_implementation == "sdpa":
        device, dtype = hidden_states.device.type, hidden_states.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        if device == "cpu":
            kind = PerSequenceAttention
        elif (
            device == "cuda" and dtype in (torch.float16, torch.bfloat16) and dropout == 0 and varlen_attn is not None
        ):
            kind = VarlenAttention
    return kind(config, sequences, hidden_states, window)
