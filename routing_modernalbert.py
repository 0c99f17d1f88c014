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
"""Routers, which choose experts for tokens and weigh them, and the loss that balances their choices.

Shapes in comments: `tokens` are those of the whole batch; `E` experts, `k` slots of a token.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_modernalbert import ModernAlbertConfig


class ModernAlbertRouter(nn.Module):
    """`router_type="top_k"`: every token takes its `num_experts_per_tok` most probable experts.

    Linear without bias, softmax in float32, top-k. In training its input, and nothing else, is multiplied by uniform
    noise in `1 ± router_jitter_noise` (Switch Transformer). The other routers change what the logits are, or which
    experts are taken.
    """

    def __init__(self, config: ModernAlbertConfig):
        super().__init__()
        self.num_experts_per_tok = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.jitter_noise = config.router_jitter_noise
        # The dtype is explicit, so that the weight stays in float32 when a model is loaded in half precision.
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size, dtype=torch.float32))

    def forward(
        self, hidden_states: torch.Tensor, depth: int = 0, sequence_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weights of the experts of every token.

        Args:
            hidden_states: `[tokens, hidden]`.
            depth: Which run of its group this is, from 0.
            sequence_ids: Number of each token's sequence, for a router that needs it, int64 `[tokens]`.

        Returns:
            Logits `[tokens, E]`; weights and experts `[tokens, k]`. A weight of 0 means that the slot is empty.
        """
        hidden_states = hidden_states.to(self.weight.dtype)
        if self.training and self.jitter_noise > 0:
            noise = torch.empty_like(hidden_states).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
            hidden_states = hidden_states * noise
        # Autocast would take the logits to half precision and flip close choices.
        with torch.autocast(hidden_states.device.type, enabled=False):
            logits = F.linear(hidden_states, self.weight)
        logits = self.adjust(logits, depth, sequence_ids)
        probabilities = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        weights, experts = self.choose(probabilities)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return logits, weights, experts

    def adjust(self, logits: torch.Tensor, depth: int, sequence_ids: torch.Tensor | None) -> torch.Tensor:
        """Logits that decide, `[tokens, E]`, from those of the tokens."""
        return logits

    def choose(self, probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities of the chosen experts and the experts, `[tokens, k]`, from `[tokens, E]`."""
        return probabilities.topk(self.num_experts_per_tok, dim=-1)


class ModernAlbertSoftRouter(ModernAlbertRouter):
    """`router_type="soft"`: every token takes all experts, each with its probability; `num_experts_per_tok` is unused."""

    def choose(self, probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        experts = torch.arange(probabilities.shape[-1], device=probabilities.device)
        return probabilities, experts.expand_as(probabilities)


def most_probable(probabilities: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The most probable experts whose probabilities sum to at least `top_p`.

    Args:
        probabilities: `[..., E]`.
        top_p: Sum to reach.

    Returns:
        Probabilities in falling order, 0 for experts that are not needed, and the experts, each `[..., E]`.
    """
    weights, experts = probabilities.sort(dim=-1, descending=True)
    before = weights.cumsum(dim=-1) - weights  # of the experts ahead
    return weights.masked_fill(before >= top_p, 0), experts


class ModernAlbertTopPRouter(ModernAlbertRouter):
    """`router_type="top_p"`: as many experts as a token needs until their probabilities reach `router_top_p`.

    Huang et al., "Harder Tasks Need More Experts" (2024), without their second loss, which makes probabilities uneven
    so that few experts suffice. The division by the sum (`norm_topk_prob`) is our choice. Slots are as many as experts;
    those that are empty cost nothing in `GroupedMixture`, and a turn each in the static form.
    """

    def __init__(self, config: ModernAlbertConfig):
        super().__init__(config)
        self.top_p = config.router_top_p

    def choose(self, probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return most_probable(probabilities, self.top_p)


class ModernAlbertSequenceRouter(ModernAlbertRouter):
    """`router_type="sequence"`: all tokens of a sequence take the same experts, chosen from the mean of its states.

    MiLoRA (2024) routes once for a prompt; the mean is our choice. Sequences are told apart in packed rows as in padded
    ones, and padding has no part in the mean, in which the noise of the tokens all but cancels.
    """

    def adjust(self, logits: torch.Tensor, depth: int, sequence_ids: torch.Tensor | None) -> torch.Tensor:
        # The logits of a mean are the mean of the logits. Numbers run up to that of padding, `tokens`.
        counted = F.pad(logits, (0, 1), value=1.0)  # [tokens, E + 1]
        sums = counted.new_zeros(len(counted) + 1, counted.shape[1]).index_add(0, sequence_ids, counted)
        return (sums[:, :-1] / sums[:, -1:].clamp(min=1))[sequence_ids]


class ModernAlbertDepthRouter(ModernAlbertRouter):
    """`router_type="depth"`: top-k with a learned bias for every depth, `[layers_per_group, E]`, at first 0.

    So the same state may take other experts at another depth. Our choice.
    """

    def __init__(self, config: ModernAlbertConfig):
        super().__init__(config)
        self.depth_bias = nn.Parameter(torch.empty(config.layers_per_group, config.num_experts, dtype=torch.float32))

    def adjust(self, logits: torch.Tensor, depth: int, sequence_ids: torch.Tensor | None) -> torch.Tensor:
        return logits + self.depth_bias[depth]


ROUTERS = {
    "top_k": ModernAlbertRouter,
    "soft": ModernAlbertSoftRouter,
    "top_p": ModernAlbertTopPRouter,
    "sequence": ModernAlbertSequenceRouter,
    "depth": ModernAlbertDepthRouter,
}


def shares_of_choices(probabilities: torch.Tensor, config: ModernAlbertConfig) -> torch.Tensor:
    """Share of a token's choices that falls on each expert, which sums to one.

    Even over the experts that the token takes; with `"soft"`, where it takes all, their probabilities.

    Args:
        probabilities: Of the router, `[..., E]`.
        config: `router_type`, `num_experts_per_tok` and `router_top_p` are read.

    Returns:
        `[..., E]`.
    """
    if config.router_type == "soft":
        return probabilities
    if config.router_type == "top_p":
        weights, experts = most_probable(probabilities, config.router_top_p)
        chosen = torch.zeros_like(probabilities).scatter(-1, experts, (weights > 0).to(probabilities.dtype))
        return chosen / chosen.sum(dim=-1, keepdim=True)
    experts = probabilities.topk(config.num_experts_per_tok, dim=-1).indices
    chosen = F.one_hot(experts, probabilities.shape[-1]).sum(dim=-2)
    return chosen.to(probabilities.dtype) / config.num_experts_per_tok


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...],
    config: ModernAlbertConfig,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Load-balancing loss of Switch Transformer (section 2.2), `E * sum_e f_e P_e`, averaged over the MoL groups.

    `f_e` is the share of all choices that fell on expert e, `P_e` its mean router probability; both run over real
    tokens and over all depths of a group. So it is 1 for an even load, whatever k is, and balances the load over all
    depths of a group, as MoEUT does: an expert may serve one depth more than another. The paper does not state its
    formula.

    What a choice is depends on the router: with `"top_k"` and `"depth"` each of the k experts counts 1 / k, with
    `"top_p"` each of the n that the token takes 1 / n. With `"soft"` all are taken and f = P, so that the loss is
    `E * sum_e P_e^2`. With `"sequence"` a sequence counts as often as it has tokens, since load is work. Our choices.

    Args:
        router_logits: For every executed MoL layer, `[batch, seq, num_experts]`.
        config: Of the model; each of its `mol_groups` has executed equally many of the layers, in a row.
        attention_mask: 0 at padding, `[batch, seq]`.

    Returns:
        Scalar, float32 at least.
    """
    device = router_logits[0].device
    logits = torch.stack([layer.to(device) for layer in router_logits])  # [layers, batch, seq, experts]
    logits = logits.unflatten(0, (len(config.mol_groups), -1))  # [groups, depth, batch, seq, experts]
    probabilities = logits.softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    real = torch.ones_like(probabilities[..., :1])
    if attention_mask is not None:
        real = real * attention_mask.to(device, real.dtype)[..., None]
    count = real.sum(dim=(1, 2, 3)).clamp(min=1)  # [groups, 1]
    load = (shares_of_choices(probabilities, config) * real).sum(dim=(1, 2, 3)) / count
    probability = (probabilities * real).sum(dim=(1, 2, 3)) / count
    return (logits.shape[-1] * (load * probability).sum(dim=-1)).mean()
