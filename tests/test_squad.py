"""SQuAD: official figures, windows over contexts, answers from logits, thresholds, and the script end to end."""

import json
import random
import re
import string
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from helpers import DATA, load_script
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from transformers import BertConfig, BertForMaskedLM

import modernalbert
from modernalbert.tokenization import load_tokenizer, save_tokenizer, train_tokenizer
from modernalbert.training.evaluation.metrics import average_scores, score_answers
from modernalbert.training.evaluation.squad import (
    Ranking,
    best_spans,
    best_threshold,
    check_rows,
    check_windows,
    choose_answers,
    cut_questions,
    evaluate_rankings,
    is_valid,
    keep_valid,
    list_answers,
    make_features,
    rank_answers,
)


OFFICIAL = DATA / "squad_v2" / "validation.parquet"
CONTEXT = (
    "The café “Zürich” opened in 1897 (some say 1,898). Its owner, José Núñez-Sánchez, sold 東京 tea at £2.50 a cup; "
    "the naïve critic wrote:   “It's the best!” In 1936 the house was torn down, and a hotel called A stands there now."
)
ANSWERS = ["“Zürich”", "1897", "1,898", "Núñez", "東京", "£2.50", "It's the best!", "The café", "A stands", "now."]


def ask(context, answer=None, name="q", question="What does the text say?"):
    found = {"text": [], "answer_start": []}
    if answer is not None:
        found = {"text": [answer], "answer_start": [context.index(answer)]}
    return {"id": name, "context": context, "question": question, "answers": found}


ROWS = [ask(CONTEXT, answer, f"q{number}") for number, answer in enumerate(ANSWERS)]
ROWS += [ask(CONTEXT, None, "none"), ask("", None, "empty")]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([CONTEXT, ROWS[0]["question"]], vocab_size=320)


def windows(rows, tokenizer, max_length=48, doc_stride=8, max_question_length=16):
    rows = Dataset.from_list(rows)
    lengths = {"max_length": max_length, "doc_stride": doc_stride, "max_question_length": max_question_length}
    settings = {"tokenizer": tokenizer, **lengths}
    return rows.map(make_features, True, batched=True, remove_columns=rows.column_names, fn_kwargs=settings).to_list()


def ideal_logits(features, width=64):
    """Certain of the labels, and of less where the label is [CLS], so that a window with the answer wins."""
    starts, ends = (np.full((len(features), width), -100.0, dtype=np.float32) for _ in range(2))
    for row, feature in enumerate(features):
        sure = 5 if feature["start_positions"] == feature["cls_position"] else 10
        starts[row, feature["start_positions"]] = ends[row, feature["end_positions"]] = sure
        starts[row, feature["cls_position"]] = max(starts[row, feature["cls_position"]], 0)
        ends[row, feature["cls_position"]] = max(ends[row, feature["cls_position"]], 0)
    return starts, ends


def reference_scores(predictions, golds, unanswerable):
    """The definition of both official scripts, one question at a time, without anything of ours."""

    def words(text):
        kept = "".join(letter for letter in text.lower() if letter not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", kept).split()

    exact, f1 = {}, {}
    for name, texts in golds.items():
        if unanswerable:
            texts = [text for text in texts if words(text)] or [""]
        predicted, exact[name], f1[name] = words(predictions[name]), 0.0, 0.0
        for expected in map(words, texts):
            exact[name] = max(exact[name], float(" ".join(predicted) == " ".join(expected)))
            left = list(expected)
            for word in predicted:
                if word in left:
                    left.remove(word)
            shared = len(expected) - len(left)
            if unanswerable and not (predicted and expected):
                f1[name] = max(f1[name], float(predicted == expected))
            elif shared:
                precision, recall = shared / len(predicted), shared / len(expected)
                f1[name] = max(f1[name], 2 * precision * recall / (precision + recall))
    return {"exact": exact, "f1": f1}


@pytest.mark.parametrize(
    ("prediction", "golds", "v2", "v1"),
    [  # exact match and F1, worked out by hand from evaluate-v2.0.py and evaluate-v1.1.py
        ("The  Cat!", ["cat"], (1, 1), (1, 1)),
        ("cat in the hat", ["dog", "a cat in hat"], (1, 1), (1, 1)),
        ("black cat", ["cat"], (0, 2 / 3), (0, 2 / 3)),
        ("cat cat", ["the cat", "cat dog cat"], (0, 4 / 5), (0, 4 / 5)),
        ("U.S.", ["US"], (1, 1), (1, 1)),
        ("semi-final", ["semi final"], (0, 0), (0, 0)),
        ("1–2", ["1-2"], (0, 0), (0, 0)),  # an en dash is no ASCII punctuation
        ("theory", ["ory"], (0, 0), (0, 0)),
        ("a-the", ["athe"], (1, 1), (1, 1)),  # punctuation goes before articles
        ("", ["cat"], (0, 0), (0, 0)),
        ("the", ["a"], (1, 1), (1, 0)),
        ("the", ["a", "cat"], (0, 0), (1, 0)),
        ("", [], (1, 1), None),
        ("the", [], (1, 1), None),
        ("cat", [], (0, 0), None),
    ],
)
def test_official_figures(prediction, golds, v2, v1):
    for expected, unanswerable in ((v2, True), (v1, False)):
        if expected is not None:
            scores = score_answers({"q": prediction}, {"q": golds}, unanswerable)
            assert (scores["exact"]["q"], scores["f1"]["q"]) == pytest.approx(expected)


def test_means_by_kind_of_question():
    golds = {"a": ["cat"], "b": ["dog"], "c": []}
    scores = score_answers({"a": "black cat", "b": "dog", "c": "dog"}, golds, True)
    expected = {
        "f1": 5 / 9,
        "exact": 1 / 3,
        "HasAns_f1": 5 / 6,
        "HasAns_exact": 1 / 2,
        "NoAns_f1": 0,
        "NoAns_exact": 0,
    }
    assert average_scores(scores, golds) == pytest.approx(expected)
    del golds["c"]
    assert set(average_scores(scores, golds)) == {"f1", "exact"}


def corrupt(text, context, draw):
    """What a model might say instead."""
    words = context.split() or ["word"]
    first = draw.randrange(len(words))
    return draw.choice(
        [text, "", text.upper() + ".", f"the {text}", text[1:], f"{text} {text}", " ".join(words[first : first + 4])]
    )


def test_official_development_set():
    """Gold answers score 100; corrupted ones as by the reference, also at their best thresholds."""
    if not OFFICIAL.exists():
        pytest.skip("needs SQuAD's rows: name their folder in MODERNALBERT_DATA")
    rows = load_dataset("parquet", data_files={"validation": str(OFFICIAL)}, split="validation")
    check_rows(rows, "validation", unanswerable=True)
    golds = {row["id"]: row["answers"]["text"] for row in rows}
    assert len(golds) == 11873 and sum(not texts for texts in golds.values()) == 5945
    perfect = {name: texts[0] if texts else "" for name, texts in golds.items()}
    assert set(average_scores(score_answers(perfect, golds, True), golds).values()) == {1.0}

    draw = random.Random(0)
    predictions = {row["id"]: corrupt(perfect[row["id"]], row["context"], draw) for row in rows}
    answerable = {name: texts for name, texts in golds.items() if texts}
    for part, unanswerable in ((golds, True), (answerable, False)):
        scores, expected = (
            function(predictions, part, unanswerable) for function in (score_answers, reference_scores)
        )
        assert scores["exact"] == expected["exact"] and 0.1 < average_scores(scores, part)["exact"] < 0.9
        assert scores["f1"] == pytest.approx(expected["f1"])


def test_windows_give_answers_back_exactly(tokenizer):
    features = windows(ROWS, tokenizer)
    held = {row["id"]: 0 for row in ROWS}
    for feature in features:
        row = ROWS[feature["row"]]
        assert len(feature["input_ids"]) <= 48 and feature["cls_position"] == 0
        first, last = feature["start_positions"], feature["end_positions"]
        if first == 0:
            assert last == 0
            continue
        held[row["id"]] += 1
        offsets, start = feature["offsets"], feature["context_start"]
        text = row["context"][offsets[first - start][0] : offsets[last - start][1]]
        assert text.strip() == row["answers"]["text"][0]
    assert all(held[f"q{number}"] >= 1 for number in range(len(ANSWERS))) and held["none"] == held["empty"] == 0
    assert sum(feature["row"] == 0 for feature in features) > 3
    # The context is covered, and neighbours share `doc_stride` tokens.
    parts = [feature["offsets"] for feature in features if feature["row"] == 0]
    assert parts[0][0][0] == 0 and parts[-1][-1][1] == len(CONTEXT)
    assert all(before[-8:] == after[:8] for before, after in zip(parts, parts[1:], strict=False))


def test_an_answer_that_a_window_cuts_is_none_there(tokenizer):
    features = windows([ask(CONTEXT, "1897 (some say 1,898)")], tokenizer, max_length=40, doc_stride=0)
    start, end = CONTEXT.index("1897"), CONTEXT.index("1,898)") + 6
    touching = [f for f in features if f["offsets"][0][0] < end and f["offsets"][-1][1] > start]
    assert len(touching) == 2 and all(f["start_positions"] == f["end_positions"] == 0 for f in touching)
    assert any(f["start_positions"] for f in windows([ask(CONTEXT, "1897 (some say 1,898)")], tokenizer, 48, 24))


@pytest.mark.parametrize(
    ("question", "context"), [("why?", ""), ("", CONTEXT), ("", ""), (CONTEXT, CONTEXT), (" ", "  ")]
)
def test_odd_texts(tokenizer, question, context):
    features = windows([ask(context, None, question=question)], tokenizer)
    assert len(features) >= 1 and all(f["start_positions"] == f["end_positions"] == 0 for f in features)
    (ranking,) = rank_answers([context], features, *ideal_logits(features))
    assert (ranking.answers == []) == (not context.strip())
    assert choose_answers({"q": ranking}, 0.0) == {"q": ""}


def test_long_questions_are_cut(tokenizer):
    length = len(tokenizer(CONTEXT, add_special_tokens=False)["input_ids"])
    for limit in range(1, length + 2):
        (question,) = cut_questions([CONTEXT], tokenizer, limit)
        tokens = len(tokenizer(question, add_special_tokens=False)["input_ids"])
        assert CONTEXT.startswith(question) and tokens <= limit
        assert tokens >= limit - 3 or question == CONTEXT  # a character has up to four tokens


@pytest.mark.parametrize("lengths", [{"max_length": 200}, {}, {"max_length": 40, "doc_stride": 16}])
def test_ideal_logits_give_the_answers(tokenizer, lengths):
    """In one window and in many; the right answer beats what other windows say."""
    features = windows(ROWS, tokenizer, **lengths)
    rankings = rank_answers([row["context"] for row in ROWS], features, *ideal_logits(features, 200))
    rankings = dict(zip([row["id"] for row in ROWS], rankings, strict=True))
    golds = {row["id"]: row["answers"]["text"] for row in ROWS}
    predictions, scores, best = evaluate_rankings(rankings, golds, 0.0)
    assert predictions == {name: texts[0] if texts else "" for name, texts in golds.items()}
    assert set(scores.values()) == {1.0} and best["best_f1"] == best["best_exact"] == 1.0


def test_rankings_are_those_of_all_pairs(tokenizer):
    """Random logits, against a loop over every pair of every window."""
    features = windows(ROWS, tokenizer)
    draw = np.random.default_rng(0)
    starts, ends = (draw.normal(size=(len(features), 64)).astype(np.float32) for _ in range(2))
    rankings = rank_answers(
        [row["context"] for row in ROWS], features, starts, ends, n_best_size=7, max_answer_length=5
    )
    for index, row in enumerate(ROWS):
        spans, null = {}, []
        for feature, start, end in zip(features, starts, ends, strict=True):
            if feature["row"] != index:
                continue
            null.append(float(start[0]) + float(end[0]))
            for i in range(len(feature["offsets"])):
                for j in range(i, min(i + 5, len(feature["offsets"]))):
                    span = feature["offsets"][i][0], feature["offsets"][j][1]
                    score = float(start[feature["context_start"] + i]) + float(end[feature["context_start"] + j])
                    spans[span] = max(score, spans.get(span, score))
        expected = sorted(spans.items(), key=lambda item: -item[1])
        expected = [(row["context"][a:b].strip(), score) for (a, b), score in expected if row["context"][a:b].strip()]
        assert rankings[index].null_score == min(null)
        assert [text for text, _ in rankings[index].answers] == [text for text, _ in expected[:7]]
        assert [s for _, s in rankings[index].answers] == pytest.approx([s for _, s in expected[:7]])


def test_best_spans_of_short_contexts():
    assert best_spans(np.zeros(0), np.zeros(0), 20, 30) == []
    assert best_spans(np.array([1.0]), np.array([2.0]), 20, 30) == [(3.0, 0, 0)]
    assert best_spans(np.array([1.0, 0]), np.array([2.0, 5]), 2, 30) == [(6.0, 0, 1), (5.0, 1, 1)]
    assert best_spans(np.array([1.0, 0]), np.array([2.0, 5]), 9, 1) == [(5.0, 1, 1), (3.0, 0, 0)]


def test_null_threshold_and_listing():
    rankings = {"q": Ranking(3.0, [("cat", 2.0), ("dog", 0.0)]), "empty": Ranking(1.0, [])}
    assert choose_answers(rankings, 1.0) == {"q": "cat", "empty": ""}  # above the threshold, not at it
    assert choose_answers(rankings, 0.9)["q"] == "" and choose_answers(rankings, None)["q"] == "cat"
    listed = list_answers(rankings["q"], unanswerable=True)
    assert [answer["text"] for answer in listed] == ["", "cat", "dog"]
    total = sum(np.exp([3.0, 2.0, 0.0]))
    assert [answer["probability"] for answer in listed] == pytest.approx(list(np.exp([3.0, 2.0, 0.0]) / total))
    assert [answer["text"] for answer in list_answers(rankings["q"], unanswerable=False)] == ["cat", "dog"]
    assert list_answers(rankings["empty"], unanswerable=False) == []


@pytest.mark.parametrize("seed", range(20))
def test_best_threshold_is_that_of_brute_force(seed):
    """Every threshold between the odds is tried; what it gives is the best, and is reached at the one returned."""
    draw = random.Random(seed)
    share = draw.random()
    golds = {f"q{number}": ["a cat"] if draw.random() < share else [] for number in range(30)}
    rankings = {
        name: Ranking(draw.gauss(0, 2), [(draw.choice(["cat", "black cat", "dog"]), draw.gauss(0, 2))])
        for name in golds
    }
    rankings["q0"] = Ranking(0.0, [])

    def mean(threshold, metric):
        return average_scores(score_answers(choose_answers(rankings, threshold), golds, True), golds)[metric]

    odds = {name: ranking.null_odds for name, ranking in rankings.items()}
    best = evaluate_rankings(rankings, golds, 0.0)[2]
    for metric in ("exact", "f1"):
        expected = max(mean(threshold, metric) for threshold in [-1e9, *odds.values()])
        assert best[f"best_{metric}"] == pytest.approx(expected)
        assert mean(best[f"best_{metric}_thresh"], metric) == pytest.approx(expected)


def test_best_threshold_by_hand():
    golds, answers = {"a": ["cat"], "b": [], "c": ["dog"]}, {"a": "cat", "b": "dog", "c": "dog"}
    scores = {"a": 1.0, "b": 0.0, "c": 1.0}
    # None: 1 right; up to a: 2; up to b: 1; up to c: 2, which is not better than the first 2.
    assert best_threshold(answers, scores, {"a": -2.0, "b": 0.5, "c": 1.0}, golds) == (2 / 3, -2.0)
    assert best_threshold(answers, scores, {"a": -2.0, "b": 2.0, "c": 1.0}, golds) == (1.0, 1.0)


def with_answers(answers):
    return lambda rows: Dataset.from_list([{**ROWS[0], "answers": answers}])


@pytest.mark.parametrize(
    ("change", "unanswerable", "message"),
    [
        (lambda rows: rows.select([]), True, "there are no train rows"),
        (lambda rows: rows.remove_columns("context"), True, "have no column 'context', but 'id'"),
        (with_answers("now."), True, "train row 0 has 'now.' as 'answers', expected {'text': "),
        (
            with_answers({"text": "now.", "answer_start": 3}),
            True,
            "train row 0 has .* as 'answers', expected {'text': ",
        ),
        (with_answers({"text": [None], "answer_start": [3]}), True, "the answer None at 3, expected a text"),
        (with_answers({"text": ["now."], "answer_start": ["3"]}), True, "the answer 'now.' at '3', expected a text"),
        (with_answers({"text": ["now."], "answer_start": [3, 4]}), True, "has 1 texts and 2 starts"),
        (with_answers(None), True, "column 'answers' is empty in train row 0"),
        (
            lambda rows: Dataset.from_list([{**ROWS[0], "context": 7}]),
            True,
            "train row 0 has 7 as 'context', expected a text",
        ),
        (lambda rows: Dataset.from_list([{**ROWS[0], "id": 1.5}]), True, "train row 0 has 1.5 as 'id'"),
        (lambda rows: Dataset.from_list([*ROWS, {**ROWS[0], "question": None}]), True, "'question' is empty in .* 12"),
        (lambda rows: Dataset.from_list([*ROWS, ROWS[3]]), True, "id 'q3' occurs twice, again in train row 12"),
        (lambda rows: rows, False, "question 'none' has no answer, as only `squad_v2` allows"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused(change, unanswerable, message):
    rows = Dataset.from_list(ROWS)
    assert check_rows(rows, "train", unanswerable=True).to_list() == ROWS
    with pytest.raises(ValueError, match=message):
        check_rows(change(rows), "train", unanswerable)


@pytest.mark.parametrize(
    "answers",
    [
        {"text": [], "answer_start": []},
        {"text": [""], "answer_start": [-1]},
        {"text": [" ", ""], "answer_start": [0, None]},
        {"text": [""], "answer_start": []},
    ],
)
def test_no_answer_is_written_in_many_ways(answers):
    rows = check_rows(Dataset.from_list([{**ROWS[0], "id": 7, "answers": answers}]), "train", unanswerable=True)
    assert rows[0]["answers"] == {"text": [], "answer_start": []} and rows[0]["id"] == "7"
    assert keep_valid(rows).to_list() == rows.to_list()
    with pytest.raises(ValueError, match="question '7' has no answer"):
        check_rows(Dataset.from_list([{**ROWS[0], "id": 7, "answers": answers}]), "train", unanswerable=False)


def test_plausible_answers_of_impossible_questions_are_none():
    rows = Dataset.from_list([{**ROWS[0], "is_impossible": True}, {**ROWS[1], "is_impossible": False}])
    assert [row["answers"]["text"] for row in check_rows(rows, "train", unanswerable=True)] == [[], ["1897"]]
    with pytest.raises(ValueError, match="train row 0 has 'false' as 'is_impossible', expected true or false"):
        check_rows(Dataset.from_list([{**ROWS[0], "is_impossible": "false"}]), "train", unanswerable=True)


def test_broken_rows_are_left_out_of_training_and_counted(caplog):
    rows = [{**ROWS[0], "id": str(n)} for n in range(150)]
    broken = {"id": "broken", "answers": {"text": ["1897"], "answer_start": [0]}}
    kept = keep_valid(check_rows(Dataset.from_list([*rows, {**ROWS[0], **broken}]), "train", unanswerable=True))
    assert len(kept) == 150 and "1 of the 151 rows of 'train' are left out: they have no first answer" in caplog.text
    with pytest.raises(ValueError, match="2 of the 12 rows .* id 'broken'.* more than 1%"):
        keep_valid(Dataset.from_list([*rows[:10], {**ROWS[0], **broken}, {**ROWS[0], **broken}]))


def test_valid_rows():
    row = ask(CONTEXT, "1897")
    assert is_valid(row) and is_valid(ask(CONTEXT))
    for answers in (
        {"text": ["1897"], "answer_start": [row["answers"]["answer_start"][0] + 1]},
        {"text": ["1897"], "answer_start": []},
        {"text": ["1897"], "answer_start": [None]},
        {"text": ["now."], "answer_start": [-4]},
        {"text": [" "], "answer_start": [3]},
    ):
        assert not is_valid({**row, "answers": answers})


def test_windows_that_would_not_move_on_are_refused(tokenizer):
    check_windows(tokenizer, 48, 28, 16)
    with pytest.raises(ValueError, match=r"`doc_stride` \(29\) must be at least 0 and below the 29 tokens"):
        check_windows(tokenizer, 48, 29, 16)


@pytest.fixture(scope="module")
def script():
    return load_script("run_squad")


@pytest.fixture(scope="module")
def command(tmp_path_factory, tokenizer, make_config):
    """Makes command lines of a run on the rows above, with models of two kinds."""
    folder = tmp_path_factory.mktemp("squad")
    torch.manual_seed(0)
    config = make_config(vocab_size=320, pad_token_id=tokenizer.pad_token_id)
    modernalbert.ModernAlbertForMaskedLM(config).save_pretrained(folder / "modernalbert")
    save_tokenizer(tokenizer, folder / "modernalbert")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForMaskedLM(BertConfig(vocab_size=320, max_position_embeddings=64, **sizes)).save_pretrained(folder / "bert")
    typed = load_tokenizer(folder / "modernalbert")
    typed.model_input_names, typed.padding_side = ["input_ids", "token_type_ids", "attention_mask"], "left"
    typed.save_pretrained(folder / "bert")

    def build(output_dir, *extra, model="modernalbert", rows=ROWS):
        data, train = (folder / f"{output_dir.name}-{output_dir.parent.name}{end}.jsonl" for end in ("", "-train"))
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        train.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
        return [
            *("--model_name_or_path", str(folder / model), "--output_dir", str(output_dir), "--do_train"),
            *("--train_files", str(train), "--validation_files", str(data), "--max_length", "48", "--doc_stride", "8"),
            *("--max_question_length", "16", "--max_steps", "4", "--save_steps", "2", "--learning_rate", "1e-3"),
            *("--per_device_train_batch_size", "4", "--report_to", "none", "--use_cpu", "true"),
            *("--disable_tqdm", "true", *extra),
        ]

    return build


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_script_v2(script, command, tmp_path, monkeypatch):
    """Trained and merged; files agree with the scores."""
    whole = tmp_path / "whole"
    results = script.main(command(whole, "--merge_after", "ema"))
    assert results == read(whole / "results.json") and results["task"] == "squad_v2"
    assert {"f1", "exact", "HasAns_f1", "NoAns_f1", "merged_f1"} <= set(results["scores"])
    assert list(results["scores"])[0] == "f1" and all(0 <= score <= 1 for score in results["scores"].values())
    best = {"best_f1", "best_f1_thresh", "best_exact", "best_exact_thresh"}
    assert set(results["details"]["best_threshold"]) == set(results["details"]["merged_best_threshold"]) == best
    assert not (whole / "training_args.bin").exists() and read(whole / "tokenizer.json")["truncation"] is None
    for folder in (whole, whole / "merged"):  # usage runs as written, and the Hub reads the scores
        card = ModelCard.load(folder / "README.md")
        name, scores = model_index_to_eval_results(card.data.to_dict()["model-index"])
        assert name == folder.name and {"f1", "exact_match"} <= {score.metric_type for score in scores}
        monkeypatch.chdir(folder.parent)
        exec(re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1], {})

    golds = {row["id"]: row["answers"]["text"] for row in ROWS}
    for folder, prefix in ((whole, ""), (whole / "merged", "merged_")):
        predictions, odds = read(folder / "predictions.json"), read(folder / "null_odds.json")
        scores = reference_scores(predictions, golds, True)["f1"]
        assert results["scores"][f"{prefix}f1"] == pytest.approx(sum(scores.values()) / len(scores))
        listed = read(folder / "nbest_predictions.json")
        assert set(predictions) == set(odds) == set(listed) == set(golds)
        for name, prediction in predictions.items():
            texts = [answer["text"] for answer in listed[name] if answer["text"]]
            assert prediction == ("" if odds[name] > 0 else next(iter(texts), ""))


def test_script_v1_with_bert(script, command, tmp_path):
    """Token types, and a tokenizer that pads on the left; then the trained model is evaluated alone."""
    rows = [row for row in ROWS if row["answers"]["text"]]
    task = ["--task_name", "squad"]
    output_dir = tmp_path / "bert"
    more = ["--max_steps", "100", "--learning_rate", "1e-2", "--max_length", "64", "--doc_stride", "20"]
    one = [ask(CONTEXT, "José Núñez-Sánchez", "q0"), ask(CONTEXT, "1936", "q1", "When?")]
    results = script.main(command(output_dir, *task, *more, model="bert", rows=one))
    assert results["scores"] == {"f1": 1.0, "exact": 1.0} and "best_threshold" not in results["details"]
    assert not (output_dir / "null_odds.json").exists()

    alone = command(tmp_path / "alone", *task, *more, model="bert", rows=one)
    alone.remove("--do_train")
    with pytest.raises(ValueError, match="was not trained for this task; give `do_train`"):
        script.main(alone)
    alone[1] = str(output_dir)
    assert script.main(alone)["scores"] == results["scores"]
    with pytest.raises(ValueError, match="'none' has no answer"):
        script.main(command(tmp_path / "v2", *task, rows=[*rows, ask(CONTEXT, None, "none")]))


@pytest.mark.parametrize(
    ("extra", "rows", "message"),
    [
        ([], [{key: row[key] for key in ("id", "question", "answers")} for row in ROWS], "have no column 'context'"),
        (
            [],
            [{**ROWS[0], "answers": {"text": ["1897"], "answer_start": [0]}}],
            "1 of the 1 rows of .train. have no first answer at its `answer_start`",
        ),
        (["--max_length", "65"], ROWS, r"`max_length` \(65\) must be at least 4, and at most the 64 tokens"),
        (["--doc_stride", "29"], ROWS, "must be at least 0 and below the 29"),
        (["--n_best_size", "0"], ROWS, "must be at least 1"),
        (["--null_score_diff_threshold", "nan"], ROWS, r"`null_score_diff_threshold` \(nan\) must be a finite number"),
        (["--task_name", "squad_v3"], ROWS, "there is no task 'squad_v3'; the tasks are squad, squad_v2"),
    ],
)
def test_script_refuses_before_work(script, command, tmp_path, extra, rows, message):
    with pytest.raises(ValueError, match=message):
        script.main(command(tmp_path / "refused", *extra, rows=rows))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_batches_are_padded_on_the_right(script, tokenizer, monkeypatch):
    """Whatever the tokenizer does: labels are positions."""
    features = windows([ROWS[0], ROWS[-1]], tokenizer)
    task = object.__new__(script.QuestionAnsweringTask)
    task.setup = SimpleNamespace(tokenizer=tokenizer)
    monkeypatch.setattr(tokenizer, "padding_side", "left")
    batch = task.collate(features)
    assert batch["attention_mask"].min() == 0 and set(batch["input_ids"][:, 0].tolist()) == {tokenizer.cls_token_id}
    for row, feature in zip(batch["input_ids"], features, strict=True):
        assert row[: len(feature["input_ids"])].tolist() == feature["input_ids"]
    assert torch.equal(batch["start_positions"], torch.tensor([feature["start_positions"] for feature in features]))
