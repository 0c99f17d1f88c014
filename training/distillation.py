"""Distillation: what a frozen teacher adds to the loss of a masked language model.

[`Distiller`] is for a ModernBERT or ModernALBERT with the student's vocabulary, which sees the student's masked rows;
[`EncoderDistiller`] for any other encoder, which sees each clean sequence by itself.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, PreTrainedModel

from .alignment import NO_WORD
from .initialization import teacher_segments
from .loading import is_sentence_transformer, load_model
from .runs import describe_model
from .teacher_cache import StateCache


def packed_inputs(model: PreTrainedModel, inputs: dict) -> dict:
    """Inputs that keep packed sequences from attending to each other in a given model.

    ModernALBERT derives them from `position_ids`. ModernBERT needs a mask for each layer type.

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
    if model.config._attn_implementation != "sdpa":  # others add boolean masks or ignore them
        raise ValueError(
            f"packed rows of a ModernBERT need `attn_implementation='sdpa'`, got '{model.config._attn_implementation}'"
        )
    position_ids = inputs["position_ids"]
    sequence_ids = (position_ids == 0).cumsum(-1).masked_fill(inputs["attention_mask"] == 0, 0)
    same = sequence_ids[:, None, :, None] == sequence_ids[:, None, None, :]  # [batch, 1, query, key]
    near = (position_ids[:, None, :, None] - position_ids[:, None, None, :]).abs() <= model.config.sliding_window
    return {**inputs, "attention_mask": {"full_attention": same, "sliding_attention": same & near}}


class Distiller:
    r"""A frozen teacher, and two loss terms that pull a student towards it.

    *Logits*: at masked positions, `T^2 KL(softmax(z_teacher / T) || softmax(z_student / T))`, summed over them and
    divided by their number. *Hidden states*: after each group of the student, against those after the last of the
    teacher's layers that the group replaces (`teacher_segments`), over all real tokens: `1 - cos`, or the mean squared
    difference. Where widths differ, the wider states are first projected by a fixed random matrix with orthonormal
    columns: it needs no training and keeps angles on average. The paper distils from ModernBERT and does not state its
    losses; these are MiniALBERT's (section 3.2) without the attention maps, which FlashAttention does not return.

    Args:
        teacher: ModernBERT or ModernALBERT for masked language modelling, with the student's vocabulary.
        student: Model in training.
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
        # Indices in the tuple of hidden states, where 0 is the embedding.
        self.num_layers = config.num_hidden_layers
        self.layer_map = [((group + 1) * depth, segment.stop) for group, segment in enumerate(segments)]
        self.projection = None
        smaller, larger = sorted((config.hidden_size, teacher.config.hidden_size))
        if smaller != larger:
            random = torch.randn(larger, smaller, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            self.projection = torch.linalg.qr(random).Q.float()  # [larger, smaller]

    @torch.no_grad()
    def ask(self, inputs: dict) -> Any:
        """The teacher's outputs for a masked batch of `PackedCollator`, with `labels`."""
        return self.teacher(**packed_inputs(self.teacher, inputs), output_hidden_states=True)

    def __call__(
        self, inputs: dict, outputs: Any, num_items: torch.Tensor | int, num_tokens: int, expected: Any
    ) -> dict:
        """The terms `kl_loss` and `hidden_loss`, scalars.

        Args:
            inputs: A masked batch of `PackedCollator`, with `labels`.
            outputs: The student's, at any depth, with sparse logits `[labelled, vocab_size]` and hidden states.
            num_items: Labelled tokens of the whole batch of which this may be a part.
            num_tokens: Its real tokens.
            expected: What `ask` gave for these inputs.
        """
        student, teacher = (
            F.log_softmax(logits.float() / self.temperature, dim=-1) for logits in (outputs.logits, expected.logits)
        )  # [labelled, vocab_size]
        kl_loss = F.kl_div(student, teacher, log_target=True, reduction="sum") * self.temperature**2 / num_items

        real = inputs["attention_mask"].bool()
        differences = []
        for student_layer, teacher_layer in self.layer_map:
            student_layer = student_layer * (len(outputs.hidden_states) - 1) // self.num_layers  # at a smaller depth
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


class Teacher(nn.Module):
    """A frozen encoder: the states of its tokens, and one vector per sequence.

    Args:
        name: Hub name or folder of an encoder of the Auto classes, or of a SentenceTransformer, whose own modules make
            the vector; of others it is the mean over the tokens.
        dtype: Of its weights.
        cache: File that keeps its states, see [`StateCache`]; default: they are computed each time.
        cache_bytes: Largest size of that file.
        sep_token_id: Token that ends a text, where there are pairs of texts. A teacher that knows two types of tokens
            (BERT's) gets them.

    Raises:
        ImportError: A SentenceTransformer needs sentence-transformers.
        OSError: There is no such model, or the cache cannot be written.
        ValueError: The model is damaged, or the cache is of another teacher.
    """

    def __init__(
        self,
        name: str,
        dtype: str = "auto",
        cache: str | Path | None = None,
        cache_bytes: int = 20 * 10**9,
        sep_token_id: int | None = None,
    ):
        super().__init__()
        self.sentence_modules = nn.ModuleList()
        if is_sentence_transformer(name):
            try:
                from sentence_transformers import SentenceTransformer
            except ImportError as error:
                raise ImportError(
                    f"the teacher '{name}' is a SentenceTransformer; install it with `pip install \".[retrieval]\"`"
                ) from error
            modules = SentenceTransformer(name, device="cpu", model_kwargs={"dtype": dtype, "use_safetensors": True})
            self.encoder = modules[0].auto_model
            self.sentence_modules.extend(list(modules)[1:])
            self.max_length, self.width = modules.max_seq_length, modules.get_embedding_dimension()
        else:
            self.encoder, _ = load_model(AutoModel, name, dtype=dtype)
            self.max_length, self.width = None, self.encoder.config.hidden_size
        self.max_length = self.max_length or getattr(self.encoder.config, "max_position_embeddings", None) or 512
        self.sep_token_id = sep_token_id
        self.has_types = sep_token_id is not None and getattr(self.encoder.config, "type_vocab_size", 0) > 1
        self.eval().requires_grad_(False)
        self.cache = None
        if cache is not None:
            self.cache = StateCache(cache, describe_model(name), self.encoder.dtype, cache_bytes)

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States of all tokens and a vector for each sequence, of sequences in rows of their own.

        Args:
            input_ids: `[sequences, length]`.
            attention_mask: 0 at padding, which is on the right.

        Returns:
            `[sequences, length, hidden]`, 0 at padding, and `[sequences, width]`, in float32.
        """
        if self.cache is None:
            return self.compute(input_ids, attention_mask)
        lengths = attention_mask.sum(dim=1).tolist()
        tokens = [row[:length] for row, length in zip(input_ids.tolist(), lengths, strict=True)]
        states = input_ids.new_zeros(*input_ids.shape, self.encoder.config.hidden_size, dtype=torch.float32)
        vectors = states.new_zeros(len(states), self.width)
        missing = []
        for index, row in enumerate(tokens):
            if (known := self.cache.get(row)) is None:
                missing.append(index)
            else:
                states[index, : len(row)], vectors[index] = known
        if missing:
            length = max(lengths[index] for index in missing)
            states[missing, :length], vectors[missing] = self.compute(
                input_ids[missing, :length], attention_mask[missing, :length]
            )
            self.cache.put([(tokens[i], states[i, : lengths[i]], vectors[i]) for i in missing])
        return states, vectors

    def compute(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, chunk_size: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `forward`, by the encoder, in chunks of similar length, since most encoders compute padding as well."""
        if chunk_size is None:  # on an accelerator many small calls take longer than the padding
            chunk_size = 32 if input_ids.device.type == "cpu" else 512
        states, vectors = None, None
        lengths = attention_mask.sum(dim=1)
        for chunk in lengths.argsort().split(chunk_size):
            length = int(lengths[chunk].max())
            mask = attention_mask[chunk, :length]
            inputs = {"input_ids": input_ids[chunk, :length], "attention_mask": mask}
            if self.has_types:  # 0 up to the first [SEP], 1 behind it
                ends = (inputs["input_ids"] == self.sep_token_id).long()
                inputs["token_type_ids"] = (ends.cumsum(dim=1) - ends).clamp(max=1)
            hidden = self.encoder(**inputs).last_hidden_state.float()
            features = {"token_embeddings": hidden, "attention_mask": mask}
            for module in self.sentence_modules:
                features = module(features)
            pooled = features.get("sentence_embedding")
            if pooled is None:
                pooled = (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
            if states is None:
                states = hidden.new_zeros(*input_ids.shape, hidden.shape[-1])
                vectors = pooled.new_zeros(len(input_ids), pooled.shape[-1])
            states[chunk, :length] = hidden * mask[..., None]
            vectors[chunk] = pooled.float()
        return states, vectors


def texts_of_pairs(
    input_ids: torch.Tensor, mask: torch.Tensor, sep_token_id: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The texts of pairs, each as a sequence of its own.

    Args:
        input_ids: Sequences `[CLS] text [SEP]` or `[CLS] text [SEP] pair [SEP]`, `[sequences, length]`.
        mask: 0 at padding, which is on the right.
        sep_token_id: `[SEP]`; some tokenizers write two between the texts.

    Returns:
        Which sequences are pairs, `[pairs]`; the tokens of their first texts and then of their second ones, with their mask,
        both `[2 * pairs, length]`.
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    lengths = mask.sum(dim=1)
    is_sep = (input_ids == sep_token_id) & mask.bool()
    ends = torch.where(is_sep.any(dim=1), is_sep.int().argmax(dim=1) + 1, lengths)  # of first texts
    doubled = is_sep.gather(1, ends.clamp(max=len(positions) - 1)[:, None])[:, 0] & (ends < len(positions))
    starts = ends + doubled.long()  # of second texts
    pairs = (starts < lengths).nonzero()[:, 0]
    input_ids, lengths, ends, starts = (each[pairs] for each in (input_ids, lengths, ends, starts))
    sources = torch.where(positions == 0, 0, positions + starts[:, None] - 1)  # [CLS], then the second text
    seconds = input_ids.gather(1, sources.clamp(max=len(positions) - 1))
    text_mask = torch.cat([positions < ends[:, None], sources < lengths[:, None]]).to(mask.dtype)
    return pairs, torch.cat([input_ids, seconds]) * text_mask, text_mask


class EncoderDistiller:
    r"""An encoder of any kind as the teacher of last hidden states and of pooled sequences.

    *Hidden states*: `1 - cos` between the teacher's state of a word and the student's, `W h + b` with W and b trained
    beside the student. With equal tokenizers a word is a token; otherwise it is what white space separates, and its
    state the mean over its tokens. *Pooled*: `1 - cos` between the teacher's vector of a sequence and the mean of the
    student's states, projected likewise (by a projection of its own where that vector has another width). *Pairs*: the
    squared difference between the cosine of the teacher's vectors of the two texts, each by itself, and what a linear head
    makes of the mean of the student's states of the pair: comparing texts is learned from a teacher that embeds them. All
    are sums over the whole batch, divided by its words and, the latter two, by its sequences. The teacher sees clean text,
    whatever the student sees masked. Our choice, after sentence-transformers' distillation.

    Args:
        teacher: Frozen.
        student: What is trained; the projections and the head of pairs become its modules `teacher_projections` and
            `pair_head`, so that they are trained and kept in checkpoints; see `remove_heads`.
        pairs: Whether the similarity of pairs is a term; the teacher needs its `sep_token_id`.
    """

    def __init__(self, teacher: Teacher, student: PreTrainedModel, pairs: bool = False):
        self.teacher = teacher
        hidden_size = student.config.hidden_size
        widths = dict.fromkeys([teacher.encoder.config.hidden_size, teacher.width])
        student.teacher_projections = nn.ModuleList([nn.Linear(hidden_size, width) for width in widths])
        for projection in student.teacher_projections:
            nn.init.normal_(projection.weight, std=hidden_size**-0.5)
            nn.init.zeros_(projection.bias)
        self.pair_head = None
        if pairs:
            self.pair_head = student.pair_head = nn.Linear(hidden_size, 1)
            nn.init.zeros_(self.pair_head.weight)
            nn.init.constant_(self.pair_head.bias, 0.5)
        self.projection, self.pooled_projection = student.teacher_projections[0], student.teacher_projections[-1]

    def remove_heads(self, student: PreTrainedModel) -> None:
        """Takes the modules of the distillation out of the student, which has no further use for them."""
        del student.teacher_projections
        if self.pair_head is not None:
            del student.pair_head

    @staticmethod
    def count(batch: dict) -> tuple[int, int]:
        """Words and sequences of a batch, by which the terms are divided."""
        starts = (batch["position_ids"] == 0) & batch["attention_mask"].bool()
        words = batch["attention_mask"].sum() if "words" not in batch else batch["words"].max() + 1
        return int(words), int(starts.sum())

    @torch.no_grad()
    def ask(self, inputs: dict) -> dict[str, torch.Tensor]:
        """What the teacher says of a batch of `AlignedCollator`, with the clean `input_ids` as `clean_ids`.

        Returns:
            `states` of all words `[words, hidden]`, `vectors` of the sequences `[sequences, width]`, `sequence_ids`, the number
            of each real token's sequence `[tokens]` and, with `pairs`, which sequences are `pairs` and the `cosines` of
            their texts.
        """
        real = inputs["attention_mask"].bool()
        starts = (inputs["position_ids"] == 0) & real
        sequence_ids = starts.flatten().cumsum(0).view_as(real)[real] - 1
        offsets = inputs["position_ids"][real]
        if "teacher_input_ids" in inputs:
            teacher_ids, mask = inputs["teacher_input_ids"], inputs["teacher_attention_mask"]
        else:  # the student's tokens, each sequence in a row of its own
            shape = (int(sequence_ids[-1]) + 1, int(offsets.max()) + 1)
            teacher_ids, mask = (inputs["clean_ids"].new_zeros(shape) for _ in range(2))
            teacher_ids[sequence_ids, offsets] = inputs["clean_ids"][real]
            mask[sequence_ids, offsets] = 1
        states, vectors = self.teacher(teacher_ids, mask)
        if "teacher_input_ids" in inputs:
            words = int(inputs["words"].max()) + 1
            states = mean_by_word(states.flatten(0, 1), inputs["teacher_words"].flatten(), words)
        else:
            states = states[sequence_ids, offsets]
        expected = {"states": states, "vectors": vectors, "sequence_ids": sequence_ids}
        if self.pair_head is not None:
            pairs, text_ids, text_mask = texts_of_pairs(teacher_ids, mask, self.teacher.sep_token_id)
            expected |= {"pairs": pairs, "cosines": vectors.new_zeros(0)}
            if len(pairs):
                expected["cosines"] = F.cosine_similarity(*self.teacher(text_ids, text_mask)[1].chunk(2), dim=-1)
        return expected

    def __call__(
        self, inputs: dict, outputs: Any, num_words: int, num_sequences: int, expected: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The terms `hidden_loss`, `pooled_loss` and, with `pairs`, `pair_loss`, scalars.

        Args:
            inputs: A batch of `AlignedCollator`.
            outputs: The student's, at any depth, with hidden states.
            num_words: Words of the whole batch of which this may be a part.
            num_sequences: Its sequences.
            expected: What `ask` gave for these inputs.
        """
        real = inputs["attention_mask"].bool()
        states = outputs.hidden_states[-1][real]  # [tokens, hidden]
        found = self.projection(states).float()
        if "words" in inputs:
            found = mean_by_word(found, inputs["words"][real], len(expected["states"]))
        hidden_loss = (1 - F.cosine_similarity(found, expected["states"], dim=-1)).sum() / num_words
        means = mean_by_word(states, expected["sequence_ids"], len(expected["vectors"]))
        pooled = self.pooled_projection(means).float()
        pooled_loss = (1 - F.cosine_similarity(pooled, expected["vectors"], dim=-1)).sum() / num_sequences
        terms = {"hidden_loss": hidden_loss, "pooled_loss": pooled_loss}
        if self.pair_head is not None:  # of no pair: 0, and part of the graph, as other processes expect
            predicted = self.pair_head(means).float()[expected["pairs"], 0]
            terms["pair_loss"] = (predicted - expected["cosines"]).square().sum() / num_sequences
        return terms


def mean_by_word(states: torch.Tensor, words: torch.Tensor, count: int) -> torch.Tensor:
    """Mean of the states of each word.

    Args:
        states: `[tokens, width]`.
        words: Number of each token's word, `[tokens]`; -1 for tokens that count nowhere.
        count: Words.

    Returns:
        `[count, width]`.
    """
    kept = words != NO_WORD
    counts = torch.bincount(words[kept], minlength=count).clamp(min=1)
    return states.new_zeros(count, states.shape[-1]).index_add(0, words[kept], states[kept]) / counts[:, None]


@torch.no_grad()
def start_from_table(table: torch.Tensor, student: PreTrainedModel) -> float:
    """Starts a factorised embedding from a teacher's table of the same tokens: its first principal components.

    Each row becomes its coordinates there, at a standard deviation of 1 over the table, at which a step of AdamW is
    small. The decoder, tied to the table, keeps the scale of its scores: what projects to it is divided by as much.

    Args:
        table: `[V, width]`; the student may have more rows, which stay as they are.
        student: With a masked-LM head.

    Returns:
        Share of the table's energy (squared singular values, without the mean) that is kept.
    """
    embedding = student.get_input_embeddings().weight
    size = embedding.shape[1]
    centred = table.to("cpu", torch.float32) - table.to("cpu", torch.float32).mean(dim=0)
    U, S, _ = torch.linalg.svd(centred, full_matrices=False)
    rows = U[:, :size] * S[:size]
    student.decoder_projection.weight *= embedding.std()
    embedding[: len(rows), : rows.shape[1]] = rows / rows.std()
    return (S[:size].square().sum() / S.square().sum()).item()
