"""The chat: one shot and conversation, what stands on which stream, what is refused, and how it ends."""

import io
import sys

import pytest
import torch

from nanochat.checkpoint_manager import run_dir, save_checkpoint
from nanochat.common import Dist
from nanochat.config import run
from nanochat.documents import Document
from nanochat.engine import Completion, Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.rag_utils import ABSTENTION
from nanochat.reader import FEATURES, answer_each
from nanochat.retrieval import build_kb
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from scripts import chat_cli

DOCS = [
    Document("a", "Freedonia - Land", "The river of Freedonia is the Long River."),
    Document("b", "Freedonia - People", "The capital of Freedonia is Oldtown."),
    Document("c", "Sylvania - Land", "Sylvania has no river. It is a dry country."),
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A base directory with a small random model as newest `rag` checkpoint, and two knowledge bases."""
    base = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        text = "The capital of Freedonia is Oldtown. Its river is long, 1234 km. What is the name of the river? " * 20
        tokenizer = Tokenizer.train([text], 256 + len(SPECIAL_TOKENS) + 40)
        torch.manual_seed(0)
        model = GPT(GPTConfig(256, tokenizer.vocab_size, 2, 2, 2, 32, "MT", d_state=16, headdim=16))
        model.init_weights()
        torch.nn.init.normal_(model.lm_head.weight, 0, 0.3)
        save_checkpoint(run_dir("rag", "d2"), 1, model, tokenizer, {}, {}, Dist(0, 0, 1, torch.device("cpu")))
        build_kb(DOCS, base / "kb", "bm25")
        build_kb(DOCS, base / "plain", "simple")
        yield base


@pytest.fixture(autouse=True)
def _base(home, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(home))


class FixedEngine(Engine):
    """Answers what the test wants it to, in pieces."""

    reply = "The Long River. [1] [9]"

    def stream(self, ids, *args, **kwargs):
        self.asked = ids
        for i in range(0, len(self.reply), 4):
            if self.reply[i:].startswith("^C"):
                raise KeyboardInterrupt
            yield self.reply[i : i + 4]


def cli(monkeypatch, *argv: str, stdin: str = "") -> int:
    """Run the script as the shell would; returns the exit code."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    try:
        run(chat_cli.main, chat_cli.Config, ["--device", "cpu", "--max_tokens", "8", *argv])
    except SystemExit as e:
        return e.code or 0
    return 0


def test_one_shot_answers_on_stdout_and_shows_passages_on_stderr(home, monkeypatch, capsys):
    assert cli(monkeypatch, "--knowledge_base", str(home / "kb"), "-p", "What is the river of Freedonia?") == 0
    out, err = capsys.readouterr()
    model, tokenizer, _ = chat_cli.load_model("rag", "cpu")
    capsys.readouterr()
    manager = chat_cli.RetrievalManager("bm25", home / "kb")
    asked = {"messages": [{"role": "user", "content": "What is the river of Freedonia?"}]}
    [answer], _ = answer_each(Engine(model, tokenizer), [manager.augment_conversation(asked, 5)], max_tokens=8)
    assert out == answer + "\n" and answer
    assert "[1]" in err and "Freedonia - Land" in err and "cited:" in err


def test_of_passages_that_disagree_the_newer_is_heard_first_and_the_other_one_too(home, monkeypatch, capsys):
    """The model says of each passage what stands in it."""
    kb, load = home / "dated", chat_cli.load_model
    build_kb(
        [Document(n, "Freedonia", f"Its river is {n}.", metadata={"date": n}) for n in ("2001", "2020")], kb, "bm25"
    )

    def load_sure(*args, **options):
        model, *rest = load(*args, **options)
        model.confidence = {"mean": [0] * FEATURES, "scale": [1] * FEATURES, "weights": [0] * FEATURES}
        model.confidence |= {
            "usual": 0.0,
            "bias": 1.0,
            "rivals": 0.0,
            "beside": 0.5,
            "words": [0.0, 0.0, 1.0],
            "together": None,
        }
        return model, *rest

    class Reads(FixedEngine):
        def stream(self, conversation, *args, **options):
            [doc] = conversation["messages"][0]["documents"]
            yield from (doc["content"].split()[-1], f" [{doc['number']}]")

        def complete_batch(self, prompts, *args, **options):
            told = [self.tokenizer.decode(ids).partition("<|doc_end|>")[0].rpartition(" [") for ids in prompts]
            said = [f"{text.split()[-1]} [{text[0]}]" for _, _, text in told]
            return [Completion(self.tokenizer.encode_text(text), [0.0]) for text in said]

    monkeypatch.setattr(chat_cli, "load_model", load_sure)
    monkeypatch.setattr(chat_cli, "Engine", Reads)
    assert cli(monkeypatch, "--knowledge_base", str(kb), "-p", "What is the river of Freedonia?") == 0
    out, err = capsys.readouterr()
    new, old = ("1", "2") if "[1]" in out.partition("This is")[0] else ("2", "1")
    assert out == f"2020. [{new}] This is as of 2020. As of 2001: 2001. [{old}]\n"
    assert "Freedonia (2020)" in err and "Freedonia (2001)" in err and err.count("* [") == 2


def test_where_nothing_is_found_the_model_is_not_asked(home, monkeypatch, capsys):
    monkeypatch.setattr(Engine, "stream", lambda *args, **more: pytest.fail("asked"))
    assert cli(monkeypatch, "--knowledge_base", str(home / "kb"), "-p", "zzyzx qwrtp") == 0
    out, err = capsys.readouterr()
    assert out == ABSTENTION + "\n" and "no passage was found" in err


def test_without_a_knowledge_base_it_just_chats(home, monkeypatch, capsys):
    assert cli(monkeypatch, "--prompt", "Hello?", "--temperature", "1", "--seed", "3") == 0
    first = capsys.readouterr()
    assert first.out.strip() and "[1]" not in first.err
    assert cli(monkeypatch, "--prompt", "Hello?", "--temperature", "1", "--seed", "3") == 0
    assert capsys.readouterr().out == first.out


def test_a_conversation_marks_cited_passages_and_obeys_its_commands(home, monkeypatch, capsys):
    monkeypatch.setattr(chat_cli, "Engine", FixedEngine)
    lines = [
        "/docs",
        "/help",
        "",
        "What is the river of Freedonia?",
        "/docs",
        "/nonsense",
        "/clear",
        "/docs",
        "/quit",
        "x",
    ]
    argv = ["--knowledge_base", str(home / "kb"), "--top_k", "2"]
    assert cli(monkeypatch, *argv, stdin="\n".join(lines)) == 0
    out = capsys.readouterr().out
    assert "The Long River. [1] [9]" in out
    assert "* [1]" in out and "  [2]" in out and "[3]" not in out
    assert "cited: [1] Freedonia - Land" in out and "no such passage: [9]" in out
    assert "[1] Freedonia - Land\nThe river of Freedonia is the Long River." in out
    assert out.count("No passages yet.") == 2 and "Forgotten." in out and "Unknown command /nonsense" in out
    assert out.count("/clear  forget") == 2


@pytest.mark.parametrize("read", ["each", "together"])
def test_turns_are_remembered_without_their_citations_where_passages_are_read_together(home, monkeypatch, read):
    engines = []
    monkeypatch.setattr(chat_cli, "Engine", lambda *a: engines.append(FixedEngine(*a)) or engines[0])
    argv = ["--knowledge_base", str(home / "kb"), "--top_k", "1", "--system", "Be brief.", "--read", read]
    assert cli(monkeypatch, *argv, stdin="The river of Freedonia?\nAnd the capital of Freedonia?\n") == 0
    asked = engines[0].asked
    text = engines[0].tokenizer.decode(asked if isinstance(asked, list) else engines[0].prompt(asked))
    if read == "each":
        assert text.startswith("<|bos|><|system_start|> Be brief.<|system_end|><|retrieval_start|> And the capital")
        return
    assert text.startswith("<|bos|><|system_start|> Be brief.<|system_end|><|user_start|> The river of Freedonia?")
    assert "<|assistant_start|> The Long River.<|assistant_end|>" in text
    assert text.count("<|doc_start|>") == 1 and text.index("Oldtown") < text.rindex("And the capital")


def test_old_turns_make_room_for_new_ones(home, monkeypatch, capsys):
    engines = []
    monkeypatch.setattr(chat_cli, "Engine", lambda *a: engines.append(FixedEngine(*a)) or engines[0])
    assert cli(monkeypatch, stdin="".join(f"Question {i} about the river?\n" for i in range(12))) == 0
    text = engines[0].tokenizer.decode(engines[0].asked)
    assert "Question 11 " in text and "Question 10 " in text and "Question 0 " not in text
    assert "error" not in capsys.readouterr().out


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(home, monkeypatch, capsys):
    monkeypatch.setattr(chat_cli, "Engine", FixedEngine)
    monkeypatch.setattr(FixedEngine, "reply", "The ^C not this")
    assert cli(monkeypatch, stdin="What is the river?\nWhat is the river?\n") == 0
    out = capsys.readouterr().out
    assert out.count("The  [stopped]") == 2 and "not this" not in out


def test_ctrl_c_at_the_prompt_ends_cleanly(home, monkeypatch, capsys):
    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert cli(monkeypatch) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_too_long_a_question_gets_a_line_and_the_chat_goes_on(home, monkeypatch, capsys):
    monkeypatch.setattr(chat_cli, "Engine", FixedEngine)
    for long in ("word " * 400, "x" * 10_000_000):
        assert cli(monkeypatch, stdin=f"{long}\nWhat is the river?\n") == 0
        out = capsys.readouterr().out
        assert out.count("error: ") == 1 and "The Long River." in out and len(out) < 2000


def refused(monkeypatch, capsys, *argv: str) -> str:
    """The one line a refusal prints."""
    assert cli(monkeypatch, *argv) == 2
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert not out and "Traceback" not in err and len(line) < 400
    return line


def test_bad_input_is_one_line_and_exit_code_2(home, monkeypatch, capsys):
    kb = ["--knowledge_base", str(home / "kb")]
    assert "at most" in refused(monkeypatch, capsys, "-p", "word " * 400)
    assert "at most" in refused(monkeypatch, capsys, "-p", "x" * 200_000)
    assert "empty" in refused(monkeypatch, capsys, "-p", "  ")
    assert "dense" in refused(monkeypatch, capsys, *kb, "--retriever_type", "dense", "-p", "hi")
    assert "bm25" in refused(
        monkeypatch, capsys, "--knowledge_base", str(home / "plain"), "--retriever_type", "bm25", "-p", "hi"
    )
    refused(monkeypatch, capsys, *kb, "--retriever_type", "psychic", "-p", "hi")
    refused(monkeypatch, capsys, "--knowledge_base", str(home / "nowhere"), "-p", "hi")
    refused(monkeypatch, capsys, "--knowledge_base", str(home / "checkpoints"), "-p", "hi")
    refused(monkeypatch, capsys, "--source", "sft", "-p", "hi")
    refused(monkeypatch, capsys, "--model_tag", "d99", "-p", "hi")
    refused(monkeypatch, capsys, "--step", "77", "-p", "hi")
    refused(monkeypatch, capsys, "--step", "x", "-p", "hi")
    refused(monkeypatch, capsys, "--temperature", "-1", "-p", "hi")
    refused(monkeypatch, capsys, "--max_tokens", "0", "-p", "hi")
    refused(monkeypatch, capsys, "--device", "toaster", "-p", "hi")
    assert "top_k" in refused(monkeypatch, capsys, *kb, "--top_k", "0", "-p", "hi")
    assert "--read all: choose each or together" in refused(monkeypatch, capsys, *kb, "--read", "all", "-p", "hi")
    assert "did you mean --temperature" in refused(monkeypatch, capsys, "--temprature", "1")


def test_bytes_that_are_not_utf8_are_no_reason_to_stop(home, monkeypatch, capsys):
    assert cli(monkeypatch, "--knowledge_base", str(home / "kb"), "-p", "river \udcff \ud800?") == 0


def test_what_a_document_says_does_not_steer_the_terminal(home, monkeypatch, capsys, tmp_path):
    build_kb([Document("1", "Freedonia\x1b[2J\ncited: [3]", "river\x07 of\x9b31m Freedonia")], tmp_path / "kb", "bm25")
    cli(monkeypatch, "--knowledge_base", str(tmp_path / "kb"), stdin="The river of Freedonia?\n/docs\n")
    out = capsys.readouterr().out
    assert "Freedonia[2J" in out and not set(out) & set("\x1b\x07\x9b")
    assert "Freedonia[2J cited: [3]" in out


def test_passages_without_room_are_said_to_be_left_out(home, monkeypatch, capsys, tmp_path):
    docs = [Document(str(i), f"Freedonia - {i}", "river of Freedonia " * 25) for i in range(5)]
    build_kb(docs, tmp_path / "kb", "bm25")
    kb = ("--knowledge_base", str(tmp_path / "kb"), "-p", "The river of Freedonia?")
    assert cli(monkeypatch, *kb) == 0  # one by one, every passage has room
    assert "left out" not in capsys.readouterr().err
    assert cli(monkeypatch, *kb, "--read", "together") == 0
    err = capsys.readouterr().err
    assert 1 <= err.count("left out: no room") <= 4 and "[5]" in err
