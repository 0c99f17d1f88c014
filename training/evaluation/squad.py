"""SQuAD v1.1 and v2: from contexts to windows of tokens, from logits to answers, from answers to the official scores."""

import math
import re
import string
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase


COLUMNS = ("id", "context", "question", "answers")

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def check_rows(rows: Dataset, name: str, unanswerable: bool) -> None:
    """Refuses rows that cannot be scored.

    Args:
        rows: As on the Hub, with the columns `id`, `context`, `question` and `answers {text, answer_start}`.
        name: What messages call them.
        unanswerable: Whether a question may have no answer, as in v2.

    Raises:
        ValueError: There are no rows, a column is missing or has an empty cell, an id occurs twice, or a question of
            v1.1 has no answer.
    """
    if len(rows) == 0:
        raise ValueError(f"there are no {name} rows; give files with at least one question")
    for column in COLUMNS:
        if column not in rows.column_names:
            raise ValueError(
                f"the {name} rows have no column '{column}', but {', '.join(map(repr, rows.column_names))}; expected are "
                "id, context, question and answers {text, answer_start}, as on the Hub"
            )
    kind = rows.features["answers"]
    if not isinstance(kind, dict) or not {"text", "answer_start"} <= set(kind):
        raise ValueError(
            f"column 'answers' of the {name} rows holds {kind}, expected {{'text': [...], 'answer_start': [...]}}"
        )
    seen = set()
    for index, row in enumerate(rows.select_columns(list(COLUMNS))):
        empty = [
            column for column in COLUMNS if row[column] is None or column == "answers" and row[column]["text"] is None
        ]
        if empty:
            raise ValueError(f"column '{empty[0]}' is empty in {name} row {index}; mend or drop that row")
        if row["id"] in seen:
            raise ValueError(
                f"id {row['id']!r} occurs twice, again in {name} row {index}; give every question its own"
            )
        if not (row["answers"]["text"] or unanswerable):
            raise ValueError(
                f"{name} question {row['id']!r} has no answer, as only `squad_v2` allows; drop it or change the task"
            )
        seen.add(row["id"])


def is_sound(row: Mapping) -> bool:
    """Whether a row can be learned from: its first answer, where there is one, stands at its `answer_start`."""
    texts, starts = row["answers"]["text"], row["answers"]["answer_start"]
    if not texts:
        return True
    found = starts and isinstance(starts[0], int) and starts[0] >= 0 and row["context"].startswith(texts[0], starts[0])
    return bool(found and texts[0].strip())


def answer_span(row: Mapping) -> tuple[int, int] | None:
    """First and last-plus-one character of the first answer, without white space around it; None where there is none."""
    if not row["answers"]["text"] or not is_sound(row):
        return None
    text, start = row["answers"]["text"][0], row["answers"]["answer_start"][0]
    return start + len(text) - len(text.lstrip()), start + len(text.rstrip())


def cut_questions(questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[str]:
    """Questions of at most `max_length` tokens: what is longer ends before the first token too many."""
    encoded = tokenizer(list(questions), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [
        question if len(offsets) <= max_length else question[: offsets[max_length][0]]
        for question, offsets in zip(questions, encoded["offset_mapping"], strict=True)
    ]


def check_windows(
    tokenizer: PreTrainedTokenizerBase, max_length: int, doc_stride: int, max_question_length: int
) -> None:
    """Sees that windows move on; for the lengths see [`make_features`].

    Raises:
        ValueError: They do not, or the tokenizer gives no offsets.
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
    """Windows over the contexts of a batch of rows, each behind its question, for `Dataset.map`.

    Args:
        batch: Columns of rows.
        indices: Their places in the data set.
        tokenizer: With offsets. Nothing is padded here; pad on the right, where places keep their number.
        max_length: Tokens of a window, question and special tokens included.
        doc_stride: Tokens of context that neighbouring windows share.
        max_question_length: Tokens that a question is cut to.

    Returns:
        What the model takes; `start_positions` and `end_positions`, which are the place of `[CLS]` where the window
        does not hold the whole answer; and to read answers off again `row`, `cls_position`, `context_start` (place of
        the first token of the context) and `offsets` (characters of each token of the context).
    """
    encoded = tokenizer(
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
        places = find_tokens(offsets, spans[owner])
        first, last = (cls_position, cls_position) if places is None else (start + places[0], start + places[1])
        values = (indices[owner], cls_position, start, offsets, first, last)
        for name, value in zip(names, values, strict=True):
            columns[name].append(value)
    return {**encoded, **columns}


def find_tokens(offsets: Sequence[Sequence[int]], span: tuple[int, int] | None) -> tuple[int, int] | None:
    """First and last token of a span of characters; None where it is not whole among the tokens."""
    if span is None or not offsets or span[0] < offsets[0][0] or span[1] > offsets[-1][1]:
        return None
    # By the ends for the first and by the starts for the last, since some tokens begin with a space.
    first = bisect_right([end for _, end in offsets], span[0])
    last = bisect_left([start for start, _ in offsets], span[1]) - 1
    return (first, last) if first <= last else None  # a tokenizer may drop characters


class Ranking(NamedTuple):
    """What a model says to one question.

    Attributes:
        null_score: Score of no answer: the lowest over the windows, since one window with an answer is enough.
        answers: Texts with their scores, best first; none where the context has no token.
    """

    null_score: float
    answers: list[tuple[str, float]]

    @property
    def best(self) -> str:
        """The best answer, however likely it is that there is none."""
        return self.answers[0][0] if self.answers else ""

    @property
    def null_odds(self) -> float:
        """By how much no answer scores above the best one."""
        return self.null_score - (self.answers[0][1] if self.answers else 0.0)


def best_spans(
    starts: np.ndarray, ends: np.ndarray, count: int, max_answer_length: int
) -> list[tuple[float, int, int]]:
    """The `count` best of all pairs of a first and a last token, at most `max_answer_length` tokens, as (score, i, j)."""
    width = min(max_answer_length, len(starts))
    if width == 0:
        return []
    ends = np.pad(ends.astype(np.float64), (0, width - 1), constant_values=-np.inf)
    scores = starts[:, None] + np.lib.stride_tricks.sliding_window_view(ends, width)  # [first token, length - 1]
    flat = scores.ravel()
    top = np.argpartition(-flat, min(count, flat.size) - 1)[:count]
    pairs = ((float(flat[place]), int(place) // width, int(place) % width) for place in top)
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
        contexts: Of each row.
        features: See [`make_features`].
        start_logits: Of each feature, `[features, length]`; what lies behind its tokens is not looked at.
        end_logits: The same for the last token.
        n_best_size: Answers of a ranking.
        max_answer_length: In tokens.

    Returns:
        One ranking for each context.
    """
    null_scores = [float("inf")] * len(contexts)
    spans = [{} for _ in contexts]
    for feature, starts, ends in zip(features, start_logits, end_logits, strict=True):
        row, cls_position, offsets = feature["row"], feature["cls_position"], feature["offsets"]
        null_scores[row] = min(null_scores[row], float(starts[cls_position]) + float(ends[cls_position]))
        window = slice(feature["context_start"], feature["context_start"] + len(offsets))
        for score, first, last in best_spans(starts[window], ends[window], n_best_size, max_answer_length):
            span = offsets[first][0], offsets[last][1]
            # Neighbouring windows share tokens: a span is one answer, as good as in the window that knows it best.
            spans[row][span] = max(score, spans[row].get(span, score))
    rankings = []
    for context, null_score, scores in zip(contexts, null_scores, spans, strict=True):
        ordered = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
        answers = [(context[start:end].strip(), score) for (start, end), score in ordered]
        rankings.append(Ranking(null_score, [answer for answer in answers if answer[0]][:n_best_size]))
    return rankings


def choose_answers(rankings: Mapping[str, Ranking], threshold: float | None) -> dict[str, str]:
    """The answer to each question: none, `""`, where the odds of that exceed the threshold (v1.1: None)."""
    return {
        name: "" if threshold is not None and ranking.null_odds > threshold else ranking.best
        for name, ranking in rankings.items()
    }


def list_answers(ranking: Ranking, unanswerable: bool) -> list[dict[str, str | float]]:
    """The ranking with probabilities, which add up to 1; for v2 no answer, `""`, takes its place among the others."""
    answers = [*ranking.answers, *([("", ranking.null_score)] if unanswerable else [])]
    answers.sort(key=lambda answer: -answer[1])
    weights = np.exp([score - answers[0][1] for _, score in answers])
    return [
        {"text": text, "probability": float(weight / weights.sum()), "score": score}
        for (text, score), weight in zip(answers, weights, strict=True)
    ]


def normalize(text: str) -> str:
    """What the official scripts compare: lower case, without ASCII punctuation, English articles and extra spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def token_f1(prediction: str, gold: str, unanswerable: bool) -> float:
    """Harmonic mean of precision and recall of the words; of two empty texts 1 in v2 and 0 in v1.1, as officially."""
    predicted, expected = normalize(prediction).split(), normalize(gold).split()
    common = (Counter(predicted) & Counter(expected)).total()
    if common == 0:
        return float(unanswerable and not predicted and not expected)
    return 2 * common / (len(predicted) + len(expected))


def score_answers(
    predictions: Mapping[str, str], golds: Mapping[str, Sequence[str]], unanswerable: bool
) -> dict[str, dict[str, float]]:
    """Exact match and F1 of every question, each the best over its gold answers.

    Args:
        predictions: Answers; `""` for none.
        golds: Right answers; none where the question has none.
        unanswerable: v2's rules, by which a gold answer that normalises to nothing is none, else v1.1's.

    Returns:
        `exact` and `f1`, each by question.
    """
    scores = {"exact": {}, "f1": {}}
    for name, texts in golds.items():
        if unanswerable:
            texts = [text for text in texts if normalize(text)] or [""]
        prediction = predictions[name]
        scores["exact"][name] = max(float(normalize(prediction) == normalize(text)) for text in texts)
        scores["f1"][name] = max(token_f1(prediction, text, unanswerable) for text in texts)
    return scores


def average_scores(scores: Mapping[str, Mapping[str, float]], golds: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Means of [`score_answers`], F1 first; with unanswerable questions also those of both kinds (`HasAns_`, `NoAns_`)."""
    kinds = {
        "": list(golds),
        "HasAns_": [name for name, texts in golds.items() if texts],
        "NoAns_": [name for name, texts in golds.items() if not texts],
    }
    if not kinds["NoAns_"]:
        kinds = {"": kinds[""]}
    return {
        f"{kind}{metric}": sum(scores[metric][name] for name in names) / len(names)
        for kind, names in kinds.items()
        for metric in ("f1", "exact")
        if names
    }


def best_threshold(
    answers: Mapping[str, str],
    scores: Mapping[str, float],
    null_odds: Mapping[str, float],
    golds: Mapping[str, Sequence[str]],
) -> tuple[float, float]:
    """The best mean that any threshold over the null odds gives, and the threshold, as the official script of v2 does.

    It is chosen with the gold answers in hand, so it bounds what a threshold can do and is no score of the model.

    Args:
        answers: Best answer to every question, whatever its odds.
        scores: Their exact matches or F1.
        null_odds: No answer is given above the threshold.
        golds: Right answers.

    Returns:
        Mean and threshold. Where giving no answer at all is best the threshold lies below all odds; the official
        script, which is made for probabilities, names 0 there.
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
    """Answers, their scores, and apart from these what the best threshold would reach.

    Args:
        rankings: Of every question.
        golds: Right answers.
        threshold: Of the null odds; None for v1.1, which has no best threshold either.

    Returns:
        `predictions`; `f1`, `exact` and, by kind of question, `HasAns_...` and `NoAns_...`; `best_f1`,
        `best_f1_thresh`, `best_exact` and `best_exact_thresh`.
    """
    unanswerable = threshold is not None
    predictions = choose_answers(rankings, threshold)
    scores = average_scores(score_answers(predictions, golds, unanswerable), golds)
    if not unanswerable:
        return predictions, scores, {}
    answers = choose_answers(rankings, None)
    odds = {name: ranking.null_odds for name, ranking in rankings.items()}
    best = {}
    for metric, values in score_answers(answers, golds, unanswerable).items():
        best[f"best_{metric}"], best[f"best_{metric}_thresh"] = best_threshold(answers, values, odds, golds)
    return predictions, scores, best
