"""Retrieval in BEIR's format: layouts and their faults, trec_eval's scores, search, encoding and training that resume."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from helpers import DATA, load_script
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from safetensors.torch import load_file

import modernalbert
from modernalbert.tokenization import padded_vocab_size, save_tokenizer, train_tokenizer


pytest.importorskip("sentence_transformers")
pytest.importorskip("pytrec_eval")

from sentence_transformers import SentenceTransformer  # noqa: E402

from modernalbert.training.evaluation import retrieval  # noqa: E402
from modernalbert.training.evaluation.retrieval import (  # noqa: E402
    TOP_K,
    encode_corpus,
    encode_texts,
    evaluate_bm25,
    load_retrieval,
    make_pairs,
    mean_scores,
    read_shards,
    score_run,
    search,
    search_bm25,
    to_run,
)


ROOT = Path(modernalbert.__file__).parent
SCIFACT = DATA / "beir" / "scifact"
ANIMALS = ["fox", "dog", "cat", "owl", "hen", "bee", "ant", "eel"]
PLACES = ["field", "river", "house", "cloud"]
CORPUS = [
    {"_id": f"{animal}-{place}", "title": animal.title(), "text": f"An animal of the {place}. " * (1 + number % 5)}
    for number, (animal, place) in enumerate((animal, place) for animal in ANIMALS for place in PLACES)
]
QUERIES = [{"_id": str(number), "text": f"Where is the {animal}?"} for number, animal in enumerate(ANIMALS)]
QRELS = [
    {"query-id": str(number), "corpus-id": f"{animal}-{place}", "score": 1 + (place == "cloud")}
    for number, animal in enumerate(ANIMALS)
    for place in PLACES[number % 2 :]
]


def write_set(folder, corpus=CORPUS, queries=QUERIES, qrels=QRELS, layout="beir"):
    """A set as BEIR's own zip files have it, or as parquet or jsonl in one folder; the same judgements in both splits, in another order."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        if layout == "parquet":
            Dataset.from_list(rows).to_parquet(str(folder / f"{name}.parquet"))
        else:  # keys of `metadata` differ from row to row, as in BEIR's files
            lines = [json.dumps({**row, "metadata": {str(number): []}}) for number, row in enumerate(rows)]
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    for split, judged in (("train", qrels[::-1]), ("test", qrels)):
        if layout == "parquet":
            Dataset.from_list(judged).to_parquet(str(folder / f"qrels_{split}.parquet"))
        elif layout == "jsonl":
            (folder / f"qrels_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judged))
        else:
            (folder / "qrels").mkdir(exist_ok=True)
            with (folder / "qrels" / f"{split}.tsv").open("w", newline="") as file:
                writer = csv.DictWriter(file, list(judged[0]), delimiter="\t")
                writer.writeheader()
                writer.writerows(judged)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("sets") / "animals")


@pytest.fixture(scope="module")
def encoder(make_model, tmp_path_factory):
    """Folder of a masked language model and its tokenizer."""
    folder = tmp_path_factory.mktemp("encoder") / "tiny"
    texts = [f"{row['title']} {row['text']}" for row in CORPUS] + [row["text"] for row in QUERIES]
    tokenizer = train_tokenizer(texts, vocab_size=320, model_max_length=64)
    ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("pad", "cls", "sep")}
    ids |= {"bos_token_id": ids["cls_token_id"], "eos_token_id": ids["sep_token_id"]}
    model = make_model(modernalbert.ModernAlbertForMaskedLM, vocab_size=padded_vocab_size(tokenizer), **ids)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture
def model(encoder):
    return SentenceTransformer(str(encoder), device="cpu")


@pytest.fixture(scope="module")
def run_beir():
    return load_script("run_beir")


# ---- Reading


@pytest.mark.parametrize("layout", ["beir", "parquet", "jsonl"])
def test_layouts_are_read_alike(tmp_path, layout):
    data = load_retrieval(str(write_set(tmp_path, layout=layout)), "test")
    assert data.corpus["_id"][:] == [row["_id"] for row in CORPUS]
    assert data.corpus["text"][:] == [f"{row['title']} {row['text']}".strip() for row in CORPUS]
    assert data.queries == {row["_id"]: row["text"] for row in QUERIES}
    assert data.qrels["1"] == {"dog-river": 1, "dog-house": 1, "dog-cloud": 2}
    assert data.facts["documents"] == 32 and data.facts["queries"] == 8 and data.facts["judgements"] == len(QRELS)


def test_sets_of_the_hub_are_read(monkeypatch):
    """There, the ids of judgements are numbers."""
    tables = {
        ("BeIR/animals", "corpus", "corpus"): [{"_id": "7", "title": "A", "text": "b"}],
        ("BeIR/animals", "queries", "queries"): [{"_id": "1", "title": "", "text": "q"}],
        ("BeIR/animals-qrels", None, "test"): [{"query-id": 1, "corpus-id": 7, "score": 1}],
    }
    monkeypatch.setattr(
        retrieval, "load_dataset", lambda name, config=None, split=None: Dataset.from_list(tables[name, config, split])
    )
    data = load_retrieval("BeIR/animals", "test")
    assert (data.queries, data.qrels, data.corpus["text"][:]) == ({"1": "q"}, {"1": {"7": 1}}, ["A b"])


def test_what_is_odd_but_allowed_is_counted(tmp_path):
    corpus = [{"_id": "a", "text": "No title."}, {"_id": "b", "title": " ", "text": ""}]
    qrels = [("1", "a", 1), ("1", "gone", 1), ("2", "a", 0), ("3", "b", 1)]
    qrels = [dict(zip(("query-id", "corpus-id", "score"), row, strict=True)) for row in qrels]
    data = load_retrieval(str(write_set(tmp_path, corpus, qrels=qrels)), "test")
    assert list(data.queries) == ["1", "2", "3"]  # those without judgements are left out
    names = ("empty documents", "queries without a relevant document", "judgements of documents that the corpus lacks")
    assert [data.facts[name] for name in names] == [1, 1, 1]
    # The document that is not there lowers the score of its query, and the query with nothing to find scores 0.
    scores = score_run({"1": {"a": 1.0}, "2": {"a": 1.0}, "3": {}}, data.qrels)
    assert [scores[query]["map"] for query in "123"] == [0.5, 0, 0]
    assert mean_scores(scores)["map"] == pytest.approx(1 / 6)
    pairs = make_pairs(data)
    assert pairs[:] == {"query": ["Where is the dog?"], "document": ["No title."]}


def replaced(rows, index, **values):
    return [{**row, **values} if number == index else row for number, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpus": [{"_id": "a", "title": "b"}]}, "lacks 'text'; it has '_id', 'title'"),
        ({"corpus": [{"_id": "a", "title": "b"}], "layout": "parquet"}, "lacks 'text'; it has '_id', 'title'"),
        ({"corpus": replaced(CORPUS, 3, _id="fox-field")}, "row 3 of the corpus .* of row 0, 'fox-field'"),
        (
            {"queries": replaced(QUERIES, 2, _id=None)},
            "row 2 of the queries .* None as '_id', expected an id of its own",
        ),
        ({"queries": QUERIES[1:]}, "name 1 queries that have no text, the first '0'"),
        ({"qrels": [{"query-id": "1", "doc": "x", "score": 1}]}, "lacks 'corpus-id'"),
        ({"qrels": replaced(QRELS, 1, score="high")}, "row 1 of the judgements .*'high'; expected two ids and an int"),
        ({"qrels": replaced(QRELS, 1, score=0.5), "layout": "parquet"}, "row 1 of the judgements .* an integer"),
        ({"qrels": [{**row, "corpus-id": f"x{n}"} for n, row in enumerate(QRELS)]}, "has none of the documents"),
        (
            {"qrels": [*QRELS, {**QRELS[0], "score": 0}]},
            "judges query '0' and document 'fox-field' as 0, an earlier row as 1",
        ),
        ({"corpus": replaced(CORPUS, 1, text=["a", "b"])}, "row 1 of the corpus .* has .'a', 'b'. as a text"),
        ({"corpus": replaced(CORPUS, 1, _id=1.0)}, "row 1 of the corpus .* has 1.0 as '_id'"),
        ({"corpus": [{"_id": "1", "text": "a"}, {"_id": 1, "text": "b"}]}, "row 1 of the corpus .* row 0, '1'"),
        ({"corpus": [{"_id": row["_id"], "text": " "} for row in CORPUS]}, "all 32 documents of .* are empty"),
        ({"corpus": []}, "there are no rows in the corpus of"),
    ],
)
def test_faults_are_named(tmp_path, change, message):
    with pytest.raises(Exception, match=message) as error:
        load_retrieval(str(write_set(tmp_path, **change)), "test")
    assert isinstance(error.value, ValueError) or "ValueError" in str(error.getrepr())


def test_a_quotation_mark_in_tsv_is_a_letter(tmp_path):
    """The rows read are the rows there."""
    texts = ['"Six" feet', 'five "', '"four', "three", '"']
    write_set(tmp_path, qrels=[{"query-id": "0", "corpus-id": "d1", "score": 1}])
    (tmp_path / "corpus.jsonl").unlink()
    lines = ["_id\ttitle\ttext", *(f"d{n}\t\t{text}" for n, text in enumerate(texts))]
    (tmp_path / "corpus.tsv").write_text("\n".join(lines) + "\n")
    data = load_retrieval(str(tmp_path), "test")
    assert data.corpus["text"][:] == texts and data.facts["documents"] == 5
    (tmp_path / "corpus.tsv").write_text("\n".join(lines) + "\td6\n")
    with pytest.raises(ValueError, match="line 6 has 4 fields, and the header 3"):
        load_retrieval(str(tmp_path), "test")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"qrels/dev.parquet, .*qrels_dev.tsv; one of these must be there"):
        load_retrieval(str(write_set(tmp_path)), "dev")
    (tmp_path / "corpus.tsv").write_text("_id\ttext\na\tb\n")
    with pytest.raises(ValueError, match="has corpus.jsonl, corpus.tsv, of which one alone may be there"):
        load_retrieval(str(tmp_path), "test")
    (tmp_path / "corpus.tsv").unlink()
    (tmp_path / "corpus.jsonl").write_text("{broken\n")
    with pytest.raises(Exception, match="corpus.jsonl', line 1: Expecting property name"):
        load_retrieval(str(tmp_path), "test")


# ---- Scores


def naive_scores(ranking, judged):
    """Measures of one query by their definitions, from the ids of documents in order."""
    gains = [max(judged.get(document, 0), 0) for document in ranking]
    ideal = sorted((max(gain, 0) for gain in judged.values()), reverse=True)
    relevant = sum(gain > 0 for gain in ideal)
    hits = [rank for rank, gain in enumerate(gains, 1) if gain > 0]
    dcg, best = (sum(gain / math.log2(1 + rank) for rank, gain in enumerate(row[:10], 1)) for row in (gains, ideal))
    return {
        "ndcg_at_10": dcg / best if best else 0.0,
        "map": sum(number / rank for number, rank in enumerate(hits, 1)) / relevant if relevant else 0.0,
        "recall_at_100": sum(rank <= 100 for rank in hits) / relevant if relevant else 0.0,
        "mrr": 1 / hits[0] if hits else 0.0,
    }


@pytest.mark.parametrize("levels", [3, 1000], ids=["ties", "no ties"])
def test_measures_are_those_of_the_definitions(levels):
    """Of documents with equal scores, trec_eval takes the last id first, in whatever order they are given."""
    generator = np.random.default_rng(0)
    documents = [f"d{number}" for number in range(250)]
    qrels = {
        str(query): {str(name): int(generator.integers(-1, 4)) for name in generator.choice(documents, 40, False)}
        for query in range(20)
    }
    qrels["nothing"] = {"d1": 0}
    run = {
        query: {str(name): float(generator.integers(levels)) for name in generator.permutation(documents)}
        for query in qrels
    }
    for query, scores in score_run(run, qrels).items():
        ranking = sorted(run[query], key=lambda name: (run[query][name], name), reverse=True)
        assert scores == pytest.approx(naive_scores(ranking, qrels[query]), rel=1e-6), query


def test_a_query_does_not_find_itself():
    documents = [str(number) for number in range(TOP_K + 50)]
    scores = np.linspace(1, 0, TOP_K + 1)
    run = to_run([(scores, range(TOP_K + 1))] * 2, ["3", "x"], documents)
    assert [len(found) for found in run.values()] == [TOP_K, TOP_K]
    assert "3" not in run["3"] and run["3"][str(TOP_K)] == 0 and str(TOP_K) not in run["x"]


# ---- Search


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 1000])
def test_chunked_search_equals_brute_force(chunk_size):
    """Small integers have many equal products, of which the first documents are found."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randint(-2, 3, (9, 4), generator=generator).float()
    corpus = torch.randint(-2, 3, (500, 4), generator=generator).float()
    scores, indices = search(queries, corpus.split(chunk_size), top_k=30, block_size=4)
    products = (queries @ corpus.T).numpy()
    expected = np.argsort(-products, axis=1, kind="stable")[:, :30]
    assert indices.tolist() == expected.tolist()
    assert scores.tolist() == np.take_along_axis(products, expected, axis=1).tolist()


def test_search_holds_one_chunk_and_may_find_less_than_asked():
    seen = []

    def chunks():
        for number in range(3):
            seen.append(number)
            yield torch.eye(4)[number : number + 1]

    scores, indices = search(torch.eye(4), chunks(), top_k=10)
    assert indices.shape == scores.shape == (4, 3) and seen == [0, 1, 2]


def test_bm25_by_hand():
    documents = ["a b b", "a c", "", "D d; d d"]
    k1, b, mean = 0.9, 0.4, 9 / 4

    def score(count, length, frequency):
        idf = math.log(1 + (4 - frequency + 0.5) / (frequency + 0.5))
        return idf * count * (k1 + 1) / (count + k1 * (1 - b + b * length / mean))

    found = list(search_bm25(["b a", "d x D", "x"], documents, top_k=3))
    assert [indices.tolist() for _, indices in found] == [[0, 1], [3], []]
    assert found[0][0] == pytest.approx([score(2, 3, 1) + score(1, 3, 2), score(1, 2, 2)])
    assert found[1][0] == pytest.approx([2 * score(4, 4, 1)])  # a word counts as often as the query has it


@pytest.mark.skipif(not SCIFACT.exists(), reason="needs SciFact's rows: name their folder in MODERNALBERT_DATA")
def test_bm25_on_scifact():
    scores = mean_scores(evaluate_bm25(load_retrieval(str(SCIFACT), "test")))
    assert scores["ndcg_at_10"] == pytest.approx(0.659, abs=0.005)
    assert scores["recall_at_100"] == pytest.approx(0.889, abs=0.005)


# ---- Encoding


def test_encoding_in_shards_keeps_the_order(model, folder, tmp_path):
    corpus = load_retrieval(str(folder), "test").corpus
    shards = encode_corpus(model, corpus, tmp_path, batch_size=3, shard_size=10)
    assert [path.name for path in shards] == [f"0000{number}.safetensors" for number in range(4)]
    alone = torch.cat([encode_texts(model, [text], "document", 1) for text in corpus["text"]])
    torch.testing.assert_close(torch.cat(list(read_shards(shards))), alone)
    torch.testing.assert_close(alone.norm(dim=1), torch.ones(32))


def test_encoding_goes_on_where_it_was_killed(model, folder, tmp_path, monkeypatch):
    corpus = load_retrieval(str(folder), "test").corpus
    expected = [load_file(path) for path in encode_corpus(model, corpus, tmp_path / "whole", 4, shard_size=10)]
    encoded = []

    def count(model, texts, *arguments):
        if len(encoded) == stop:
            raise KeyboardInterrupt
        encoded.append(texts[0])
        return encode_texts(model, texts, *arguments)

    def encode():
        encoded.clear()
        return encode_corpus(model, corpus, tmp_path / "killed", 4, shard_size=10)

    monkeypatch.setattr(retrieval, "encode_texts", count)
    stop = 2
    with pytest.raises(KeyboardInterrupt):
        encode()
    assert len(list((tmp_path / "killed").iterdir())) == 2
    stop = None
    shards = encode()
    assert encoded == [corpus[20]["text"], corpus[30]["text"]]
    assert all(
        torch.equal(load_file(path)["embeddings"], old["embeddings"])
        for path, old in zip(shards, expected, strict=True)
    )

    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    encode()
    assert encoded == [corpus[10]["text"]]  # what was damaged, and nothing else
    model.prompts["document"] = "passage: "
    encode()
    assert len(encoded) == 4
    model[0].auto_model.merge_experts()
    encode()
    assert len(encoded) == 4


def test_embeddings_that_cannot_be_searched_are_refused(model):
    model.similarity_fn_name = "euclidean"
    with pytest.raises(ValueError, match="compares embeddings by 'euclidean'"):
        encode_texts(model, ["a"], "query", 1)
    model.similarity_fn_name = "dot"
    with torch.no_grad():
        model[0].auto_model.final_norm.weight.fill_(math.inf)
    with pytest.raises(ValueError, match="embedding of a query is not finite"):
        encode_texts(model, ["a"], "query", 1)


# ---- The script


def arguments(encoder, folder, output, *more):
    return [
        *("--model_name_or_path", str(encoder), "--dataset", str(folder), "--output_dir", str(output)),
        *("--use_cpu", "True", "--disable_tqdm", "True", "--report_to", "none", "--max_seq_length", "32", *more),
    ]


TRAINING = ["--do_train", "--max_steps", "6", "--save_steps", "2", "--learning_rate", "1e-3", "--num_negatives", "1"]
TRAINING += ["--per_device_train_batch_size", "4", "--query_prompt", "find: "]


def test_training_and_evaluation(run_beir, encoder, folder, tmp_path, monkeypatch):
    more = ["--merge_after", "regression", "--bm25", "True", "--mini_batch_size", "2", "--seeds", "1", "2"]
    results = run_beir.main(arguments(encoder, folder, tmp_path, *TRAINING, *more))
    assert json.loads((tmp_path / "results.json").read_text()) == results and results["seeds"] == [1, 2]
    scores, details = results["scores"], results["details"]
    assert next(iter(scores)) == "ndcg_at_10" and {"merged_mrr", "recall_at_100"} < scores.keys()
    assert all(0 <= value <= 1 for value in scores.values()) and details["baselines"]["BM25"]["recall_at_100"] == 1
    first, second = details["by_seed"]["mrr"]
    assert scores["mrr"] == pytest.approx((first + second) / 2) and details["std"]["mrr"] is not None
    for name, prefix in (("ndcg_at_10 of queries", ""), ("merged_ndcg_at_10 of queries", "merged_")):
        assert np.mean(list(details[name].values())) == pytest.approx(scores[f"{prefix}ndcg_at_10"])
    assert str(tmp_path) not in (tmp_path / "results.json").read_text()
    (second_run,) = tmp_path.glob("seed-2-*")
    assert SentenceTransformer(str(second_run / "merged"))[0].auto_model.config.num_experts == 0

    # What was measured is what others load.
    trained = next(tmp_path.glob("seed-1-*"))
    model = SentenceTransformer(str(trained / "model"), trust_remote_code=True, device="cpu")
    assert model.max_seq_length == 32 and model.prompts["query"] == "find: "
    documents = model.encode_document(
        [f"{row['title']} {row['text']}".strip() for row in CORPUS], normalize_embeddings=True, convert_to_tensor=True
    )
    shard = load_file(trained / "embeddings" / "model" / "00000.safetensors")["embeddings"]
    torch.testing.assert_close(documents, shard)

    for path, prefix in ((trained / "model", ""), (trained / "merged", "merged_")):
        card = ModelCard.load(path / "README.md")
        own = json.loads((trained / "results.json").read_text())["scores"]
        _, found = model_index_to_eval_results(card.data.to_dict()["model-index"])
        assert {each.metric_name: each.metric_value for each in found} == pytest.approx(
            {name: own[prefix + name] for name in retrieval.MEASURES}, abs=1e-4
        )
        assert not any(row["text"] in card.content for row in QUERIES)
        assert json.loads((path / "tokenizer.json").read_text())["truncation"] is None
        monkeypatch.chdir(trained)
        exec(re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1], {})

    compare = load_script("compare_results")
    compare.main(["--runs", str(tmp_path), "--output_dir", str(tmp_path / "compared")])
    lines = (tmp_path / "compared" / "comparison.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["tiny", "tiny, merged", "BM25"]

    monkeypatch.setattr(run_beir.RetrievalTask, "load_model", None)
    assert run_beir.main(arguments(encoder, folder, tmp_path, *TRAINING, *more)) == results


@pytest.mark.parametrize("extra", [[], ["--peft"]], ids=["whole", "lora"])
def test_what_lies_in_the_folder_is_used_only_if_it_is_of_this_run(
    run_beir, encoder, folder, tmp_path, monkeypatch, extra
):
    """An untrained model is not taken for the trained one; pairs are mined once; a LoRA goes on where it was stopped."""
    whole, killed, training = tmp_path / "whole", tmp_path / "killed", [*TRAINING, *extra]
    expected = run_beir.main(arguments(encoder, folder, whole, *training))
    assert run_beir.main(arguments(encoder, folder, killed))["scores"] != expected["scores"]
    (killed / "results.json").unlink()  # as if it was killed with the untrained `model` there
    steps = []
    own = run_beir.ContrastiveTrainer.training_step

    def training_step(*values, **options):
        if len(steps) == 3:
            raise KeyboardInterrupt
        steps.append(1)
        return own(*values, **options)

    monkeypatch.setattr(run_beir.ContrastiveTrainer, "training_step", training_step)
    with pytest.raises(KeyboardInterrupt):
        run_beir.main(arguments(encoder, folder, killed, *training))
    assert not (killed / "results.json").exists()
    steps.extend([1] * 4)  # never 3 again
    monkeypatch.setattr(run_beir, "mine_hard_negatives", None)
    with pytest.raises(ValueError, match="temperature: 0.05 before, 0.1 now"):
        run_beir.main(arguments(encoder, folder, killed, *training, "--temperature", "0.1"))
    assert run_beir.main(arguments(encoder, folder, killed, *training))["scores"] == expected["scores"]
    assert len(steps) == 7 + 4  # from the checkpoint of step 2
    one, other = (load_file(path / "model" / "model.safetensors") for path in (whole, killed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_zero_shot_of_any_encoder(run_beir, folder, encoder, tmp_path):
    from transformers import AutoTokenizer, BertConfig, BertModel

    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=320, max_position_embeddings=64, **sizes)).save_pretrained(tmp_path / "bert")
    results = run_beir.main(arguments(tmp_path / "bert", folder, tmp_path / "out", "--pooling", "cls"))
    assert results["scores"].keys() == retrieval.MEASURES.keys() and results["model_type"] == "bert"
    saved = SentenceTransformer(str(tmp_path / "out" / "model"), device="cpu")
    text = saved.tokenizer("Fox", return_tensors="pt")
    first = saved[0].auto_model(**text).last_hidden_state[0, 0]
    torch.testing.assert_close(torch.from_numpy(saved.encode("Fox")), first.detach())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max_seq_length", "1"], r"`max_seq_length` \(1\) must be at least 4"),
        (["--prompts", "x"], "`prompts` cannot be 'x' here: `query_prompt` and"),
        (
            [
                "--do_train",
                "--max_steps",
                "1",
                "--dataloader_drop_last",
                "True",
                "--per_device_train_batch_size",
                "500",
            ],
            "the 28 train rows make no batch; leave out `dataloader_drop_last`",
        ),
        (["--eval_strategy", "epoch"], "`eval_strategy` cannot be .* the model is scored once, after its training"),
        (["--mining_margin", "1"], r"`mining_margin` \(1.0\) must be at least 0 and below 1"),
        (["--seeds", "1", "1"], "names a run twice"),
        (["--seeds", "1"], "`seeds` is for training: give `do_train`"),
        (["--num_negatives", "2"], "`num_negatives` is for training"),
        (["--do_train", "--mining_model", "x"], "`mining_model` mines negatives: give `num_negatives`"),
        (["--temperature", "0"], r"`temperature` \(0\) must be above 0"),
        (["--mini_batch_size", "0"], "must be at least 1"),
        (["--max_seq_length", "65"], r"`max_seq_length` \(65\) must be at least 4, and at most the 64 tokens"),
    ],
)
def test_bad_arguments_are_refused(run_beir, encoder, folder, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        run_beir.main(arguments(encoder, folder, tmp_path, *more))
    assert not (tmp_path / "results.json").exists()


def test_negatives_that_cannot_be_mined(run_beir, encoder, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run_beir, "mine_hard_negatives", lambda pairs, *values, **options: pairs.select([]))
    with pytest.raises(ValueError, match=r"no pair has 1 negatives; .* leave `mining_margin` \(None\) out"):
        run_beir.main(arguments(encoder, folder, tmp_path, *TRAINING))


# ---- The router's balance


@pytest.mark.parametrize("mini_batch_size", [None, 2], ids=["whole", "GradCache"])
def test_contrastive_training_balances_the_router(encoder, mini_batch_size):
    """Gradients are those of the contrastive loss plus the weighted balancing loss, whatever scales the sum."""
    from sentence_transformers.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss

    from modernalbert.training.evaluation.contrastive import BalancedLoss

    model = SentenceTransformer(str(encoder), device="cpu").train()
    module = model[0].auto_model
    module.config.router_aux_loss_coef = 3.0
    for router in (part for part in module.modules() if hasattr(part, "jitter_noise")):
        router.jitter_noise = 0.0
    columns = [
        model.tokenizer(texts, padding=True, return_tensors="pt")
        for texts in (["Fox?", "A dog?", "Owl"], ["It is a fox.", "Dog", "An owl of the field"])
    ]
    columns = [dict(column) for column in columns]

    def gradients(loss):
        model.zero_grad()
        (0.5 * loss).backward()
        return {
            name: parameter.grad.clone() for name, parameter in module.named_parameters() if parameter.grad is not None
        }

    plain = gradients(MultipleNegativesRankingLoss(model)([dict(column) for column in columns], None))
    calls, forward = [], module.forward

    def record(**batch):
        calls.append((batch, torch.is_grad_enabled()))
        return forward(**batch)

    module.forward = record
    loss = MultipleNegativesRankingLoss(model)
    if mini_batch_size is not None:
        loss = CachedMultipleNegativesRankingLoss(model, mini_batch_size=mini_batch_size)
    loss = BalancedLoss(model, loss)
    parts = loss([dict(column) for column in columns], None)
    found = gradients(sum(parts.values()))
    assert parts["aux_loss"] > 0 and not parts["aux_loss"].requires_grad
    loss.remove()
    assert module.forward.__func__ is type(module).forward

    first = [batch for batch, grad in calls if grad == (mini_batch_size is None)]  # each text once
    tokens = sum(batch["attention_mask"].sum() for batch in first)
    assert tokens == sum(column["attention_mask"].sum() for column in columns)
    expected = sum(3 * module(**batch).aux_loss * batch["attention_mask"].sum() / tokens for batch in first)
    assert parts["aux_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    balance = gradients(expected)
    assert any("router" in name for name in balance)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, plain[name] + balance.get(name, 0), rtol=1e-4, atol=1e-5)
