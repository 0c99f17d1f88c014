"""Retrieval on data sets in BEIR's format: reading, resumable encoding, exact search in chunks, BM25, trec_eval's scores."""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytrec_eval
import torch
from datasets import Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sklearn.feature_extraction.text import CountVectorizer
from tqdm.auto import tqdm

from ..data import fingerprint, read_file
from ..export.redaction import redact
from ..runs import write_files


logger = logging.getLogger(__name__)

TOP_K = 1000  # BEIR's: how many documents of each query are scored

# mteb's names, which are ours, to trec_eval's. `map` and `mrr` are cut at `TOP_K`.
MEASURES = {"ndcg_at_10": "ndcg_cut_10", "map": "map", "recall_at_100": "recall_100", "mrr": "recip_rank"}

TEXTS = Features({"_id": Value("string"), "text": Value("large_string")})


@dataclass(frozen=True)
class RetrievalSet:
    """Documents, and the queries of one split with their judgements.

    Attributes:
        corpus: Columns `_id` and `text`, title included; memory-mapped by `datasets`.
        queries: Id to text; queries without judgements are left out.
        qrels: Query to document to relevance; above 0 is relevant.
        judged: One row per query: `query`, and its judgements as JSON.
        facts: Source, split and counts, for the results.
    """

    corpus: Dataset
    queries: dict[str, str]
    qrels: dict[str, dict[str, int]]
    judged: Dataset
    facts: dict[str, Any]


def load_retrieval(source: str, split: str, limit: int | None = None) -> RetrievalSet:
    """Reads a set of the Hub in BEIR's layout (`BeIR/scifact`), or a folder.

    A folder holds `corpus` (`_id`, `text`, maybe `title`), `queries` (`_id`, `text`), and `qrels/SPLIT` or
    `qrels_SPLIT` (`query-id`, `corpus-id`, `score`), each as parquet, jsonl or, judgements, tsv with a header.

    The rules are BEIR's. A document is its title, a space and its text. Queries without judgements are left out; those
    whose judgements are all 0 score 0. Empty texts are encoded as they are. Documents that are judged but not in the
    corpus count as not found. The log says how many of each there are.

    Args:
        source: Name on the Hub, or folder.
        split: Split of the judgements.
        limit: Number of queries to take; None: all.

    Raises:
        FileNotFoundError: A file of the folder is missing.
        ValueError: A column or an id is missing, an id occurs twice, a text is not a string, a relevance is not an
            integer, a pair is judged twice, or there are no rows.
    """
    names = ("corpus", "queries")
    if Path(source).is_dir():
        corpus, queries = (join_texts(find_file(source, [name]), f"{name} of '{source}'") for name in names)
        judgements = [row for _, row in read_file(find_file(source, [f"qrels/{split}", f"qrels_{split}"]))]
    else:
        corpus, queries = (
            join_texts(load_dataset(source, name, split=name), f"{name} of '{source}'") for name in names
        )
        judgements = load_dataset(f"{source}-qrels", split=split)
    texts = dict(zip(queries["_id"], queries["text"], strict=True))
    qrels = read_judgements(judgements, f"judgements '{split}' of '{source}'")
    if unknown := [query for query in qrels if query not in texts]:
        raise ValueError(
            f"judgements '{split}' of '{source}' name {len(unknown)} queries that have no text, the first '{unknown[0]}'; "
            "are they of another set?"
        )
    qrels = dict(islice(qrels.items(), limit))
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
    if counts["documents"] == counts["empty documents"]:
        raise ValueError(f"all {counts['documents']} documents of '{source}' are empty")
    if counts["judgements"] == counts["judgements of documents that the corpus lacks"]:
        raise ValueError(f"the corpus of '{source}' has none of the documents that judgements '{split}' name")
    judged = Dataset.from_dict(
        {"query": [texts[query] for query in qrels], "found": list(map(json.dumps, qrels.values()))}
    )
    hashes = f"{fingerprint(corpus)}-{fingerprint(judged)}"
    facts = {"source": redact(source), "split": split, **counts, "fingerprint": hashes}
    return RetrievalSet(corpus, {query: texts[query] for query in qrels}, qrels, judged, facts)


def find_file(folder: str | Path, names: Sequence[str]) -> Path:
    """The file that exists among the names, with any of the endings.

    Raises:
        FileNotFoundError: There is none.
        ValueError: There are several.
    """
    candidates = [f"{name}.{ending}" for name in names for ending in ("parquet", "jsonl", "tsv")]
    found = [path for name in candidates if (path := Path(folder) / name).is_file()]
    if not found:
        raise FileNotFoundError(
            f"'{folder}' has no {', '.join(candidates)}; one of these must be there (BEIR's layout)"
        )
    if len(found) > 1:
        there = ", ".join(path.relative_to(folder).as_posix() for path in found)
        raise ValueError(f"'{folder}' has {there}, of which one alone may be there; remove the others")
    return found[0]


def join_texts(rows: Path | Dataset, what: str) -> Dataset:
    """Columns `_id` and `text`, both strings, title included; memory-mapped by `datasets`.

    Raises:
        ValueError: There are no rows; a column or an id is missing; an id occurs twice; or a text is not a string.
    """
    stamp = (rows.stat().st_size, rows.stat().st_mtime_ns) if isinstance(rows, Path) else None
    try:
        return Dataset.from_generator(
            generate_texts, features=TEXTS, gen_kwargs={"rows": rows, "what": what, "stamp": stamp}
        )
    except DatasetGenerationError as error:
        raise error.__cause__ or error from error


def generate_texts(rows: Path | Dataset, what: str, stamp: tuple | None) -> Iterator[dict[str, str]]:
    """Rows for [`join_texts`]. Other columns are dropped: `metadata` has thousands of keys in some data sets."""
    read = (row for _, row in read_file(rows)) if isinstance(rows, Path) else iter(rows)
    seen = {}
    for index, row in enumerate(read):
        check_columns(row, ("_id", "text"), what)
        name, parts = read_id(row["_id"]), [row.get("title"), row["text"]]
        if name is None or name in seen:
            fault = f"{row['_id']!r} as '_id'" if name is None else f"the '_id' of row {seen[name]}, '{name}'"
            raise ValueError(
                f"row {index} of the {what} has {fault}, expected an id of its own, a text or a whole number; correct or "
                "drop that row"
            )
        if odd := [part for part in parts if not isinstance(part, str | None)]:
            raise ValueError(f"row {index} of the {what} has {odd[0]!r} as a text, expected a string; fix that row")
        seen[name] = index
        yield {"_id": name, "text": " ".join(part or "" for part in parts).strip()}
    if not seen:
        raise ValueError(f"there are no rows in the {what}")


def read_id(value: Any) -> str | None:
    """An id as a string; None if the value cannot be an id."""
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) and value != "" else None


def read_judgements(rows: Iterable[Mapping[str, Any]], what: str) -> dict[str, dict[str, int]]:
    """Query to document to relevance.

    Raises:
        ValueError: There are no rows, a column is missing, a relevance is not an integer, or a pair has two.
    """
    columns = ("query-id", "corpus-id", "score")
    qrels, count = {}, 0
    for index, row in enumerate(rows):
        check_columns(row, columns, what)
        query, document, score = read_id(row["query-id"]), read_id(row["corpus-id"]), row["score"]
        try:
            relevance = int(score)
            if query is None or document is None or isinstance(score, bool) or relevance != float(score):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            given = ", ".join(repr(row[column]) for column in columns)
            raise ValueError(f"row {index} of the {what} is {given}; expected two ids and an integer") from None
        before = qrels.setdefault(query, {}).setdefault(document, relevance)
        if before != relevance:
            raise ValueError(
                f"row {index} of the {what} judges query '{query}' and document '{document}' as {relevance}, an earlier row "
                f"as {before}; keep one of them"
            )
        count += 1
    if count == 0:
        raise ValueError(f"there are no rows in the {what}")
    if repeated := count - sum(map(len, qrels.values())):
        logger.warning("the %s repeat %d pairs, with the same relevance", what, repeated)
    return qrels


def check_columns(row: Mapping[str, Any], expected: Sequence[str], what: str) -> None:
    """Checks that a row has the expected columns.

    Raises:
        ValueError: A column is missing.
    """
    if missing := [name for name in expected if name not in row]:
        raise ValueError(
            f"a row of the {what} lacks {', '.join(map(repr, missing))}; it has {', '.join(map(repr, row))}"
        )


def make_pairs(data: RetrievalSet) -> Dataset:
    """Each query with each of its relevant documents, in columns `query` and `document`; empty texts are left out.

    Raises:
        ValueError: There are no pairs.
    """
    indices = {name: index for index, name in enumerate(data.corpus["_id"])}
    relevant = [
        (query, indices[document])
        for query, found in data.qrels.items()
        for document, relevance in found.items()
        if relevance > 0 and document in indices
    ]
    documents = data.corpus.select([index for _, index in relevant])["text"]
    pairs = [
        {"query": data.queries[query], "document": document}
        for (query, _), document in zip(relevant, documents, strict=True)
        if data.queries[query] and document
    ]
    if not pairs:
        raise ValueError(f"judgements '{data.facts['split']}' of '{data.facts['source']}' have no pair to train on")
    return Dataset.from_list(pairs)


def encode_texts(model: SentenceTransformer, texts: list[str], kind: str, batch_size: int) -> torch.Tensor:
    """Embeddings in float32 whose dot product is the model's similarity; the model's prompt for the kind is prepended.

    sentence-transformers sorts the texts by length and restores the order.

    Args:
        model: Its similarity is the cosine or the dot product.
        texts: Queries or documents.
        kind: `"query"` or `"document"`.
        batch_size: Texts per batch.

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
    """Writes embeddings of the documents, in their order, as shards; finished shards are not encoded again.

    A shard stores a hash of the model, its prompts and the texts; it is encoded again when that changes. Each is a
    safetensors file with one tensor, `embeddings`, written atomically.

    Args:
        model: See [`encode_texts`].
        corpus: Column `text`.
        folder: Folder of the shards.
        batch_size: Texts per batch.
        shard_size: Documents per shard; one shard is in memory at a time, and is sorted by length as a whole.

    Returns:
        Paths of the shards.
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
    """Hash of everything that embeddings depend on: weights, modules, prompts, and the maximum length."""
    state = hashlib.sha256(repr((str(model), model.prompts, model.max_seq_length)).encode())
    for name, tensor in model.state_dict().items():
        state.update(name.encode())
        state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return state.hexdigest()


def write_shard(path: Path, embeddings: torch.Tensor, key: str) -> None:
    """Writes a shard with its key as metadata."""
    write_files(path.parent, lambda draft: save_file({"embeddings": embeddings}, draft / path.name, {"key": key}))


def read_key(path: Path) -> str | None:
    """Key of a shard; None if there is no readable one."""
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
    """The documents with the largest dot products; only one chunk of documents is in memory at a time.

    `sentence_transformers.util.semantic_search` takes all documents at once. Among equal scores the earlier document
    comes first, however the documents are divided into chunks.

    Args:
        queries: `[Q, H]`; the search runs on their device.
        chunks: Embeddings of the documents, `[n, H]` each.
        top_k: Documents to keep.
        block_size: Queries per matrix product.

    Returns:
        Scores and indices of the documents, `[Q, top_k]` each, or fewer columns where there are fewer documents.
    """
    blocks = queries.split(block_size)
    found = [(block[:, :0], torch.empty(len(block), 0, dtype=torch.long, device=block.device)) for block in blocks]
    start = 0
    for chunk in chunks:
        chunk = chunk.to(queries)
        chunk_indices = torch.arange(start, start + len(chunk), device=queries.device)
        start += len(chunk)
        for index, block in enumerate(blocks):
            best_scores, best_indices = found[index]
            scores = torch.cat([best_scores, block @ chunk.T], dim=1)
            indices = torch.cat([best_indices, chunk_indices.expand(len(block), -1)], dim=1)
            # Earlier results come first, so that a stable sort keeps the order of the documents.
            order = scores.argsort(dim=1, descending=True, stable=True)[:, :top_k]
            found[index] = scores.gather(1, order), indices.gather(1, order)
    scores, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
    return scores, indices


def search_bm25(
    queries: Sequence[str], documents: Iterable[str], top_k: int, k1: float = 0.9, b: float = 0.4
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Scores and indices of the best documents by BM25 for each query, as [`search`] gives them; scores of 0 left out.

    Words are lower-cased runs of letters and digits; there are no stop words and no stemming. `k1` and `b` are
    Anserini's, the inverse document frequency is Lucene's. The counts of all documents are in memory, 12 bytes for each
    distinct word of a document.
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
    """Query to document to score, as pytrec_eval takes it: the best `TOP_K`, a document with the query's id left out.

    Args:
        found: Scores and indices for each query, one more than `TOP_K`.
        queries: Ids of the queries.
        documents: Ids of the corpus.
    """
    run = {}
    for query, (scores, indices) in zip(queries, found, strict=True):
        ranked = ((documents[index], float(score)) for score, index in zip(scores, indices, strict=True))
        run[query] = dict(islice(((name, score) for name, score in ranked if name != query), TOP_K))
    return run


def score_run(run: dict[str, dict[str, float]], qrels: dict[str, dict[str, int]]) -> dict[str, dict[str, float]]:
    """Measures of each query, by trec_eval, which ranks documents of equal scores by id in descending order."""
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
    scores, indices = search(queries, read_shards(shards), TOP_K + 1)
    found = zip(scores.tolist(), indices.tolist(), strict=True)
    return score_run(to_run(found, data.queries, data.corpus["_id"][:]), data.qrels)
