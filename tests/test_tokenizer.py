"""The tokenizer: every byte comes back, special tokens can't be written, conversations render as documented."""

import copy
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer, check_conversation, without_answer

TEXT = "The capital of Freedonia is Oldtown. Its river is long, 1234 km. What is the name of the river? " * 20
TOK = Tokenizer.train([TEXT], 256 + len(SPECIAL_TOKENS) + 50)

DOCS = [
    {"id": "a", "title": "Alpha", "content": "one two three four", "score": 0.9, "source": ""},
    {"id": "b", "title": "Beta", "content": "five six", "score": 0.1, "source": ""},
    {"id": "c", "title": "Gamma", "content": "seven", "score": 0.5, "source": ""},
]
CONVERSATION: dict = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "retrieval", "query": "the river?", "documents": DOCS},
        {"role": "user", "content": "What is the river?"},
        {"role": "assistant", "content": "Long. [1]"},
    ]
}


@given(st.binary(max_size=200))
def test_any_bytes_come_back(data):
    ids = TOK.encode(data)
    assert TOK.decode_bytes(ids) == data
    assert all(i < len(TOK.ranks) for i in ids)


@given(st.text(st.characters(), max_size=100))  # characters() includes lone surrogates
def test_any_text_comes_back(text):
    assert TOK.decode_bytes(TOK.encode(text)) == text.encode("utf-8", "surrogatepass")


@given(st.text(max_size=100))  # no surrogates: decode gives text
def test_text_in_conversations_comes_back(text):
    assert TOK.decode_text(TOK.encode_text(text)) == text


@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "a", " ", "<|", "|>"]), max_size=8).map("".join))
def test_text_that_spells_a_special_token_stays_text(text):
    specials = set(TOK.special_ids.values())
    assert not specials & set(TOK.encode(text))
    assert not specials & {i for ids in TOK.encode_batch([text]) for i in ids}
    assert TOK.decode(TOK.encode(text)) == text
    conversation = {"messages": [{"role": "user", "content": text}]}
    ids, _ = TOK.render_conversation(conversation)
    assert sum(i in specials for i in ids) == 3  # bos, user_start, user_end


def test_json_save_and_load_are_identical(tmp_path):
    TOK.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.ranks == TOK.ranks and again.special_ids == TOK.special_ids and again.pattern == TOK.pattern
    assert again.encode(TEXT) == TOK.encode(TEXT)
    again.save(tmp_path / "b")
    assert (tmp_path / "b" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("harm", ["missing", "truncated", "version", "list", "base64", "no_tokens"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, harm):
    TOK.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    obj = json.loads(path.read_text())
    if harm == "missing":
        path.unlink()
    elif harm == "truncated":
        path.write_bytes(path.read_bytes()[:100])
    else:
        changes = {"version": {"version": 99}, "base64": {"tokens": ["?"]}, "no_tokens": {"tokens": None}, "list": {}}
        path.write_text(json.dumps([] if harm == "list" else obj | changes[harm]))
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_too_small_a_vocabulary_or_text_is_refused():
    with pytest.raises(UserError, match="too small"):
        Tokenizer.train([TEXT], 100)
    with pytest.raises(UserError, match="more text"):
        Tokenizer.train(["abc"], 8192)


def test_common_words_are_one_token_at_the_start_and_in_the_middle():
    assert TOK.encode_text("river")[0] in TOK.encode("the river")


def spell(ids):
    return TOK.decode(ids)


def test_a_conversation_renders_as_documented():
    ids, mask = TOK.render_conversation(CONVERSATION)
    assert len(ids) == len(mask)
    assert spell(ids) == (
        "<|bos|><|system_start|> Be brief.<|system_end|>"
        "<|retrieval_start|> the river?<|doc_start|> [1] Alpha\n one two three four<|doc_end|>"
        "<|doc_start|> [2] Beta\n five six<|doc_end|><|doc_start|> [3] Gamma\n seven<|doc_end|><|retrieval_end|>"
        "<|user_start|> What is the river?<|user_end|><|assistant_start|> Long. [1]<|assistant_end|>"
    )


def test_the_mask_is_one_only_on_what_the_assistant_says():
    ids, mask = TOK.render_conversation(CONVERSATION)
    assert spell([i for i, m in zip(ids, mask) if m]) == " Long. [1]<|assistant_end|>"
    two = {"messages": CONVERSATION["messages"] + CONVERSATION["messages"][2:]}
    ids, mask = TOK.render_conversation(two)
    assert spell([i for i, m in zip(ids, mask) if m]) == " Long. [1]<|assistant_end|>" * 2


def test_a_completion_ends_where_the_answer_begins():
    full, _ = TOK.render_conversation(CONVERSATION)
    ids, mask = TOK.render_conversation(without_answer(CONVERSATION), completion=True)
    assert full[: len(ids)] == ids and not any(mask)
    assert spell(ids).endswith("<|user_end|><|assistant_start|>")
    assert len(CONVERSATION["messages"]) == 4, "without_answer must not change its argument"


def test_several_hops_number_their_documents_on():
    hops = [
        {"role": "retrieval", "query": q, "documents": [d], "hop": i + 1} for i, (q, d) in enumerate(zip("xy", DOCS))
    ]
    text = spell(TOK.render_conversation({"messages": hops})[0])
    assert "[1] Alpha" in text and "[2] Beta" in text and text.count("<|retrieval_start|>") == 2


def test_lowest_scored_documents_go_first_and_numbers_stay():
    before = copy.deepcopy(CONVERSATION)
    full = len(TOK.render_conversation(CONVERSATION)[0])
    text = spell(TOK.render_conversation(CONVERSATION, max_tokens=full - 1)[0])
    assert "[2]" not in text and "[1] Alpha" in text and "[3] Gamma" in text
    sizes = {}
    for limit in range(full, 0, -1):
        try:
            ids, mask = TOK.render_conversation(CONVERSATION, max_tokens=limit)
        except UserError:
            break
        assert len(ids) <= limit and len(ids) == len(mask)
        text = spell(ids)
        assert "What is the river?" in text and "Be brief." in text
        assert spell([i for i, m in zip(ids, mask) if m]) == " Long. [1]<|assistant_end|>"
        sizes[limit] = [n for n in (1, 2, 3) if f" [{n}] " in text]
        assert text.count("<|doc_start|>") == text.count("<|doc_end|>")
    assert [sorted(s) for s in dict.fromkeys(map(tuple, sizes.values()))] == [[1, 2, 3], [1, 3], [1], []]
    assert before == CONVERSATION


def test_the_last_document_is_truncated_rather_than_dropped():
    full = len(TOK.render_conversation(CONVERSATION)[0])
    one = {"messages": [{**CONVERSATION["messages"][1], "documents": DOCS[:1]}, *CONVERSATION["messages"][2:]]}
    n = len(TOK.render_conversation(one)[0])
    ids, _ = TOK.render_conversation(one, max_tokens=n - 3)
    assert len(ids) == n - 3 < full
    assert "<|doc_start|> [1] Alpha\n one" in spell(ids) and "<|doc_end|>" in spell(ids)


@settings(max_examples=30)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.sampled_from([None, 0.0, 0.5, 1.0])), max_size=6), st.integers(12, 300)
)
def test_whatever_the_documents_the_limit_is_kept(docs, limit):
    documents = [{"title": "T", "content": "word " * n, "score": score} for n, score in docs]
    conversation = {"messages": [{"role": "retrieval", "documents": documents}, {"role": "user", "content": "Q?"}]}
    ids, mask = TOK.render_conversation(conversation, max_tokens=limit, completion=True)
    assert len(ids) == len(mask) <= limit
    assert spell(ids).endswith("<|user_start|> Q?<|user_end|><|assistant_start|>")


def test_messages_that_dont_fit_are_refused():
    conversation = {"messages": [{"role": "user", "content": "word " * 100}]}
    with pytest.raises(UserError, match="at most 20"):
        TOK.render_conversation(conversation, max_tokens=20)


@pytest.mark.parametrize(
    "bad",
    [
        None, {}, {"messages": []}, {"messages": "hi"}, {"messages": ["hi"]}, {"messages": [{"role": "bot"}]},
        {"messages": [{"role": "user"}]}, {"messages": [{"role": "user", "content": 3}]},
        {"messages": [{"role": "retrieval"}]}, {"messages": [{"role": "retrieval", "documents": [{"title": "x"}]}]},
        {"messages": [{"role": "retrieval", "documents": ["x"]}]},
        {"messages": [{"role": "retrieval", "documents": 5}]},
        *[{"messages": [{"role": "retrieval", "documents": [{"content": "x", "number": n}]}]} for n in (0, "3", True)],
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_refused(bad):
    with pytest.raises(UserError):
        check_conversation(bad)


def test_a_document_may_bring_its_number_and_counting_goes_on_from_there():
    docs = [{"title": "a", "content": "x", **more} for more in ({}, {"number": 7}, {}, {"number": None})]
    ids, _ = TOK.render_conversation({"messages": [{"role": "retrieval", "documents": docs}]})
    assert re.findall(r"\[(\d+)\] a", TOK.decode(ids)) == ["1", "7", "8", "9"]
