"""Knowledge bases on disk: what is added, changed and removed; what survives kills, damage and other processes."""

import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.kb_kill_loop import Checksums, held_by, kill_loop
from nanochat import knowledge_base, retrieval
from nanochat.common import REPO, UserError
from nanochat.documents import Document
from nanochat.knowledge_base import (
    TYPES,
    Documents,
    add_documents,
    build_kb,
    check_files,
    kb_info,
    open_kb,
    remove_documents,
    writing,
)
from nanochat.retrieval import RetrievalManager, load_retriever


@pytest.fixture(autouse=True)
def checksums(monkeypatch):
    """Vectors without a model: equal texts have equal ones, others differ."""
    monkeypatch.setattr(knowledge_base, "get_encoder", lambda name="": Checksums())


def docs(*ids, text="some words"):
    return [Document(i, f"title {i}", f"{text} of {i}", "test", metadata={"land": f"l{len(i)}"}) for i in ids]


def held(path):
    return [doc.id for doc in open_kb(path).documents]


# ----------------------------------------------------------------------------------------------------------------------
# Coming and going


@pytest.mark.parametrize("reindex", [0, 20_000])
@pytest.mark.parametrize("name", TYPES)
def test_what_comes_and_goes_is_found_or_not(tmp_path, monkeypatch, name, reindex):
    monkeypatch.setattr(retrieval, "REINDEX", reindex)
    path = tmp_path / "kb"
    build_kb(docs("a", "b", "c", "d"), path, name)
    manager = RetrievalManager("", path)
    manager.add_documents(docs("e"))
    manager.update_documents([Document("b", "a volcano", "erupts"), *docs("f")])
    manager.remove_documents(["c", "e"])
    assert [doc.id for doc in manager.documents] == ["a", "d", "b", "f"]
    for title, text, first in [("a volcano", "erupts", "b"), ("title f", "some words of f", "f")]:
        found = manager.retrieve(f"{title}\n{text}", 9)
        assert found[0].id == first and {doc.id for doc in found} <= {"a", "b", "d", "f"}
    with pytest.raises(UserError, match="'a' is already in"):
        manager.add_documents(docs("x", "a"))
    with pytest.raises(UserError, match="no document with the id 'c'"):
        manager.remove_documents(["a", "c"])
    assert len(manager.documents) == 4  # nothing was done by halves
    manager.add_documents(docs("c"))  # what was removed may come back
    assert [doc.id for doc in manager.retrieve("title c\nsome words of c", 1)] == ["c"]
    check_files(path, kb_info(path), whole=True)


def test_only_new_documents_are_embedded(tmp_path, monkeypatch):
    seen = []
    embed = Checksums.encode_passages
    monkeypatch.setattr(Checksums, "encode_passages", lambda self, texts: seen.extend(texts) or embed(self, texts))
    monkeypatch.setattr(knowledge_base, "COMPACT", 3)
    build_kb(docs("a", "b"), tmp_path / "kb")
    add_documents(tmp_path / "kb", docs("c", "d"))
    add_documents(tmp_path / "kb", docs("a", "e", text="new"), replace=True)  # outgrows the base: a new one is made
    assert kb_info(tmp_path / "kb")["segments"] == [] and held(tmp_path / "kb") == ["b", "c", "d", "a", "e"]
    assert len(seen) == 6 and held_by(tmp_path / "kb")["e"] == "new of e"


def test_a_changed_knowledge_base_ranks_as_one_built_anew(tmp_path):
    many = [Document(str(n), f"t{n % 5}", f"word{n} word{n % 7} common " * (1 + n % 3)) for n in range(60)]
    build_kb(many, tmp_path / "whole")
    build_kb([*many[:20], Document("x", "word3", "common")], tmp_path / "grown")
    for start in range(20, 60, 8):
        add_documents(tmp_path / "grown", many[start : start + 8])
    remove_documents(tmp_path / "grown", ["x"])
    for name in TYPES:
        whole, grown = (load_retriever(tmp_path / kb, name) for kb in ("whole", "grown"))
        for query in ("word3 common", "t1 word44", "common"):
            assert whole.retrieve(query, 20) == grown.retrieve(query, 20), (name, query)


def test_many_small_additions_are_merged(tmp_path, monkeypatch):
    monkeypatch.setattr(knowledge_base, "MAX_SEGMENTS", 3)
    build_kb(docs("a"), tmp_path / "kb")
    for n in range(9):
        add_documents(tmp_path / "kb", docs(f"n{n}"))
        if n == 4:
            remove_documents(tmp_path / "kb", ["n2"])
    info = kb_info(tmp_path / "kb")
    assert held(tmp_path / "kb") == ["a", *(f"n{n}" for n in range(9) if n != 2)] == list(held_by(tmp_path / "kb"))
    assert len(info["segments"]) <= 3
    assert sorted(f.name for f in (tmp_path / "kb" / "segments").iterdir()) == info["segments"]


TEXT = st.text(st.characters(codec=None), max_size=30)
HOSTILE = st.one_of(
    TEXT, st.sampled_from(["", "\x00\x1b\u2028\x85\r\n", "א\u202eב", "🙂" * 40, "<|bos|>", "\ud800", "x" * 10**4])
)
META = st.dictionaries(
    TEXT.filter(lambda k: k not in ("id", "title", "content", "source", "score")), HOSTILE, max_size=2
)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(HOSTILE, HOSTILE, META), min_size=2, max_size=6), st.data())
def test_any_document_comes_back_as_it_was(tmp_path_factory, rows, data):
    many = [
        Document(f"{n} {title[:20]}", title, content, metadata=meta) for n, (title, content, meta) in enumerate(rows)
    ]
    path, cut = tmp_path_factory.mktemp("hostile") / "kb", data.draw(st.integers(1, len(many) - 1))
    build_kb(many[:cut], path)
    add_documents(path, many[cut:])
    plain = lambda text: text.encode("utf-8", "replace").decode()
    want = [
        (plain(d.id), plain(d.title), plain(d.content), {plain(k): plain(v) for k, v in d.metadata.items()})
        for d in many
    ]
    got = [(d.id, d.title, d.content, d.metadata) for d in open_kb(path).documents]
    assert got == want
    retriever = load_retriever(path, "hybrid")
    for query in (data.draw(HOSTILE), many[0].text):
        assert len(retriever.retrieve(query, 3, filters=data.draw(st.sampled_from([None, {"title": query}])))) <= 3
    remove_documents(path, [want[-1][0]])
    assert held(path) == [row[0] for row in want[:-1]]


def test_a_megabyte_is_a_document(tmp_path):
    build_kb([*docs("a"), Document("big", "", "word " * 200_000), Document("line", "", "x" * 10**6)], tmp_path / "kb")
    for name in TYPES:
        assert load_retriever(tmp_path / "kb", name).retrieve("word", 1)[0].id in ("big", "line", "a")
    assert len(open_kb(tmp_path / "kb").documents[2].content) == 10**6


def test_documents_that_cannot_be_kept_are_refused(tmp_path):
    build_kb(docs("a"), tmp_path / "kb")
    before = (tmp_path / "kb" / "kb.json").read_bytes()
    for bad, says in [
        (docs("x", "x"), "'x' is that of two documents"),
        ([{"id": "x"}], "made of Documents, not of dict"),
        ([Document("x", "t", "c", metadata={"set": {1}})], "cannot be written as JSON"),
        ([Document("x", None, "c")], "field 'title'"),
    ]:
        for write in (add_documents, lambda path, documents: build_kb(documents, path)):
            with pytest.raises(UserError, match=says):
                write(tmp_path / "kb", bad)
    with pytest.raises(UserError, match="nothing would be left"):
        remove_documents(tmp_path / "kb", ["a"])
    with pytest.raises(UserError, match="no documents"):
        build_kb([], tmp_path / "kb")
    assert (tmp_path / "kb" / "kb.json").read_bytes() == before


def test_documents_are_a_sequence_read_lazily(tmp_path):
    build_kb(docs("a", "b", "c"), tmp_path / "kb", "simple")
    add_documents(tmp_path / "kb", docs("d", "b!"))
    found = open_kb(tmp_path / "kb").documents
    assert isinstance(found, Documents) and len(found) == 5
    assert found[-1].id == "b!" and [doc.id for doc in found[1:4]] == ["b", "c", "d"]
    found[0].metadata["land"] = "changed"
    assert found[0].metadata == {"land": "l1"}
    with pytest.raises(IndexError):
        found[5]


# ----------------------------------------------------------------------------------------------------------------------
# Kills, damage, other processes


def test_a_killed_writer_loses_nothing_it_acknowledged(tmp_path, monkeypatch):
    monkeypatch.setattr(knowledge_base, "COMPACT", 20)
    monkeypatch.setattr(knowledge_base, "MAX_SEGMENTS", 4)
    monkeypatch.setattr(retrieval, "REINDEX", 20_000)  # the loop changes it
    counts = kill_loop(tmp_path / "kb", kills=12, max_milliseconds=100, seed=1)
    assert counts["kills"] == 12 and counts["steps"] > 0  # how many depends on what else the machine does


STEPS = {
    "build": lambda path: build_kb(docs("new"), path),
    "add": lambda path: add_documents(path, docs("new")),
    "merge": lambda path: add_documents(path, docs("new")),
    "compact": lambda path: add_documents(path, docs("new")),
    "remove": lambda path: remove_documents(path, ["a"]),
}


def die_before(call, *functions):
    """The functions, counting together: the process ends when call number `call` is about to happen."""
    left = iter(range(call, -1, -1))
    return [lambda *args, f=f, **kwargs: f(*args, **kwargs) if next(left) else os._exit(9) for f in functions]


@pytest.mark.parametrize("name", STEPS)
def test_dying_at_any_rename_or_deletion_leaves_the_old_or_the_new(tmp_path, monkeypatch, name):
    """The process dies before its first call of os.replace, os.fsync or rmtree, before its second, and so on."""
    if name in ("merge", "compact"):
        monkeypatch.setattr(knowledge_base, *{"merge": ("MAX_SEGMENTS", 1), "compact": ("COMPACT", 0)}[name])
    build_kb(docs("a", "b"), tmp_path / "original")
    path = tmp_path / "original"
    if name == "merge":
        add_documents(path, docs("c"))
    before = held(path)
    for calls in range(200):
        path = tmp_path / f"kb{calls}"
        shutil.copytree(tmp_path / "original", path)
        child = os.fork()
        if child == 0:
            os.replace, os.fsync, shutil.rmtree = die_before(calls, os.replace, os.fsync, shutil.rmtree)
            STEPS[name](path)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        now = list(held_by(path))
        after = {"build": ["new"], "remove": before[1:]}.get(name, [*before, "new"])
        assert now == after if code == 0 else now in (before, after), (name, calls)
        add_documents(path, docs("later"))  # and writing goes on
        assert list(held_by(path)) == [*now, "later"]
        left = [p.name for p in tmp_path.iterdir() if p.name.startswith(f".{path.name}.")]
        assert left == [f".{path.name}.lock"]
        if code == 0:
            break
    assert code == 0 and calls > 2


def test_a_reader_keeps_what_it_opened(tmp_path):
    path = tmp_path / "kb"
    build_kb(docs("a", "b"), path)
    manager = RetrievalManager("hybrid", path)
    build_kb(docs("c"), path)
    assert [doc.id for doc in manager.documents] == ["a", "b"]
    assert manager.retrieve("title b\nsome words of b", 1)[0].id == "b"
    manager.refresh()
    assert [doc.id for doc in manager.documents] == ["c"]


def test_threads_may_read_while_another_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(knowledge_base, "COMPACT", 5)
    path, errors = tmp_path / "kb", []
    build_kb(docs("a", "b"), path)
    manager = RetrievalManager("hybrid", path)

    def ask():
        try:
            while not done.is_set():
                assert manager.retrieve("title a\nsome words of a", 1, filters={"land": "l1"})[0].id == "a"
                held(path)
        except Exception as e:
            errors.append(e)

    done = threading.Event()
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for n in range(12):
        manager.update_documents(docs(f"n{n % 4}", text=str(n)))
    done.set()
    for thread in threads:
        thread.join()
    assert not errors and held(path)[:2] == ["a", "b"] and len(manager.documents) == 6


def test_two_processes_building_into_one_folder_leave_one_whole(tmp_path):
    code = (
        "import sys; from nanochat.knowledge_base import build_kb; from nanochat.documents import Document\n"
        "docs = [Document(f'{sys.argv[2]}{i}', 't', 'words') for i in range(40)]\n"
        "for n in range(8): build_kb(docs, sys.argv[1], 'bm25')"
    )
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "kb"), who], env=env) for who in "ab"]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    ids = held(tmp_path / "kb")
    assert ids in ([f"a{i}" for i in range(40)], [f"b{i}" for i in range(40)])
    check_files(tmp_path / "kb", kb_info(tmp_path / "kb"), whole=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".kb.lock", "kb"]


def test_a_second_writer_waits_and_then_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(knowledge_base, "WAIT", 0.1)
    build_kb(docs("a"), tmp_path / "kb")
    with writing(tmp_path / "kb"):
        with pytest.raises(UserError, match="being written by another process"):
            add_documents(tmp_path / "kb", docs("b"))
        assert held(tmp_path / "kb") == ["a"]  # readers don't wait
    add_documents(tmp_path / "kb", docs("b"))


FILES = ["documents.jsonl", "documents.idx.npy", "embeddings.npy", "index.faiss", "bm25/data.csc.index.npy",
         "bm25/vocab.index.json", "segments/000001/documents.jsonl", "segments/000001/embeddings.npy"]  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two knowledge bases whose files have the same names and nearly the same sizes."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(knowledge_base, "get_encoder", lambda name="": Checksums())
        for name, text in (("one", "some words"), ("other", "more words")):
            build_kb(docs("a", "b", text=text), folder / name)
            add_documents(folder / name, docs("c", text=text))
        build_kb(docs("a", "b"), folder / "unchanged")
    return folder


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "swap"])
def test_damage_is_one_clear_error(tmp_path, two, file, harm):
    shutil.copytree(two / "one", tmp_path / "kb")
    path = tmp_path / "kb" / file
    data = path.read_bytes()
    new = {"truncate": data[: len(data) // 2], "flip": data[:-2] + bytes([data[-2] ^ 1]) + data[-1:],
           "swap": (two / "other" / file).read_bytes(), "remove": b""}[harm]  # fmt: skip
    if new == data:
        pytest.skip("the two are equal in this file")
    path.write_bytes(new)
    if harm == "remove":
        path.unlink()
    with pytest.raises(UserError, match="missing or was changed"):
        RetrievalManager("hybrid", tmp_path / "kb")


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_kb_json_that_was_tampered_with_gives_a_user_error_or_works(tmp_path_factory, two, data):
    path = tmp_path_factory.mktemp("tampered") / "kb"
    shutil.copytree(two / data.draw(st.sampled_from(["one", "unchanged"])), path)
    info = json.loads((path / "kb.json").read_text())
    key = data.draw(st.sampled_from([k for k in info if k != "built_from"]))
    junk = st.one_of(
        st.none(),
        st.integers(),
        st.text(max_size=3),
        st.lists(st.one_of(st.integers(-9, 9), st.text(max_size=3)), max_size=3),
    )
    info[key] = data.draw(st.one_of(junk, st.dictionaries(st.text(max_size=3), junk, max_size=2)))
    (path / "kb.json").write_text(json.dumps(info))
    for use in (lambda: RetrievalManager("", path).retrieve("some words", 3), lambda: add_documents(path, docs("new"))):
        with suppress(UserError), pytest.MonkeyPatch.context() as patch:
            patch.setattr(retrieval, "REINDEX", data.draw(st.sampled_from([0, 20_000])))
            use()


@pytest.mark.parametrize("limit", ["COMPACT", "MAX_SEGMENTS"])
def test_damaged_vectors_are_not_taken_into_a_new_file(tmp_path, two, monkeypatch, limit):
    monkeypatch.setattr(knowledge_base, limit, 1)
    shutil.copytree(two / "one", tmp_path / "kb")
    shutil.copy(two / "other" / "segments" / "000001" / "embeddings.npy", tmp_path / "kb" / "segments" / "000001")
    with pytest.raises(UserError, match="missing or was changed"):
        add_documents(tmp_path / "kb", docs("d"))


def test_large_files_are_only_measured_until_asked_to_verify(tmp_path, monkeypatch):
    monkeypatch.setattr(knowledge_base, "HASHED", 10)
    build_kb(docs("a", "b"), tmp_path / "kb", "bm25")
    path = tmp_path / "kb" / "documents.jsonl"
    path.write_bytes(path.read_bytes().replace(b"words", b"birds"))
    assert open_kb(tmp_path / "kb").documents[0].content == "some birds of a"
    with pytest.raises(SystemExit) as end:
        retrieval.cli(["stats", "--knowledge_base", str(tmp_path / "kb"), "--verify", "true"])
    assert end.value.code == 2
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(UserError, match="missing or was changed"):
        open_kb(tmp_path / "kb")


def test_an_older_format_says_what_to_do(tmp_path):
    (tmp_path / "kb").mkdir()
    old = {"format": "nanochat-kb", "version": 1, "type": "bm25", "documents": 1, "files": {"documents.jsonl": {}}}
    (tmp_path / "kb" / "kb.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match="version 1, not 2; build it again with"):
        RetrievalManager("bm25", tmp_path / "kb")


def test_a_write_leaves_other_folders_alone_and_torchrun_is_refused(tmp_path, monkeypatch):
    build_kb(docs("a", "b"), tmp_path / "kb", "simple")
    (tmp_path / ".kb.archived").mkdir()
    (tmp_path / "kb" / ".DS_Store").write_text("a file manager's")
    add_documents(tmp_path / "kb", docs("c"))
    assert (tmp_path / ".kb.archived").is_dir()
    build_kb(docs("a", "b"), tmp_path / "kb", "simple")  # what a file manager left is no reason to stop
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process"):
        add_documents(tmp_path / "kb", docs("d"))
