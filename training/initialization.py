"""Initialises a ModernALBERT from a ModernBERT: layers, embedding and, optionally, experts.

ModernBERT's blocks are ModernALBERT's, with the same order of queries, keys, values and of gate and value. What
differs is how many blocks there are, how wide their feed-forward layers are, and the embedding. Every rule below
computes, as closely as its shapes allow, what the teacher computes; where they allow it exactly, it is exact.

Shapes in comments: `H` is the hidden size, `I` an intermediate size, `V` the vocabulary, `E` the embedding size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import ModernBertConfig, ModernBertForMaskedLM, ModernBertModel

from ..configuration_modernalbert import ModernAlbertConfig
from ..mixture_modernalbert import ModernAlbertDepthLoRA, ModernAlbertMLP, ModernAlbertMoL
from ..modeling_modernalbert import ModernAlbertEmbeddings, ModernAlbertForMaskedLM


LAYER_RULES = ("stepwise", "average", "lower")
EXPERT_RULES = ("zero", "svd")

# What a student has in common with any teacher; widths and depths are its preset's.
SHARED_FIELDS = (
    *("vocab_size", "pad_token_id", "bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id"),
    *("norm_eps", "hidden_activation", "classifier_activation", "initializer_range"),
    *("max_position_embeddings", "local_attention", "rope_parameters"),
)


class Sources(NamedTuple):
    """Teacher layers that a group starts from, several where their mean is taken.

    Attributes:
        layers: For attention, and for a feed-forward layer as wide as the teacher's.
        first: For the neurons of a wider feed-forward layer.
        second: For the neurons that such a layer has beyond the teacher's.
    """

    layers: list[int]
    first: list[int]
    second: list[int]


class EffectiveLayer(NamedTuple):
    """Matrices of a teacher layer, or their mean over several, with the weights of its norms folded in.

    Attributes:
        Wqkv: `[3H, H]`.
        attn_Wo: `[H, H]`.
        Wi: Gates and values, `[2, I, H]`.
        Wo: `[H, I]`.
    """

    Wqkv: torch.Tensor
    attn_Wo: torch.Tensor
    Wi: torch.Tensor
    Wo: torch.Tensor


def teacher_segments(num_teacher_layers: int, num_groups: int) -> list[range]:
    """For each group of the student, the run of teacher layers that it stands for.

    Raises:
        ValueError: There are more groups than teacher layers.
    """
    if num_groups > num_teacher_layers:
        raise ValueError(
            f"`num_hidden_groups` ({num_groups}) exceeds the {num_teacher_layers} layers of the teacher; lower it, or "
            "choose a deeper teacher"
        )
    ends = [round(group * num_teacher_layers / num_groups) for group in range(num_groups + 1)]
    return [range(start, end) for start, end in zip(ends[:-1], ends[1:], strict=True)]


def source_layers(num_teacher_layers: int, num_groups: int, layers: str) -> list[Sources]:
    """For each group of the student, the teacher layers that it starts from.

    Args:
        num_teacher_layers: Layers of the teacher.
        num_groups: Groups of the student, at most as many.
        layers: `"stepwise"`: layers at even steps, from the first to the last (a single group takes the middle one).
            `"lower"`: the first ones. Both widen a feed-forward layer by the next layer (the last one by the one
            before). `"average"`: the mean over the group's segment; a wider feed-forward layer takes the means over
            its first and its second half, which share the middle layer where the segment is odd.
    """
    segments = teacher_segments(num_teacher_layers, num_groups)
    if layers == "average":
        halves = [(list(s), list(s[: (len(s) + 1) // 2]), list(s[len(s) // 2 :])) for s in segments]
        return [Sources(*half) for half in halves]
    last = num_teacher_layers - 1
    if layers == "lower":
        picked = range(num_groups)
    else:
        picked = [group * last // (num_groups - 1) for group in range(num_groups)] if num_groups > 1 else [last // 2]
    return [Sources([layer], [layer], [layer + 1 if layer < last else max(layer - 1, 0)]) for layer in picked]


def check_fit(teacher_config: ModernBertConfig, config: ModernAlbertConfig, layers: str, experts: str) -> None:
    """Refuses a teacher and a student that cannot share weights.

    Raises:
        ValueError: They do not fit; the message lists every reason.
    """
    misfits = []
    if layers not in LAYER_RULES:
        misfits.append(f"there is no rule {layers!r} for the layers; the rules are {', '.join(LAYER_RULES)}")
    if experts not in EXPERT_RULES:
        misfits.append(f"there is no rule {experts!r} for the experts; the rules are {', '.join(EXPERT_RULES)}")
    if experts == "svd" and config.ffn_modulation not in ("mol", "depth_lora"):
        misfits.append(
            f"`svd` starts LoRAs, and `ffn_modulation` is {config.ffn_modulation!r}, which has none; use "
            '`experts="zero"`'
        )
    elif experts == "svd" and (not config.mol_groups or (config.ffn_modulation == "mol" and config.num_experts < 2)):
        misfits.append(
            f"there are no experts to start by `svd`: `num_experts` is {config.num_experts} in "
            f'{len(config.mol_groups)} MoL groups; use `experts="zero"`, or give the student 2 experts or more'
        )
    if teacher_config.model_type != "modernbert":
        misfits.append(f"the teacher is a {teacher_config.model_type}; only a modernbert has the student's blocks")
    else:
        misfits += shape_misfits(teacher_config, config)
    if misfits:
        raise ValueError("the student cannot start from this teacher:\n- " + "\n- ".join(misfits))


def shape_misfits(teacher_config: ModernBertConfig, config: ModernAlbertConfig) -> list[str]:
    """Reasons why the student cannot take the teacher's matrices, each with a remedy."""
    misfits = []
    for name in ("vocab_size", "hidden_size", "num_attention_heads"):
        if getattr(config, name) != getattr(teacher_config, name):
            misfits.append(
                f"`{name}` is {getattr(config, name)}, the teacher's is {getattr(teacher_config, name)}; set it to "
                "the teacher's, or choose another preset or teacher"
            )
    widths = {"mol_intermediate_size": len(config.mol_groups)}
    widths["intermediate_size"] = config.num_hidden_groups - len(config.mol_groups)
    for name, used in widths.items():
        if used and getattr(config, name) < teacher_config.intermediate_size:
            misfits.append(
                f"`{name}` ({getattr(config, name)}) is narrower than the teacher's feed-forward layers; set it to "
                f"{teacher_config.intermediate_size} or more"
            )
    for name in ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias"):
        if getattr(teacher_config, name):
            misfits.append(f"the teacher has `{name}`, which the student does not have; choose a teacher without")
    try:
        teacher_segments(teacher_config.num_hidden_layers, config.num_hidden_groups)
    except ValueError as error:
        misfits.append(str(error))
    return misfits


def student_config(
    teacher_config: ModernBertConfig, preset: str, layers: str = "stepwise", **overrides
) -> ModernAlbertConfig:
    """Configuration of a student that a teacher's weights fit.

    Vocabulary, tokens, activation, norm and positions are the teacher's. Every executed layer of a group has the
    attention type that most of its source layers have, full attention where they are even.

    Args:
        teacher_config: Configuration of the teacher.
        preset: Size of the student, see [`ModernAlbertConfig.preset`].
        layers: Which teacher layers a group starts from, see [`source_layers`].
        **overrides: Any field; they win over the teacher's and the preset's.

    Raises:
        ValueError: The two do not fit, see [`check_fit`].
    """
    shared = {name: getattr(teacher_config, name) for name in SHARED_FIELDS if hasattr(teacher_config, name)}
    config = ModernAlbertConfig.preset(preset, **{**shared, **overrides})
    check_fit(teacher_config, config, layers, "zero")
    layer_types = []
    for sources in source_layers(teacher_config.num_hidden_layers, config.num_hidden_groups, layers):
        full = sum(teacher_config.layer_types[layer] == "full_attention" for layer in sources.layers)
        layer_type = "full_attention" if 2 * full >= len(sources.layers) else "sliding_attention"
        layer_types += [layer_type] * config.layers_per_group
    return ModernAlbertConfig.preset(preset, **{**shared, "layer_types": layer_types, **overrides})


@torch.no_grad()
def initialize_from_teacher(
    teacher: ModernBertForMaskedLM, config: ModernAlbertConfig, layers: str = "stepwise", experts: str = "zero"
) -> tuple[ModernAlbertForMaskedLM, dict]:
    """Builds a student whose encoder and head start from a teacher's.

    Weights without a counterpart in the teacher are initialised as in a new model, from torch's global generator: the
    router, and neurons beyond twice the teacher's width (their output is 0).

    Args:
        teacher: With its masked-LM head; not modified.
        config: Of the student, e.g. from [`student_config`].
        layers: Which teacher layers a group starts from, see [`source_layers`].
        experts: `"zero"`: new experts, which correct nothing yet. `"svd"`: expert `e` is the best correction of its
            rank from the shared layer to the `e`-th teacher layer of the group's segment, counted round. With
            `ffn_modulation="depth_lora"`, the LoRA of depth `l` is that to the layer in the middle of the `l`-th of as
            many equal parts of the segment (as Relaxed Recursive Transformers start theirs).

    Returns:
        The student on the CPU, and what can be said of it as JSON: for each group its teacher layers and, with
        `"svd"`, the share of their energy that the experts caught; the energy and the error of the embedding; the
        error of the decoder.

    Raises:
        ValueError: The two do not fit, see [`check_fit`].
    """
    check_fit(teacher.config, config, layers, experts)
    student = ModernAlbertForMaskedLM(config)
    encoder = teacher.model
    report = {
        "layers": layers,
        "experts": experts,
        "embedding": factorize_embedding(encoder, student.model.embeddings),
        "groups": [],
    }
    num_layers = teacher.config.num_hidden_layers
    segments = teacher_segments(num_layers, config.num_hidden_groups)
    all_sources = source_layers(num_layers, config.num_hidden_groups, layers)
    for block, sources, segment in zip(student.model.layers, all_sources, segments, strict=True):
        layer = mean_layer(encoder, sources.layers)
        block.attn.Wqkv.weight.copy_(layer.Wqkv)
        block.attn.Wo.weight.copy_(layer.attn_Wo)
        group = {"segment": list(segment), "layers": sources.layers}
        if block.mlp.Wo.in_features == teacher.config.intermediate_size:
            Wi, Wo = widen(layer, layer, block.mlp)
        else:
            group.update(widened_from=[sources.first, sources.second])
            Wi, Wo = widen(mean_layer(encoder, sources.first), mean_layer(encoder, sources.second), block.mlp)
        block.mlp.Wi.weight.copy_(Wi)
        block.mlp.Wo.weight.copy_(Wo)
        if experts == "svd" and isinstance(block.mlp, (ModernAlbertMoL, ModernAlbertDepthLoRA)):
            fitted = segment[: config.num_experts]
            if isinstance(block.mlp, ModernAlbertDepthLoRA):
                depths = config.layers_per_group
                fitted = [segment[(2 * depth + 1) * len(segment) // (2 * depths)] for depth in range(depths)]
            group["expert_energy"] = fit_experts(block.mlp, [mean_layer(encoder, [index]) for index in fitted])
        report["groups"].append(group)
    student.model.final_norm.weight.copy_(encoder.final_norm.weight)
    report["decoder"] = copy_head(teacher, student)
    return student, report


def has_experts(config: ModernAlbertConfig) -> bool:
    """Whether some group of a model has experts."""
    return config.num_experts > 0 and bool(config.mol_groups)


def add_experts(model: ModernAlbertForMaskedLM, config: ModernAlbertConfig) -> ModernAlbertForMaskedLM:
    """A model with the weights of one without experts, and with experts that correct nothing yet.

    Args:
        model: Without experts.
        config: Its configuration, with experts in some groups.

    Raises:
        ValueError: Another field that changes shapes differs.
    """
    grown = type(model)._from_config(config)
    try:
        missing, unexpected = grown.load_state_dict(model.state_dict(), strict=False)
    except RuntimeError as error:
        raise ValueError(f"experts cannot be added together with other shapes: {error}") from error
    other = [name for name in missing if not {"experts", "router"} & set(name.split("."))]
    if other or unexpected:
        raise ValueError(f"experts cannot be added together with other tensors: {', '.join(other + unexpected)}")
    return grown


def factorize_embedding(encoder: ModernBertModel, embeddings: ModernAlbertEmbeddings) -> dict[str, float]:
    """Fills the student's table and projection from the teacher's table, in closed form and float64.

    The teacher's embedding is `w * z`, with `z` the normed rows of its table. The student's norm takes the mean and
    the scale from each of its rows, which leaves E - 1 dimensions: `z` is projected on its first E - 1 principal
    directions, and the coordinates are embedded in the space of rows whose mean is 0. Their scale is free; it is that of
    the teacher's row, since the decoder, tied to the table, reads it. The projection is the least-squares fit of
    `w * z` on the normed rows, exact where `z` has rank E - 1 or less.

    Returns:
        `energy_kept`, the share of the squared singular values of `z`, and `relative_error` of the fit.
    """
    table = upcast(encoder.embeddings.tok_embeddings.weight).double()  # [V, H]
    unit = F.layer_norm(table, table.shape[1:], eps=encoder.embeddings.norm.eps)
    target = unit * upcast(encoder.embeddings.norm.weight)
    size = embeddings.tok_embeddings.embedding_dim
    # The Gram matrix has the same directions, and is H x H.
    energies, directions = torch.linalg.eigh(unit.T @ unit)
    kept = min(size - 1, len(energies))
    directions, energies = directions.flip(1)[:, :kept], energies.flip(0).clamp(min=0)
    basis = torch.linalg.svd(unit.new_ones(1, size)).Vh[1 : kept + 1]  # [kept, E], orthonormal and without mean
    rows = unit @ directions @ basis  # [V, E]
    # A row of equal values, such as that of the padding token, is 0 here and stays so.
    smallest = torch.finfo(rows.dtype).eps
    rows *= (table.std(dim=1, correction=0) / rows.std(dim=1, correction=0).clamp(min=smallest))[:, None]
    coordinates = F.layer_norm(rows, (size,), eps=embeddings.norm.eps) @ basis.T  # [V, kept]
    inverse = torch.linalg.pinv(coordinates.T @ coordinates, rtol=1e-12, hermitian=True)
    fitted = target.T @ coordinates @ inverse  # [H, kept]
    embeddings.tok_embeddings.weight.copy_(rows)
    embeddings.projection.weight.copy_(fitted @ basis)
    return {
        "energy_kept": (energies[:kept].sum() / energies.sum()).item(),
        "relative_error": ((coordinates @ fitted.T - target).norm() / target.norm()).item(),
    }


def copy_head(teacher: ModernBertForMaskedLM, student: ModernAlbertForMaskedLM) -> dict[str, float]:
    """Copies the teacher's prediction head, and fits the projection so that the decoder is closest to the teacher's.

    The teacher scores the head's output g with its decoder `[V, H]`, the student with its table times the projection,
    `[V, E] [E, H]`: the projection is the least-squares fit, in float64.

    Returns:
        `relative_error` of the decoder's matrix.
    """
    student.head.dense.weight.copy_(teacher.head.dense.weight)
    student.head.norm.weight.copy_(teacher.head.norm.weight)
    if student.config.decoder_bias and teacher.config.decoder_bias:
        student.decoder.bias.copy_(teacher.decoder.bias)
    table, target = student.decoder.weight.double(), upcast(teacher.decoder.weight).double()
    inverse = torch.linalg.pinv(table.T @ table, rtol=1e-12, hermitian=True)
    projection = inverse @ table.T @ target  # [E, H]
    student.decoder_projection.weight.copy_(projection)
    return {"relative_error": ((table @ projection - target).norm() / target.norm()).item()}


def mean_layer(encoder: ModernBertModel, indices: Sequence[int]) -> EffectiveLayer:
    """Mean of the effective matrices of teacher layers."""
    layers = [effective_layer(encoder, index) for index in indices]
    return EffectiveLayer(*(torch.stack(matrices).mean(dim=0) for matrices in zip(*layers, strict=True)))


def effective_layer(encoder: ModernBertModel, index: int) -> EffectiveLayer:
    """A teacher layer with the weights of its norms folded into the matrices that read them.

    Norms have no bias, so that their weights scale the columns of the matrix that reads them. The first layer has no
    norm before its attention and reads the normed embedding `w * z`; the student's norm takes the scale from it, which
    the root mean square of `w` gives back: exactly, but for the norm's epsilon, where `w` is uniform.
    """
    layer = encoder.layers[index]
    if isinstance(layer.attn_norm, nn.Identity):
        attn_scale = upcast(encoder.embeddings.norm.weight).square().mean().sqrt()
    else:
        attn_scale = upcast(layer.attn_norm.weight)
    return EffectiveLayer(
        Wqkv=upcast(layer.attn.Wqkv.weight) * attn_scale,
        attn_Wo=upcast(layer.attn.Wo.weight),
        Wi=(upcast(layer.mlp.Wi.weight) * upcast(layer.mlp_norm.weight)).unflatten(0, (2, -1)),
        Wo=upcast(layer.mlp.Wo.weight),
    )


def upcast(weight: torch.Tensor) -> torch.Tensor:
    """A teacher's weight on the CPU in float32, like the student's."""
    return weight.to("cpu", torch.float32)


def widen(first: EffectiveLayer, second: EffectiveLayer, mlp: ModernAlbertMLP) -> tuple[torch.Tensor, torch.Tensor]:
    """Feed-forward matrices of the student's width from two layers of the teacher's, at most as wide.

    As many neurons as fit are duplicated, from `first` and from `second`, each at half its output, which gives their
    mean. Neurons beyond both layers are the student's own, with an output of 0.

    Returns:
        `Wi [2I, H]` and `Wo [H, I]` in the student's layout.
    """
    Wi = mlp.Wi.weight.unflatten(0, (2, -1)).clone()  # [2, I, H]
    Wo = torch.zeros_like(mlp.Wo.weight)
    own = first.Wo.shape[1]
    twice = min(Wo.shape[1] - own, own)
    Wi[:, :own], Wi[:, own : own + twice] = first.Wi, second.Wi[:, :twice]
    Wo[:, :own], Wo[:, own : own + twice] = first.Wo, second.Wo[:, :twice]
    Wo[:, :twice] /= 2
    Wo[:, own : own + twice] /= 2
    return Wi.flatten(0, 1), Wo


def fit_experts(mixture: ModernAlbertMoL | ModernAlbertDepthLoRA, targets: list[EffectiveLayer]) -> float:
    """Makes expert `e` the best correction of its rank from the shared projections to target `e % len(targets)`.

    Each target is widened with itself. Experts of the same target start equal; the router tells them apart.

    Returns:
        Share of the energy (squared singular values) of all differences that the corrections have, 1 where there is
        no difference.
    """
    experts, caught, total = mixture.experts, 0.0, 0.0
    for index, target in enumerate(targets):
        same = slice(index, None, len(targets))
        Wi, Wo = widen(target, target, mixture)
        for A, B, linear, goal in (
            (experts.in_A, experts.in_B, mixture.Wi, Wi),
            (experts.out_A, experts.out_B, mixture.Wo, Wo),
        ):
            U, S, Vh = torch.linalg.svd(goal - linear.weight, full_matrices=False)
            # Beyond the rank of the difference A stays as drawn and B 0: were both 0, neither would get a gradient.
            rank = int((S[: A.shape[1]] > torch.finfo(S.dtype).eps * goal.norm()).sum())
            root = S[:rank].sqrt()
            A[same, :rank] = root[:, None] * Vh[:rank]
            B[same, :, :rank] = U[:, :rank] * root / experts.scaling
            caught += S[:rank].square().sum().item()
            total += S.square().sum().item()
    return caught / total if total else 1.0
