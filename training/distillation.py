"""Distillation: what a frozen teacher adds to the loss of a masked language model."""

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .initialization import teacher_segments


def packed_inputs(model: PreTrainedModel, inputs: dict) -> dict:
    """Packed rows in the form that keeps texts apart in a given model.

    ModernALBERT reads it from `position_ids`. ModernBERT does not, but takes a mask for each type of layer.

    Args:
        model: ModernALBERT or ModernBERT.
        inputs: A batch of `PackedCollator`.

    Raises:
        ValueError: The model is neither of them, or a ModernBERT with another attention than sdpa.
    """
    if model.config.model_type == "modernalbert":
        return inputs
    if model.config.model_type != "modernbert":
        raise ValueError(
            f"packed rows would let texts of a {model.config.model_type} see each other; use a ModernALBERT or a "
            "ModernBERT"
        )
    if model.config._attn_implementation != "sdpa":  # the others would add such a mask, or not see it
        raise ValueError(
            f"packed rows of a ModernBERT need `attn_implementation='sdpa'`, got '{model.config._attn_implementation}'"
        )
    position_ids = inputs["position_ids"]
    text_ids = (position_ids == 0).cumsum(-1).masked_fill(inputs["attention_mask"] == 0, 0)
    same = text_ids[:, None, :, None] == text_ids[:, None, None, :]  # [batch, 1, query, key]
    near = (position_ids[:, None, :, None] - position_ids[:, None, None, :]).abs() <= model.config.sliding_window
    return {**inputs, "attention_mask": {"full_attention": same, "sliding_attention": same & near}}


class Distiller:
    r"""A frozen teacher, and the two terms that bring a student close to it.

    *Logits*: at masked positions, `T^2 KL(softmax(z_teacher / T) || softmax(z_student / T))`, summed over them and
    divided by their number. *Hidden states*: after each group of the student, against those after the last of the
    teacher's layers that the group replaces (`teacher_segments`), over all real tokens: `1 - cos`, or the mean squared
    difference. Where widths differ, the wider states are first projected by a fixed random matrix with orthonormal
    columns: it needs no training and keeps angles on average. The paper distils from ModernBERT and does not state its
    losses; these are MiniALBERT's (section 3.2) without the attention maps, which FlashAttention does not return.

    Args:
        teacher: ModernBERT or ModernALBERT for masked language modelling, with the student's vocabulary.
        student: What is trained.
        temperature: T.
        hidden_loss: `"cosine"` or `"mse"`.

    Raises:
        ValueError: The vocabularies differ, or the loss is unknown.
    """

    def __init__(
        self, teacher: PreTrainedModel, student: PreTrainedModel, temperature: float = 1.0, hidden_loss: str = "cosine"
    ):
        if teacher.config.vocab_size != student.config.vocab_size:
            raise ValueError(
                f"the teacher has {teacher.config.vocab_size} tokens and the student {student.config.vocab_size}; set "
                f"the student's `vocab_size` to {teacher.config.vocab_size}"
            )
        if hidden_loss not in ("cosine", "mse"):
            raise ValueError(f"`hidden_loss` must be 'cosine' or 'mse', got '{hidden_loss}'")
        self.teacher = teacher.eval().requires_grad_(False)
        self.teacher.config.sparse_prediction = self.teacher.sparse_prediction = True
        self.temperature = temperature
        self.hidden_loss = hidden_loss
        config = student.config
        groups = getattr(config, "num_hidden_groups", config.num_hidden_layers)
        segments = teacher_segments(teacher.config.num_hidden_layers, groups)
        depth = config.num_hidden_layers // groups
        # Places in the tuple of hidden states, where 0 is the embedding.
        self.layer_map = [((group + 1) * depth, segment.stop) for group, segment in enumerate(segments)]
        self.projection = None
        narrow, wide = sorted((config.hidden_size, teacher.config.hidden_size))
        if narrow != wide:
            random = torch.randn(wide, narrow, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            self.projection = torch.linalg.qr(random).Q.float()  # [wide, narrow]

    def __call__(self, inputs: dict, outputs, num_items: torch.Tensor | int, num_tokens: int) -> dict:
        """The terms `kl_loss` and `hidden_loss`, scalars.

        Args:
            inputs: A masked batch of `PackedCollator`, with `labels`.
            outputs: The student's, with sparse logits `[labelled, vocab_size]` and hidden states.
            num_items: Labelled tokens of the whole batch of which this may be a part.
            num_tokens: Its real tokens.
        """
        with torch.no_grad():
            expected = self.teacher(**packed_inputs(self.teacher, inputs), output_hidden_states=True)
        student, teacher = (
            F.log_softmax(logits.float() / self.temperature, dim=-1) for logits in (outputs.logits, expected.logits)
        )  # [labelled, vocab_size]
        kl_loss = F.kl_div(student, teacher, log_target=True, reduction="sum") * self.temperature**2 / num_items

        real = inputs["attention_mask"].bool()
        differences = []
        for student_layer, teacher_layer in self.layer_map:
            student = outputs.hidden_states[student_layer][real].float()  # [tokens, hidden]
            teacher = expected.hidden_states[teacher_layer][real].float()
            if student.shape[-1] > teacher.shape[-1]:
                student = student @ self.projection.to(student)
            elif student.shape[-1] < teacher.shape[-1]:
                teacher = teacher @ self.projection.to(teacher)
            if self.hidden_loss == "cosine":
                difference = 1 - F.cosine_similarity(student, teacher, dim=-1)
            else:
                difference = (student - teacher).square().mean(dim=-1)
            differences.append(difference.sum())
        return {"kl_loss": kl_loss, "hidden_loss": torch.stack(differences).mean() / num_tokens}
