"""The evidence reader: where an answer stands, what is drawn from it, what is found."""

import random

import numpy as np
import pytest
import torch

from nanochat.common import UserError
from nanochat.evidence import (
    MAX_PIECES,
    EvidenceConfig,
    EvidenceReader,
    Pointer,
    Window,
    _best,
    pointer_loss,
    read_pair,
    shown_text,
    stack,
)
from nanochat.optim import build_optimizer
from nanochat.rag_utils import ABSTENTION
from tasks.common import MixStream
from tasks.evidence import PairLoader, PointerStream, draw_pair, pointing_eval

TOWNS = "Oldtown Ripley Danford Kelso Marlow Tenby Selby Whitby Ludlow Hythe".split()


def conversation(question: str, answer: str, *docs: str) -> dict:
    shown = [{"title": f"Note {n}", "content": text} for n, text in enumerate(docs, 1)]
    return {
        "messages": [
            {"role": "retrieval", "query": question, "documents": shown},
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


class Towns:
    """Conversations about where somebody lives."""

    epoch = 0

    def __len__(self):
        return 40

    def __getitem__(self, i):
        rng = random.Random(f"{i}/{self.epoch}")
        here, there = rng.sample(TOWNS, 2)
        text = f"Ann lives in {here}. Her brother works at {there}."
        question, answer = [("Where does Ann live?", here), ("Where does her brother work?", there), ("Who?", "")][
            i % 3
        ]
        return conversation(question, f"{answer}. [1]" if answer else ABSTENTION, text)


@pytest.fixture
def net() -> Pointer:
    torch.manual_seed(0)
    return Pointer(EvidenceConfig())


def towns() -> MixStream:
    return MixStream({"towns": PointerStream(Towns(), 1)}, {"towns": 1.0})


def pointed(talk: dict) -> str | None:
    """The text that the drawn pair points at; "" for none."""
    pair = draw_pair(talk, random.Random(0))
    if pair is None:
        return None
    window, (first, last) = pair
    text = shown_text(talk["messages"][0]["documents"])[0]
    return text[window.places[first][0] : window.places[last][1]] if last else ""


def test_what_is_pointed_at_is_the_answer_where_the_cited_document_has_it():
    assert pointed(conversation("Who?", "Ann Lee. [2]", "Ann Lee is old.", "It was Ann Lee, then.")) == "Ann Lee"
    docs = ["The mill has 12 wheels and 3 men.", "It has 12 or 3,112 pits, 312 carts and since 1990 12 ponies."]
    pair = draw_pair(conversation("How many ponies?", "12. [2]", *docs), random.Random(0))
    text = shown_text([{"title": f"Note {n}", "content": t} for n, t in enumerate(docs, 1)])[0]
    assert pair[0].places[pair[1][0]][0] > text.index("Note 2")
    assert pointed(conversation("Who?", ABSTENTION, "Nobody knows.")) == ""
    assert pointed(conversation("Who?", "Bob. [1]", "Nobody knows.", "Bob does.")) is None
    assert pointed(conversation("Who?", "Ann. [1]", "Anna knows.")) is None


def test_of_several_places_the_one_amid_the_questions_words_is_meant():
    talk = conversation(
        "How many bells has the tower?", "four. [1]", "In four days " + "and nights " * 20 + "the tower got four bells."
    )
    window, (first, _) = draw_pair(talk, random.Random(0))
    assert shown_text(talk["messages"][0]["documents"])[0][window.places[first][0] :].startswith("four bells")


def test_no_conversation_with_its_answer_says_so():
    class Lost(Towns):
        def __getitem__(self, i):
            return conversation("Who?", "Bob. [1]", "Nobody knows.")

    with pytest.raises(UserError, match="nothing to point at"):
        PointerStream(Lost()).sample(0)


def test_a_resumed_loader_gives_the_batches_of_one_that_went_on():
    make = lambda rank: PairLoader(
        MixStream({"a": PointerStream(Towns(), 1), "b": PointerStream(Towns(), 2)}, {"a": 0.5, "b": 0.5}, 3, 2),
        4, 64, rank, 2,
    )  # fmt: skip
    loader = make(0)
    for _ in range(70):  # into the second pool
        ids, targets, kinds = next(loader)
        assert ids.numel() <= 4 * 64 and ids.shape == kinds.shape and targets.shape == (len(ids), 2)
        assert (targets < (ids != 0).sum(1, keepdim=True)).all()
    state = loader.state_dict()
    again = make(0)
    again.load_state_dict(state)
    for _ in range(200):
        assert all(torch.equal(a, b) for a, b in zip(next(loader), next(again)))
    with pytest.raises(UserError, match="2 processes"):
        PairLoader(towns(), 4, 64).load_state_dict(state)


def test_it_learns_to_point(net):
    loader = PairLoader(towns(), 16, 32)
    before = pointing_eval(Towns(), 12, "")(net)
    groups = net.param_groups(0.001, 3e-4, 0.0)
    names = {id(p): name for name, p in net.named_parameters()}
    muon, rest = ([names.pop(id(p)) for p in g["params"]] for g in groups)
    assert not names and len(muon) == 6 * 6 and all("encoder/layer" in name for name in muon) and "head.weight" in rest
    optimizer = build_optimizer(groups)
    for _ in range(40):
        pointer_loss(net, *next(loader)).backward()
        optimizer.reduce_gradients()
        optimizer.step()
        optimizer.zero_grad()
    after = pointing_eval(Towns(), 12, "")(net)
    assert after["score"] > 0.9 > before["score"]
    reader = EvidenceReader(net)
    docs = [{"title": "A", "content": "Bob likes tea."}, {"title": "B", "content": "Ann lives in Kelso, says Bob."}]
    [found, nobody] = reader.find([("Where does Ann live?", docs), ("Who?", docs[:1])])
    assert (found.text, found.document, found.sentence) == ("Kelso", 1, "B. Ann lives in Kelso, says Bob.")
    assert found.odds > 0 > nobody.odds and found.logprob <= 0
    far = [{"title": "A", "content": "Rain falls on hills. " * 300 + "Ann lives in Kelso."}]
    [found] = reader.find([("Where does Ann live?", far)])
    assert found.text == "Kelso" and found.sentence == "Ann lives in Kelso."


def test_odd_input_is_read_all_the_same(net):
    reader = EvidenceReader(net)
    long = [{"title": "A", "content": "word " * 2000}]
    asked = [
        ("", []),
        ("Who?", []),
        ("", [{"title": "", "content": ""}]),
        ("Wer? " * 500, long),
        ("東京 🙂 \ud800", [{"title": "\ud800", "content": "half \udc00 a pair"}]),
    ]
    found = reader.find(asked)
    assert found[:3] == [None] * 3 and found[3].text and found[4].text
    assert reader.find([]) == []
    assert all(len(w.ids) <= MAX_PIECES for question, docs in asked for w in read_pair(question, shown_text(docs)[0]))
    assert len(read_pair("Who?", shown_text(long)[0])) > 3


@pytest.mark.parametrize("text, answer", [("[7]", None), ("[7", None), ("7", "7"), ("ponds [7]", "ponds [7]")])
def test_a_citation_or_half_of_one_is_no_answer(text, answer):
    pieces = [(n, n + 1) for n in range(len(text))]
    window = Window([1] * (len(text) + 1), [0] + [1] * len(text), [(0, 0), *pieces])
    logits = np.zeros((len(text) + 1, 2))
    logits[1, 0] = logits[-1, 1] = 9.0  # from the first to the last
    found = _best(window, logits, text, [(0, len(text))])
    assert (found and found.text) == answer


def test_attention_is_the_same_in_training(net):
    window = read_pair("Where?", "Ann lives in Kelso. " * 3)
    ids, kinds = stack([*window, *read_pair("Who?", "Ann.")])
    with torch.no_grad():
        fast = net(ids, kinds)
    torch.testing.assert_close(net(ids, kinds), fast, atol=1e-4, rtol=1e-4)


def test_another_encoders_reader_is_refused():
    with pytest.raises(UserError, match="train it again"):
        Pointer(EvidenceConfig(sha256="0"))
