"""Contrastive training of a routed encoder with sentence-transformers: their losses, and the router's balancing loss."""

from collections.abc import Callable, Iterable
from functools import partial, wraps

import torch
from sentence_transformers import SentenceTransformer
from torch import nn


class BalancedLoss(nn.Module):
    """A loss of sentence-transformers plus `router_aux_loss_coef` times the balancing loss of the encoder.

    The encoder runs once for each column of a batch, and with GradCache again for each mini-batch inside the backward
    pass, so the balancing loss is not part of a single graph. Its gradient is added in the backward pass of the hidden
    states of each call, weighted by the call's share of the batch's tokens.

    Args:
        model: Model whose encoder returns `aux_loss` with `output_router_logits=True`.
        loss: Loss of this model.
    """

    def __init__(self, model: SentenceTransformer, loss: nn.Module):
        super().__init__()
        self.loss = loss
        # Not registered as a submodule: its parameters are the model's. `forward` is wrapped, since sentence-transformers
        # calls it directly and hooks would not run.
        object.__setattr__(self, "encoder", model[0].auto_model)
        self.weight = self.encoder.config.router_aux_loss_coef
        self.encoder.forward = wraps(self.encoder.forward)(partial(self.run, self.encoder.forward))
        self.forget()

    def forget(self) -> None:
        """Resets the sums for a new batch."""
        self.tokens = self.total = 0.0
        self.scale = None
        self.inside = False

    def forward(self, sentence_features: Iterable[dict], labels: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """`contrastive_loss`, and `aux_loss` with its weight, which sentence-transformers adds up and logs."""
        sentence_features = list(sentence_features)
        self.forget()
        self.tokens = sum(features["attention_mask"].sum() for features in sentence_features)
        self.inside = True
        loss = self.loss(sentence_features, labels)
        self.inside = False
        if not torch.is_tensor(self.total):
            return {"contrastive_loss": loss}
        # The factor by which Trainer scales the loss (accumulation, fp16) is known only in the backward pass.
        return {"contrastive_loss": _Observed.apply(loss, self), "aux_loss": self.total}

    def run(self, forward: Callable, *args, **kwargs):
        """Runs the encoder; the backward pass of its hidden states adds the gradient of the balancing loss."""
        if not self.encoder.training:
            return forward(*args, **kwargs)
        outputs = forward(*args, **{**kwargs, "output_router_logits": True})
        share = kwargs["attention_mask"].sum() / self.tokens
        aux_loss = self.weight * share * outputs.aux_loss
        if self.inside:
            self.total = self.total + aux_loss.detach()
        if torch.is_grad_enabled():
            outputs.last_hidden_state = _Balanced.apply(outputs.last_hidden_state, aux_loss, self)
        return outputs

    def remove(self) -> None:
        """Restores the encoder's `forward`."""
        del self.encoder.forward


class _Observed(torch.autograd.Function):
    """Identity that stores the gradient of the loss in a [`BalancedLoss`]."""

    @staticmethod
    def forward(ctx, loss, owner):
        ctx.owner = owner
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, gradient):
        ctx.owner.scale = gradient
        return gradient, None


class _Balanced(torch.autograd.Function):
    """Identity of hidden states, whose backward pass gives the balancing loss its gradient."""

    @staticmethod
    def forward(ctx, states, aux_loss, owner):
        ctx.owner = owner
        return states.view_as(states)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, ctx.owner.scale, None
