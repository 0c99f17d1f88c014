"""Rows of files of every kind: read exactly, or refused with the file and the line."""

import json
import math
from collections import Counter

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from modernalbert.training import data
from modernalbert.training.data import check_texts, load_texts, name_sources, read_rows


pytestmark = pytest.mark.usefixtures("fresh_cache")


def write_sources(folder):
    """Three sources of four kinds of files, with 40 texts each, `a 0` to `c 39`."""
    texts = {name: [f"{name} {n}" for n in range(40)] for name in "abc"}
    (folder / "a.txt").write_text("".join(f"{text}\n" for text in texts["a"]))
    lines = [json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(texts["b"])]
    (folder / "b.jsonl").write_text("".join(lines))
    (folder / "c").mkdir()
    Dataset.from_dict({"text": texts["c"][:20]}).to_parquet(folder / "c" / "1.parquet")
    (folder / "c" / "2.csv").write_text(
        "id,text\n" + "".join(f"{n},{text}\n" for n, text in enumerate(texts["c"][20:]))
    )
    return [str(folder / "a.txt"), str(folder / "b.jsonl"), str(folder / "c" / "*")], texts


def first_letters(texts):
    return [row["text"][0] for row in texts]


@pytest.mark.parametrize("streaming", [False, True])
def test_sources_of_several_kinds_are_read_once_each(tmp_path, streaming):
    sources, texts = write_sources(tmp_path)
    rows = list(load_texts(sources, streaming=streaming))
    assert {name for row in rows for name in row} == {"text"}
    assert Counter(row["text"] for row in rows) == Counter(sum(texts.values(), []))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("local", [True, False])
def test_second_texts_are_read_where_there_are_some(tmp_path, monkeypatch, streaming, local):
    rows = {"plain": [{"text": "a"}, {"text": None, "id": 1}], "pairs": [{"text": "b", "two": "c"}, {"text": "d"}]}
    rows["plain"] += [{"text": "a"}] * 200
    sources = list(rows)
    if local:
        sources = [str(tmp_path / f"{name}.jsonl") for name in rows]
        for path, lines in zip(sources, rows.values(), strict=True):
            with open(path, "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in lines)
    else:

        def load(name, configuration, split, streaming):
            part = Dataset.from_list([{"id": 0, **row} for row in rows[name]])
            return part.to_iterable_dataset() if streaming else part

        monkeypatch.setattr(data, "load_dataset", load)
    found = [(row["text"], row["two"]) for row in load_texts(sources, streaming=streaming, pair_column="two")]
    assert Counter(found) == {("a", None): 201, ("b", "c"): 1, ("d", None): 1}


def test_second_texts_that_are_none_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "b", "two": 3}\n')
    with pytest.raises(ValueError, match="line 1 of .* has 3 as 'two', expected a text; .*`pair_column`"):
        load_texts([str(tmp_path / "a.jsonl")], pair_column="two")


@pytest.mark.parametrize("streaming", [False, True])
def test_mixing_weights_are_shares_of_the_texts(tmp_path, streaming):
    sources, texts = write_sources(tmp_path)

    def mix(seed):
        weights = [6, 3, 1]
        return [row["text"] for row in load_texts(sources, streaming=streaming, mixing_weights=weights, seed=seed)]

    mixed = mix(0)
    counts = Counter(text[0] for text in mixed)
    for name, share in zip("abc", (0.6, 0.3, 0.1), strict=True):
        tolerance = 4 * math.sqrt(share * (1 - share) / len(mixed))
        assert counts[name] / len(mixed) == pytest.approx(share, abs=tolerance)
    assert set(mixed) == set(sum(texts.values(), []))  # the smallest share is not cut
    assert mixed == mix(0) != mix(1)


@pytest.mark.parametrize("weights", [[1], [1, 2, 3, 4], [1, 0, 1], [1, -1, 1]])
def test_mixing_weights_that_do_not_fit_are_refused(tmp_path, weights):
    sources, _ = write_sources(tmp_path)
    with pytest.raises(ValueError, match="must be positive, one for each of the 3 sources"):
        load_texts(sources, mixing_weights=weights)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_stream_is_shuffled_by_its_seed(tmp_path, streaming):
    sources, _ = write_sources(tmp_path)
    one, same, other = (list(load_texts(sources, streaming=streaming, seed=seed)) for seed in (0, 0, 1))
    assert one == same and (one != other) == streaming


# A message says at least which file it is.
BROKEN = [
    ("body.jsonl", b'{"body": "a"}\n', "has no column 'text', but 'body'"),
    ("empty.txt", b"", "empty.txt"),
    ("empty.jsonl", b"", "empty.jsonl"),
    ("empty.csv", b"", "empty.csv"),
    ("header.csv", b"text\n", "header.csv"),
    ("numbers.jsonl", b'{"text": "a"}\n{"text": 1}\n', "line 2 of '.*numbers.jsonl' has 1 as 'text', expected a text"),
    ("list.jsonl", b'{"text": ["a"]}\n', "line 1 of '.*list.jsonl' has ..a.. as 'text', expected a text"),
    (
        "nulls.jsonl",
        b'{"text": "a"}\n{"text": null}\n',
        "1 of the 2 rows of '.*nulls.jsonl' have no 'text', more than 1%",
    ),
    ("latin.txt", "caf\u00e9\n".encode("latin-1"), "cannot read '.*latin.txt': it is not UTF-8"),
    ("broken.jsonl", b'{"text": "a"}\n{"text": \n', "cannot read .*broken.jsonl"),
    ("broken.parquet", b"not a parquet file", "cannot read .*broken.parquet"),
    ("texts.docx", b"", "cannot read '.*texts.docx'; convert it to one of .parquet"),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("name", "content", "message"), BROKEN, ids=[name for name, *_ in BROKEN])
def test_files_without_texts_are_refused(tmp_path, name, content, message, streaming):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(load_texts([str(tmp_path / name)], streaming=streaming))


@pytest.mark.parametrize("pattern", ["*.txt", "none.txt", "**/none.jsonl"])
def test_a_source_that_matches_no_file_is_refused(tmp_path, pattern):
    with pytest.raises(FileNotFoundError, match="no file matches"):
        load_texts([str(tmp_path / pattern)])


def test_a_folder_as_a_source_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is a folder; name its files"):
        load_texts([str(tmp_path)])


@pytest.mark.parametrize("streaming", [False, True])
def test_other_columns_need_not_agree(tmp_path, streaming):
    (tmp_path / "a.jsonl").write_text('{"text": "one", "id": 1}\n')
    (tmp_path / "b.csv").write_text("text,id\ntwo,b\n")
    rows = load_texts([str(tmp_path / "*")], streaming=streaming)
    assert sorted(row["text"] for row in rows) == ["one", "two"]


@pytest.mark.parametrize("streaming", [False, True])
def test_large_strings_mix_with_others(tmp_path, streaming):
    """Polars and recent pandas write Parquet files of `large_string`."""
    column = pyarrow.array(["one"], type=pyarrow.large_string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    (tmp_path / "b.txt").write_text("two\n")
    rows = load_texts([str(tmp_path / "a.parquet"), str(tmp_path / "b.txt")], streaming=streaming)
    assert sorted(row["text"] for row in rows) == ["one", "two"]


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["data/a.txt", "other/b.jsonl"], ["a", "b"]),
        (["org/wikitext:raw-v1", "org/news"], ["wikitext", "news"]),
        (["org/wiki:en", "org/wiki:de"], ["org_wiki_en", "org_wiki_de"]),
        (["x/a.txt", "y/a.txt", "b.txt"], ["x_a_txt", "y_a_txt", "b"]),
        (["org/a:b", "a.jsonl"], ["org_a_b", "a_jsonl"]),
        ([], []),
    ],
)
def test_sources_are_named_by_stem_where_it_is_unique(sources, names):
    assert name_sources(sources) == dict(zip(sources, names, strict=True))


@pytest.mark.parametrize("sources", [["x-y/a.txt", "x_y/a.txt"], ["x/a.txt", "y/a.txt", "x_a_txt.csv"]])
def test_no_two_sources_share_a_name(sources):
    assert len(set(name_sources(sources).values())) == len(sources)


def test_files_of_several_kinds_are_read_together(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n')
    assert sorted(read_rows([str(tmp_path / "*")])["text"]) == ["one", "three", "two"]


def write(path, content, encoding="utf-8"):
    path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return str(path)


# Each of these files holds these rows.
SAME = [{"text": "None", "label": "1"}, {"text": 'a "b", c', "label": "NA"}, {"text": "é\u2028ü", "label": None}]
SAME_FILES = {
    "plain.csv": 'text,label\nNone,1\n"a ""b"", c",NA\né\u2028ü,\n',
    "windows.CSV": b"\xef\xbb\xbf" + 'text,label\r\nNone,1\r\n"a ""b"", c",NA\r\n\r\né\u2028ü,\r\n'.encode(),
    "plain.tsv": 'text\tlabel\nNone\t1\na "b", c\tNA\né\u2028ü\t',
    "excel.tsv": 'text\tlabel\r\nNone\t1\r\na "b", c\tNA\r\né\u2028ü\t\r\n'.encode("utf-16"),
    "lines.jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in SAME),
    "list.json": json.dumps(SAME, indent=1),
    "lines.JSON": "\n".join(map(json.dumps, SAME)),
}


@pytest.mark.parametrize("name", SAME_FILES)
def test_a_row_is_the_same_in_every_kind_of_file(tmp_path, name):
    assert list(read_rows([write(tmp_path / name, SAME_FILES[name])])) == SAME


def test_a_row_is_the_same_in_parquet(tmp_path):
    Dataset.from_list(SAME).to_parquet(tmp_path / "rows.parquet")
    assert list(read_rows([str(tmp_path / "rows.parquet")])) == SAME


def test_files_of_all_kinds_are_one_data_set(tmp_path):
    Dataset.from_list(SAME).to_parquet(tmp_path / "rows.parquet")
    files = [write(tmp_path / name, content) for name, content in SAME_FILES.items()]
    assert list(read_rows([*files, str(tmp_path / "rows.parquet")])) == SAME * (len(files) + 1)


def test_numbers_beside_names_are_names(tmp_path):
    first = write(tmp_path / "a.jsonl", '{"label": 1, "n": 1}\n{"label": "N", "n": 2.5}\n{"label": true, "n": null}\n')
    second = write(tmp_path / "b.csv", "label\n2\n")
    rows = read_rows([first, second])
    assert rows["label"] == ["1", "N", "true", "2"] and rows["n"] == [1.0, 2.5, None, None]


def test_a_number_of_more_than_64_bits_is_a_text(tmp_path):
    assert read_rows([write(tmp_path / "a.jsonl", '{"n": 1180591620717411303424}\n')])["n"] == [
        "1180591620717411303424"
    ]


def test_a_column_of_two_forms_in_two_files_is_refused(tmp_path):
    files = [write(tmp_path / "a.jsonl", '{"a": [1]}\n'), write(tmp_path / "b.jsonl", '{"a": {"x": 1}}\n')]
    with pytest.raises(
        ValueError, match="column 'a' of '.*b.jsonl' is of another type than before .*; make them alike"
    ):
        read_rows(files)


def test_nested_values_keep_their_form(tmp_path):
    answers = [{"text": ["a"], "answer_start": [3]}, {"text": [], "answer_start": []}]
    path = write(tmp_path / "rows.jsonl", "".join(json.dumps({"answers": answer}) + "\n" for answer in answers))
    assert read_rows([path])["answers"] == answers


def test_classes_of_parquet_keep_their_names(tmp_path):
    features = datasets.Features({"label": datasets.ClassLabel(names=["no", "yes"])})
    Dataset.from_dict({"label": [1, 0]}, features=features).to_parquet(tmp_path / "rows.parquet")
    assert read_rows([str(tmp_path / "rows.parquet")]).features == features


REFUSED = [
    ("more.csv", "a,b\n1,2\n1,2,3\n", "line 3 has 3 fields, and the header 2 \\(a, b\\); quote a field"),
    ("fewer.csv", "a,b\n1\n", "line 2 has 1 fields, and the header 2"),
    ("more.tsv", "a\tb\n1\t2\t3\n", "line 2 has 3 fields, and the header 2 .*; a field cannot hold a tab"),
    ("open.csv", 'a,b\n"1,2\n3,4\n', "unexpected end of data .line 3."),
    ("inside.csv", 'a,b\n"1" x,2\n', "expected after .* .line 2."),
    ("header.csv", "a,a\n1,2\n", "a column of the header ..a., .a.. is there twice"),
    ("twice.jsonl", '{"a": 1}\n{"a": 1, "a": 2}\n', "line 2: the key 'a' is there twice"),
    ("nan.jsonl", '{"a": NaN}\n', "line 1: NaN is no JSON"),
    ("half.jsonl", '{"a": "\\ud83d\\ude00"}\n{"a": "\\ud800"}\n', "line 2: .* surrogates not allowed"),
    ("list.jsonl", "[1]\n", "line 1 is no object but .1."),
    ("cut.json", '[{"a": 1}', "as JSON: Expecting"),
    ("values.json", "[1, 2]", "row 1 is no object but 1"),
    ("mixed.jsonl", '{"a": ["x"]}\n{"a": ["y"]}\n{"a": "x"}\n', 'holds "x" in line 3, and values of another kind'),
    ("odd.jsonl", '{"a": [1, "x"]}\n', "cannot read column 'a' of '.*odd.jsonl': .*; make its values alike"),
    ("latin.csv", "a\n\u00e9\n".encode("latin-1"), "it is not UTF-8 .* save it as UTF-8"),
    ("not.parquet", "a", "cannot read '.*not.parquet' as parquet"),
    ("empty.csv", "", "empty.csv' has no rows"),
    ("header-only.tsv", "a\tb\n", "header-only.tsv' has no rows"),
    ("rows.xlsx", "", "cannot read '.*rows.xlsx'; convert it to one of .parquet"),
]


@pytest.mark.parametrize(("name", "content", "message"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_a_file_that_cannot_be_read_exactly_is_refused(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as caught:
        read_rows([path])
    assert name in str(caught.value)


def test_a_name_with_brackets_is_that_file(tmp_path):
    write(tmp_path / "c1.csv", "a\nother\n")
    for name in ("c[1].csv", "c[1].jsonl"):
        path = write(tmp_path / name, "a\nthis\n" if name.endswith("csv") else '{"a": "this"}\n')
        assert read_rows([path])["a"] == ["this"]
    Dataset.from_dict({"a": ["this"]}).to_parquet(str(tmp_path / "p.parquet"))
    (tmp_path / "p.parquet").rename(tmp_path / "c[1].parquet")
    assert read_rows([str(tmp_path / "c[1].parquet")])["a"] == ["this"]


def test_a_changed_file_is_read_anew(tmp_path):
    for text in ("one", "two"):
        assert read_rows([write(tmp_path / "a.csv", f"text\n{text}\n")])["text"] == [text]
        assert load_texts([str(tmp_path / "a.csv")])["text"] == [text]


def test_a_file_without_rows_beside_others_is_named(tmp_path, caplog):
    write(tmp_path / "a.txt", ""), write(tmp_path / "b.txt", "one\n")
    assert load_texts([str(tmp_path / "*.txt")])["text"] == ["one"] and "a.txt' has no rows" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_a_text_are_counted(tmp_path, caplog, streaming):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n' * 199 + '{"text": null}\n')
    assert len(list(load_texts([path], streaming=streaming))) == 199
    assert "1 of the 200 rows of" in caplog.text and "have no 'text'" in caplog.text


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([{"a": "x", "b": 0}], ("a", "a"), "the column 'a' is named twice"),
        ([{"a": "x", "b": 0}], ("c",), "has no column 'c', but 'a', 'b'"),
        ([{"a": "x", "b": 0}], ("b",), "row 0 of 'here' has 0 as 'b', expected a text"),
        ([{"a": "x"}, {"a": None}], ("a",), "row 1 of 'here' has no 'a'"),
    ],
)
def test_columns_are_checked_row_by_row(rows, columns, message):
    with pytest.raises(ValueError, match=message):
        check_texts(Dataset.from_list(rows), "here", columns)
