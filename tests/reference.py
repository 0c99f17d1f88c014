"""Slow forms that are right at a glance, which tests and benchmarks compare the model with."""

import torch
import torch.nn.functional as F


def naive_mol(mol, hidden_states):
    """MoL as its definition reads: a whole corrected feed-forward layer for every chosen expert of every token.

    Takes a `ModernAlbertMoL` and `[..., hidden]`; the router's choice is the layer's own.
    """
    states = hidden_states.flatten(0, -2)
    experts, scaling = mol.experts, mol.experts.scaling
    _, weights, chosen = mol.router(states)
    weights = weights.to(states.dtype)
    output = torch.zeros_like(states)
    for slot in range(chosen.shape[1]):
        for expert in range(len(experts.in_A)):
            tokens = (chosen[:, slot] == expert).nonzero().flatten()
            inputs = states[tokens]
            projected = mol.Wi(inputs) + scaling * F.linear(
                F.linear(inputs, experts.in_A[expert]), experts.in_B[expert]
            )
            activated = mol.glu(projected)
            result = mol.Wo(activated) + scaling * F.linear(
                F.linear(activated, experts.out_A[expert]), experts.out_B[expert]
            )
            output = output.index_add(0, tokens, weights[tokens, slot, None] * result)
    if not mol.router.norm_topk_prob:
        output = output + (1 - weights.sum(dim=-1, keepdim=True)) * mol.Wo(mol.glu(mol.Wi(states)))
    return output.view_as(hidden_states)


def naive_load_balancing_loss(router_logits, num_experts_per_tok, real=None):
    """Load-balancing loss token by token.

    Takes a list of groups, each a list of the logits `[batch, seq, experts]` of its depths, and the real tokens as a
    bool `[batch, seq]`.
    """
    losses = []
    for depths in router_logits:
        num_experts = depths[0].shape[-1]
        load, probability = torch.zeros(num_experts).to(depths[0]), torch.zeros(num_experts).to(depths[0])
        count = 0
        for logits in depths:
            for row in range(logits.shape[0]):
                for position in range(logits.shape[1]):
                    if real is not None and not real[row, position]:
                        continue
                    probabilities = logits[row, position].exp() / logits[row, position].exp().sum()
                    for expert in probabilities.argsort(descending=True)[:num_experts_per_tok]:
                        load[expert] += 1 / num_experts_per_tok
                    probability = probability + probabilities
                    count += 1
        losses.append(num_experts * (load / count * probability / count).sum())
    return sum(losses) / len(losses)
