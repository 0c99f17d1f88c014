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
"""Expert merging: the experts of a MoL group become one adapter, part of the shared projections, or fewer experts.

Factors are those of `ModernAlbertExperts`: `A [E, r, in]` and `B [E, out, r]` of one projection, whose expert e adds
`s B_e A_e` to the shared weight, s = alpha / r. A merged pair has shapes `[rank, in]` and `[out, rank]`, and the same s.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_modernalbert import ModernAlbertConfig
from .mixture_modernalbert import ModernAlbertDepthMLP, ModernAlbertMLP, ModernAlbertMoL


def average(A: torch.Tensor, B: torch.Tensor, weights: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of the factors, `A = sum_e w_e A_e` and `B = sum_e w_e B_e`: the paper's merging, as far as it is known.

    The product of two means is not the mean of the products: corrections that differ cancel twice.
    """
    return torch.einsum("e,eri->ri", weights, A), torch.einsum("e,eor->or", weights, B)


def svd(A: torch.Tensor, B: torch.Tensor, weights: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of the products, `sum_e w_e B_e A_e`, at the rank given: the closest such matrix in Frobenius norm."""
    A, B = cat(A, B, weights, rank)
    # The SVD of a thin product, without making the product: B = Q R, A^T = P S, B A = Q (R S^T) P^T.
    (Q, R), (P, S) = torch.linalg.qr(B), torch.linalg.qr(A.mT)
    U, values, Vh = torch.linalg.svd(R @ S.mT)
    root = values[:rank].sqrt()
    return root[:, None] * (Vh[:rank] @ P.mT), (Q @ U[:, :rank]) * root


def cat(A: torch.Tensor, B: torch.Tensor, weights: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of the products, exactly, at rank E r: the factors side by side, the weights in B."""
    return A.flatten(0, 1), (weights[:, None, None] * B).transpose(0, 1).flatten(1)


def drop(A: torch.Tensor, B: torch.Tensor, weights: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """No correction at all: the shared layer alone. The control that every method has to beat."""
    return torch.zeros_like(A[0]), torch.zeros_like(B[0])


class MergingMethod(NamedTuple):
    """A way to merge.

    Attributes:
        combine: What it makes of a group's `A [E, r, in]`, `B [E, out, r]`, weights `[E]` and rank; None for a method
            that looks at a whole layer.
        source: Where the weights of the experts come from: `"even"`, `"given"` by the caller, `"given or even"`, or
            `"text"`, the routing of calibration text.
    """

    combine: Callable | None
    source: str


METHODS = {
    "uniform": MergingMethod(average, "even"),
    "ema": MergingMethod(average, "given"),
    "svd": MergingMethod(svd, "given or even"),
    "cat": MergingMethod(cat, "given or even"),
    "frequency": MergingMethod(svd, "text"),
    "regression": MergingMethod(None, "text"),
    "cluster": MergingMethod(None, "text"),
    "drop": MergingMethod(drop, "even"),
}


def routing_weights(mixture: ModernAlbertMoL, states: torch.Tensor) -> torch.Tensor:
    """Weight that the router gives to each expert for each token, 0 where it is not chosen.

    Args:
        mixture: MoL layer, in evaluation mode.
        states: Its inputs, `[tokens, H]`.

    Returns:
        `[tokens, E]`.
    """
    logits, weights, chosen = mixture.router(states)
    return torch.zeros_like(logits).scatter(1, chosen, weights.to(logits.dtype))


def mean_routing(mixture: ModernAlbertMoL, states: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of [`routing_weights`], `[E]`."""
    return torch.cat([routing_weights(mixture, part) for part in states.split(2048)]).mean(dim=0).to(states)


def reduced_rank(
    gram: torch.Tensor, cross: torch.Tensor, prior: torch.Tensor, rank: int, ridge: float = 1e-3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reduced-rank regression: the pair that minimises `sum_t |y_t - B A x_t|^2`, in closed form.

    The least-squares solution, projected on the leading directions of what it predicts (Izenman, 1975).

    Args:
        gram: `sum_t x_t x_t^T`, `[in, in]`.
        cross: `sum_t x_t y_t^T`, `[in, out]`.
        prior: Solution in directions that the text hardly shows, `[in, out]`.
        rank: At most `min(in, out)` of it is used.
        ridge: Pull towards the prior, in parts of the mean of the diagonal of `gram`.

    Returns:
        `A [rank, in]` and `B [out, rank]`.
    """
    damped = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor = torch.linalg.cholesky(damped)
    solution = prior + torch.cholesky_solve(cross - gram @ prior, factor)  # [in, out]
    B = torch.linalg.svd(factor.mT @ solution, full_matrices=False).Vh[:rank].mT
    return (solution @ B).mT, B


def regression(
    mixture: ModernAlbertMoL, states: torch.Tensor, rank: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The adapter that best reproduces a routed layer on given inputs: two regressions in closed form, ours.

    First the input projection, `x = h`, `y = sum_e p_e(h) s B1_e A1_e h`: the mean correction of the chosen experts,
    which fixed weights miss as far as routing depends on h. Then the output projection, given the activations of the
    first: `x = geglu(W_i' h)`, `y = MoL(h) - W_o x`, which also makes up for what the first could not reproduce. Both
    start from the mean of the products with the router's mean weights, as `frequency`.

    Args:
        mixture: MoL layer, in evaluation mode.
        states: Inputs of all its runs on calibration text, `[tokens, H]`.
        rank: Of the adapter.

    Returns:
        `A` and `B` for `"in"` and `"out"`, with the scale of the experts divided out.
    """
    experts = mixture.experts
    chunks = states.split(2048)
    usage = mean_routing(mixture, states)

    def fit(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], A, B) -> tuple[torch.Tensor, torch.Tensor]:
        gram = cross = 0
        for x, y in pairs:
            gram, cross = gram + (x.mT @ x).double(), cross + (x.mT @ y).double()
        prior = experts.scaling * torch.einsum("e,eri,eor->io", usage, A, B)
        return tuple(factor.to(states) for factor in reduced_rank(gram, cross, prior.double(), rank))

    def input_corrections():
        for h in chunks:
            low_rank = torch.einsum("th,erh->ter", h, experts.in_A) * routing_weights(mixture, h).to(h)[..., None]
            yield h, experts.scaling * torch.einsum("ter,eor->to", low_rank, experts.in_B)

    in_A, in_B = fit(input_corrections(), experts.in_A, experts.in_B)

    def output_corrections():
        for h in chunks:
            activated = mixture.glu(mixture.Wi(h) + F.linear(F.linear(h, in_A), in_B))
            yield activated, mixture(h) - mixture.Wo(activated)

    out_A, out_B = fit(output_corrections(), experts.out_A, experts.out_B)
    return {"in": (in_A, in_B / experts.scaling), "out": (out_A, out_B / experts.scaling)}


def similarity(mixture: ModernAlbertMoL, states: torch.Tensor) -> torch.Tensor:
    """Cosine between the corrections that the experts make to a layer's output, over all given tokens.

    Args:
        mixture: MoL layer.
        states: Its inputs, `[tokens, H]`.

    Returns:
        `[E, E]`, 1 on the diagonal; 0 where an expert corrects nothing.
    """
    experts = mixture.experts
    products = 0
    for h in states.split(512):
        projected = mixture.Wi(h)
        shared = mixture.Wo(mixture.glu(projected))
        corrections = []
        for in_A, in_B, out_A, out_B in zip(*experts.parameters(), strict=True):
            activated = mixture.glu(projected + experts.scaling * F.linear(F.linear(h, in_A), in_B))
            output = mixture.Wo(activated) + experts.scaling * F.linear(F.linear(activated, out_A), out_B)
            corrections.append((output - shared).flatten())
        stacked = torch.stack(corrections).double()  # [E, tokens * H]
        products = products + stacked @ stacked.mT
    norms = products.diagonal().sqrt()
    return products / (norms[:, None] * norms).clamp(min=torch.finfo(products.dtype).tiny)


def cluster(mixture: ModernAlbertMoL, states: torch.Tensor, num_experts: int) -> list[list[int]]:
    """Experts that make similar corrections, in `num_experts` groups: average linkage, from the most similar pair on."""
    cosines = similarity(mixture, states)
    groups = [[expert] for expert in range(len(cosines))]
    while len(groups) > num_experts:
        pairs = [(i, j) for i in range(len(groups)) for j in range(i)]
        i, j = max(pairs, key=lambda pair: cosines[groups[pair[0]]][:, groups[pair[1]]].mean())
        groups[j] += groups.pop(i)
    return groups


def merge_router(mixture: ModernAlbertMoL, states: torch.Tensor, groups: list[list[int]]) -> torch.Tensor:
    """Router rows of merged experts, `[groups, H]`: the linear map closest to the log of the groups' probabilities.

    A group's probability is the sum of its experts', whose logit is `logsumexp` of theirs. That is not linear in the
    token; this is its least-squares fit on the calibration text, after the part that all logits share is taken out.
    """
    gram = cross = 0
    for h in states.split(2048):
        logits = F.linear(h.to(mixture.router.weight.dtype), mixture.router.weight)
        targets = torch.stack([logits[:, group].logsumexp(dim=-1) for group in groups], dim=-1)
        targets = targets - targets.mean(dim=-1, keepdim=True)
        gram, cross = gram + (h.mT @ h).double(), cross + (h.mT.to(targets.dtype) @ targets).double()
    damped = gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(damped, cross).mT


def collect_states(
    model: nn.Module, mixtures: Sequence[ModernAlbertMoL], batches: Iterable[dict]
) -> list[list[torch.Tensor]]:
    """Inputs of MoL layers, `[tokens, H]` for each layer and depth, on batches of the encoder's inputs."""
    collected = [[[] for _ in range(model.config.layers_per_group)] for _ in mixtures]

    def keep(index):
        def hook(module, inputs):
            states, depth, *_ = inputs
            collected[index][depth].append(states.flatten(0, -2))

        return hook

    handles = [mixture.register_forward_pre_hook(keep(index)) for index, mixture in enumerate(mixtures)]
    modes = {module: module.training for module in model.modules()}
    unpad_inputs, model.config.unpad_inputs = model.config.unpad_inputs, True  # layers are to see no padding
    model.eval()
    try:
        for batch in batches:
            model.base_model(**{name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"})
    finally:
        model.config.unpad_inputs = unpad_inputs
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if not collected[0][0]:
        raise ValueError("`batches` is empty: give the method some text")
    return [[torch.cat(states) for states in depths] for depths in collected]


def check_mergeable(config: ModernAlbertConfig, text: bool) -> None:
    """Refuses a model whose experts cannot be merged, or not by looking at text.

    Raises:
        ValueError: Its layers are not a Mixture of LoRAs, or its router does not route each token independently.
    """
    if config.ffn_modulation != "mol":
        raise ValueError(
            f"only a Mixture of LoRAs can be merged, and `ffn_modulation` is {config.ffn_modulation!r}: its layers have "
            "no experts that are corrections of one weight"
        )
    if text and config.has_router and config.router_type in ("sequence", "depth"):
        raise ValueError(
            "methods and measures that look at text route every token by itself, and `router_type` is "
            f"{config.router_type!r}; use 'uniform', 'svd', 'cat' or 'ema', and give no text"
        )


def check_arguments(
    config: ModernAlbertConfig,
    method: str,
    fold: bool,
    weights: Sequence[Sequence[float]] | None,
    batches: Iterable[dict] | None,
    rank: int | None,
    num_experts: int | None,
    per_depth: bool,
) -> None:
    """Refuses arguments that do not fit the model or each other.

    Raises:
        ValueError: There are no experts to merge, the method is unknown, or it lacks what it needs.
    """
    if method not in METHODS:
        raise ValueError(f"there is no merging method {method!r}; the methods are {', '.join(METHODS)}")
    check_mergeable(config, METHODS[method].source == "text")
    if config.num_experts == 0 or not config.mol_groups or (config.num_experts == 1 and not fold):
        raise ValueError(
            f"there is nothing to merge: `num_experts` is {config.num_experts} in {len(config.mol_groups)} MoL groups"
        )
    source = METHODS[method].source
    if source == "text" and batches is None:
        raise ValueError(f"method {method!r} looks at how text is routed: give it some as `batches`")
    if source == "given" and weights is None:
        raise ValueError(f"method {method!r} needs `weights`, one for each expert of each MoL group")
    if weights is not None:
        shape = [len(row) for row in weights]
        if shape != [config.num_experts] * len(config.mol_groups):
            raise ValueError(
                f"`weights` must have {len(config.mol_groups)} rows, one for each MoL group, of {config.num_experts} "
                f"values; got rows of {shape}"
            )
        for row in weights:
            if not all(math.isfinite(weight) and weight >= 0 for weight in row) or sum(row) == 0:
                raise ValueError(f"`weights` must be finite and at least 0, and not all 0 in a group; got {list(row)}")
    if per_depth and (source != "text" or method == "cluster" or not fold or config.num_experts == 1):
        raise ValueError(
            "`per_depth` folds what the router does at each depth: it goes with the methods 'frequency' and "
            f"'regression', `fold` and a router; got method {method!r}, `fold` {fold} and {config.num_experts} experts"
        )
    if rank is not None and rank < 1:
        raise ValueError(f"`rank` must be at least 1, got {rank}")
    joined = config.num_experts * config.expert_rank
    if method == "cat" and not fold and joined > config.largest_rank:
        raise ValueError(
            f"method 'cat' joins {config.num_experts} experts of rank {config.expert_rank} to a rank of {joined}, more "
            f"than the {config.largest_rank} of the layer: fold the adapter, or use 'svd' with a `rank`"
        )
    if method == "cluster":
        if num_experts is None or not 2 <= num_experts < config.num_experts:
            raise ValueError(
                f"method 'cluster' needs `num_experts` from 2 to {config.num_experts - 1}, got {num_experts}; to one "
                "expert all other methods merge"
            )
    elif num_experts is not None:
        raise ValueError(f"`num_experts` is for method 'cluster'; {method!r} merges to one adapter")


@torch.no_grad()
def merge_experts(
    model: nn.Module,
    method: str,
    fold: bool,
    weights: Sequence[Sequence[float]] | None,
    batches: Iterable[dict] | None,
    rank: int | None,
    num_experts: int | None,
    per_depth: bool,
) -> None:
    """Merges the experts of every MoL layer of a model in place; see `ModernAlbertPreTrainedModel.merge_experts`."""
    config = model.config
    check_arguments(config, method, fold, weights, batches, rank, num_experts, per_depth)
    blocks = [block for block in model.modules() if isinstance(getattr(block, "mlp", None), ModernAlbertMoL)]
    if config.num_experts == 1 and method != "drop":  # a merged adapter, to be folded
        method, batches = "uniform", None
    states = [None] * len(blocks)
    if METHODS[method].source == "text":
        states = collect_states(model, [block.mlp for block in blocks], batches)
    # The full rank of both projections, used where a lower rank saves nothing.
    full = min(config.hidden_size, config.mol_intermediate_size)
    if rank is None:
        rank = full if fold and METHODS[method].source == "text" else config.expert_rank
    rank = min(rank, full)
    for index, block in enumerate(blocks):
        upcast = torch.promote_types(block.mlp.Wi.weight.dtype, torch.float32)
        mixture = copy.deepcopy(block.mlp).eval().to(upcast)
        given = None if weights is None else torch.tensor(weights[index], dtype=upcast)
        if per_depth:
            adapters = [merge_layer(mixture, method, part.to(upcast), given, rank) for part in states[index]]
            block.mlp = fold_by_depth(config, block.mlp, adapters)
            continue
        own = None if states[index] is None else torch.cat(states[index]).to(upcast)
        if method == "cluster":
            reduce_experts(block.mlp, mixture, own, num_experts)
        else:
            adapter = merge_layer(mixture, method, own, given, rank)
            if fold:
                block.mlp = fold_adapter(config, block.mlp, adapter)
            else:
                keep_adapter(block.mlp, adapter)
    if method == "cluster":
        config.num_experts = num_experts
        config.num_experts_per_tok = min(config.num_experts_per_tok, num_experts)
    elif fold:
        config.num_experts = 0
        if per_depth:
            config.ffn_modulation = "per_depth"
    else:
        config.num_experts = 1
        config.expert_rank, before = blocks[0].mlp.experts.in_A.shape[1], config.expert_rank
        config.expert_alpha = config.expert_alpha * config.expert_rank / before


def merge_layer(
    mixture: ModernAlbertMoL, method: str, states: torch.Tensor | None, weights: torch.Tensor | None, rank: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """One pair `A [rank, in]`, `B [out, rank]` for the projections `"in"` and `"out"` of a layer."""
    if method == "regression":
        return regression(mixture, states, rank)
    experts = mixture.experts
    if method == "frequency":
        weights = mean_routing(mixture, states)
    if weights is None:
        weights = experts.in_A.new_ones(len(experts.in_A))
    weights = (weights / weights.sum()).to(experts.in_A)
    combine = METHODS[method].combine
    return {
        "in": combine(experts.in_A, experts.in_B, weights, rank),
        "out": combine(experts.out_A, experts.out_B, weights, rank),
    }


def fold_adapter(config: ModernAlbertConfig, mixture: ModernAlbertMoL, adapter: dict) -> ModernAlbertMLP:
    """A plain feed-forward layer with the adapter added to its projections."""
    for linear, (A, B) in ((mixture.Wi, adapter["in"]), (mixture.Wo, adapter["out"])):
        linear.weight.copy_(linear.weight.to(A.dtype) + mixture.experts.scaling * (B @ A))
    with torch.device("meta"):  # its own weights are not needed
        folded = ModernAlbertMLP(config)
    for name, module in folded.named_children():
        setattr(folded, name, getattr(mixture, name, module))
    return folded.train(mixture.training)


def fold_by_depth(
    config: ModernAlbertConfig, mixture: ModernAlbertMoL, adapters: Sequence[dict]
) -> ModernAlbertDepthMLP:
    """A plain feed-forward layer for each depth, with its adapter added to its projections."""
    with torch.device("meta"):
        folded = ModernAlbertDepthMLP(config)
    folded.depths = nn.ModuleList([fold_adapter(config, copy.deepcopy(mixture), adapter) for adapter in adapters])
    return folded.train(mixture.training)


def keep_adapter(mixture: ModernAlbertMoL, adapter: dict) -> None:
    """Replaces the experts by one, and removes the router."""
    set_experts(mixture, {side: (A[None], B[None]) for side, (A, B) in adapter.items()})
    mixture.router = None


def set_experts(mixture: ModernAlbertMoL, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Sets the factors `A [E, r, in]` and `B [E, out, r]` of a layer, in the dtype of the old ones."""
    for side, (A, B) in factors.items():
        for name, factor in ((f"{side}_A", A), (f"{side}_B", B)):
            old = getattr(mixture.experts, name)
            setattr(mixture.experts, name, nn.Parameter(factor.to(old).contiguous(), old.requires_grad))


def reduce_experts(mixture: ModernAlbertMoL, upcast: ModernAlbertMoL, states: torch.Tensor, num_experts: int) -> None:
    """Merges similar experts of a layer, each cluster by `svd` with the weights that the router gave its members.

    Args:
        mixture: The layer to change.
        upcast: The same layer in float32 at least.
        states: Its inputs on calibration text, `[tokens, H]`.
        num_experts: Experts that are left.
    """
    experts = upcast.experts
    usage = mean_routing(upcast, states)
    groups = cluster(upcast, states, num_experts)
    factors = {}
    for side in ("in", "out"):
        A, B = getattr(experts, f"{side}_A"), getattr(experts, f"{side}_B")
        # Members that the text never used get equal weights.
        shares = [usage[group] + torch.finfo(usage.dtype).tiny for group in groups]
        pairs = [
            svd(A[group], B[group], share / share.sum(), A.shape[1])
            for group, share in zip(groups, shares, strict=True)
        ]
        factors[side] = tuple(torch.stack(parts) for parts in zip(*pairs, strict=True))
    router = mixture.router
    rows = merge_router(upcast, states, groups)
    router.weight = nn.Parameter(rows.to(router.weight), router.weight.requires_grad)
    router.num_experts_per_tok = min(router.num_experts_per_tok, num_experts)
    set_experts(mixture, factors)


__all__ = ["METHODS", "check_mergeable", "merge_experts"]
