"""Retrieval: tokens, the four retrievers, knowledge bases on disk, the command line, the example data set."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_bm25 import BM25Okapi

from benchmarks.kb_kill_loop import Checksums
from nanochat import knowledge_base, retrieval
from nanochat import retrievers as retrievers_module
from nanochat.common import UserError, read_jsonl
from nanochat.documents import Document, read_documents, tokenize
from nanochat.passages import sentences
from nanochat.rag_utils import ABSTENTION, extract_citations
from nanochat.retrieval import (
    BM25Retriever,
    DenseRetriever,
    HybridRetriever,
    RetrievalManager,
    SimpleRetriever,
    build_kb,
    cli,
    load_retriever,
)
from nanochat.retrievers import dense_index
from scripts import prepare_rag_dataset

TEXTS = [
    (
        "Chad - land",
        "The highest point of Chad is Emi Koussi. The climate is tropical in the south, desert in the north.",
    ),
    ("Chad - people", "The population of Chad is 19,093,595. Arabic and French are spoken."),
    ("Peru - land", "The highest point of Peru is Nevado Huascaran. The climate varies from tropical to temperate."),
    ("Peru - people", "The population of Peru is 32,600,249. Spanish, Quechua and Aymara are spoken."),
    ("Norway - land", "The highest point of Norway is Galdhopiggen. Fjords cut into the coast."),
    ("J. S. Bach", "Johann Sebastian Bach wrote cantatas for voice C and viola d'amore."),
    ("東京", "東京は日本の首都です。"),
    ("Cooking rice", "Rinse the grains, add water, simmer under a lid and let it rest."),
]
DOCS = [Document(f"d{n}", title, content, "test", metadata={"n": [n]}) for n, (title, content) in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def kb(tmp_path_factory):
    """One knowledge base with every index, built once."""
    path = tmp_path_factory.mktemp("kb") / "kb"
    build_kb(DOCS, path, "hybrid")
    return path


@pytest.fixture(scope="module")
def retrievers(kb):
    return {name: load_retriever(kb, name) for name in retrieval.TYPES}


# ----------------------------------------------------------------------------------------------------------------------
# Tokens and documents


def test_tokens_are_lower_case_words_and_numbers_of_any_script():
    assert tokenize("J. R. Tolkien's C") == ["j", "r", "tolkien", "s", "c"]
    assert tokenize("83,871 sq km, 3.5 % of 1,2") == ["83871", "sq", "km", "3.5", "of", "1", "2"]
    assert tokenize("São Tomé, STRASSE/Straße") == ["sao", "tome", "strasse", "strasse"]
    assert tokenize("東京 Москва हिन्दी") == ["東", "京", "москва", "हिन्दी"]
    assert tokenize("") == tokenize(" ,.! \x00 🙂") == []


@given(st.text(max_size=200), st.text(max_size=200))
def test_tokens_of_two_texts_are_the_tokens_of_each(a, b):
    assert tokenize(f"{a}\n{b}") == tokenize(a) + tokenize(b)
    assert all(token and not token.isspace() for token in tokenize(a))


def test_a_document_survives_the_way_to_json_and_back():
    for doc in (DOCS[0], Document("x", "", "", score=0.5)):
        assert Document.from_dict(json.loads(json.dumps(doc.to_dict()))) == doc


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"title": "t", "content": "c"}, "no field 'id'"),
        ({"id": "a", "content": "c"}, "'a' has no field 'title'"),
        ({"id": "a", "title": None, "content": "c"}, "'a' has null in field 'title'"),
        ({"id": "a", "title": "t", "content": ["c"]}, "a list, not text, in field 'content'"),
        ({"id": 3, "title": "t", "content": "c"}, "a int, not text, in field 'id'"),
        ({"id": "a", "title": "t", "content": "c", "score": "high"}, "'score' must be a number"),
        ("text", "not a str"),
    ],
)
def test_a_bad_document_is_refused(row, says):
    with pytest.raises(UserError, match=says):
        Document.from_dict(row)


# ----------------------------------------------------------------------------------------------------------------------
# Retrievers


@pytest.mark.parametrize("name", retrieval.TYPES)
def test_the_right_document_comes_first(retrievers, name):
    for query, want in [("highest point of Peru", "d2"), ("population of Chad", "d1"), ("How do I cook rice?", "d7")]:
        found = retrievers[name].retrieve(query, 3)
        assert found[0].id == want, query
        assert [doc.score for doc in found] == sorted((doc.score for doc in found), reverse=True)


def test_numbers_initials_and_unspaced_scripts_are_found_by_words(retrievers):
    for name in ("simple", "bm25"):
        for query, want in [("19093595", "d1"), ("J S", "d5"), ("首都", "d6")]:
            assert retrievers[name].retrieve(query, 1)[0].id == want, (name, query)
        assert retrievers[name].retrieve("xylophone", 5) == []


@pytest.mark.parametrize("name", retrieval.TYPES)
def test_what_is_returned_is_a_copy(retrievers, name):
    found = retrievers[name].retrieve("highest point", 2)
    for doc in found:
        doc.content, doc.score = "overwritten", -1.0
        doc.metadata["n"].append("more")
    again = retrievers[name].retrieve("highest point", 2)
    assert all(doc.content != "overwritten" and doc.score > 0 and len(doc.metadata["n"]) == 1 for doc in again)
    assert all(doc.score is None for doc in retrievers[name].documents)


WORDS = st.sampled_from("highest point of Chad Peru population spoken climate tropical rice 東京 C 🙂 <|bos|>".split())
QUERIES = st.lists(st.one_of(st.lists(WORDS, max_size=6).map(" ".join), st.text(max_size=40)), max_size=5)


@settings(max_examples=40, deadline=None)
@given(QUERIES, st.integers(1, 20))
def test_a_batch_gives_what_single_queries_give_and_a_smaller_k_the_beginning(queries, top_k):
    for retriever in (SimpleRetriever(DOCS), BM25Retriever(DOCS)):
        batch = retriever.retrieve_batch(queries, top_k)
        assert batch == [retriever.retrieve(query, top_k) for query in queries]
        assert all(len(found) <= min(top_k, len(DOCS)) for found in batch)
        assert [found[:1] for found in batch] == retriever.retrieve_batch(queries, 1)


@pytest.mark.parametrize("name", ["dense", "hybrid"])
def test_a_dense_batch_gives_what_single_queries_give(retrievers, name):
    queries = [
        f"{a} {b}" for a in ("highest point of", "people of", "") for b in ("Chad", "Peru", "a much longer place")
    ] * 3
    batch = retrievers[name].retrieve_batch(queries, 5)
    for query, found in zip(queries, batch):
        single = retrievers[name].retrieve(query, 5)
        assert [doc.id for doc in found] == [doc.id for doc in single]
        # padding changes fp32 sums in the last bits
        assert np.allclose([doc.score for doc in found], [doc.score for doc in single], atol=1e-5)


def test_what_compares_vectors_says_how_similar_a_documents_best_sentence_is(retrievers, kb):
    query = "Where is the river of Chad?"
    encoder = retrievers["dense"].encoder
    [vector] = encoder.encode_queries([query])
    for name, retriever in retrievers.items():
        found = retriever.retrieve(query, 4)
        assert [doc.similarity for doc in found] == [None] * len(found)
        compared = retriever.compare(query, [*found, Document("new", "Chari", "")])
        assert compared == RetrievalManager(name, kb).compare(query, compared)
        if name in ("dense", "hybrid"):
            told = [[f"{doc.title}\n{s}" for s in sentences(doc.content)] or [doc.text] for doc in compared]
            best = [float((encoder.encode_passages(texts) @ vector).max()) for texts in told]
            assert [doc.similarity for doc in compared] == pytest.approx(best, abs=2e-2)
            assert max(map(len, told)) > 1 and RetrievalManager(name, kb).retrieve(query, 4) == compared[:4]
        else:
            assert [doc.similarity for doc in compared] == [None] * len(compared)


def test_equal_scores_come_in_order_of_position():
    twins = [Document(f"t{n}", "same", "same words") for n in range(30)]
    for retriever in (SimpleRetriever(twins), BM25Retriever(twins)):
        assert [doc.id for doc in retriever.retrieve("same", 7)] == [f"t{n}" for n in range(7)]


def test_bm25_ranks_as_rank_bm25_does_on_the_same_tokens():
    """With Okapi's idf ("robertson") the scores are rank-bm25's without its factor k1 + 1, to float32's precision.

    Words in more than half of the documents are left out: rank-bm25 gives those a small floor, bm25s zero. The
    default, Lucene's idf, weighs rare words a little less: the best document is the same for four queries of five.
    """
    rng = np.random.default_rng(0)
    vocabulary = [f"w{n}" for n in range(60)]
    weights = 1 / np.arange(1, 61)
    texts = [" ".join(rng.choice(vocabulary, rng.integers(5, 40), p=weights / weights.sum())) for _ in range(60)]
    docs = [Document(str(n), "", text) for n, text in enumerate(texts)]
    tokens = [tokenize(text) for text in texts]
    rare = [word for word in vocabulary if sum(word in t for t in tokens) < 30]
    okapi, lucene, robertson = BM25Okapi(tokens), BM25Retriever(docs), BM25Retriever(docs, method="robertson")
    same = 0
    for _ in range(40):
        query = list(rng.choice(rare, 4))
        scores = okapi.get_scores(query)
        found = robertson.retrieve(" ".join(query), 60)
        want = sorted((n for n in range(60) if scores[n] > 0), key=lambda n: (-round(scores[n], 4), n))
        assert np.allclose([doc.score * 2.5 for doc in found], [scores[n] for n in want], rtol=1e-4)
        assert np.allclose([scores[int(doc.id)] for doc in found], [scores[n] for n in want], rtol=1e-4)
        same += lucene.retrieve(" ".join(query), 1)[0].id == found[0].id
    assert same >= 32


def test_odd_documents_and_queries_are_searched_without_harm():
    odd = ["", "\x00\x1b", "🙂🙃", "שלום עולם", "word " * 50_000, "<|bos|><|doc_start|>"]
    docs = [Document(str(n), "", text) for n, text in enumerate(odd)]
    for retriever in (SimpleRetriever(docs), BM25Retriever(docs), BM25Retriever(docs[:3])):
        for query in ["", " ", "\ud800", "the of a", "שלום", "<|bos|>", "🙂", "word " * 2_000_000]:  # the last: 10 MB
            assert len(retriever.retrieve(query, 3)) <= 3
    assert SimpleRetriever(docs).retrieve("שלום", 1)[0].id == "3"


def test_what_cannot_be_asked_is_refused(retrievers):
    for top_k in (0, -1, 2.5, True):
        with pytest.raises(UserError, match="top_k"):
            retrievers["simple"].retrieve("Chad", top_k)
    with pytest.raises(UserError, match="must be text"):
        retrievers["simple"].retrieve(None)
    with pytest.raises(UserError, match="no documents"):
        SimpleRetriever([])


def test_fusion_prefers_what_both_lists_hold():
    class Fixed(retrieval.Retriever):
        def __init__(self, *order):
            super().__init__(DOCS)
            self.order = order

        def _search(self, queries, top_k, mask):
            return [[(1.0, position) for position in self.order] for _ in queries]

    found = HybridRetriever(Fixed(0, 1, 2), Fixed(3, 1, 4)).retrieve("any", 3)
    assert [doc.id for doc in found] == ["d1", "d0", "d3"]
    assert found[0].score == pytest.approx(2 / (HybridRetriever.K + 2))


# ----------------------------------------------------------------------------------------------------------------------
# Options


@pytest.fixture(scope="module")
def many():
    """2,000 documents of Zipf's words, every retriever over them, with vectors that only the text decides."""
    rng = np.random.default_rng(3)
    weights = 1 / np.arange(1, 401)
    texts = [
        " ".join(f"w{n}" for n in rng.choice(400, rng.integers(3, 40), p=weights / weights.sum())) for _ in range(2000)
    ]
    docs = [
        Document(
            str(n),
            f"title{n % 50}",
            text,
            metadata={"third": n % 3, "tags": [f"t{n % 7}", f"u{n % 11}"], "ok": n % 2 == 0},
        )
        for n, text in enumerate(texts)
    ]
    bm25, dense = BM25Retriever(docs), DenseRetriever(docs, Checksums())
    return {"simple": SimpleRetriever(docs), "bm25": bm25, "dense": dense, "hybrid": HybridRetriever(bm25, dense)}


@pytest.mark.parametrize("name", retrieval.TYPES)
def test_filters_give_what_sifting_all_results_gives(many, name):
    """Fusion is left to the filtered lists: what doesn't pass takes nobody's rank."""
    retriever, n = many[name], len(many[name].documents)
    for filters, passes in [
        ({"third": 1}, lambda d: d.metadata["third"] == 1),
        ({"third": ["0", 2], "ok": True}, lambda d: d.metadata["third"] != 1 and d.metadata["ok"]),
        ({"tags": ["t3", "u5"]}, lambda d: {"t3", "u5"} & set(d.metadata["tags"])),
        ({"title": "title7"}, lambda d: d.title == "title7"),
    ]:
        found = retriever.retrieve("w3 w50 w200 title7", 8, filters=filters)
        assert found and all(passes(doc) for doc in found)
        if name != "hybrid":
            want = [doc for doc in retriever.retrieve("w3 w50 w200 title7", n) if passes(doc)][:8]
            assert [doc.id for doc in found] == [doc.id for doc in want]
            assert np.allclose([doc.score for doc in found], [doc.score for doc in want], atol=1e-5)
    for bad in ({"mmr": True}, {"mmr": 1.1}, {"min_score": "high"}, {"filters": "third=1"}):
        with pytest.raises(UserError):
            retriever.retrieve("w3", 5, **bad)
    for nothing in ({"third": 5}, {"nowhere": "x"}, {"title": []}, {"title": "\ud800"}):
        assert retriever.retrieve("w3 w50", 5, filters=nothing) == []
    with pytest.raises(UserError, match="values must be text"):
        retriever.retrieve("w3", 5, filters={"third": None})


def test_bm25_gives_the_best_of_all_however_few_are_asked_for(many):
    """Common words are added to promising documents only; that changes nothing."""
    retriever, rng = many["bm25"], np.random.default_rng(0)
    for _ in range(60):
        query = " ".join(f"w{n}" for n in [*rng.integers(0, 6, 3), *rng.integers(0, 400, 2)])
        scores = retriever.index.get_scores(tokenize(query))
        [every] = retriever.search([query], 2000)
        assert np.allclose([score for score, _ in every], np.sort(scores[scores > 0])[::-1], rtol=1e-5)
        for top_k in (1, 10):
            assert retriever.search([query], top_k) == [every[:top_k]]


@pytest.mark.parametrize("name", retrieval.TYPES)
def test_min_score_and_mmr(many, name):
    retriever, query = many[name], "w3 w50 w120"
    plain = retriever.retrieve(query, 10)
    enough = [doc for doc in plain if doc.score >= plain[3].score]
    assert 4 <= len(enough) < 10 and retriever.retrieve(query, 10, min_score=plain[3].score) == enough
    assert retriever.retrieve(query, 10, mmr=1) == plain
    diverse = retriever.retrieve(query, 10, mmr=0.3)
    assert diverse[0] == plain[0] and diverse[:4] == retriever.retrieve(query, 4, mmr=0.3)
    likeness = lambda docs: retriever._likeness([int(doc.id) for doc in docs])[np.triu_indices(10, 1)].mean()
    assert likeness(diverse) < likeness(plain)


def test_twins_are_shown_once_when_diversity_is_asked_for():
    docs = [Document(str(n), "", text) for n, text in enumerate(["red fox"] * 5 + ["red wine", "red fox den"])]
    for retriever in (SimpleRetriever(docs), BM25Retriever(docs), DenseRetriever(docs, Checksums())):
        found = retriever.retrieve("red fox", 3, mmr=0.3)
        assert len({doc.content for doc in found}) == 3


def test_reranking_orders_the_best_fifty(many, monkeypatch):
    class Shortest:
        def score(self, query, texts):
            return -np.array([len(text) for text in texts], dtype=np.float32)

    monkeypatch.setattr(retrievers_module, "get_reranker", lambda name: {"short": Shortest()}[name])
    pool = many["hybrid"].retrieve("w3 w50", 50)
    found = many["hybrid"].retrieve("w3 w50", 5, rerank="short")
    assert [doc.id for doc in found] == [doc.id for doc in sorted(pool, key=lambda doc: len(doc.text))[:5]]
    assert found == many["hybrid"].retrieve_batch(["nothing", "w3 w50"], 5, rerank="short")[1]
    assert many["bm25"].retrieve("nothing", 5, rerank="short") == []


def test_weighted_fusion_runs_from_one_part_to_the_other(many):
    bm25, dense = many["bm25"], many["dense"]
    for alpha, part in ((0.0, bm25), (1.0, dense)):
        fused = HybridRetriever(bm25, dense, fusion="weighted", alpha=alpha)
        assert [doc.id for doc in fused.retrieve("w9 w50", 5)] == [doc.id for doc in part.retrieve("w9 w50", 5)]
    best = HybridRetriever(bm25, dense, fusion="weighted", alpha=0.7).retrieve("w9 w50", 5)[0]
    hits = [{i: s for s, i in part._search(["w9 w50"], 100, None)[0]} for part in (bm25, dense)]
    scaled = [
        (h.get(int(best.id), min(h.values())) - min(h.values())) / (max(h.values()) - min(h.values())) for h in hits
    ]
    assert best.score == pytest.approx(0.3 * scaled[0] + 0.7 * scaled[1])
    for bad in ({"fusion": "mix"}, {"alpha": 1.5}):
        with pytest.raises(UserError):
            HybridRetriever(bm25, dense, **bad)


@pytest.mark.parametrize("kind", ["hnsw", "ivf", "ivfpq"])
def test_approximate_indexes_find_what_the_exact_one_finds(kind):
    n, rng = 1200, np.random.default_rng(0)
    vectors = np.repeat(rng.standard_normal((40, 16)), n // 40, axis=0) + rng.standard_normal((n, 16)) * 0.7
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    docs = [Document(str(i), "", "", metadata={"half": i % 2}) for i in range(n)]
    encoder = SimpleNamespace(encode_queries=lambda queries: vectors[[int(query) for query in queries]])
    index, described = dense_index(vectors, kind)
    assert described["kind"] == kind and described["recall@10"] >= 0.95
    keep, half = np.arange(n) % 3 > 0, np.arange(n) % 2 == 1
    begun = dense_index(vectors[: n - 50], kind)[0]
    cases = [  # with a tail, with removed documents, with a filter on top
        (DenseRetriever(docs, encoder, [vectors[: n - 50], vectors[n - 50 :]], begun, described), {}, keep | True),
        (DenseRetriever(docs, encoder, [vectors], index, described, keep), {}, keep),
        (DenseRetriever(docs, encoder, [vectors], index, described, keep), {"filters": {"half": 1}}, keep & half),
    ]
    queries = range(0, n, 40)
    for retriever, options, passes in cases:
        shared = []
        for query, found in zip(queries, retriever.search([str(q) for q in queries], 10, **options)):
            want = np.argsort(-np.where(passes, vectors @ vectors[query], -2))[:10]
            shared.append(len({i for _, i in found} & set(want.tolist())))
        assert np.mean(shared) >= 9.3, options


def test_the_index_is_chosen_by_size_and_its_recall_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(knowledge_base, "get_encoder", lambda name="": Checksums())
    build_kb(DOCS, tmp_path / "flat")
    build_kb(DOCS, tmp_path / "hnsw", index="hnsw")
    for name in ("flat", "hnsw"):
        info = json.loads((tmp_path / name / "kb.json").read_text())["index"]
        assert info["kind"] == name and info["recall@10"] >= 0.95
    with pytest.raises(UserError, match="unknown index 'tree'"):
        build_kb(DOCS, tmp_path / "kb", index="tree")


# ----------------------------------------------------------------------------------------------------------------------
# The manager


def test_a_cached_search_is_not_done_again_until_something_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    build_kb(DOCS, tmp_path / "kb", "bm25")
    searches = []
    find = BM25Retriever._find
    monkeypatch.setattr(BM25Retriever, "_find", lambda self, *args: searches.append(args[0]) or find(self, *args))
    queries, plain = ["point of Peru", "Chad", "\ud800", "Chad"], RetrievalManager("", tmp_path / "kb")
    want = plain.retrieve_batch(queries, 3)
    searches.clear()
    for _ in range(2):
        manager = RetrievalManager("", tmp_path / "kb", cached=True)
        assert manager.retrieve_batch(queries, 3) == want
        assert len(searches) == 3  # in the first turn; equal queries once
    assert manager.retrieve("Chad", 3) == want[1] and len(searches) == 3
    manager.retrieve("Chad", 2)
    assert manager.retrieve("Chad", 3, filters={"title": "Chad - land"})[0].id == "d0" and len(searches) == 5
    manager.add_documents([Document("new", "Chad", "Chad")])
    assert manager.retrieve("Chad", 1)[0].id == "new" and len(searches) == 6
    with pytest.raises(UserError, match="must be text"):
        manager.retrieve(None)
    with pytest.raises(UserError, match="unknown option 'filter'"):
        RetrievalManager("", tmp_path / "kb", filter={})


def test_the_managers_options_are_defaults(tmp_path):
    build_kb(DOCS, tmp_path / "kb", "bm25")
    manager = RetrievalManager("bm25", tmp_path / "kb", filters={"title": "Peru - land"})
    assert [doc.id for doc in manager.retrieve("highest point")] == ["d2"]
    assert len(manager.retrieve("highest point", filters=None)) > 1
    talk = manager.augment_conversation({"messages": [{"role": "user", "content": "highest point"}]})
    assert [doc["id"] for doc in talk["messages"][0]["documents"]] == ["d2"]


# ----------------------------------------------------------------------------------------------------------------------
# Knowledge bases


def test_a_loaded_index_ranks_as_the_one_that_was_built(retrievers):
    for query in ("highest point of Peru", "languages", "tropical climate"):
        for name, built in (("bm25", BM25Retriever(DOCS)), ("dense", DenseRetriever(DOCS))):
            assert built.retrieve(query, 5) == retrievers[name].retrieve(query, 5)


def test_the_folder_holds_what_the_format_says_and_no_pickle(kb):
    info = json.loads((kb / "kb.json").read_text())
    assert (info["version"], info["documents"], info["encoder"]["dims"]) == (2, len(DOCS), 384)
    assert {"documents.jsonl", "embeddings.npy", "index.faiss"} <= set(info["files"])
    assert np.load(kb / "embeddings.npy", allow_pickle=False).shape == (len(DOCS), 384)
    assert all(b"pickle" not in path.read_bytes()[:200] for path in kb.rglob("*") if path.is_file())


def test_a_knowledge_base_serves_what_was_built(tmp_path):
    build_kb(DOCS, tmp_path / "kb", "simple")
    assert RetrievalManager("simple", knowledge_base=tmp_path / "kb").retrieve("Aymara", 1)[0].id == "d3"
    with pytest.raises(UserError, match="no dense index; build it again with prepare_kb --type dense"):
        RetrievalManager("dense", tmp_path / "kb")
    with pytest.raises(UserError, match="unknown retriever type 'spares'"):
        RetrievalManager("spares", tmp_path / "kb")
    build_kb(DOCS[:3], tmp_path / "kb", "bm25")  # replaces the older one
    assert len(RetrievalManager("bm25", tmp_path / "kb").documents) == 3


def test_what_is_no_knowledge_base_is_said_in_one_sentence(tmp_path, kb):
    with pytest.raises(UserError, match=r"not a knowledge base .*prepare_kb"):
        RetrievalManager("simple", tmp_path)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "knowledge_base").symlink_to(kb)
    with pytest.raises(UserError, match="knowledge_base is: name that"):
        RetrievalManager("simple", tmp_path / "set")
    (tmp_path / "kb.json").write_text('{"format": "other"}')
    with pytest.raises(UserError, match="not that of a knowledge base"):
        RetrievalManager("simple", tmp_path)


@pytest.mark.parametrize("name", ["documents.jsonl", "bm25/data.csc.index.npy", "bm25/params.index.json"])
@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_tampering_is_noticed(tmp_path, name, harm):
    build_kb(DOCS, tmp_path / "kb", "bm25")
    path = tmp_path / "kb" / name
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] if harm == "truncate" else data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    if harm == "remove":
        path.unlink()
    with pytest.raises(UserError, match="missing or was changed"):
        RetrievalManager("bm25", tmp_path / "kb")


def test_another_format_version_or_encoder_is_refused(tmp_path, kb):
    info = json.loads((kb / "kb.json").read_text())
    for change, says in [({"version": 99}, "version 99, not 2"), ({"encoder": {"sha256": "0"}}, "another encoder")]:
        for path in kb.iterdir():
            if not (tmp_path / path.name).exists():
                (tmp_path / path.name).symlink_to(path)
        (tmp_path / "kb.json").unlink()
        (tmp_path / "kb.json").write_text(json.dumps({**info, **change}))
        with pytest.raises(UserError, match=says):
            RetrievalManager("dense", tmp_path)


def test_a_knowledge_base_that_does_not_say_its_type_is_refused(tmp_path):
    build_kb(DOCS, tmp_path / "kb", "simple")
    info = json.loads((tmp_path / "kb" / "kb.json").read_text())
    for change in ({}, {"type": "psychic"}, {"type": ["bm25"]}):
        (tmp_path / "kb" / "kb.json").write_text(json.dumps({k: v for k, v in info.items() if k != "type"} | change))
        with pytest.raises(UserError, match="field 'type'"):
            RetrievalManager(knowledge_base_path=tmp_path / "kb")


def test_a_failed_build_leaves_nothing_and_harms_nothing(tmp_path, monkeypatch):
    build_kb(DOCS, tmp_path / "kb", "bm25")
    monkeypatch.setattr(np, "save", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        build_kb(DOCS[:2], tmp_path / "kb", "bm25")
    monkeypatch.undo()
    assert len(RetrievalManager("bm25", tmp_path / "kb").documents) == len(DOCS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".kb.lock", "kb"]


def test_a_folder_that_is_not_ours_is_never_replaced(tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("dear")
    with pytest.raises(UserError, match="exists and is not a knowledge base"):
        build_kb(DOCS, tmp_path / "letters", "simple")
    assert (tmp_path / "letters" / "dear.txt").read_text() == "dear"


def test_a_file_of_the_users_in_a_knowledge_base_is_not_lost_when_it_is_built_again(tmp_path):
    kb = tmp_path / "kb"
    build_kb(DOCS, kb, "simple")
    info = json.loads((kb / "kb.json").read_text())
    (kb / "kb.json").write_text(json.dumps({**info, "version": 0}))
    build_kb(DOCS[:3], kb, "simple")  # an older version's is replaced
    (kb / "mine.jsonl").write_text(json.dumps({"id": "x", "title": "x", "content": "x"}))
    with pytest.raises(SystemExit) as end:
        cli(["prepare_kb", "--documents", str(kb / "mine.jsonl"), "--output", str(kb), "--type", "simple"])
    assert end.value.code == 2 and (kb / "mine.jsonl").exists()
    assert len(RetrievalManager("simple", kb).documents) == 3


@pytest.mark.parametrize(
    "row",
    [
        '{"query": "x", "positive_ids": [["a"]]}',
        '{"query": 3, "positive_ids": ["a"]}',
        '{"query": "x", "positive_ids": ["another knowledge base\'s"]}',
    ],
)
def test_questions_that_cannot_be_judged_are_one_line(kb, tmp_path, capsys, row):
    (tmp_path / "q.jsonl").write_text(row + "\n")
    for more in ([], ["--max_examples", "-3"]):
        with pytest.raises(SystemExit) as end:
            cli(["eval", "--knowledge_base", str(kb), "--queries", str(tmp_path / "q.jsonl"), *more])
        assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_help_names_the_commands(capsys):
    cli(["--help"])
    assert "prepare_kb, add, remove, stats, query, eval" in capsys.readouterr().out


def test_a_conversation_gets_documents_before_its_last_user_message(kb):
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "What is the highest point of Peru?"},
    ]
    conversation = {"messages": messages, "metadata": {"id": 7}}
    before = json.dumps(conversation)
    augmented = RetrievalManager("simple", kb, top_k=4).augment_conversation(conversation, top_k=2)
    assert json.dumps(conversation) == before
    assert [m["role"] for m in augmented["messages"]] == ["system", "user", "assistant", "retrieval", "user"]
    message = augmented["messages"][3]
    assert message["query"] == "What is the highest point of Peru?"
    assert [set(doc) for doc in message["documents"]] == [
        {"id", "title", "content", "score", "similarity", "closest", "source"}
    ] * 2
    assert message["documents"][0]["id"] == "d2" and augmented["metadata"] == {"id": 7}
    json.dumps(augmented)
    for bad in ({"messages": [{"role": "system", "content": "s"}]}, {"messages": []}, {}):
        with pytest.raises(UserError):
            RetrievalManager("simple", kb).augment_conversation(bad)


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def _write(path, docs):
    path.write_text("".join(json.dumps(doc.to_dict()) + "\n" for doc in docs))
    return str(path)


def test_both_spellings_build_the_same_knowledge_base(tmp_path, capsys):
    docs = _write(tmp_path / "docs.jsonl", DOCS)
    for n, argv in enumerate((["prepare_kb"], [])):
        retrieval.cli([*argv, "--documents", docs, "--output", str(tmp_path / f"kb{n}"), "--type", "bm25"])
    infos = [json.loads((tmp_path / f"kb{n}" / "kb.json").read_text()) for n in (0, 1)]
    assert infos[0] == infos[1]
    retrieval.cli(["query", "--knowledge-base", str(tmp_path / "kb0"), "--query", "Peru", "--retriever_type", "bm25"])
    assert "[1] Peru - " in capsys.readouterr().out


def test_documents_come_and_go_by_command(tmp_path, capsys):
    kb, folder = str(tmp_path / "kb"), tmp_path / "docs"
    folder.mkdir()
    (folder / "pumps.md").write_text("# Pumps\n\nThe red pump moves 12 litres.\n\n## Care\n\nOil it each week.\n")
    (folder / "ovens.html").write_text("<title>Ovens</title><p>The blue oven reaches 900 degrees.</p>")
    more = _write(
        tmp_path / "more.jsonl", [Document("chad", "Chad", "The river is the Chari.", metadata={"year": 2020})]
    )
    cli(["prepare_kb", "--documents", str(folder), "--output", kb, "--type", "bm25", "--chunk_tokens", "40"])
    cli(["add", "--knowledge_base", kb, "--documents", more])
    with pytest.raises(SystemExit):
        cli(["add", "--knowledge_base", kb, "--documents", more])
    cli(["add", "--knowledge_base", kb, "--documents", more, "--update", "true"])
    cli(["stats", "--knowledge_base", kb, "--verify", "true"])
    out = capsys.readouterr().out
    assert "2 files, 3 passages" in out and '"chunk_tokens": 40' in out and "files are unchanged" in out
    for query, filters, first in [
        ("hot oven", "", "Ovens"),
        ("the", "year=2020,source=", "Chad"),
        ("the", "year=2020,year=1", "Chad"),
    ]:
        cli(["query", "--knowledge_base", kb, "--query", query, "--filters", filters, "--top_k", "1"])
        assert f"[1] {first}" in capsys.readouterr().out
    cli(["remove", "--knowledge_base", kb, "--ids", "chad"])
    cli(["query", "--knowledge_base", kb, "--query", "Chari"])
    assert "no document" in capsys.readouterr().out
    comma = _write(tmp_path / "comma.jsonl", [Document("a, b", "Comma", "The comma of Chad.")])
    cli(["add", "--knowledge_base", kb, "--documents", comma])
    (tmp_path / "ids.txt").write_text("a, b\n\n")
    cli(["remove", "--knowledge_base", kb, "--ids", f"@{tmp_path / 'ids.txt'}"])
    cli(["query", "--knowledge_base", kb, "--query", "comma"])
    assert "no document" in capsys.readouterr().out
    ask = ["query", "--knowledge_base", kb, "--query", "x"]
    remove = ["remove", "--knowledge_base", kb, "--ids"]
    for bad in ([*ask, "--filters", "year"], [*ask, "--mmr", "2"], [*remove, "chad"], [*remove, "@nowhere.txt"]):
        with pytest.raises(SystemExit) as end:
            cli(bad)
        assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_eval_writes_a_row_for_every_retriever(tmp_path, kb, capsys):
    queries = [
        {"query": "What is the highest point of Chad?", "positive_ids": ["d0"], "type": "single"},
        {"query": "Highest points of Norway and Peru", "positive_ids": ["d4", "d2"], "type": "two_hop"},
        {"query": "Who is the king of Mars?", "positive_ids": [], "type": "unanswerable"},
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    out = tmp_path / "out.json"
    retrieval.cli(["eval", "--knowledge_base", str(kb), "--queries", str(tmp_path / "q.jsonl"), "--output", str(out)])
    result = json.loads(out.read_text())
    assert set(result) == {"rows", "by_type", "config", "versions"}
    assert list(result["rows"]) == ["simple", "bm25", "dense", "hybrid", "rerank"]
    for row in result["rows"].values():
        assert row["n"] == 2 and row["recall@5"] == row["all_gold@5"] == 1.0 and row["recall@1"] == 0.75
    assert set(result["by_type"]) == {"single", "two_hop"}
    assert "two_hop" in capsys.readouterr().out


GOOD = '{"id": "a", "title": "t", "content": "c"}\n'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no documents"),
        (GOOD.encode() + b"{not json\n", "line 2: not valid JSON"),
        (GOOD.encode() + b'{"id": "\xff"}\n', "line 2"),
        (GOOD.encode() + b'{"id": "b", "title": "t"}\n', "row 2: document 'b' has no field 'content'"),
        (GOOD.encode() * 2, "already that of row 1"),
        (b"[1]\n", "line 1: not a JSON object"),
        (None, "cannot read"),
    ],
)
def test_bad_documents_end_in_one_line_and_exit_code_2(tmp_path, capsys, content, says):
    path = tmp_path / "docs.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as exit:
        retrieval.cli(["prepare_kb", "--documents", str(path), "--output", str(tmp_path / "kb"), "--type", "simple"])
    err = capsys.readouterr().err
    assert exit.value.code == 2 and says in err and err.count("\n") == 1
    assert not (tmp_path / "kb").exists()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["prepare_kb"], "give --documents"),
        (["prepair"], "unknown command 'prepair'"),
        (["query", "--knowledge_base", "nowhere", "--query", "x"], "not a knowledge base"),
        (["eval", "--knowledge_bass", "x"], "did you mean --knowledge_base?"),
    ],
)
def test_bad_commands_end_in_one_line_and_exit_code_2(argv, says, capsys):
    with pytest.raises(SystemExit) as exit:
        retrieval.cli(argv)
    err = capsys.readouterr().err
    assert exit.value.code == 2 and says in err and err.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------------
# The example data set


def test_the_example_answers_what_machine_learning_is(tmp_path, monkeypatch):
    config = prepare_rag_dataset.Config(output=str(tmp_path), type="bm25")
    prepare_rag_dataset.main(config)
    manager = RetrievalManager(retriever_type="simple", knowledge_base_path=tmp_path / "knowledge_base")
    assert manager.retrieve("What is machine learning?", top_k=3)[0].title == "Machine learning"
    monkeypatch.setattr(prepare_rag_dataset, "build_kb", lambda *args: pytest.fail("built again"))
    prepare_rag_dataset.main(config)


def test_the_example_is_consistent(tmp_path):
    prepare_rag_dataset.main(prepare_rag_dataset.Config(output=str(tmp_path), type="simple"))
    docs = {doc.id: doc for doc in read_documents(tmp_path / "knowledge_base" / "documents.jsonl")}
    topics = {}
    for split in ("train", "val", "test"):
        rows = list(read_jsonl(tmp_path / "queries" / f"{split}.jsonl", prepare_rag_dataset.FIELDS))
        topics[split] = {i for row in rows for i in row["positive_ids"]}
        for row in rows:
            assert all(row["answer"].split()[-1].lower() in docs[i].text.lower() for i in row["positive_ids"]), row
    assert not topics["train"] & topics["test"] and not topics["train"] & topics["val"]
    for split in ("train", "val"):
        cited = abstained = 0
        for row in read_jsonl(tmp_path / "conversations" / f"{split}_rag.jsonl"):
            shown, answer = row["messages"][1]["documents"], row["messages"][-1]["content"]
            assert all(docs[doc["id"]].metadata["split"] == split for doc in shown)
            numbers = extract_citations(answer)
            assert all(1 <= n <= len(shown) for n in numbers)
            cited, abstained = cited + bool(numbers), abstained + (answer == ABSTENTION)
        assert cited and abstained


def test_an_unknown_mode_is_refused(tmp_path):
    with pytest.raises(UserError, match="unknown --mode"):
        prepare_rag_dataset.main(prepare_rag_dataset.Config(mode="exmaple", output=str(tmp_path)))


def test_a_file_that_was_edited_replaces_its_passages(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(knowledge_base, "get_encoder", lambda name="": Checksums())
    folder, kb = tmp_path / "files", str(tmp_path / "kb")
    folder.mkdir()
    (folder / "a.md").write_text("The bridge was opened in 1950.")
    (folder / "b.md").write_text("The bakery opens at six.")
    command = lambda *argv: retrieval.cli([argv[0], *argv[1:]])
    command("prepare_kb", "--documents", str(folder), "--output", kb, "--type", "bm25")
    (folder / "a.md").write_text("The bridge was opened in 1960.")
    command("add", "--knowledge_base", kb, "--documents", str(folder))
    assert len(RetrievalManager(knowledge_base=kb).documents) == 3
    assert "1 passages that these files no longer have stay; --update true" in capsys.readouterr().out
    command("add", "--knowledge_base", kb, "--documents", str(folder), "--update", "true")
    held = sorted(doc.content for doc in RetrievalManager(knowledge_base=kb).documents)
    assert held == ["The bakery opens at six.", "The bridge was opened in 1960."]


def test_whole_numbers_pass_a_filter_however_they_are_spelled():
    docs = [Document(str(n), "t", "word", metadata={"year": year}) for n, year in enumerate((2020, 2020.0, 2021))]
    for year in (2020, 2020.0, "2020"):
        assert [doc.id for doc in SimpleRetriever(docs).retrieve("word", filters={"year": year})] == ["0", "1"]
