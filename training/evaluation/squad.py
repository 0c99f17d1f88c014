"""SQuAD v1.1 and v2: contexts to windows of tokens, logits to answers, answers to the official scores."""

import logging
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from ..data import report_dropped
from ..packing import encode_texts
from .metrics import Squad, SquadV2, score_answers


logger = logging.getLogger(__name__)

COLUMNS = ("id", "context", "question", "answers")
FEATURES = Features(
    {
        "id": Value("string"),
        "context": Value("large_string"),
        "question": Value("string"),
        "answers": {"text": List(Value("string")), "answer_start": List(Value("int64"))},
    }
)

EXPECTED = "{'text': [...], 'answer_start': [...]}, both empty where there is no answer"


def check_rows(rows: Dataset, name: str, unanswerable: bool) -> Dataset:
    """Checked rows with the columns `COLUMNS` alone.

    An unanswerable question has empty lists, whether the rows say `[]`, `[""]` or `is_impossible`.

    Args:
        rows: As on the Hub, with the columns `id`, `context`, `question` and `answers {text, answer_start}`.
        name: Name of the rows in messages.
        unanswerable: Whether a question may have no answer, as in v2.

    Raises:
        ValueError: There are no rows, a column is missing or has an empty cell or a value of another kind, an id occurs
            twice, or a question of v1.1 has no answer.
    """
    if len(rows) == 0:
        raise ValueError(f"there are no {name} rows; give files with at least one question")
    for column in COLUMNS:
        if column not in rows.column_names:
            raise ValueError(
                f"the {name} rows have no column '{column}', but {', '.join(map(repr, rows.column_names))}; expected are "
                "id, context, question and answers {text, answer_start}, as on the Hub"
            )
    checked, seen = {column: [] for column in COLUMNS}, set()
    for index, row in enumerate(rows):
        for column in COLUMNS:
            if row[column] is None:
                raise ValueError(f"column '{column}' is empty in {name} row {index}; fix or drop that row")
            if column in ("context", "question") and not isinstance(row[column], str):
                raise ValueError(f"{name} row {index} has {row[column]!r} as '{column}', expected a text")
        if isinstance(row["id"], bool) or not isinstance(row["id"], str | int):
            raise ValueError(f"{name} row {index} has {row['id']!r} as 'id', expected a text or a whole number")
        question = str(row["id"])
        if question in seen:
            raise ValueError(f"id {question!r} occurs twice, again in {name} row {index}; give every question its own")
        seen.add(question)
        answers = read_answers(row["answers"], f"{name} row {index}")
        impossible = row.get("is_impossible")
        if not isinstance(impossible, bool | None):  # the text "false" would be true
            raise ValueError(f"{name} row {index} has {impossible!r} as 'is_impossible', expected true or false")
        if impossible:
            answers = {"text": [], "answer_start": []}  # what the official files list there is plausible, not right
        if not (answers["text"] or unanswerable):
            raise ValueError(
                f"{name} question {question!r} has no answer, as only `squad_v2` allows; drop it or change the task"
            )
        for column, value in zip(COLUMNS, (question, row["context"], row["question"], answers), strict=True):
            checked[column].append(value)
    return Dataset.from_dict(checked, FEATURES)


def read_answers(answers: Any, where: str) -> dict[str, list]:
    """Texts and starts of the answers to a question; empty texts are left out.

    Raises:
        ValueError: The answers have another form.
    """
    texts, starts = (answers.get(name) if isinstance(answers, dict) else None for name in ("text", "answer_start"))
    if not isinstance(texts, list) or not isinstance(starts, list):
        raise ValueError(f"{where} has {answers!r} as 'answers', expected {EXPECTED}")
    starts = starts or [None] * len(texts)
    if len(texts) != len(starts):
        raise ValueError(
            f"{where} has {len(texts)} texts and {len(starts)} starts as 'answers', expected as many of both"
        )
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or isinstance(start, bool) or not isinstance(start, int | None):
            raise ValueError(f"{where} has the answer {text!r} at {start!r}, expected a text and its first character")
    found = [(text, start) for text, start in zip(texts, starts, strict=True) if text.strip()]
    return {"text": [text for text, _ in found], "answer_start": [start for _, start in found]}


def keep_valid(rows: Dataset) -> Dataset:
    """The training rows that are valid, see [`is_valid`]; the others are counted in the log.

    Raises:
        ValueError: More than 1% of the rows are not valid.
    """
    broken = [index for index, row in enumerate(rows) if not is_valid(row)]
    first = f" (the first: id {rows[broken[0]]['id']!r}, {rows[broken[0]]['answers']})" if broken else ""
    report_dropped(len(broken), len(rows), "train", f"no first answer at its `answer_start`{first}")
    kept = set(range(len(rows))) - set(broken)
    return rows.select(sorted(kept)) if broken else rows


def is_valid(row: Mapping) -> bool:
    """Whether a row can be used in training: its first answer, if any, is in the context at its `answer_start`."""
    texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
    if not texts:
        return True
    found = starts and isinstance(starts[0], int) and starts[0] >= 0 and row["context"].startswith(texts[0], starts[0])
    return bool(found and texts[0].strip())


def answer_span(row: Mapping) -> tuple[int, int] | None:
    """First and last-plus-one character of the first answer, stripped of white space; None if there is no valid one."""
    if not row["answers"]["text"] or not is_valid(row):
        return None
    text, start = row["answers"]["text"][0], row["answers"]["answer_start"][0]
    return start + len(text) - len(text.lstrip()), start + len(text.rstrip())


def cut_questions(questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[str]:
    """Questions truncated to `max_length` tokens, as text."""
    encoded = encode_texts(tokenizer, questions, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [
        question if len(offsets) <= max_length else question[: offsets[max_length][0]]
        for question, offsets in zip(questions, encoded["offset_mapping"], strict=True)
    ]


def check_windows(
    tokenizer: PreTrainedTokenizerBase, max_length: int, doc_stride: int, max_question_length: int
) -> None:
    """Checks that each window starts after the one before; for the lengths see [`make_features`].

    Raises:
        ValueError: `doc_stride` leaves no room, or the tokenizer gives no offsets.
    """
    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} gives no offsets; load its fast counterpart")
    room = max_length - max_question_length - tokenizer.num_special_tokens_to_add(pair=True)
    if not 0 <= doc_stride < room:
        raise ValueError(
            f"`doc_stride` ({doc_stride}) must be at least 0 and below the {room} tokens of context that a question of "
            f"`max_question_length` ({max_question_length}) leaves in `max_length` ({max_length}); change one of them"
        )


def make_features(
    batch: Mapping[str, list],
    indices: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 384,
    doc_stride: int = 128,
    max_question_length: int = 64,
) -> dict[str, list]:
    """Windows over the contexts of a batch of rows, each after its question, for `Dataset.map`.

    Args:
        batch: Columns of rows.
        indices: Indices of the rows in the data set.
        tokenizer: A fast tokenizer. Nothing is padded here; pad on the right, so that positions stay valid.
        max_length: Tokens of a window, question and special tokens included.
        doc_stride: Tokens of context that neighbouring windows share.
        max_question_length: Tokens that a question is truncated to.

    Returns:
        Inputs of the model; `start_positions` and `end_positions`, the position of `[CLS]` if the window does not hold
        the whole answer; and for [`rank_answers`] `row`, `cls_position`, `context_start` (position of the first token of
        the context) and `offsets` (characters of each token of the context).
    """
    encoded = encode_texts(
        tokenizer,
        cut_questions(batch["question"], tokenizer, max_question_length),
        batch["context"],
        truncation="only_second",
        max_length=max_length,
        stride=doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    spans = [
        answer_span({"context": context, "answers": answers})
        for context, answers in zip(batch["context"], batch["answers"], strict=True)
    ]
    mapping, owners = encoded.pop("offset_mapping"), encoded.pop("overflow_to_sample_mapping")
    names = ("row", "cls_position", "context_start", "offsets", "start_positions", "end_positions")
    columns = {name: [] for name in names}
    for window, owner in enumerate(owners):
        input_ids, parts = encoded["input_ids"][window], encoded.sequence_ids(window)
        start = parts.index(1) if 1 in parts else len(parts)
        offsets = [list(pair) for pair, part in zip(mapping[window], parts, strict=True) if part == 1]
        cls_position = input_ids.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in input_ids else 0
        positions = find_tokens(offsets, spans[owner])
        first, last = (
            (cls_position, cls_position) if positions is None else (start + positions[0], start + positions[1])
        )
        values = (indices[owner], cls_position, start, offsets, first, last)
        for name, value in zip(names, values, strict=True):
            columns[name].append(value)
    return {**encoded, **columns}


def find_tokens(offsets: Sequence[Sequence[int]], span: tuple[int, int] | None) -> tuple[int, int] | None:
    """First and last token of a span of characters; None if the tokens do not cover it."""
    if span is None or not offsets or span[0] < offsets[0][0] or span[1] > offsets[-1][1]:
        return None
    # Ends locate the first token and starts the last one, since some tokens begin with a space.
    first = bisect_right([end for _, end in offsets], span[0])
    last = bisect_left([start for start, _ in offsets], span[1]) - 1
    return (first, last) if first <= last else None  # a tokenizer may drop characters


class Ranking(NamedTuple):
    """Scored answers to one question.

    Attributes:
        null_score: Score of no answer: the lowest over the windows, since one window with an answer is enough.
        answers: Texts with their scores, best first; empty if the context has no token.
    """

    null_score: float
    answers: list[tuple[str, float]]

    @property
    def best(self) -> str:
        """The best answer, whatever the score of no answer."""
        return self.answers[0][0] if self.answers else ""

    @property
    def null_odds(self) -> float:
        """Score of no answer minus that of the best answer."""
        return self.null_score - (self.answers[0][1] if self.answers else 0.0)


def best_spans(
    starts: np.ndarray, ends: np.ndarray, count: int, max_answer_length: int
) -> list[tuple[float, int, int]]:
    """The `count` best spans of at most `max_answer_length` tokens, as (score, first token, last token)."""
    width = min(max_answer_length, len(starts))
    if width == 0:
        return []
    ends = np.pad(ends.astype(np.float64), (0, width - 1), constant_values=-np.inf)
    scores = starts[:, None] + np.lib.stride_tricks.sliding_window_view(ends, width)  # [first token, length - 1]
    flat = scores.ravel()
    top = np.argpartition(-flat, min(count, flat.size) - 1)[:count]
    pairs = ((float(flat[position]), int(position) // width, int(position) % width) for position in top)
    return sorted(
        ((score, first, first + more) for score, first, more in pairs if first + more < len(starts)),
        key=lambda pair: (-pair[0], *pair[1:]),
    )


def rank_answers(
    contexts: Sequence[str],
    features: Iterable[Mapping],
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    n_best_size: int = 20,
    max_answer_length: int = 30,
) -> list[Ranking]:
    """The best answers to each question over all of its windows.

    Args:
        contexts: Context of each row.
        features: See [`make_features`].
        start_logits: `[features, length]`; padding is ignored.
        end_logits: `[features, length]`.
        n_best_size: Answers per ranking.
        max_answer_length: Tokens of the longest answer.

    Returns:
        One ranking per context.
    """
    null_scores = [float("inf")] * len(contexts)
    spans = [{} for _ in contexts]
    for feature, starts, ends in zip(features, start_logits, end_logits, strict=True):
        row, cls_position, offsets = feature["row"], feature["cls_position"], feature["offsets"]
        null_scores[row] = min(null_scores[row], float(starts[cls_position]) + float(ends[cls_position]))
        window = slice(feature["context_start"], feature["context_start"] + len(offsets))
        for score, first, last in best_spans(starts[window], ends[window], n_best_size, max_answer_length):
            span = offsets[first][0], offsets[last][1]
            # Neighbouring windows share tokens: a span counts once, with its best score.
            spans[row][span] = max(score, spans[row].get(span, score))
    rankings = []
    for context, null_score, scores in zip(contexts, null_scores, spans, strict=True):
        ordered = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
        answers = [(context[start:end].strip(), score) for (start, end), score in ordered]
        rankings.append(Ranking(null_score, [answer for answer in answers if answer[0]][:n_best_size]))
    return rankings


def choose_answers(rankings: Mapping[str, Ranking], threshold: float | None) -> dict[str, str]:
    """The answer to each question: `""` (none) if its null odds exceed the threshold, which is None in v1.1."""
    return {
        name: "" if threshold is not None and ranking.null_odds > threshold else ranking.best
        for name, ranking in rankings.items()
    }


def list_answers(ranking: Ranking, unanswerable: bool) -> list[dict[str, str | float]]:
    """The ranking with probabilities that sum to 1; in v2 it includes no answer, `""`."""
    answers = [*ranking.answers, *([("", ranking.null_score)] if unanswerable else [])]
    answers.sort(key=lambda answer: -answer[1])
    weights = np.exp([score - answers[0][1] for _, score in answers])
    return [
        {"text": text, "probability": float(weight / weights.sum()), "score": score}
        for (text, score), weight in zip(answers, weights, strict=True)
    ]


def best_threshold(
    answers: Mapping[str, str],
    scores: Mapping[str, float],
    null_odds: Mapping[str, float],
    golds: Mapping[str, Sequence[str]],
) -> tuple[float, float]:
    """The best mean over all thresholds of the null odds, and that threshold, as in the official script of v2.

    The threshold is chosen on the gold answers, so the mean is an upper bound and not a score of the model.

    Args:
        answers: Best answer to every question, whatever its odds.
        scores: Exact match or F1 of these answers.
        null_odds: No answer is given above the threshold.
        golds: Gold answers.

    Returns:
        Mean and threshold. If giving no answer at all is best, the threshold is below all odds; the official script,
        which expects probabilities, gives 0 there.
    """
    best = total = float(sum(not texts for texts in golds.values()))
    threshold = math.nextafter(min(null_odds.values()), -math.inf)
    for name in sorted(null_odds, key=null_odds.get):
        total += scores[name] if golds[name] else -float(bool(answers[name]))
        if total > best:
            best, threshold = total, null_odds[name]
    return best / len(golds), threshold


def evaluate_rankings(
    rankings: Mapping[str, Ranking], golds: Mapping[str, Sequence[str]], threshold: float | None
) -> tuple[dict[str, str], dict[str, float], dict[str, float]]:
    """Answers, their scores and, kept apart, the scores at the best threshold.

    Args:
        rankings: Ranking of every question.
        golds: Gold answers.
        threshold: Threshold of the null odds; None for v1.1, which has no best threshold either.

    Returns:
        `predictions`; `f1`, `exact` and, by kind of question, `HasAns_...` and `NoAns_...`; `best_f1`,
        `best_f1_thresh`, `best_exact` and `best_exact_thresh`.
    """
    predictions = choose_answers(rankings, threshold)
    answers = [
        {"id": name, "prediction_text": text, "no_answer_probability": 0.0} for name, text in predictions.items()
    ]
    right = [{"id": name, "answers": {"text": list(texts), "answer_start": []}} for name, texts in golds.items()]
    if threshold is None:
        answers = [{name: row[name] for name in ("id", "prediction_text")} for row in answers]
        return predictions, Squad().compute(predictions=answers, references=right), {}
    scores = SquadV2().compute(predictions=answers, references=right)
    answers = choose_answers(rankings, None)
    odds = {name: ranking.null_odds for name, ranking in rankings.items()}
    best = {}
    for metric, values in score_answers(answers, golds, unanswerable=True).items():
        best[f"best_{metric}"], best[f"best_{metric}_thresh"] = best_threshold(answers, values, odds, golds)
    return predictions, scores, best
