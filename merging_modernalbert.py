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
"""Expert merging: the experts of a MoL group become one adapter, or part of the shared projections."""

from collections.abc import Callable

import torch
from torch import nn


def uniform(factors: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of the factors, `A = 1/E sum_e A_e` and `B = 1/E sum_e B_e` (the paper's uniform merging).

    Args:
        factors: `A [E, r, in]` and `B [E, out, r]` of one projection.

    Returns:
        `A [r, in]` and `B [out, r]`.
    """
    A, B = factors
    return A.mean(dim=0), B.mean(dim=0)


METHODS: dict[str, Callable] = {"uniform": uniform}


@torch.no_grad()
def merge_experts(model: nn.Module, plain_layer: type, mixture_layer: type, method: str, fold: bool) -> None:
    """Merges the experts of every MoL layer of a model in place, in float32 at least.

    Args:
        model: A ModernALBERT, with any head.
        plain_layer: Class of the feed-forward layer that a folded layer becomes.
        mixture_layer: Class of the layers that hold experts.
        method: A name from [`METHODS`].
        fold: Whether the adapter is added into the shared projections.

    Raises:
        ValueError: There are no experts to merge, or the method is unknown.
    """
    config = model.config
    if method not in METHODS:
        raise ValueError(f"there is no merging method {method!r}; the methods are {', '.join(METHODS)}")
    if config.num_experts == 0 or not config.mol_groups or (config.num_experts == 1 and not fold):
        raise ValueError(
            f"there is nothing to merge: `num_experts` is {config.num_experts} in {len(config.mol_groups)} MoL groups"
        )
    blocks = [block for block in model.modules() if isinstance(getattr(block, "mlp", None), mixture_layer)]
    for block in blocks:
        mixture = block.mlp
        experts = mixture.experts
        merged = {}
        for side in ("in", "out"):
            factors = (getattr(experts, f"{side}_A"), getattr(experts, f"{side}_B"))
            wide = torch.promote_types(factors[0].dtype, torch.float32)
            merged[side] = METHODS[method](tuple(factor.to(wide) for factor in factors))
        if fold:
            for side, linear in (("in", mixture.Wi), ("out", mixture.Wo)):
                A, B = merged[side]
                linear.weight.copy_(linear.weight.to(A.dtype) + experts.scaling * (B @ A))
            folded = plain_layer.__new__(plain_layer)
            nn.Module.__init__(folded)
            for name in ("Wi", "act", "Wo", "drop"):
                setattr(folded, name, getattr(mixture, name))
            folded.train(mixture.training)
            block.mlp = folded
        else:
            for side, (A, B) in merged.items():
                for name, factor in ((f"{side}_A", A), (f"{side}_B", B)):
                    old = getattr(experts, name)
                    setattr(experts, name, nn.Parameter(factor[None].to(old.dtype), old.requires_grad))
            mixture.router = None
    config.num_experts = 0 if fold else 1


__all__ = ["METHODS", "merge_experts", "uniform"]
