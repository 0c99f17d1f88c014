"""Retrieval on sets in BEIR's format: reading, encoding that resumes, exact search in chunks, BM25, trec_eval's scores."""

import csv
import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytrec_eval
import torch
from datasets import Dataset, Features, Value, load_dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sklearn.feature_extraction.text import CountVectorizer
from tqdm.auto import tqdm

from ..data import fingerprint
from ..runs import write_files


logger = logging.getLogger(__name__)

TOP_K = 1000  # BEIR's: how many documents of each query are scored

# Our names, which are mteb's, to trec_eval's. `map` and `mrr` end at `TOP_K`.
MEASURES = {"ndcg_at_10": "ndcg_cut_10", "map": "map", "recall_at_100": "recall_100", "mrr": "recip_rank"}

TEXTS = Features({"_id": Value("string"), "text": Value("string")})


@dataclass(frozen=True)
class RetrievalSet:
    """Documents, and the queries of one split with their judgements.

    Attributes:
        corpus: Columns `_id` and `text`, the latter with the title in front; on disk, as `datasets` keeps it.
        queries: Id to text, of those that have judgements.
        qrels: Query to document to relevance; above 0 is relevant.
        facts: What was read, for the results.
    """

    corpus: Dataset
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    facts: dict[str, Any]


def load_retrieval(source: str, split: str) -> RetrievalSet:
    """Reads a set of the Hub in BEIR's layout (`BeIR/scifact`), or a folder.

    A folder holds `corpus` (`_id`, `text`, maybe `title`), `queries` (`_id`, `text`), and `qrels/SPLIT` or
    `qrels_SPLIT` (`query-id`, `corpus-id`, `score`), each as parquet, jsonl or, judgements, tsv with a header.

    The rules are BEIR's. A document is its title, a space and its text. Queries without judgements are left out; those
    whose judgements are all 0 score 0. Empty texts are encoded as they are, and documents that judgements name and the
    corpus lacks count as not found. Of each of these the number is logged.

    Args:
        source: Name on the Hub, or folder.
        split: Of the judgements.

    Raises:
        FileNotFoundError: A file of the folder is missing.
        ValueError: A column or an id is missing, an id occurs twice, a relevance is no integer, or there is nothing.
    """
    if Path(source).is_dir():
        corpus, queries = (read_rows(source, [name], ("_id", "title", "text")) for name in ("corpus", "queries"))
        judgements = read_rows(source, [f"qrels/{split}", f"qrels_{split}"], ("query-id", "corpus-id", "score"))
    else:
        corpus, queries = (load_dataset(source, name, split=name) for name in ("corpus", "queries"))
        judgements = load_dataset(f"{source}-qrels", split=split)
    corpus, queries = join_texts(corpus, f"corpus of '{source}'"), join_texts(queries, f"queries of '{source}'")
    texts = dict(zip(queries["_id"], queries["text"], strict=True))
    qrels = read_judgements(judgements, f"judgements '{split}' of '{source}'")
    if unknown := [query for query in qrels if query not in texts]:
        raise ValueError(
            f"judgements '{split}' of '{source}' name {len(unknown)} queries that have no text, the first '{unknown[0]}'; "
            "are they of another set?"
        )
    documents = set(corpus["_id"])
    counts = {
        "documents": len(corpus),
        "queries": len(qrels),
        "judgements": sum(map(len, qrels.values())),
        "empty documents": sum(not text for text in corpus["text"]),
        "empty queries": sum(not texts[query] for query in qrels),
        "queries without a relevant document": sum(max(found.values()) <= 0 for found in qrels.values()),
        "judgements of documents that the corpus lacks": sum(
            document not in documents for found in qrels.values() for document in found
        ),
    }
    logger.info("%s, %s: %s", source, split, ", ".join(f"{count} {name}" for name, count in counts.items() if count))
    if counts["judgements"] == counts["judgements of documents that the corpus lacks"]:
        raise ValueError(f"the corpus of '{source}' has none of the documents that judgements '{split}' name")
    judged = Dataset.from_dict(
        {"query": [texts[query] for query in qrels], "found": list(map(json.dumps, qrels.values()))}
    )
    prints = f"{fingerprint(corpus)}-{fingerprint(judged)}"
    facts = {"source": source, "split": split, **counts, "fingerprint": prints}
    return RetrievalSet(corpus, {query: texts[query] for query in qrels}, qrels, facts)


def read_rows(folder: str | Path, names: Sequence[str], columns: Sequence[str]) -> Dataset | list[dict[str, str]]:
    """Rows of the first file that exists, of those named, with any of the endings.

    Raises:
        FileNotFoundError: There is none.
        ValueError: A line is no JSON object, or lacks a column.
    """
    candidates = [f"{name}.{ending}" for name in names for ending in ("parquet", "jsonl", "tsv")]
    path = next((path for name in candidates if (path := Path(folder) / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"'{folder}' has no {', '.join(candidates)}; one of these must be there (BEIR's layout)"
        )
    if path.suffix == ".parquet":
        return load_dataset("parquet", data_files=str(path), split="train")
    if path.suffix == ".tsv":
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file, delimiter="\t"))

    def parse(batch):
        try:
            rows = [{"title": None, **json.loads(line)} for line in batch["text"] if line.strip()]
            return {column: [None if row[column] is None else str(row[column]) for row in rows] for column in columns}
        except (ValueError, TypeError) as error:
            raise ValueError(f"'{path}' has a line that is no JSON object ({error}); mend or drop it") from error
        except KeyError as error:
            raise ValueError(f"'{path}' has a line without {error}; mend or drop it") from error

    # The `json` reader of `datasets` makes a column of every key of `metadata`, of which some sets have thousands.
    lines = load_dataset("text", data_files=str(path), split="train")
    strings = Features({column: Value("string") for column in columns})
    return lines.map(parse, batched=True, remove_columns=["text"], features=strings, desc=f"Reading {path.name}")


def join_texts(rows: Dataset | list[dict], what: str) -> Dataset:
    """Columns `_id` and `text`, both strings, the latter with the title in front.

    Raises:
        ValueError: There are no rows, a column or an id is missing, or an id occurs twice.
    """
    rows = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    check_columns(rows.column_names, ("_id", "text"), len(rows), what)

    def join(batch):
        titles = batch.get("title", [None] * len(batch["_id"]))
        texts = [f"{title or ''} {text or ''}".strip() for title, text in zip(titles, batch["text"], strict=True)]
        return {"_id": [None if name is None else str(name) for name in batch["_id"]], "text": texts}

    joined = rows.map(join, batched=True, remove_columns=rows.column_names, features=TEXTS, desc=f"Reading {what}")
    seen = set()
    for place, name in enumerate(joined["_id"]):
        if name is None or name in seen:
            fault = "no '_id'" if name is None else f"the '_id' of an earlier one, '{name}'"
            raise ValueError(f"row {place} of the {what} has {fault}; mend or drop that row")
        seen.add(name)
    return joined


def read_judgements(rows: Dataset | list[dict], what: str) -> dict[str, dict[str, int]]:
    """Query to document to relevance.

    Raises:
        ValueError: There are no rows, a column is missing, or a relevance is no integer.
    """
    names = rows.column_names if isinstance(rows, Dataset) else list(rows[0] if rows else ())
    columns = ("query-id", "corpus-id", "score")
    check_columns(names, columns, len(rows), what)
    qrels = {}
    for place, row in enumerate(rows):
        query, document, score = (row[column] for column in columns)
        try:
            relevance = int(score)
            if query is None or document is None or relevance != float(score):
                raise ValueError
        except (TypeError, ValueError):
            raise ValueError(
                f"row {place} of the {what} is {query!r}, {document!r}, {score!r}; expected two ids and an integer"
            ) from None
        qrels.setdefault(str(query), {})[str(document)] = relevance
    return qrels


def check_columns(names: Sequence[str], expected: Sequence[str], num_rows: int, what: str) -> None:
    """Sees that there are rows with the expected columns.

    Raises:
        ValueError: There are none.
    """
    if num_rows == 0:
        raise ValueError(f"the {what} have no rows")
    if missing := [name for name in expected if name not in names]:
        raise ValueError(f"the {what} lack {', '.join(map(repr, missing))}; they have {', '.join(map(repr, names))}")


def make_pairs(data: RetrievalSet) -> Dataset:
    """Each query with each of its relevant documents, in columns `query` and `document`; empty ones are left out.

    Raises:
        ValueError: There is none.
    """
    places = {name: place for place, name in enumerate(data.corpus["_id"])}
    relevant = [
        (query, places[document])
        for query, found in data.qrels.items()
        for document, relevance in found.items()
        if relevance > 0 and document in places
    ]
    documents = data.corpus.select([place for _, place in relevant])["text"]
    pairs = [
        {"query": data.queries[query], "document": document}
        for (query, _), document in zip(relevant, documents, strict=True)
        if data.queries[query] and document
    ]
    if not pairs:
        raise ValueError(f"judgements '{data.facts['split']}' of '{data.facts['source']}' have no pair to train on")
    return Dataset.from_list(pairs)


def encode_texts(model: SentenceTransformer, texts: list[str], kind: str, batch_size: int) -> torch.Tensor:
    """Embeddings in float32, whose dot product is the model's similarity, with the model's prompt for the kind of text.

    sentence-transformers sorts the texts by length, and restores the order.

    Args:
        model: Whose similarity is the cosine or the dot product.
        texts: Queries or documents.
        kind: `"query"` or `"document"`.
        batch_size: Texts of a batch.

    Raises:
        ValueError: The model has another similarity, or an embedding is not finite.
    """
    if model.similarity_fn_name not in ("cosine", "dot"):
        raise ValueError(
            f"the model compares embeddings by '{model.similarity_fn_name}'; exact search here is by 'cosine' or 'dot': "
            "set `similarity_fn_name` in its config_sentence_transformers.json"
        )
    encode = {"query": model.encode_query, "document": model.encode_document}[kind]
    embeddings = encode(
        texts,
        batch_size=batch_size,
        normalize_embeddings=model.similarity_fn_name == "cosine",
        convert_to_tensor=True,
        show_progress_bar=False,
    ).float()
    if not embeddings.isfinite().all():
        raise ValueError(f"the embedding of a {kind} is not finite; is the model broken, or its precision too low?")
    return embeddings


def encode_corpus(
    model: SentenceTransformer, corpus: Dataset, folder: str | Path, batch_size: int, shard_size: int = 2048
) -> list[Path]:
    """Writes embeddings of the documents, in their order, as shards; finished ones are not encoded again.

    A shard knows what it was made from: of another model, prompt or text it is made anew. Each is a safetensors file
    with one tensor, `embeddings`, written whole or not at all.

    Args:
        model: See [`encode_texts`].
        corpus: Column `text`.
        folder: Where the shards are.
        batch_size: Texts of a batch.
        shard_size: Documents of a shard, which are in memory together, and are sorted by length together.

    Returns:
        The shards.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model_key = hash_model(model)
    shards = []
    with tqdm(total=len(corpus), desc="Encoding", unit=" documents") as progress:
        for start in range(0, len(corpus), shard_size):
            texts = list(corpus[start : start + shard_size]["text"])
            path = folder / f"{start // shard_size:05d}.safetensors"
            key = hashlib.sha256((model_key + json.dumps(texts)).encode()).hexdigest()
            if read_key(path) != key:
                embeddings = encode_texts(model, texts, "document", batch_size).cpu()
                write_shard(path, embeddings, key)
            shards.append(path)
            progress.update(len(texts))
    return shards


def hash_model(model: SentenceTransformer) -> str:
    """Of everything that embeddings depend on: weights, modules, prompts, and where texts are cut."""
    state = hashlib.sha256(repr((str(model), model.prompts, model.max_seq_length)).encode())
    for name, tensor in model.state_dict().items():
        state.update(name.encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return state.hexdigest()


def write_shard(path: Path, embeddings: torch.Tensor, key: str) -> None:
    """Writes a shard and what it was made from."""
    write_files(path.parent, lambda draft: save_file({"embeddings": embeddings}, draft / path.name, {"key": key}))


def read_key(path: Path) -> str | None:
    """What a shard was made from; None where there is none that can be read."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata()["key"]
    except (FileNotFoundError, SafetensorError, KeyError, TypeError):
        return None


def read_shards(shards: Iterable[Path]) -> Iterator[torch.Tensor]:
    """Embeddings, one shard after the other."""
    return (load_file(path)["embeddings"] for path in shards)


def search(
    queries: torch.Tensor, chunks: Iterable[torch.Tensor], top_k: int, block_size: int = 1024
) -> tuple[torch.Tensor, torch.Tensor]:
    """The documents with the largest dot products, of which only one chunk is in memory at a time.

    `sentence_transformers.util.semantic_search` takes all documents at once. Among equal scores the earlier document
    goes first, whatever the chunks are.

    Args:
        queries: `[Q, H]`; on their device the search runs.
        chunks: Embeddings of the documents, `[n, H]` each.
        top_k: Documents to keep.
        block_size: Queries that are compared at once.

    Returns:
        Scores and places of the documents, `[Q, top_k]` each, or fewer columns where there are fewer documents.
    """
    blocks = queries.split(block_size)
    found = [(block[:, :0], torch.empty(len(block), 0, dtype=torch.long, device=block.device)) for block in blocks]
    start = 0
    for chunk in chunks:
        chunk = chunk.to(queries)
        chunk_places = torch.arange(start, start + len(chunk), device=queries.device)
        start += len(chunk)
        for index, block in enumerate(blocks):
            best_scores, best_places = found[index]
            scores = torch.cat([best_scores, block @ chunk.T], dim=1)
            places = torch.cat([best_places, chunk_places.expand(len(block), -1)], dim=1)
            # What was found before lies in front, so that a stable sort keeps the order of the documents.
            order = scores.argsort(dim=1, descending=True, stable=True)[:, :top_k]
            found[index] = scores.gather(1, order), places.gather(1, order)
    scores, places = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scores, places


def search_bm25(
    queries: Sequence[str], documents: Iterable[str], top_k: int, k1: float = 0.9, b: float = 0.4
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Scores and places of the best documents by BM25, for each query, as [`search`] does; without those at 0.

    Words are lower-cased runs of letters and digits, without stop words or stemming; `k1` and `b` are Anserini's, the
    inverse document frequency Lucene's. The counts of all documents are in memory, 12 bytes for each of their
    different words.
    """
    vectorizer = CountVectorizer(token_pattern=r"(?u)\w+")
    weights = vectorizer.fit_transform(documents).astype(np.float32)
    lengths = np.asarray(weights.sum(axis=1)).ravel()
    frequencies = np.bincount(weights.indices, minlength=weights.shape[1])
    idf = np.log1p((len(lengths) - frequencies + 0.5) / (frequencies + 0.5))
    norms = np.repeat(k1 * (1 - b + b * lengths / lengths.mean()), np.diff(weights.indptr))
    weights.data = idf[weights.indices] * weights.data * (k1 + 1) / (weights.data + norms)
    by_word = weights.T.tocsr()
    for counts in vectorizer.transform(queries):
        scores = (counts @ by_word).toarray().ravel()
        order = np.argsort(-scores, kind="stable")[:top_k]
        order = order[scores[order] > 0]
        yield scores[order], order


def to_run(
    found: Iterable[tuple[Sequence[float], Sequence[int]]], queries: Iterable[str], documents: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Query to document to score, as pytrec_eval takes it: the best `TOP_K`, without a query that is its own document.

    Args:
        found: Scores and places for each query, one more than `TOP_K`.
        queries: Their ids.
        documents: Ids of the corpus.
    """
    run = {}
    for query, (scores, places) in zip(queries, found, strict=True):
        ranked = ((documents[place], float(score)) for score, place in zip(scores, places, strict=True))
        run[query] = dict(islice(((name, score) for name, score in ranked if name != query), TOP_K))
    return run


def score_run(run: dict[str, dict[str, float]], qrels: dict[str, dict[str, int]]) -> dict[str, dict[str, float]]:
    """Measures of each query, by trec_eval; it ranks documents of equal scores by their ids, the last one first."""
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "map", "recall.100", "recip_rank"})
    evaluated = evaluator.evaluate(run)
    return {query: {name: evaluated[query][own] for name, own in MEASURES.items()} for query in qrels}


def mean_scores(queries: dict[str, dict[str, float]]) -> dict[str, float]:
    """Mean of each measure over all queries."""
    return {name: float(np.mean([scores[name] for scores in queries.values()])) for name in MEASURES}


def evaluate_bm25(data: RetrievalSet) -> dict[str, dict[str, float]]:
    """Measures of each query for [`search_bm25`]."""
    found = search_bm25(list(data.queries.values()), data.corpus["text"], TOP_K + 1)
    return score_run(to_run(found, data.queries, data.corpus["_id"][:]), data.qrels)


def evaluate_model(
    model: SentenceTransformer, data: RetrievalSet, folder: str | Path, batch_size: int
) -> dict[str, dict[str, float]]:
    """Measures of each query for exact search with a model; see [`encode_corpus`] for `folder`."""
    queries = encode_texts(model, list(data.queries.values()), "query", batch_size)
    shards = encode_corpus(model, data.corpus, folder, batch_size)
    scores, places = search(queries, read_shards(shards), TOP_K + 1)
    found = zip(scores.tolist(), places.tolist(), strict=True)
    return score_run(to_run(found, data.queries, data.corpus["_id"][:]), data.qrels)
