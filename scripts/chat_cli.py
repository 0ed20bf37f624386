"""Chat in the terminal, with or without documents.

    python -m scripts.chat_cli --source rag --knowledge_base KB                      # a conversation
    python -m scripts.chat_cli --source rag --knowledge_base KB -p "the question"    # one answer, on stdout
    python -m scripts.chat_cli --source sft                                          # no documents

With a knowledge base every question is looked up first; the passages follow the answer, the cited ones marked with *.
Type /help in the chat for its commands. Ctrl-C stops an answer, at the prompt it ends the chat.
"""

import contextlib
import sys
from dataclasses import dataclass

from simple_parsing import field

from nanochat.checkpoint_manager import load_model
from nanochat.common import UserError, init_distributed, pick_dtype, print0
from nanochat.config import run
from nanochat.engine import Engine, check_sampling
from nanochat.rag_utils import ABSTENTION, document_text, extract_citations, strip_citations
from nanochat.reader import answer_together, focus, stream_each
from nanochat.retrieval import RetrievalManager

MAX_CHARS = 100_000  # of a question: far more than any context holds, and quick to refuse
HELP = """With a knowledge base every question stands for itself, unless the model reads all passages in one context.
/docs   the passages of the last answer in full
/clear  forget the conversation
/quit   leave (so do Ctrl-D, and Ctrl-C at the prompt)"""


@dataclass
class Config:
    """Settings; each can be given as a flag."""

    source: str = "rag"  # which stage's model: base, mid, sft, rag, ...
    model_tag: str | None = None  # which run of that stage; the newest if not given
    step: int | None = None  # which checkpoint of that run; the last if not given
    knowledge_base: str = ""  # folder of a knowledge base; none: chat without documents
    retriever_type: str = ""  # simple, bm25, dense or hybrid; empty: what the knowledge base was built for
    top_k: int = 5  # passages to retrieve for a question
    read: str = "each"  # each: passages one by one, the surest answers; together: two by two, too
    quote: bool = True  # answers over passages are in their words; false: the model says what it likes
    prompt: str | None = field(default=None, alias=["-p"])  # answer this question and exit
    system: str = ""  # a system message
    max_tokens: int = 128  # longest answer
    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0  # sample from the likeliest tokens that make up this probability
    seed: int = 0  # of the sampling
    device: str = ""  # cpu, cuda or mps; the best present if not given
    dtype: str = "auto"  # float32 or bfloat16


class Chat:
    """One conversation: what was said, and the passages of the last question."""

    def __init__(self, engine: Engine, manager: RetrievalManager | None, config: Config):
        self.engine, self.manager, self.config = engine, manager, config
        self.clear()

    def clear(self) -> None:
        """Forget everything that was said."""
        self.turns: list[tuple[str, str]] = []  # (question, answer)
        self.documents: list = []
        self.read: set[int] = set()  # numbers of the documents that fitted into the prompt
        self.answer = ""

    def ask(self, question: str):
        """Yield the answer in pieces; what came of it until the end (or until the caller stopped) is remembered."""
        question = question.encode("utf-8", "replace").decode().strip()  # argv may hold half a surrogate pair
        if not question:
            raise UserError("the question is empty")
        if len(question) > MAX_CHARS:
            raise UserError(f"the question has {len(question):,} characters; at most {MAX_CHARS:,} are read")
        c = self.config
        conversation = self._conversation(question)
        self.documents = [d for m in conversation["messages"] if m["role"] == "retrieval" for d in m["documents"]]
        self.read, self.answer = set(), ""
        sampling = {"temperature": c.temperature, "top_p": c.top_p, "seed": c.seed + len(self.turns), "quote": c.quote}
        if self.manager and not self.documents:  # nothing to answer from
            pieces = iter([ABSTENTION])
        elif c.read == "each" and self.documents:
            many = len(self.documents) > 20  # seconds without a word
            [heard] = focus(self.engine, [conversation], c.max_tokens, progress=many)
            self.read = set(range(1, len(self.documents) + 1))  # each had room
            pieces = stream_each(self.engine, heard, c.max_tokens, **sampling)
        elif self.documents and self.engine.model.evidence and c.quote:
            self.read = set(range(1, len(self.documents) + 1))
            pieces = iter(answer_together(self.engine, [conversation], 1, c.max_tokens, **sampling))
        else:
            ids = self.engine.prompt(conversation, c.max_tokens)
            self.read = numbers_read(ids, self.engine.tokenizer)
            pieces = self.engine.stream(ids, self.engine.room(c.max_tokens), **sampling)
        try:
            for piece in pieces:
                self.answer += piece
                yield piece
        finally:
            if self.answer:
                self.turns.append((question, self.answer))

    def _conversation(self, question: str) -> dict:
        """The messages to send: system, as many of the last turns as a quarter of the context holds, the question.

        Passages read one by one, or by the evidence reader, are asked this question alone: they learned to read so, and
        earlier answers about other passages mislead. In one context, only the question's own passages are sent along:
        those of earlier ones would crowd them out. Citations of earlier answers go with their passages, whose numbers
        are given out anew.
        """
        c, count = self.config, self.engine.tokenizer.encode_text
        budget = self.engine.model.config.sequence_len // 4
        history: list[dict] = []
        alone = self.manager and (c.read == "each" or (self.engine.model.evidence and c.quote))
        for asked, answered in reversed(() if alone else self.turns):
            answered = strip_citations(answered) if self.manager else answered
            budget -= len(count(asked)) + len(count(answered)) + 4
            if budget < 0:
                break
            history = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}, *history]
        system = [{"role": "system", "content": c.system}] if c.system else []
        asked = [{"role": "user", "content": question}]
        conversation = {"messages": system + history + asked}
        try:
            self.engine.prompt(conversation, c.max_tokens)
        except UserError:  # without the past it may fit; if not, this says so
            conversation = {"messages": system + asked}
            self.engine.prompt(conversation, c.max_tokens)
        return self.manager.augment_conversation(conversation, c.top_k) if self.manager else conversation

    def sources(self) -> list[str]:
        """A line for each passage: number, score, title; * marks the cited ones. Then what was cited."""
        cited = extract_citations(self.answer)
        lines = []
        titles = [" ".join(doc["title"].split()) for doc in self.documents]  # a line break would forge a line
        for n, doc in enumerate(self.documents, 1):
            lost = "" if n in self.read else "  (left out: no room)"
            date = f" ({doc['date']})" if doc.get("date") else ""
            lines.append(f"{'*' if n in cited else ' '} [{n}] {doc['score']:7.3f}  {titles[n - 1]}{date}{lost}")
        if self.documents:
            unknown = [n for n in cited if not 1 <= n <= len(self.documents)]
            good = [f"[{n}] {titles[n - 1]}" for n in cited if n not in unknown]
            lines.append("cited: " + ("; ".join(good) or "nothing"))
            if unknown:
                lines.append("cited, but there is no such passage: " + ", ".join(f"[{n}]" for n in unknown))
        elif self.manager:
            lines.append("no passage was found")
        return lines


def numbers_read(ids: list[int], tokenizer) -> set[int]:
    """The numbers of the documents that are in a rendered prompt."""
    start = tokenizer.special_ids["<|doc_start|>"]
    heads = (tokenizer.decode_text(ids[i + 1 : i + 9]) for i, token in enumerate(ids) if token == start)
    return {int(n) for head in heads if (n := head.partition("]")[0].removeprefix("[")).isdecimal()}


def chat_loop(chat: Chat) -> None:
    """Read questions until /quit, Ctrl-D or Ctrl-C at the prompt."""
    print("Ask a question, or type /help.")
    while True:
        try:
            line = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line == "/quit":
            return
        if line == "/clear":
            chat.clear()
            print("Forgotten.")
        elif line == "/docs":
            print0("\n\n".join(document_text(d, n) for n, d in enumerate(chat.documents, 1)) or "No passages yet.")
        elif line.startswith("/"):
            print(HELP if line == "/help" else f"Unknown command {line[:40]}\n{HELP}")
        elif line:
            show_answer(chat, line)


def show_answer(chat: Chat, question: str) -> None:
    """Print the answer as it comes, then its passages. A question that can't be answered gets a line."""
    pieces = chat.ask(question)
    try:
        for piece in pieces:
            print0(piece, end="")
        print()
    except KeyboardInterrupt:
        pieces.close()
        print(" [stopped]")
    except UserError as e:
        print(f"error: {e}")
        return
    if lines := chat.sources():
        print0("\n" + "\n".join(lines))


def main(config: Config) -> None:
    """Load, then answer one question or talk."""
    for stream in (sys.stdin, sys.stdout):  # a byte that isn't UTF-8, or a narrow terminal, is no reason to stop
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    # 1. What can be refused before the model is loaded
    if config.read not in ("each", "together"):
        raise UserError(f"--read {config.read}: choose each or together")
    check_sampling(config.max_tokens, config.temperature, 0, config.top_p)
    pick_dtype("cpu", config.dtype)
    if config.prompt is not None and not config.prompt.strip():
        raise UserError("the question is empty")
    if config.top_k < 1:
        raise UserError(f"--top_k {config.top_k}: at least one passage must be retrieved")
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the answer
        # 2. Knowledge base and model
        manager = None
        if config.knowledge_base:
            manager = RetrievalManager(config.retriever_type, config.knowledge_base, top_k=config.top_k)
        device = init_distributed(config.device).device
        model, tokenizer, _ = load_model(
            config.source, device, "eval", model_tag=config.model_tag, step=config.step, dtype=config.dtype
        )
        engine = Engine(model, tokenizer)
        engine.generate(
            [[tokenizer.bos] * 70], max_tokens=2
        )  # what has to be compiled is compiled before the first question
    chat = Chat(engine, manager, config)
    # 3. Talk
    if config.prompt is None:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  line editing and history in input()
        chat_loop(chat)
        return
    for piece in chat.ask(config.prompt):
        print0(piece, end="")
    print(flush=True)
    if lines := chat.sources():
        with contextlib.redirect_stdout(sys.stderr):
            print0("\n".join(lines))


if __name__ == "__main__":
    run(main, Config)
