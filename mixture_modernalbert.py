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
"""The Mixture of LoRAs (MoL) and the feed-forward layer that it shares: router, experts, mixture, balancing loss.

Shapes in comments: `tokens` are those of the whole batch; `E` experts of rank `r`; `k` of them for each token; `H` is
the hidden size, `I` the intermediate size.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.utils.import_utils import is_tracing

from .configuration_modernalbert import ModernAlbertConfig


class ModernAlbertMLP(nn.Module):
    """Gated feed-forward layer, `Wo (act(gate) * value)` with `gate, value = Wi h`."""

    def __init__(self, config: ModernAlbertConfig, intermediate_size: int):
        super().__init__()
        self.Wi = nn.Linear(config.hidden_size, 2 * intermediate_size, bias=False)
        self.act = ACT2FN[config.hidden_activation]
        self.Wo = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.Wo.init_std = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
        self.drop = nn.Dropout(config.mlp_dropout)

    def gated(self, projected: torch.Tensor) -> torch.Tensor:
        """`[..., 2 * intermediate]` to `[..., intermediate]`."""
        gate, value = projected.chunk(2, dim=-1)
        return self.act(gate) * value

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.drop(self.Wo(self.gated(self.Wi(hidden_states))))


class ModernAlbertRouter(nn.Module):
    """Chooses the experts of every token and weighs them.

    Linear without bias, softmax in float32, top-k. In training its input, and nothing else, is multiplied by uniform
    noise in `1 ± router_jitter_noise` (Switch Transformer).
    """

    def __init__(self, config: ModernAlbertConfig):
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.jitter_noise = config.router_jitter_noise
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`[tokens, hidden]` to logits `[tokens, experts]`, weights and experts `[tokens, k]`."""
        hidden_states = hidden_states.to(self.weight.dtype)
        if self.training and self.jitter_noise > 0:
            noise = torch.empty_like(hidden_states).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
            hidden_states = hidden_states * noise
        # Autocast would take the logits to half precision and flip close choices.
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states, self.weight)
        probabilities = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, experts = probabilities.topk(self.num_experts_per_tok, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights, experts


def mix_dense(gated, scaling, projected, low, weights, experts, in_B, out_A):
    """Mixture with static shapes: slot by slot, an expert's part of `low` kept and the others' masked to 0.

    Args:
        gated: Activation, `[tokens, 2I]` to `[tokens, I]`.
        scaling: LoRA alpha / r.
        projected: Shared input projection, `[tokens, 2I]`.
        low: Input projected by all `in_A`, `[tokens, E, r]`.
        weights: Router weights, `[tokens, k]`.
        experts: Chosen experts, int64 `[tokens, k]`.
        in_B: `[E, 2I, r]`.
        out_A: `[E, r, I]`.

    Returns:
        `sum_e p_e a_e` of shape `[tokens, I]`, and `p_e A2_e a_e` for each chosen expert, else 0, `[tokens, E, r]`.
    """
    chosen = F.one_hot(experts, low.shape[1]).to(low.dtype)[..., None]  # [tokens, k, E, 1]
    in_B = in_B.transpose(1, 2).flatten(0, 1)  # [E * r, 2I]
    activated, low_out = 0, 0
    for slot in range(experts.shape[1]):
        delta = torch.mm((low * chosen[:, slot]).flatten(1), in_B)
        part = weights[:, slot, None] * gated(projected + scaling * delta)
        activated = activated + part
        low_out = low_out + F.linear(part, out_A.flatten(0, 1)).view_as(low) * chosen[:, slot]
    return activated, low_out


class GroupedMixture(torch.autograd.Function):
    """[`mix_dense`], expert by expert over the tokens that chose it: the fast form on a CPU.

    Works through chunks that fit the cache, and keeps nothing between the two passes but its inputs: the backward pass
    repeats a chunk and differentiates it.
    """

    chunk_size = 128

    @staticmethod
    def chunks(experts: torch.Tensor, num_experts: int):
        """For each chunk: the expert, its tokens, and their slots in the flattened `[tokens * k]`."""
        flat = experts.flatten()
        counts = torch.bincount(flat, minlength=num_experts).tolist()
        for expert, slots in enumerate(flat.argsort(stable=True).split(counts)):
            for chunk in slots.split(GroupedMixture.chunk_size) if len(slots) else ():
                yield expert, chunk // experts.shape[1], chunk

    @staticmethod
    def mix(gated, corrected, weights, out_A):
        part = gated(corrected).mul_(weights[:, None])
        return part, F.linear(part, out_A)  # [chunk, I], [chunk, r]

    @staticmethod
    def forward(ctx, gated, scaling, projected, low, weights, experts, in_B, out_A):
        ctx.gated, ctx.scaling = gated, scaling
        ctx.save_for_backward(projected, low, weights, experts, in_B, out_A)
        activated = projected.new_zeros(len(projected), out_A.shape[-1])
        low_out = torch.zeros_like(low)
        flat_weights = weights.flatten()
        for expert, tokens, slots in GroupedMixture.chunks(experts, len(in_B)):
            corrected = projected.index_select(0, tokens).addmm_(low[tokens, expert], in_B[expert].t(), alpha=scaling)
            part, part_low = GroupedMixture.mix(gated, corrected, flat_weights[slots], out_A[expert])
            activated.index_add_(0, tokens, part)
            low_out[tokens, expert] = part_low
        return activated, low_out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_activated, grad_low_out):
        projected, low, weights, experts, in_B, out_A = ctx.saved_tensors
        flat_weights = weights.flatten()
        # An expert without tokens gets a gradient of 0, not none.
        grad_projected, grad_low, grad_weights, grad_in_B, grad_out_A = (
            torch.zeros_like(tensor) for tensor in (projected, low, flat_weights, in_B, out_A)
        )
        for expert, tokens, slots in GroupedMixture.chunks(experts, len(in_B)):
            chunk_low = low[tokens, expert]
            corrected = projected.index_select(0, tokens).addmm_(chunk_low, in_B[expert].t(), alpha=ctx.scaling)
            with torch.enable_grad():
                inputs = [t.detach().requires_grad_() for t in (corrected, flat_weights[slots], out_A[expert])]
                outputs = GroupedMixture.mix(ctx.gated, *inputs)
            grad_corrected, grad_weights[slots], grad_A = torch.autograd.grad(
                outputs, inputs, (grad_activated[tokens], grad_low_out[tokens, expert])
            )
            grad_projected.index_add_(0, tokens, grad_corrected)
            grad_low[tokens, expert] = ctx.scaling * (grad_corrected @ in_B[expert])
            grad_in_B[expert].addmm_(grad_corrected.t(), chunk_low, alpha=ctx.scaling)
            grad_out_A[expert] += grad_A
        return None, None, grad_projected, grad_low, grad_weights.view_as(weights), None, grad_in_B, grad_out_A


class ModernAlbertExperts(nn.Module):
    """LoRA pairs of every expert, on the input projection and on the output projection.

    `in_A [E, r, H]`, `in_B [E, 2I, r]`, `out_A [E, r, I]`, `out_B [E, H, r]`; the A as PEFT starts them, the B at 0, so
    that a new mixture equals its shared layer.
    """

    def __init__(self, config: ModernAlbertConfig):
        super().__init__()
        hidden, width = config.hidden_size, config.mol_intermediate_size
        experts, rank = config.num_experts, config.expert_rank
        self.scaling = config.expert_alpha / rank
        self.in_A = nn.Parameter(torch.empty(experts, rank, hidden))
        self.in_B = nn.Parameter(torch.empty(experts, 2 * width, rank))
        self.out_A = nn.Parameter(torch.empty(experts, rank, width))
        self.out_B = nn.Parameter(torch.empty(experts, hidden, rank))

    def forward(
        self,
        states: torch.Tensor,
        projected: torch.Tensor,
        weights: torch.Tensor,
        chosen: torch.Tensor,
        gated: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mixture of the corrected activations, and the correction of the output.

        Args:
            states: Input of the layer, `[tokens, H]`.
            projected: Its shared projection, `[tokens, 2I]`.
            weights: Router weights, `[tokens, k]`.
            chosen: Chosen experts, int64 `[tokens, k]`.
            gated: Activation, `[tokens, 2I]` to `[tokens, I]`.

        Returns:
            `sum_e p_e a_e`, `[tokens, I]`, and `s sum_e B2_e A2_e p_e a_e`, `[tokens, H]`.
        """
        dtype = projected.dtype  # of lower precision than the parameters under autocast
        low = F.linear(states, self.in_A.flatten(0, 1)).to(dtype)
        low = low.unflatten(-1, self.in_A.shape[:2])  # [tokens, E, r]
        grouped = len(self.in_A) > 1 and states.device.type == "cpu" and not is_tracing(states)
        mix = GroupedMixture.apply if grouped else mix_dense
        activated, low_out = mix(
            *(gated, self.scaling, projected, low, weights.to(dtype), chosen),
            *(self.in_B.to(dtype), self.out_A.to(dtype)),
        )
        out_B = self.out_B.transpose(1, 2).flatten(0, 1).to(dtype)  # [E * r, H]
        return activated, self.scaling * (low_out.flatten(1) @ out_B)


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
        super().__init__(config, config.mol_intermediate_size)
        self.experts = ModernAlbertExperts(config)
        self.router = ModernAlbertRouter(config) if config.num_experts > 1 else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        states = hidden_states.flatten(0, -2)  # [tokens, hidden]
        projected = self.Wi(states)  # [tokens, 2 * intermediate]
        if self.router is None:
            weights = states.new_ones(len(states), 1)
            chosen = torch.zeros_like(weights, dtype=torch.long)
        else:
            _, weights, chosen = self.router(states)
        activated, correction = self.experts(states, projected, weights, chosen, self.gated)
        if self.router is not None and not self.router.norm_topk_prob:
            rest = 1 - weights.sum(dim=-1, keepdim=True)
            activated = activated + rest.to(projected.dtype) * self.gated(projected)
        output = self.Wo(activated) + correction
        return self.drop(output.view_as(hidden_states))


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...],
    num_groups: int,
    num_experts_per_tok: int,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Load-balancing loss of Switch Transformer (section 2.2), `E * sum_e f_e P_e`, averaged over the MoL groups.

    `f_e` is the share of all choices that fell on expert e, `P_e` its mean router probability; both run over real
    tokens and over all depths of a group. So it is 1 where the load is even, whatever k is, and asks for balance over
    the depths of a group together, as MoEUT does: an expert may serve one depth more than another. The paper does not
    state its formula.

    Args:
        router_logits: For every executed MoL layer, `[batch, seq, num_experts]`.
        num_groups: MoL groups; each has executed `len(router_logits) / num_groups` layers in a row.
        num_experts_per_tok: Experts that a token chooses.
        attention_mask: 0 at padding, `[batch, seq]`.

    Returns:
        Scalar, float32 at least.
    """
    device = router_logits[0].device
    logits = torch.stack([layer.to(device) for layer in router_logits])  # [layers, batch, seq, experts]
    logits = logits.unflatten(0, (num_groups, -1))  # [groups, depth, batch, seq, experts]
    probabilities = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    num_experts = logits.shape[-1]
    chosen = F.one_hot(probabilities.topk(num_experts_per_tok, dim=-1).indices, num_experts).sum(dim=-2)
    real = torch.ones_like(probabilities[..., :1])
    if attention_mask is not None:
        real = real * attention_mask.to(device, real.dtype)[..., None]
    count = real.sum(dim=(1, 2, 3)).clamp(min=1)  # [groups, 1]
    load = (chosen * real).sum(dim=(1, 2, 3)) / (num_experts_per_tok * count)
    probability = (probabilities * real).sum(dim=(1, 2, 3)) / count
    return (num_experts * (load * probability).sum(dim=-1)).mean()
