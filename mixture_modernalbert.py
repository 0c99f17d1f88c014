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
"""Feed-forward layers: the plain one, the Mixture of LoRAs (MoL) that shares it, and the alternatives to MoL.

Shapes in comments: `tokens` are those of the whole batch; `E` experts of rank `r`; `k` of them for each token; `H` is
the hidden size, `I` the intermediate size.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from .configuration_modernalbert import ModernAlbertConfig
from .packing_modernalbert import is_traced
from .routing_modernalbert import ROUTERS, ModernAlbertRouter


class ModernAlbertMLP(nn.Module):
    """Gated feed-forward layer, `Wo (act(gate) * value)` with `gate, value = Wi h`.

    Args:
        config: Of the model.
        intermediate_size: Default: `mol_intermediate_size`.
    """

    def __init__(self, config: ModernAlbertConfig, intermediate_size: int | None = None):
        super().__init__()
        intermediate_size = intermediate_size or config.mol_intermediate_size
        self.Wi = nn.Linear(config.hidden_size, 2 * intermediate_size, bias=False)
        self.act = ACT2FN[config.hidden_activation]
        self.Wo = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.Wo.init_std = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
        self.drop = nn.Dropout(config.mlp_dropout)

    def glu(self, projected: torch.Tensor) -> torch.Tensor:
        """`[..., 2 * intermediate]` to `[..., intermediate]`."""
        gate, value = projected.chunk(2, dim=-1)
        return self.act(gate) * value

    def forward(
        self, hidden_states: torch.Tensor, depth: int = 0, sequence_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The interface of all feed-forward layers; this one needs the states alone.

        Args:
            hidden_states: `[..., hidden]`.
            depth: Which run of its group this is, from 0.
            sequence_ids: As for the router.

        Returns:
            `[..., hidden]`.
        """
        return self.drop(self.Wo(self.glu(self.Wi(hidden_states))))


def mix_dense(glu, scaling, projected, low_rank, weights, experts, in_B, out_A):
    """Mixture with static shapes: slot by slot, an expert's part of `low_rank` kept and the others' masked to 0.

    Args:
        glu: Activation, `[tokens, 2I]` to `[tokens, I]`.
        scaling: LoRA alpha / r.
        projected: Shared input projection, `[tokens, 2I]`.
        low_rank: Input projected by all `in_A`, `[tokens, E, r]`.
        weights: Router weights, `[tokens, k]`.
        experts: Chosen experts, int64 `[tokens, k]`.
        in_B: `[E, 2I, r]`.
        out_A: `[E, r, I]`.

    Returns:
        `sum_e p_e a_e` of shape `[tokens, I]`, and `p_e A2_e a_e` for each chosen expert, else 0, `[tokens, E, r]`.
    """
    numbers = torch.arange(low_rank.shape[1], device=experts.device)
    chosen = (experts[..., None] == numbers).to(low_rank.dtype)[..., None]  # [tokens, k, E, 1]; `vmap` has no one_hot
    in_B = in_B.transpose(1, 2).flatten(0, 1)  # [E * r, 2I]
    activated, low_rank_out = 0, 0
    for slot in range(experts.shape[1]):
        # The product adds to `projected` by itself: accelerators spend their time here on reading and writing `[tokens, 2I]`.
        corrected = torch.addmm(projected, (low_rank * chosen[:, slot]).flatten(1), in_B, alpha=scaling)
        part = weights[:, slot, None] * glu(corrected)
        activated = activated + part
        low_rank_out = low_rank_out + F.linear(part, out_A.flatten(0, 1)).view_as(low_rank) * chosen[:, slot]
    return activated, low_rank_out


def differentiate_dense(ctx, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Backward pass that runs [`mix_dense`] again on the saved inputs, and can itself be differentiated."""
    projected, low_rank, weights, experts, in_B, out_A = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()
    inputs = (projected, low_rank, weights, in_B, out_A)
    with torch.enable_grad():
        # Views where the graph goes on: the tensors may depend on each other, through an earlier run of the block.
        inputs = [t.view_as(t) if create_graph else t.detach().requires_grad_(t.requires_grad) for t in inputs]
        outputs = mix_dense(ctx.glu, ctx.scaling, *inputs[:3], experts, *inputs[3:])
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=create_graph))
    grads = [next(found) if tensor.requires_grad else None for tensor in inputs]
    return None, None, *grads[:3], None, *grads[3:]


class RecomputedMixture(torch.autograd.Function):
    """[`mix_dense`] that saves only its inputs, and not the widened activations of every slot: for accelerators and half precision."""

    @staticmethod
    def forward(ctx, glu, scaling, projected, low_rank, weights, experts, in_B, out_A):
        ctx.glu, ctx.scaling = glu, scaling
        ctx.save_for_backward(projected, low_rank, weights, experts, in_B, out_A)
        return mix_dense(glu, scaling, projected, low_rank, weights, experts, in_B, out_A)

    backward = staticmethod(differentiate_dense)


class GroupedMixture(torch.autograd.Function):
    """[`mix_dense`], expert by expert over the tokens that chose it: the fast form on a CPU in float32.

    It processes chunks that fit the cache, and saves only its inputs: the backward pass recomputes each chunk and
    differentiates it. A backward pass with `create_graph` (double backward) runs [`mix_dense`].
    """

    chunk_size = 128

    @staticmethod
    def chunks(experts: torch.Tensor, weights: torch.Tensor, num_experts: int):
        """For each chunk: the expert, its tokens, and their slots in the flattened `[tokens * k]`; empty slots are left out."""
        flat = experts.masked_fill(weights == 0, num_experts).flatten()
        counts = torch.bincount(flat, minlength=num_experts + 1).tolist()
        for expert, slots in enumerate(flat.argsort(stable=True).split(counts)[:num_experts]):
            for chunk in slots.split(GroupedMixture.chunk_size) if len(slots) else ():
                yield expert, chunk // experts.shape[1], chunk

    @staticmethod
    def mix(glu, corrected, weights, out_A):
        part = glu(corrected).mul_(weights[:, None])
        return part, F.linear(part, out_A)  # [chunk, I], [chunk, r]

    @staticmethod
    def forward(ctx, glu, scaling, projected, low_rank, weights, experts, in_B, out_A):
        ctx.glu, ctx.scaling = glu, scaling
        ctx.save_for_backward(projected, low_rank, weights, experts, in_B, out_A)
        activated = projected.new_zeros(len(projected), out_A.shape[-1])
        low_rank_out = torch.zeros_like(low_rank)
        flat_weights = weights.flatten()
        for expert, tokens, slots in GroupedMixture.chunks(experts, weights, len(in_B)):
            corrected = projected.index_select(0, tokens).addmm_(
                low_rank[tokens, expert], in_B[expert].t(), alpha=scaling
            )
            part, part_low_rank = GroupedMixture.mix(glu, corrected, flat_weights[slots], out_A[expert])
            activated.index_add_(0, tokens, part)
            low_rank_out[tokens, expert] = part_low_rank
        return activated, low_rank_out

    @staticmethod
    def backward(ctx, grad_activated, grad_low_rank_out):
        if torch.is_grad_enabled():  # `create_graph`: this backward pass is differentiated again
            return differentiate_dense(ctx, grad_activated, grad_low_rank_out)
        projected, low_rank, weights, experts, in_B, out_A = ctx.saved_tensors
        flat_weights = weights.flatten()
        # An expert without tokens gets a gradient of 0, not none.
        grad_projected, grad_low, grad_weights, grad_in_B, grad_out_A = (
            torch.zeros_like(tensor) for tensor in (projected, low_rank, flat_weights, in_B, out_A)
        )
        for expert, tokens, slots in GroupedMixture.chunks(experts, weights, len(in_B)):
            chunk_low_rank = low_rank[tokens, expert]
            corrected = projected.index_select(0, tokens).addmm_(chunk_low_rank, in_B[expert].t(), alpha=ctx.scaling)
            with torch.enable_grad():
                inputs = [t.detach().requires_grad_() for t in (corrected, flat_weights[slots], out_A[expert])]
                outputs = GroupedMixture.mix(ctx.glu, *inputs)
            grad_corrected, grad_weights[slots], grad_A = torch.autograd.grad(
                outputs, inputs, (grad_activated[tokens], grad_low_rank_out[tokens, expert])
            )
            grad_projected.index_add_(0, tokens, grad_corrected)
            grad_low[tokens, expert] = ctx.scaling * (grad_corrected @ in_B[expert])
            grad_in_B[expert].addmm_(grad_corrected.t(), chunk_low_rank, alpha=ctx.scaling)
            grad_out_A[expert] += grad_A
        return None, None, grad_projected, grad_low, grad_weights.view_as(weights), None, grad_in_B, grad_out_A


def choose_mixture(projected: torch.Tensor, num_experts: int) -> Callable:
    """The form of [`mix_dense`] that is fast on a device in a precision; a traced graph gets the function itself."""
    on_cpu = projected.device.type == "cpu"
    if is_traced(projected) or (on_cpu and num_experts == 1):
        return mix_dense
    # In half precision a CPU multiplies so fast that gathering the tokens of each expert takes longer than it saves.
    return GroupedMixture.apply if on_cpu and projected.element_size() > 2 else RecomputedMixture.apply


class ModernAlbertCorrections(nn.Module):
    """LoRA pairs on the input projection and on the output projection, `E` of each.

    `in_A [E, r, H]`, `in_B [E, 2I, r]`, `out_A [E, r, I]`, `out_B [E, H, r]`; the A as PEFT starts them, the B at 0, so
    that a new layer equals its shared layer.
    """

    def __init__(self, config: ModernAlbertConfig, count: int):
        super().__init__()
        hidden, width, rank = config.hidden_size, config.mol_intermediate_size, config.expert_rank
        self.scaling = config.expert_alpha / rank
        self.in_A = nn.Parameter(torch.empty(count, rank, hidden))
        self.in_B = nn.Parameter(torch.empty(count, 2 * width, rank))
        self.out_A = nn.Parameter(torch.empty(count, rank, width))
        self.out_B = nn.Parameter(torch.empty(count, hidden, rank))

    def pairs(self) -> tuple[tuple[nn.Parameter, nn.Parameter], ...]:
        """Each projection into the rank, with the one out of it."""
        return (self.in_A, self.in_B), (self.out_A, self.out_B)


class ModernAlbertExperts(ModernAlbertCorrections):
    """The corrections of a Mixture of LoRAs, one for each expert."""

    def __init__(self, config: ModernAlbertConfig):
        super().__init__(config, config.num_experts)

    def forward(
        self,
        states: torch.Tensor,
        projected: torch.Tensor,
        weights: torch.Tensor,
        chosen: torch.Tensor,
        glu: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixture of the corrected activations, and the correction of the output.

        Args:
            states: Input of the layer, `[tokens, H]`.
            projected: Its shared projection, `[tokens, 2I]`.
            weights: Router weights, `[tokens, k]`.
            chosen: Chosen experts, int64 `[tokens, k]`.
            glu: Activation, `[tokens, 2I]` to `[tokens, I]`.

        Returns:
            `sum_e p_e a_e`, `[tokens, I]`, and `s sum_e B2_e A2_e p_e a_e`, `[tokens, H]`.
        """
        dtype = projected.dtype  # of lower precision than the parameters under autocast
        low_rank = F.linear(states, self.in_A.flatten(0, 1)).to(dtype)
        low_rank = low_rank.unflatten(-1, self.in_A.shape[:2])  # [tokens, E, r]
        mix = choose_mixture(projected, len(self.in_A))
        activated, low_rank_out = mix(
            *(glu, self.scaling, projected, low_rank, weights.to(dtype), chosen),
            *(self.in_B.to(dtype), self.out_A.to(dtype)),
        )
        out_B = self.out_B.transpose(1, 2).flatten(0, 1).to(dtype)  # [E * r, H]
        return activated, self.scaling * (low_rank_out.flatten(1) @ out_B)


def make_router(config: ModernAlbertConfig) -> ModernAlbertRouter | None:
    """The router of `router_type`; None for a single expert."""
    return ROUTERS[config.router_type](config) if config.num_experts > 1 else None


class ModernAlbertMoL(ModernAlbertMLP):
    r"""Mixture of LoRAs: a shared feed-forward layer whose two projections every chosen expert corrects.

    With shared projections `W_i`, `W_o`, experts `(A1, B1, A2, B2)_e`, `s = expert_alpha / expert_rank` and router
    weights `p_e` of the chosen experts S, the layer is the mixture of feed-forward *outputs*

        MoL(h) = sum_{e in S} p_e (W_o + s B2_e A2_e) geglu((W_i + s B1_e A1_e) h)

    Both projections are linear, so that it is computed exactly with each of them once for a token, however many
    experts it chose:

        u = W_i h,    a_e = geglu(u + s B1_e A1_e h),    MoL(h) = W_o (sum_e p_e a_e) + s sum_e B2_e A2_e p_e a_e

    Where the weights do not sum to one (`norm_topk_prob=False`), the rest goes to the shared layer's own `geglu(u)`.
    One expert means a single adapter and no router. The mixture is the paper's; the cheap form is ours.
    """

    def __init__(self, config: ModernAlbertConfig):
        super().__init__(config)
        self.experts = ModernAlbertExperts(config)
        self.router = make_router(config)
        self.norm_topk_prob = config.norm_topk_prob  # the router may be wrapped, by PEFT for example

    def forward(
        self, hidden_states: torch.Tensor, depth: int = 0, sequence_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        # Linear layers get the shape of the input: wrappers may index its rows, as PEFT's `adapter_names` does.
        projected = self.Wi(hidden_states).flatten(0, -2)  # [tokens, 2 * intermediate]
        states = hidden_states.flatten(0, -2)  # [tokens, hidden]
        if self.router is None:
            weights = states.new_ones(len(states), 1)
            chosen = torch.zeros_like(weights, dtype=torch.long)
        else:
            _, weights, chosen = self.router(states, depth, sequence_ids)
        activated, correction = self.experts(states, projected, weights, chosen, self.glu)
        if self.router is not None and not self.norm_topk_prob:
            rest = 1 - weights.sum(dim=-1, keepdim=True)
            activated = activated + rest.to(projected.dtype) * self.glu(projected)
        output = self.Wo(activated.unflatten(0, hidden_states.shape[:-1]))
        return self.drop(output + correction.view_as(output))


class ModernAlbertAdapters(nn.Module):
    """Bottleneck adapters, `U_e act(D_e y)`: `down [E, r, H]`, `up [E, H, r]`.

    The D as the A of a LoRA, the U at 0, so that a new layer equals its shared layer.
    """

    def __init__(self, config: ModernAlbertConfig):
        super().__init__()
        self.scaling = config.expert_alpha / config.expert_rank
        self.act = ACT2FN[config.hidden_activation]
        self.down = nn.Parameter(torch.empty(config.num_experts, config.expert_rank, config.hidden_size))
        self.up = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, config.expert_rank))

    def pairs(self) -> tuple[tuple[nn.Parameter, nn.Parameter], ...]:
        """Each projection into the bottleneck, with the one out of it."""
        return ((self.down, self.up),)

    def forward(self, states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """`s sum_e p_e U_e act(D_e y)`, `[tokens, H]`, for y `[tokens, H]` and p `[tokens, E]`."""
        low_rank = self.act(F.linear(states, self.down.flatten(0, 1)))
        low_rank = (
            low_rank.unflatten(-1, self.down.shape[:2]) * weights.to(low_rank.dtype)[..., None]
        )  # [tokens, E, r]
        return self.scaling * F.linear(low_rank.flatten(1), self.up.transpose(0, 1).flatten(1))


class ModernAlbertMoA(ModernAlbertMLP):
    """Mixture of adapters: the experts follow the shared feed-forward layer, which stays unchanged.

        y = W_o geglu(W_i h),    MoA(h) = y + s sum_{e in S} p_e U_e act(D_e y),    s = expert_alpha / expert_rank

    The router is MoL's and reads h, as there; the bottleneck is `expert_rank` wide. Adapters are small, and all run for
    every token: those not chosen have a weight of 0. The paper compares with routed adapters after the layer and does not
    state their form: activation, scale, the router's input and the start at 0 are our choice, so that only the position of
    the experts differs from MoL.
    """

    def __init__(self, config: ModernAlbertConfig):
        super().__init__(config)
        self.experts = ModernAlbertAdapters(config)
        self.router = make_router(config)

    def forward(
        self, hidden_states: torch.Tensor, depth: int = 0, sequence_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        states = hidden_states.flatten(0, -2)  # [tokens, hidden]
        if self.router is None:
            weights = states.new_ones(len(states), 1)
        else:
            logits, weights, chosen = self.router(states, depth, sequence_ids)
            weights = weights.new_zeros(logits.shape).scatter(1, chosen, weights)  # [tokens, E]
        output = self.Wo(self.glu(self.Wi(hidden_states)))
        correction = self.experts(output.flatten(0, -2), weights)
        return self.drop(output + correction.view_as(output))


class ModernAlbertDepthLoRA(ModernAlbertMLP):
    """A LoRA for every depth on both projections, `W + s B_l A_l`, and no router: Relaxed Recursive Transformers.

    Bae et al. (2024), there on every matrix of a block; here, as MoL, on the feed-forward layer alone. `experts` holds
    one correction for each depth.
    """

    def __init__(self, config: ModernAlbertConfig):
        super().__init__(config)
        self.experts = ModernAlbertCorrections(config, config.layers_per_group)

    def forward(
        self, hidden_states: torch.Tensor, depth: int = 0, sequence_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        (in_A, in_B), (out_A, out_B) = ((A[depth], B[depth]) for A, B in self.experts.pairs())
        scaling = self.experts.scaling
        activated = self.glu(self.Wi(hidden_states) + scaling * F.linear(F.linear(hidden_states, in_A), in_B))
        return self.drop(self.Wo(activated) + scaling * F.linear(F.linear(activated, out_A), out_B))


class ModernAlbertDepthMLP(nn.Module):
    """A plain feed-forward layer for every depth: experts, folded with what the router does there. Our choice."""

    def __init__(self, config: ModernAlbertConfig):
        super().__init__()
        self.depths = nn.ModuleList([ModernAlbertMLP(config) for _ in range(config.layers_per_group)])

    def forward(
        self, hidden_states: torch.Tensor, depth: int = 0, sequence_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.depths[depth](hidden_states)


# By `ModernAlbertConfig.modulation`.
FEED_FORWARD_LAYERS = {
    "mol": ModernAlbertMoL,
    "moa": ModernAlbertMoA,
    "depth_lora": ModernAlbertDepthLoRA,
    "none": ModernAlbertMLP,
    "per_depth": ModernAlbertDepthMLP,
}
