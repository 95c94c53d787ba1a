"""Documents: what is read, in which order, and one clear line for each thing that can be wrong with a file."""

from __future__ import annotations

import gzip
import json
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mtrain.data.documents import (
    BadRows,
    Document,
    content_hash,
    find_files,
    read_jsonl,
    read_parquet,
    read_stdlib,
    read_text,
)
from mtrain.data.store import HELD_OUT_EVERY, build_store, cache_key
from mtrain.data.tokenizer import load_tokenizer
from mtrain.errors import DataError


def _texts(documents: object) -> list[str]:
    return [document.text for document in documents]  # type: ignore[attr-defined]


def _jsonl(path: Path, *rows: object) -> Path:
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows) + b"\n")
    return path


def test_jsonl_reads_what_it_should(tmp_path: Path) -> None:
    plain = _jsonl(tmp_path / "a.jsonl", {"text": "one"}, b"", {"text": "two\n", "id": 3}, {"text": ""})
    assert _texts(read_jsonl(str(plain))) == ["one", "two\n", ""]
    odd = tmp_path / "b.jsonl"
    odd.write_bytes(b'\xef\xbb\xbf{"body": "bom"}\r\n{"body": "\\u00e9\xc3\xa9"}')
    assert _texts(read_jsonl(str(odd), "body")) == ["bom", "éé"]
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "zipped"}\n'))
    assert _texts(read_jsonl(str(packed))) == ["zipped"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (b'{"text": "cut off', "not valid JSON"),
        (b'{"text": "nul \x00"}', "not valid JSON"),
        (b"\x00\x00\x00", "not valid JSON"),
        (b"[1, 2]", "expected a JSON object with a field 'text', found list"),
        ({"txt": "misspelt"}, "no field 'text'; the row has 'txt'"),
        ({}, "the row has no fields"),
        ({"text": None}, "should be text, found null"),
        ({"text": 17}, "should be text, found int '17'"),
        ({"text": ["a"]}, "should be text, found list"),
        ({"text": "\ud800"}, "half a surrogate pair"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_corrupt_row_is_named_by_file_and_line(tmp_path: Path, row: object, said: str) -> None:
    path = _jsonl(tmp_path / "a.jsonl", {"text": "good"}, b"", row, {"text": "good"})
    with pytest.raises(DataError) as error:
        list(read_jsonl(str(path)))
    assert f"{path}:3: " in str(error.value) and said in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_rows_may_be_allowed_and_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[object] = [{"text": str(i)} for i in range(300)]
    rows[150] = rows[170] = {"text": None}
    path = _jsonl(tmp_path / "a.jsonl", *rows)
    with caplog.at_level(logging.WARNING):
        texts = _texts(read_jsonl(str(path), bad=BadRows(0.02)))
    assert texts == [str(i) for i in range(300) if i not in (150, 170)]
    assert f"{path}:151" in caplog.text and "2 of 300 rows were bad" in caplog.text
    with pytest.raises(DataError, match="2 of 171 rows are bad"):
        list(read_jsonl(str(path), bad=BadRows(0.01)))


def test_a_truncated_gzip_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "x"}\n' * 5000)[:-20])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:\d+: the file ends or breaks here"):
        list(read_jsonl(str(path)))


def test_text_by_document_paragraph_and_line(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"first\nsecond\n\n\nthird\r\n")
    (tmp_path / "sub" / "a.txt").write_text("other")
    (tmp_path / "skipped.bin").write_bytes(b"\xff")
    everything = "first\nsecond\n\n\nthird\r\n"
    assert _texts(read_text(str(tmp_path))) == [everything, "other"]
    assert _texts(read_text(str(tmp_path / "*.txt"))) == [everything]
    assert _texts(read_text(str(tmp_path / "b.txt"), "paragraph")) == ["first\nsecond\n", "third\r\n"]
    assert [d.where[-2:] for d in read_text(str(tmp_path / "b.txt"), "paragraph")] == [":1", ":5"]
    assert _texts(read_text(str(tmp_path / "b.txt"), "line")) == ["first", "second", "", "", "third"]
    with pytest.raises(DataError, match=r"skipped\.bin:1: not UTF-8"):
        list(read_text(str(tmp_path / "skipped.bin"), "line"))


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(700)], "n": list(range(700))}), path)
    assert _texts(read_parquet(str(tmp_path))) == [f"row {i}" for i in range(700)]
    with pytest.raises(DataError, match="no column 'body'; it has text, n"):
        list(read_parquet(str(path), "body"))
    with pytest.raises(DataError, match="column 'n' is int64, not text"):
        list(read_parquet(str(path), "n"))
    pq.write_table(pa.table({"text": ["a", None, "c"]}), path)
    with pytest.raises(DataError, match=r"a\.parquet: row 2: field 'text' is null"):
        list(read_parquet(str(path)))
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="not a readable parquet file"):
        list(read_parquet(str(path)))


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing at"):
        find_files(str(tmp_path / "no*.jsonl"), "jsonl")
    with pytest.raises(DataError, match="holds no jsonl file"):
        find_files(str(tmp_path), "jsonl")


@pytest.mark.parametrize(
    ("name", "content", "reader"),
    [("a.jsonl", b"", read_jsonl), ("a.jsonl", b'{"text": " "}\n', read_jsonl), ("a.txt", b"\n \n", read_text)],
)
def test_empty_data_is_an_error(tmp_path: Path, name: str, content: bytes, reader: Callable) -> None:  # type: ignore[type-arg]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="holds no text"):
        build_store(reader(str(tmp_path)), load_tokenizer("bytes"), what=str(tmp_path))


def test_standard_library_is_ordered_text_without_tests() -> None:
    documents = list(read_stdlib())
    names = [document.where for document in documents]
    assert names == sorted(names) and len(names) > 300
    assert "python-stdlib/argparse.py" in names and not [n for n in names if "/test" in n or "site-packages" in n]
    held_out = [content_hash(document.text) % HELD_OUT_EVERY == 7 for document in documents]
    assert 0.02 < sum(held_out) / len(held_out) < 0.1


def test_cache_holds_the_same_tokens_and_is_read_once(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    path = _jsonl(tmp_path / "a.jsonl", *({"text": "x" * n + "é"} for n in range(50)))
    cache = tmp_path / "cache" / cache_key(tokenizer, [path], "jsonl")
    fresh = build_store(read_jsonl(str(path)), tokenizer, what="a")
    for documents in (read_jsonl(str(path)), iter(())):  # the second time nothing is read
        kept = build_store(documents, tokenizer, what="a", cache=cache)
        assert kept.tokens.tobytes() == fresh.tokens.tobytes() and kept.fingerprint() == fresh.fingerprint()
    assert sorted(p.name for p in cache.parent.iterdir()) == [cache.name, cache.name + ".lock"]
    assert fresh.document(3).tolist() == [257, *b"xxx", *"é".encode(), 258]
    (cache / "tokens.bin").write_bytes(b"short")
    with pytest.raises(DataError, match="damaged"):
        build_store(iter(()), tokenizer, what="a", cache=cache)
    path.write_text('{"text": "changed"}\n')
    assert cache_key(tokenizer, [path], "jsonl") != cache.name


def test_of_several_processes_one_tokenises(tmp_path: Path) -> None:
    tokenizer, reads = load_tokenizer("bytes"), []
    cache = tmp_path / "key"
    (tmp_path / "key.killed").mkdir()

    def documents() -> Iterator[Document]:
        reads.append(1)
        for i in range(50):
            time.sleep(0.002)
            yield Document("text " * i, str(i))

    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(lambda _: build_store(documents(), tokenizer, what="a", cache=cache), range(4)))
    assert len(reads) == 1 and len({store.fingerprint() for store in stores}) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["key", "key.lock"]


def test_a_failed_tokenisation_leaves_no_cache(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "a.jsonl", {"text": "good"}, {"text": 1})
    cache = tmp_path / "cache" / "key"
    with pytest.raises(DataError, match=":2: "):
        build_store(read_jsonl(str(path)), load_tokenizer("bytes"), what="a", cache=cache)
    assert [p.name for p in cache.parent.iterdir()] == ["key.lock"]
