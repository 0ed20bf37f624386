"""Text sources: every format, stable validation splits, one line for what can't be read, epochs as permutations."""

import json
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import dataset
from nanochat.common import UserError
from nanochat.dataset import ParquetTexts, TextStream, load_texts, read_folder
from nanochat.tokenizer import Tokenizer

BYTES = Tokenizer({bytes([i]): i for i in range(256)})  # a tokenizer without any merge


def parquet(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=3)
    return path


def jsonl(path: Path, *texts) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def both(folder: Path) -> list[str]:
    """All documents of a folder, in any order."""
    return sorted([*load_texts(str(folder), "train"), *load_texts(str(folder), "val")])


def refusal(source, split="train") -> str:
    with pytest.raises(UserError) as error:
        load_texts(str(source), split)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_may_hold_every_format_at_any_depth(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("plain — text")
    (tmp_path / "deep" / "b.MD").write_text("# marked")
    jsonl(tmp_path / "deep" / "c.jsonl", "first line", "second\nline", "  ")
    parquet(tmp_path / "deep" / "er" / "D.Parquet", text=["p1", None, "p3", "p4"], other=[1, 2, 3, 4])
    (tmp_path / "ignored.csv").write_bytes(b"\xff")
    (tmp_path / "folder.txt").mkdir()
    assert both(tmp_path) == sorted(["plain — text", "# marked", "first line", "second\nline", "p1", "p3", "p4"])


def test_a_single_file_is_cut_at_blank_lines(tmp_path):
    (tmp_path / "book.txt").write_text("one\nstill one\n\ntwo\n\n\n\nthree")
    assert [t.strip() for t in both(tmp_path / "book.txt")] == ["one\nstill one", "three", "two"]


def test_the_splits_are_disjoint_and_a_document_keeps_its_side_when_others_come(tmp_path):
    texts = [f"document number {i}" for i in range(1000)]
    before = {s: set(read_folder(jsonl(tmp_path / "a.jsonl", *texts), s)) for s in ("train", "val")}
    assert before["train"] | before["val"] == set(texts) and not before["train"] & before["val"]
    assert 3 <= len(before["val"]) <= 25  # one in a hundred of a thousand: 10, give or take five standard deviations
    more = [f"another {i}" for i in range(1000)] + texts[::-1]
    after = {s: set(read_folder(jsonl(tmp_path / "a.jsonl", *more), s)) for s in ("train", "val")}
    assert before["train"] <= after["train"] and before["val"] <= after["val"]


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip), min_size=2, unique=True))
def test_there_is_always_something_to_train_on_and_something_held_out(tmp_path_factory, texts):
    file = jsonl(tmp_path_factory.getbasetemp() / "some.jsonl", *texts)
    train, val = load_texts(str(file), "train"), load_texts(str(file), "val")
    assert sorted([*train, *val]) == sorted(texts) and len(val) >= 1 and len(train) >= 1


def test_row_groups_of_several_files_read_as_one_sequence(tmp_path):
    files = [parquet(tmp_path / f"{n}.parquet", text=[f"{n}-{i}" for i in range(n)]) for n in (7, 1, 4)]
    texts = ParquetTexts(files)
    wanted = [f"{n}-{i}" for n in (7, 1, 4) for i in range(n)]
    assert len(texts) == 12 and list(texts) == wanted
    assert [texts[i] for i in (11, 0, 7, 6, 8)] == [wanted[i] for i in (11, 0, 7, 6, 8)]
    with pytest.raises(IndexError):
        texts[12]


def test_what_is_kept_of_a_large_corpus_is_bounded(tmp_path):
    texts = ParquetTexts([parquet(tmp_path / "a.parquet", text=[str(i) for i in range(300)])])  # 100 row groups
    assert list(texts) == [str(i) for i in range(300)] and len(texts._kept) <= 64


# ----------------------------------------------------------------------------------------------------------------------
# What can't be read


def test_a_missing_folder_is_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "nowhere")
    assert "fineweb:N" in refusal("fineweb8")


@pytest.mark.parametrize(
    "files", [{}, {"a.txt": ""}, {"a.txt": "only one paragraph\n"}, {"a.csv": "x"}, {"a.md": " \n"}]
)
def test_a_folder_without_text_is_refused(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for split in ("train", "val"):
        assert "too little text" in refusal(tmp_path, split)


def test_invalid_utf8_names_file_and_byte(tmp_path):
    (tmp_path / "good.txt").write_text("fine")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    assert "latin.txt is not valid UTF-8 (byte 3)" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "line 3: not valid JSON"),
        (b'{"text": "\xff"}', "line 3: not valid JSON"),
        (b'["text"]', "line 3: not a JSON object"),
        (b'{"txt": "x"}', "line 3: no field 'text'"),
        (b'{"text": 5}', "'text' must be a string"),
    ],
)
def test_a_malformed_jsonl_line_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n')
    found = refusal(tmp_path)
    assert "a.jsonl" in found and message in found


def test_a_parquet_file_without_a_text_column_lists_what_it_has(tmp_path):
    assert "no column 'text' (columns: words, n)" in refusal(parquet(tmp_path / "a.parquet", words=["x"], n=[1]))
    assert "must hold text, not int64" in refusal(parquet(tmp_path / "a.parquet", text=[1, 2, 3]))


def test_a_truncated_parquet_file_is_refused(tmp_path):
    file = parquet(tmp_path / "a.parquet", text=["some text"] * 100)
    file.write_bytes(file.read_bytes()[:-20])
    assert "a.parquet is not a readable parquet file" in refusal(file)
    file.write_bytes(b"")
    assert "not a readable parquet file" in refusal(file)


def test_a_parquet_file_damaged_inside_is_refused(tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"{i} some text" for i in range(1000)]}), file, compression="zstd")
    data = bytearray(file.read_bytes())
    data[4:400] = bytes(396)  # behind the magic number stand the first pages
    file.write_bytes(data)
    assert "a.parquet is damaged" in refusal(file)


def test_an_unknown_split_is_refused(tmp_path):
    assert "train or val" in refusal(tmp_path, "test")


# ----------------------------------------------------------------------------------------------------------------------
# Hub shards, without a hub


def test_shards_are_downloaded_once_and_an_interrupted_download_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    content, asked = parquet(tmp_path / "shard.parquet", text=["a", "b"]).read_bytes(), []

    class Response:
        def __init__(self, url, timeout):
            asked.append(url)
            self.parts = [content[:50], content[50:], b""]

        def read(self, n):
            if len(asked) == 2 and len(self.parts) == 2:
                raise TimeoutError("stalled")
            return self.parts.pop(0)

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass

    monkeypatch.setattr(dataset.urllib.request, "urlopen", Response)
    assert "could not download shard_00001.parquet: stalled" in refusal("fineweb:2")
    assert [p.name for p in (tmp_path / "base" / "fineweb").iterdir()] == ["shard_00000.parquet"]
    assert list(load_texts("fineweb:2", "train")) == ["a", "b", "a", "b"]
    assert list(load_texts("fineweb:2", "val")) == ["a", "b"]
    assert [url[-13:-8] for url in asked] == ["00000", "00001", "00001", "01822"]


@pytest.mark.parametrize("source", ["fineweb:0", "fineweb:x", "fineweb:1822", "fineweb:-1"])
def test_an_impossible_number_of_shards_is_refused(source):
    assert "N from 1 to" in refusal(source)


def test_without_a_network_the_hub_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    assert "use --data embedded or a folder" in refusal("fineweb:1")


# ----------------------------------------------------------------------------------------------------------------------
# The embedded corpus, and streams


def test_the_embedded_corpus_loads_and_its_splits_share_no_document():
    train, val = load_texts("embedded", "train"), load_texts("embedded", "val")
    assert sum(len(t) for t in val) > 500_000 and len(train) > 10 * len(val)
    assert not set(val) & set(train)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_every_epoch_is_another_permutation_of_all_documents(n, seed):
    texts = [f"{i}" for i in range(n)]
    stream = TextStream(texts, BYTES, seed)
    epochs = [[BYTES.decode(stream.sample(e * n + i)[0][1:]) for i in range(n)] for e in range(3)]
    assert all(sorted(epoch) == sorted(texts) for epoch in epochs)
    if n >= 20:  # two of three orders of twenty agree once in 20! tries
        assert epochs[0] != epochs[1] != epochs[2]
    again = TextStream(texts, BYTES, seed)  # any sample can be asked for at any time: that is what resuming needs
    assert [again.sample(i) for i in (2 * n, 0, n)] == [stream.sample(i) for i in (2 * n, 0, n)]


def test_an_epoch_decodes_every_row_group_once_and_mixes_documents_of_many(tmp_path, monkeypatch):
    texts = ParquetTexts([parquet(tmp_path / f"{n}.parquet", text=[f"{n}-{i}" for i in range(450)]) for n in "ab"])
    wanted, decoded, read = sorted(texts), [], pq.ParquetFile.read_row_group
    assert len(texts.starts) == 301 and len(wanted) == 900  # row groups of three: five windows
    count = lambda self, group, **options: decoded.append((id(self), group)) or read(self, group, **options)
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", count)
    texts._kept.clear()
    stream = TextStream(texts, BYTES, seed=1)
    order = [BYTES.decode(stream.sample(i)[0][1:]) for i in range(900)]
    assert sorted(order) == wanted and len(decoded) == len(set(decoded)) == 300
    neighbours = sum(abs(wanted.index(a) - wanted.index(b)) < 3 for a, b in pairwise(order))
    assert neighbours < 45  # 9 or so of 899 by chance within windows of 192 documents; 600 if groups stayed together


def test_a_sample_is_a_bos_and_the_text_all_of_it_to_be_predicted():
    ids, mask = TextStream(["käse"], BYTES, shuffle=False).sample(5)
    assert ids[0] == BYTES.bos and BYTES.decode(ids[1:]) == "käse" and mask is None
    in_order = TextStream(["a", "b", "c"], BYTES, shuffle=False)
    assert [BYTES.decode(in_order.sample(i)[0][1:]) for i in range(4)] == ["a", "b", "c", "a"]
