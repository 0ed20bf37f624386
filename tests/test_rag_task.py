"""Questions over documents: every answer can be read where it is cited, and every refusal is right."""

import json
import random
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tasks.rag_task as rag_task
from nanochat.common import UserError
from nanochat.documents import Document
from nanochat.rag_utils import ABSTENTION, extract_citations, strip_citations
from nanochat.retrieval import RetrievalManager, build_kb
from nanochat.tokenizer import Tokenizer
from tasks.common import (
    whole_word,
)
from tasks.factbook import load_queries
from tasks.rag_task import (
    AFTER,
    BEFORE,
    FRAMES,
    SOURCES,
    MultiHopRAGTask,
    RAGMix,
    RAGTask,
    invent_name,
    reading_eval,
    reword,
    shorten,
    states_answer,
)
from tasks.retrieval_qa import StaticRAGTask, create_rag_task

BYTES = Tokenizer({bytes([i]): i for i in range(256)})  # a tokenizer without any merge


@pytest.fixture(scope="module")
def rows():
    """Two in five training questions, of all three types."""
    return {r["id"]: r for r in random.Random(0).sample(load_queries("train"), 8000)}


@pytest.fixture(scope="module")
def retrieved(rows, documents):
    """A retriever that finds gold documents as well as ones of every split."""
    rng, ids = random.Random(1), list(documents)
    return {i: rng.sample([*r["positive_ids"], *rng.sample(ids, 10)], 10) for i, r in rows.items()}


def examples(task, n=250, epoch=0):
    """(row, documents shown, [(question, answer, places of the cited documents)]) of n examples all over the task."""
    task.epoch = epoch
    for i in range(0, len(task), max(1, len(task) // n)):
        messages = task[i]["messages"]
        assert [m["role"] for m in messages] == ["retrieval", *["user", "assistant"] * (len(messages) // 2)]
        shown = messages[0]["documents"]
        assert messages[0]["query"] == messages[1]["content"]
        assert len({d["id"] for d in shown}) == len(shown)
        place = {d.get("number", n): n for n, d in enumerate(shown, 1)}
        turns = [
            (q["content"], strip_citations(said).removesuffix("."), [place[n] for n in extract_citations(said)])
            for q, said in zip(messages[1::2], (a["content"] for a in messages[2::2]))
        ]
        yield task.rows[i], shown, turns


REFUSED = ABSTENTION.removesuffix(".")


def test_the_gold_document_is_cited_by_its_number_and_holds_the_answer(rows, documents, retrieved):
    task = RAGTask(list(rows.values()), documents, RAGMix(counterfactual=0, min_docs=5), retrieved)
    wordings = {w: r for r in task.rows for w in [r["query"], *r["paraphrases"]]}
    numbers = Counter()
    for row, shown, turns in examples(task):
        assert wordings[turns[0][0]]["id"] == row["id"]
        for query, found, cited in turns:
            asked, ids = wordings[query], [d["id"] for d in shown]
            held = [p for p in asked["positive_ids"] if p in ids]
            if found == REFUSED:
                assert not cited and (not held or (asked["hops"] > 1 and len(held) < len(asked["positive_ids"])))
                continue
            assert found == asked["answer"]
            assert {ids[n - 1] for n in cited} == (set(asked["positive_ids"]) if asked["hops"] > 1 else {held[0]})
            numbers.update(cited)
            text = " | ".join(shown[n - 1]["title"] + " | " + shown[n - 1]["content"] for n in cited)
            assert found in text, (query, found)
    assert set(numbers) == {1, 2, 3, 4, 5} and max(numbers.values()) < 3 * min(numbers.values())  # no favourite place


def test_a_document_shown_alone_bears_any_number(rows, documents):
    task = RAGTask(list(rows.values()), documents, RAGMix(absent=0, counterfactual=0, max_docs=1))
    numbers = Counter(doc["number"] for row, [doc, *rest], _ in examples(task) if not rest)
    assert set(numbers) == set(range(1, 10)) and max(numbers.values()) < 4 * min(numbers.values())


@pytest.mark.parametrize(("absent", "refusals"), [(0.0, 0), (1.0, 1)])
def test_it_abstains_exactly_when_not_all_gold_is_shown(rows, documents, retrieved, absent, refusals):
    answerable = [r for r in rows.values() if r["positive_ids"]]
    mix = RAGMix(absent, counterfactual=0, follow_up=0, min_docs=3, max_docs=3)
    for row, shown, [(_, found, cited)] in examples(RAGTask(answerable, documents, mix, retrieved)):
        gold = {d["id"] for d in shown} & set(row["positive_ids"])
        gold = gold if row["hops"] == 1 or len(gold) == len(row["positive_ids"]) else set()  # one of two is none
        assert (found == REFUSED) == (not gold) == bool(refusals) and len(shown) == 3 and bool(cited) == bool(gold)


def test_no_document_beside_the_gold_ones_answers_the_question(rows, documents):
    """Passages of one country often repeat a fact; shown to a question that must be refused, they would teach lies."""
    near = {}
    for i, doc in documents.items():
        near.setdefault((doc["country"], doc["split"]), []).append(i)
    single = [r for r in rows.values() if r["type"] == "single"]
    repeated = [
        r for r in single
        if any(states_answer(documents[i], r) for i in near[r["country"], "train"] if i not in r["positive_ids"])
    ][:150]  # fmt: skip
    assert len(repeated) == 150
    retrieved = {r["id"]: near[r["country"], "train"] for r in repeated}
    for absent in (0.0, 1.0):
        mix = RAGMix(absent, counterfactual=0, min_docs=4)
        for row, shown, turns in examples(RAGTask(repeated, documents, mix, retrieved)):
            assert not any(states_answer(d, row) for d in shown if d["id"] not in row["positive_ids"])
            wordings = {w: r for r in repeated for w in [r["query"], *r["paraphrases"]]}
            for query, found, _ in turns:
                if found == REFUSED:
                    asked = wordings[query]
                    assert not any(states_answer(documents[d["id"]], asked) for d in shown)


def test_a_follow_up_is_never_refused_while_a_document_answers_it():
    """Document a answers five questions by its label and a sixth, labelled as b's, all the same."""
    words = ["red", "blue", "green", "white", "black", "round"]
    docs = {"a": {"id": "a", "title": "X", "content": f"X is {' '.join(words)}."},
            "b": {"id": "b", "title": "X", "content": "X is round."}}  # fmt: skip
    rows = [{"id": w, "query": f"Is it {w}?", "paraphrases": [], "answer": w, "answers": [w], "hops": 1,
             "positive_ids": ["b" if w == "round" else "a"], "type": "single"} for w in words]  # fmt: skip
    task = RAGTask(rows, docs, RAGMix(absent=1e-9, counterfactual=0, follow_up=1, max_docs=1))
    for epoch in range(20):
        for _, shown, turns in examples(task, epoch=epoch):
            said = " ".join(doc["content"] for doc in shown)
            assert not [query for query, found, _ in turns if found == REFUSED and query[6:-1] in said]


def test_a_document_answers_only_about_its_own_country():
    row = {"country": "Chad", "answers": ["Arabic"]}
    for title, content, answers in (
        ("Chad - people", "They speak Arabic.", True), ("Chad - people", "They speak French.", False),
        ("Oman - people", "They speak Arabic.", False),
    ):  # fmt: skip
        doc = {"id": "x", "title": title, "content": content}
        assert states_answer(doc, row) == states_answer(Document.from_dict(doc), row) == answers
    assert states_answer({"id": "x", "title": "", "content": "They speak Arabic."}, {"answers": ["Arabic"]})


def test_the_share_of_missing_gold_documents_is_the_one_asked_for(rows, documents):
    answerable = [r for r in rows.values() if r["positive_ids"]]
    task = RAGTask(answerable, documents, RAGMix(absent=0.3, follow_up=0))
    refused = [turns[0][1] == REFUSED for _, _, turns in examples(task, 1000)]
    assert abs(sum(refused) / len(refused) - 0.3) < 0.08  # five standard deviations of a thousand


def test_unanswerable_questions_are_always_refused(rows, documents, retrieved):
    unanswerable = [r for r in rows.values() if r["type"] == "unanswerable"]
    some = [r for r in rows.values() if r["type"] == "single"][:50]
    task = RAGTask(some + unanswerable, documents, RAGMix(absent=0, follow_up=0, min_docs=2), retrieved)
    for row, shown, turns in examples(task, 500):
        assert (turns[0][1] == REFUSED) == (row["type"] == "unanswerable") and shown


def names_in(text: str, names) -> set[str]:
    return {n for n in names if re.search(rf"(?<!\w){re.escape(n)}(?!\w)", text)}


def test_a_counterfactual_is_consistent_and_leaves_no_real_name(rows, documents, retrieved):
    """The exchanged answer stands in the cited document, and the countries asked about and shown nowhere at all."""
    task = RAGTask(list(rows.values()), documents, RAGMix(absent=0.2, counterfactual=1, max_docs=2), retrieved)
    real = {d["country"] for d in documents.values()}
    exchanged = answered = 0
    for row, shown, turns in examples(task, 800):
        text = "\n".join([d["title"] + "\n" + d["content"] for d in shown] + [f"{q}\n{a}" for q, a, _ in turns])
        subjects = {documents[d["id"]]["country"] for d in shown} | {row.get("country"), row.get("bridge")} - {None}
        assert not names_in(text, subjects & real), row["id"]
        for query, found, cited in turns:
            if found != REFUSED:
                assert any(found in d["title"] + " | " + d["content"] for d in (shown[n - 1] for n in cited)), query
        if row["hops"] == 1 and turns[0][1] != REFUSED:
            answered += 1
            exchanged += turns[0][1] not in row["answers"]
    assert exchanged > 0.5 * answered > 0


def test_a_counterfactual_exchanges_the_answer_wherever_it_stands():
    def passage(i, country, text):
        return {"id": i, "title": f"{country} - people", "content": text, "country": country, "split": "train"}

    def question(country, word, gold):
        return {"id": f"q-{gold}", "query": f"What is the main crop of {country}?", "paraphrases": [], "answer": word,
                "answers": [word], "positive_ids": [gold], "hops": 1, "type": "single", "relation": "crop",
                "country": country}  # fmt: skip

    docs = {
        "a": passage("a", "Chad", "The main crop of Chad is rye. Farmers in Chad have grown rye, not ryegrass."),
        "b": passage("b", "Peru", "The main crop of Peru is rice."),
    }
    rows = [question("Chad", "rye", "a"), question("Peru", "rice", "b")]
    task = RAGTask(rows, docs, RAGMix(absent=0, counterfactual=1, follow_up=0, max_docs=1))
    seen = set()
    for task.epoch in range(20):
        [doc], query, given = task[0]["messages"][0]["documents"], *(m["content"] for m in task[0]["messages"][1:])
        name, new = doc["title"].removesuffix(" - people"), strip_citations(given).removesuffix(".")
        assert doc["content"] == f"The main crop of {name} is {new}. Farmers in {name} have grown {new}, not ryegrass."
        assert query == f"What is the main crop of {name}?" and given == f"{new}. [{doc['number']}]" and name != "Chad"
        seen.add(new)
    assert seen == {"rice"}
    assert docs["a"]["content"].startswith("The main crop of Chad is rye.")  # the knowledge base itself is untouched


def test_an_invented_country_is_never_a_real_one(documents, monkeypatch, rows):
    made = iter(["Oman", "Panama", "Oman"])  # syllables do give these
    monkeypatch.setattr(rag_task, "invent_name", lambda rng: next(made, None) or invent_name(rng))
    task = RAGTask(list(rows.values())[:200], documents, RAGMix(absent=0, counterfactual=1))
    text = json.dumps(task[0])
    assert not names_in(text, {"Oman", "Panama"}) and next(made, "used up") == "used up"


def test_training_contexts_never_show_a_document_of_another_split(rows, documents, retrieved):
    assert any(documents[d]["split"] != "train" for found in retrieved.values() for d in found)
    for mix in (RAGMix(absent=0, min_docs=5), RAGMix(absent=1, min_docs=5), RAGMix(max_docs=1)):
        for _, shown, _ in examples(RAGTask(list(rows.values()), documents, mix, retrieved), 400):
            assert {documents[d["id"]]["split"] for d in shown} == {"train"}
    val = RAGTask(load_queries("val")[:300], documents, RAGMix(min_docs=5))
    assert {documents[d["id"]]["split"] for _, shown, _ in examples(val) for d in shown} == {"val"}


def test_documents_without_a_split_are_all_used(rows, documents):
    plain = {i: {k: v for k, v in d.items() if k != "split"} for i, d in documents.items()}
    task = RAGTask(list(rows.values()), plain, RAGMix(absent=1, min_docs=5))
    shown = {d["id"] for _, shown, _ in examples(task, 400) for d in shown}
    assert {documents[i]["split"] for i in shown} == {"train", "val", "test"}


def test_about_half_of_the_distractors_are_what_the_retriever_finds(rows, documents):
    same = {d["split"]: [] for d in documents.values()}
    for i, d in documents.items():
        same[d["split"]].append(i)
    rng = random.Random(2)
    found = {i: rng.sample(same["train"], 10) for i in rows}
    task = RAGTask(list(rows.values()), documents, RAGMix(absent=1, min_docs=4, max_docs=4), found)
    hits = [d["id"] in found[row["id"]] for row, shown, _ in examples(task, 400) for d in shown]
    assert 0.3 < sum(hits) / len(hits) < 0.6


def test_follow_ups_are_about_the_documents_shown_or_near_misses(rows, documents):
    task = RAGTask(
        list(rows.values()), documents, RAGMix(0.2, paired=0.5, counterfactual=0, follow_up=1, max_questions=6)
    )
    wordings = {w: r for r in task.rows for w in [r["query"], *r["paraphrases"]]}
    counts, asked, refused, near = Counter(), 0, 0, 0
    for _, shown, turns in examples(task, 400):
        ids = {d["id"] for d in shown}
        counts[len(turns)] += 1
        for query, answer, _ in turns[1:]:
            row = wordings[query]
            here = len(ids & set(row["positive_ids"])) >= (1 if row["hops"] == 1 else len(row["positive_ids"]))
            assert (answer == REFUSED) == (not here)
            asked, refused = asked + 1, refused + (not here)
            relations = {wordings[q].get("relation") for q, a, _ in turns if a != REFUSED}
            countries = {documents[i]["country"] for i in ids}
            near += not here and (row["country"] in countries or row.get("relation") in relations)
        assert len({wordings[q]["id"] for q, _, _ in turns}) == len(turns) <= 6
    assert len(counts) >= 5 and 0.3 < refused / asked < 0.5 and near > 0.6 * refused


def test_every_epoch_draws_anew_and_the_same_epoch_the_same(rows, documents, retrieved):
    task = RAGTask(list(rows.values()), documents, RAGMix(min_docs=3), retrieved)
    first = [list(examples(task, 40, epoch)) for epoch in (0, 1, 0)]
    assert first[0] == first[2]
    same = sum(a == b for a, b in zip(first[0], first[1]))
    assert same <= 1
    other = RAGTask(list(rows.values()), documents, RAGMix(min_docs=3), retrieved, seed=1)
    assert list(examples(other, 40)) != first[0]


def test_questions_without_their_documents_are_left_out_or_refused(rows, documents):
    half = dict(list(documents.items())[::2])
    task = RAGTask(list(rows.values()), half)
    assert 0 < len(task) < len(rows) and all(set(r["positive_ids"]) <= set(half) for r in task.rows)
    with pytest.raises(UserError, match="same data"):
        RAGTask([r for r in rows.values() if r["positive_ids"]], {"x": {"id": "x", "title": "", "content": ""}})


def test_a_knowledge_base_of_one_document_is_enough():
    docs = {"x": {"id": "x", "title": "X", "content": "X is blue."}}
    row = {"id": "q", "query": "What is X?", "paraphrases": [], "answer": "blue", "answers": ["blue"],
           "positive_ids": ["x"], "hops": 1, "type": "single"}  # fmt: skip
    task = RAGTask([row], docs, RAGMix(absent=0.5, counterfactual=0.5, follow_up=0.5))
    answers = set()
    for task.epoch in range(20):
        answers.add(strip_citations(task[0]["messages"][-1]["content"]))
        assert len(task[0]["messages"][0]["documents"]) <= 1
        BYTES.render_conversation(task[0])
    assert answers == {"blue.", ABSTENTION}


@settings(max_examples=200, deadline=None)
@given(st.text("12.,a ", max_size=12))
def test_a_whole_word_is_not_part_of_a_longer_word_or_number(text):
    found = [m.start() for m in whole_word("12").finditer(text)]
    for i in range(len(text) - 1):
        if text[i : i + 2] == "12":
            before, after = text[:i][-1:], text[i + 2 :]
            inside = before in tuple("12a.,") or after[:1] in tuple("12a") or re.match(r"[.,]\d", after)
            assert (i in found) == (not inside)


# ----------------------------------------------------------------------------------------------------------------------
# The other RAG tasks


def hops(task, n=200):
    """(row, the two retrieval messages, the answer) of n two-hop examples all over the task."""
    for i in range(0, len(task), max(1, len(task) // n)):
        first, second, question, said = task[i]["messages"]
        assert first["hop"] == 1 and second["hop"] == 2 and first["query"] == question["content"]
        yield task.rows[i], (first, second), said["content"]


def test_two_hops_are_two_searches_and_both_golds_are_cited_through_them(rows, documents):
    task = MultiHopRAGTask(list(rows.values()), documents, RAGMix(absent=0, counterfactual=0, max_docs=3))
    assert {r["type"] for r in task.rows} == {"two_hop"}
    asked = {w: r for r in rows.values() if r["hops"] == 1 for w in [r["query"], *r["paraphrases"]]}
    worded, numbers = 0, Counter()
    for row, searches, said in hops(task):
        assert searches[0]["query"] in [row["query"], *row["paraphrases"]]
        second = asked.get(searches[1]["query"])
        worded += second is not None
        assert (second["country"], second["relation"]) == (row["bridge"], row["relation"]) if second else (
            searches[1]["query"].startswith(row["bridge"])
        )  # fmt: skip
        shown = [[d["id"] for d in m["documents"]] for m in searches]
        assert [gold in ids for gold, ids in zip(row["positive_ids"], shown)] == [True, True]
        ids = shown[0] + shown[1]
        assert 2 <= len(ids) == len(set(ids)) <= 6 and {len(s) for s in shown} <= {1, 2, 3}
        assert sorted(ids[n - 1] for n in extract_citations(said)) == sorted(row["positive_ids"])
        assert strip_citations(said) == row["answer"] + "."
        numbers.update(extract_citations(said))
    assert worded > 50 and set(numbers) == {1, 2, 3, 4, 5, 6}


def test_a_missing_hop_is_answered_by_abstaining_and_no_query_tells(rows, documents):
    task = MultiHopRAGTask(list(rows.values()), documents, RAGMix(absent=1, counterfactual=0, min_docs=2, max_docs=2))
    lost, bridges = Counter(), 0
    for row, searches, said in hops(task, 150):
        shown = {d["id"] for m in searches for d in m["documents"]}
        here = [gold in shown for gold in row["positive_ids"]]
        assert said == ABSTENTION and all(len(m["documents"]) == 2 for m in searches)
        lost[tuple(here)] += 1
        if not here[0]:  # the search went astray: the bridge isn't known
            assert here == [False, False] and row["bridge"] not in searches[1]["query"].replace(row["country"], "")
        else:
            bridges += row["bridge"] in searches[1]["query"]
        left = [d for i in shown if (d := documents[i]) and i not in row["positive_ids"]]
        assert not any(states_answer(d, row | {"country": row["bridge"]}) for d in left)
    assert min(lost.values()) > 40 and set(lost) == {(True, False), (False, False)} and bridges > 50


def test_hops_are_renamed_together_and_drawn_anew(rows, documents):
    task = MultiHopRAGTask(list(rows.values()), documents, RAGMix(absent=0.3, counterfactual=1, max_docs=2))
    for row, searches, said in hops(task, 100):
        told = " | ".join(f"{d['title']} {d['content']}" for m in searches for d in m["documents"])
        names = {row["country"], row["bridge"]} - {""}
        assert not any(whole_word(name).search(m["query"] + told) for name in names for m in searches)
        assert said == ABSTENTION or strip_citations(said).removesuffix(".") in told
    first = [task[i] for i in range(30)]
    assert first == [task[i] for i in range(30)]
    task.epoch = 1
    assert sum(a == task[i] for i, a in enumerate(first)) < 3
    with pytest.raises(UserError, match="two hops"):
        MultiHopRAGTask([r for r in rows.values() if r["hops"] == 1], documents)


def cites(text, **document):
    docs = [{"id": "a", "title": "A", "content": "x"}, {"id": "b", "title": "B", "content": "y", **document}]
    found = {"role": "retrieval", "query": "q", "documents": docs}
    return {"messages": [found, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]}


def test_a_static_task_checks_that_what_is_cited_is_there(tmp_path):
    def write(*rows):
        (tmp_path / "rag.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return create_rag_task("static", path=tmp_path / "rag.jsonl")

    good = [cites("x. [1][2]"), cites("y. [7]", number=7), cites(ABSTENTION)]
    task = write(*good)
    assert isinstance(task, StaticRAGTask) and [task[i] for i in range(len(task))] == good
    for bad, says in [
        (cites("x. [3]"), "record 2: the answer cites [3]"),
        (cites("y. [2]", number=7), "record 2: the answer cites [2]"),
        ({"messages": cites("")["messages"][1:]}, "record 2: no retrieval message"),
        ({"messages": cites("")["messages"][:2]}, "record 2: no assistant message"),
    ]:
        with pytest.raises(UserError, match=re.escape(says)):
            write(good[0], bad)


def test_tasks_are_made_by_name_and_a_manager_is_asked_for_the_distractors(tmp_path):
    docs = [Document(f"d{n}", f"T{n}", f"word{n} " + "common " * n) for n in range(1, 9)]
    build_kb(docs, tmp_path / "kb", "simple")
    manager = RetrievalManager(knowledge_base_path=tmp_path / "kb")
    row = {"id": "q", "query": "word1 word2", "paraphrases": [], "answer": "word1", "answers": ["word1"],
           "positive_ids": ["d1"], "hops": 1, "type": "single"}  # fmt: skip
    task = create_rag_task("retrieval", rows=[row], retrieved=manager, mix=RAGMix(absent=0, counterfactual=0))
    assert type(task) is RAGTask and set(task.retrieved["q"]) == {"d1", "d2"} and len(task.documents) == 8
    assert create_rag_task("retrieval", rows=[row], documents=task.documents, retrieved={"q": ["d3"]}).retrieved
    two = row | {"hops": 2, "type": "two_hop", "positive_ids": ["d1", "d2"], "bridge": "T2"}
    assert isinstance(create_rag_task("multi_hop", rows=[two], retrieved=manager), MultiHopRAGTask)
    with pytest.raises(UserError, match="choose retrieval, static, multi_hop"):
        create_rag_task("dynamic")


# ----------------------------------------------------------------------------------------------------------------------
# Evaluations during training


def test_of_two_documents_an_excerpt_tells_the_way_and_the_answer(rows, documents):
    two = [r for r in rows.values() if r["hops"] > 1][:60]
    mix = RAGMix(absent=0, counterfactual=0, follow_up=0, min_docs=4, max_docs=4, sentences=1)
    facts = {(p, r.get("relation")): r["answer"] for r in rows.values() if r["hops"] == 1 for p in r["positive_ids"]}
    cut = 0
    for row, talk in zip(two, RAGTask(two, documents, mix, others=list(rows.values()))):
        assert talk["messages"][2]["content"].startswith(row["answer"])
        for doc in talk["messages"][0]["documents"]:
            cut += doc["content"] != documents[doc["id"]]["content"]
            steps = [row["relation"], row["bridge_relation"]] if doc["id"] in row["positive_ids"] else []
            needed = [facts[doc["id"], step] for step in steps if (doc["id"], step) in facts]
            assert all(answer in doc["content"] for answer in needed)
            assert needed or not steps or doc["content"] == documents[doc["id"]]["content"]
    assert cut > 150
    for row, talk in zip(two, RAGTask(two, documents, mix)):  # without other questions, nobody knows what is needed
        shown = {doc["id"]: doc["content"] for doc in talk["messages"][0]["documents"]}
        assert all(shown[p] == documents[p]["content"] for p in row["positive_ids"])


def test_other_questions_bring_no_document_from_elsewhere(rows, documents):
    two = [r for r in rows.values() if r["hops"] > 1][:20]
    single = [r for r in rows.values() if r["hops"] == 1]
    elsewhere = {**documents, "far": {**documents[two[0]["positive_ids"][0]], "id": "far", "split": "elsewhere"}}
    strange = [{**r, "id": f"{r['id']}-{p}", "positive_ids": [p]} for r in single for p in ("nowhere", "far")]
    task = RAGTask(two, elsewhere, RAGMix(min_docs=4, max_docs=4), others=[*single, *strange])
    shown = {doc["id"] for talk in task for m in talk["messages"] if m["role"] == "retrieval" for doc in m["documents"]}
    assert shown <= documents.keys()


def test_reading_is_measured_on_the_first_question(tiny, rows, documents, monkeypatch):
    single = [r for r in rows.values() if r["type"] == "single"][:100]
    asked = []

    class Knows:
        """Answers the first question of each conversation as the passages say it, never abstaining."""

        def __init__(self, model, tokenizer):
            pass

        def answer_batch(self, conversations, max_tokens):
            asked.extend(conversations)
            by = {w: r["answer"] for r in single for w in [r["query"], *r["paraphrases"]]}
            return [by[c["messages"][-1]["content"]] + ". [1]" for c in conversations]

    monkeypatch.setattr(rag_task, "Engine", Knows)
    for absent, metrics in ((0, {"f1": 1.0, "em": 1.0, "score": 1.0}), (1, {"abstains": 0.0, "score": 0.0})):
        task = RAGTask(single, documents, RAGMix(absent, counterfactual=0, follow_up=1, max_docs=2))
        assert reading_eval(BYTES, task, 30)(tiny) == metrics
    assert len(asked) == 60 and all(len(c["messages"]) == 2 for c in asked)
    two = MultiHopRAGTask(list(rows.values()), documents, RAGMix(0, counterfactual=0, max_docs=1))
    single = two.rows
    assert reading_eval(BYTES, two, 10)(tiny) == {"f1": 1.0, "em": 1.0, "score": 1.0}
    assert [m["role"] for m in asked[-1]["messages"]] == ["retrieval", "retrieval", "user"]


def test_reading_eval_runs_on_a_real_model_and_gives_shares(tiny, documents, rows):
    single = [r for r in rows.values() if r["type"] == "single"]
    task = RAGTask(single, documents, RAGMix(absent=0.5, min_docs=1, max_docs=1, counterfactual=0))
    found = reading_eval(BYTES, task, 6, max_tokens=4)(tiny)
    assert set(found) == {"f1", "em", "abstains", "score"} and all(0 <= v <= 1 for v in found.values())


@given(st.integers(0, 10**6), st.integers(1, 4))
def test_a_shortened_document_keeps_the_sentences_that_answer(seed, n):
    text = "The capital of A is Rome. It has 3 rivers. The area is 5,000 sq km. Nothing else is known."
    short = shorten(text, ["5,000 sq km"], n, random.Random(seed))
    assert "5,000 sq km" in short and len(re.findall(r"[.](?= |$)", short)) == min(n, 4)
    assert shorten(text, ["rivers. The"], n, random.Random(seed)) == text


def test_without_any_document_everything_is_abstained_from(rows, documents):
    task = RAGTask(list(rows.values()), documents, RAGMix(bare=1.0, careless=0.5))
    for i in range(20):
        messages = task[i]["messages"]
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert {m["content"] for m in messages[1::2]} == {ABSTENTION}


def test_an_excerpt_about_something_else_keeps_what_names_the_thing_asked_about():
    text = "It is dry. It is hot. It is big. Unlike Chad, Niger has 7 lakes. It is old."
    documents = {
        "chad": {"id": "chad", "title": "Chad", "content": "Chad has 5 lakes.", "country": "Chad"},
        "niger": {"id": "niger", "title": "Niger", "content": text, "country": "Niger"},
    }
    row = {"id": "q", "query": "How many lakes has Chad?", "paraphrases": [], "answer": "5", "answers": ["5"]}
    row |= {"positive_ids": ["chad"], "hops": 1, "type": "single", "country": "Chad"}
    mix = RAGMix(absent=1, counterfactual=0, follow_up=0, max_docs=1, sentences=1)
    task = RAGTask([row], documents, mix, {"q": ["niger"]})
    for task.epoch in range(20):
        [doc] = task[0]["messages"][0]["documents"]
        assert "Unlike Chad" in doc["content"] and doc["content"] != text


def test_a_question_is_asked_in_other_frames_or_among_other_words_but_never_as_the_held_out_are():
    rng = random.Random(0)
    framed = {reword("What is the birth rate of Chad?", "Chad", rng) for _ in range(400)}
    assert len(framed) > 60 and all("birth rate" in q.lower() and "Chad" in q and "{" not in q for q in framed)
    around = {reword("Where do newts live?", "", rng) for _ in range(400)}
    assert (
        len(around) > 20 and all("Where do newts live?" in q for q in around) and "Where do newts live?" not in around
    )
    for held in ("documents give", "look up", "Could you check", "Remind me", "like to know", "Please give me"):
        assert not any(held in words for words in (*FRAMES, *BEFORE, *AFTER, *framed, *SOURCES))
