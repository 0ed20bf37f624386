"""Make a data set for retrieval-augmented chat: a knowledge base, questions and conversations, in one folder.

    python -m scripts.prepare_rag_dataset --mode example --output data/rag_examples   # small, hand-written, seconds
    python -m scripts.prepare_rag_dataset --mode factbook --output DIR                # all that ships in data/factbook
    python -m scripts.prepare_rag_dataset --mode handbooks --output DIR               # and in data/handbooks
    python -m scripts.prepare_rag_dataset --mode fiction --output DIR                 # an invented world

    DIR/knowledge_base/   what RetrievalManager and the commands' --knowledge_base open
    DIR/queries/          train.jsonl val.jsonl test.jsonl: {"id", "query", "answer", "answers", "positive_ids", ...}
    DIR/conversations/    train_rag.jsonl val_rag.jsonl: conversations with documents, citations and abstentions

Questions are split by the thing asked about: nothing a test question is about occurs in a training question. What is
already there and unchanged is not made again, so the factbook's passages are embedded once.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import (
    DATA,
    UserError,
    from_main,
    init_distributed,
    is_main,
    print0,
    read_jsonl,
    sha256_of,
    write_jsonl,
)
from nanochat.config import run
from nanochat.documents import Document, read_documents
from nanochat.rag_utils import ABSTENTION
from nanochat.retrieval import SimpleRetriever, build_kb, kb_info
from tasks.fiction import make_world
from tasks.handbooks import load_handbooks

SYSTEM = "You are a helpful assistant. Answer from the documents and cite them."


@dataclass
class Config:
    """The data set to make."""

    mode: str = "example"  # example: a few documents; factbook, handbooks: all of that in data/; fiction: invented
    output: str = ""  # the folder to write
    type: str = "hybrid"  # which indexes the knowledge base gets: simple, bm25, dense or hybrid (bm25 and dense)
    max_conversations: int = 2000  # at most this many of each split's questions become conversations
    seed: int = 0  # which ones, and the order of their documents


def main(config: Config) -> None:
    if config.mode not in ("example", "factbook", "handbooks", "fiction"):
        raise UserError(f"unknown --mode {config.mode}; choose example, factbook, handbooks or fiction")
    if not config.output:
        raise UserError("give --output, the folder to write")
    if config.max_conversations < 0:
        raise UserError(f"--max_conversations {config.max_conversations}: at least 0")
    output = Path(config.output)
    init_distributed("cpu")  # under torchrun all processes embed, and the first one writes

    # 1. documents and questions
    if config.mode == "example":
        documents, queries = example_documents(), example_queries()
        built_from = "example " + str(EXAMPLE_VERSION)
    elif config.mode in ("handbooks", "fiction"):
        load = load_handbooks if config.mode == "handbooks" else lambda split: make_world(split, ENTITIES[split])
        made = {split: load(split) for split in SPLITS}
        documents = [Document.from_dict(doc) for split in SPLITS for doc in made[split].documents.values()]
        queries = {split: made[split].queries for split in SPLITS}
        built_from = " ".join(sha256_of(path) for path in sorted((DATA / config.mode).glob("*.txt")))
        built_from += f" {ENTITIES}" if config.mode == "fiction" else ""
    else:
        source = DATA / "factbook" / "knowledge_base" / "documents.jsonl"
        documents, built_from = read_documents(source), sha256_of(source)
        queries = {s: list(read_jsonl(DATA / "factbook" / "queries" / f"{s}.jsonl", FIELDS)) for s in SPLITS}

    # 2. the knowledge base, unless it is there
    kb = output / "knowledge_base"
    if from_main(is_built(kb, config.type, built_from)):
        print0(f"{kb}: already built")
    else:
        build_kb(documents, kb, config.type, built_from)
        print0(f"{kb}: {len(documents)} documents")

    # 3. questions and conversations
    if not is_main():
        return
    for split, rows in queries.items():
        write_jsonl(output / "queries" / f"{split}.jsonl", rows)
        print0(f"{output / 'queries' / split}.jsonl: {len(rows)} questions")
    if config.mode == "factbook":
        write_jsonl(output / "queries" / CONTRADICTIONS, read_jsonl(DATA / "factbook" / "queries" / CONTRADICTIONS))
    elif config.mode == "fiction":
        write_jsonl(
            output / "queries" / CONTRADICTIONS, [row for world in made.values() for row in world.contradictions]
        )
    for split in ("train", "val"):
        path, rng, rows = output / "conversations" / f"{split}_rag.jsonl", random.Random(config.seed), queries[split]
        if len(rows) > config.max_conversations:
            rows = rng.sample(rows, config.max_conversations)
        rows = list(conversations(rows, documents, split, rng))
        write_jsonl(path, rows)
        print0(f"{path}: {len(rows)} conversations")


SPLITS = ("train", "val", "test")
ENTITIES = {"train": 300, "val": 1000, "test": 1000}  # of the invented world; training makes a larger one of its own
CONTRADICTIONS = "contradictions.jsonl"
FIELDS = ("id", "query", "answer", "answers", "positive_ids", "hops", "type")


def is_built(kb: Path, type: str, built_from: str) -> bool:
    """True if `kb` was built from the same documents for the same retrievers."""
    try:
        info = kb_info(kb)
    except UserError:
        return False
    changed = info["segments"] or info["removed"]
    return not changed and (info["type"], info.get("built_from")) == (type, built_from)


def conversations(queries: list[dict], documents: list[Document], split: str, rng: random.Random) -> Iterator[dict]:
    """For each question a conversation over three documents: the gold ones among what retrieval finds in the split.

    Every fifth question is shown without its gold documents, and the answer is then to abstain.
    """
    by_id = {doc.id: doc for doc in documents}
    retriever = SimpleRetriever([doc for doc in documents if doc.metadata.get("split") == split])
    found = retriever.retrieve_batch([row["query"] for row in queries], 8)
    for n, (row, hits) in enumerate(zip(queries, found, strict=True)):
        gold = [by_id[i] for i in row["positive_ids"]] if n % 5 != 4 else []
        others = [doc for doc in hits if doc.id not in row["positive_ids"]]
        shown = gold + others[: max(0, 3 - len(gold))]
        rng.shuffle(shown)
        numbers = [k for k, doc in enumerate(shown, 1) if doc.id in row["positive_ids"]]
        answer = f"{row['answer']}. {''.join(f'[{k}]' for k in numbers)}" if gold else ABSTENTION
        scores = {doc.id: doc.score for doc in hits}
        keys = ("id", "title", "content", "source")
        docs = [{**{key: getattr(doc, key) for key in keys}, "score": scores.get(doc.id)} for doc in shown]
        yield {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "retrieval", "query": row["query"], "documents": docs},
                {"role": "user", "content": row["query"]},
                {"role": "assistant", "content": answer},
            ],
            "metadata": {
                "id": row["id"],
                "query": row["query"],
                "retrieval_method": "simple",
                "num_retrieved": len(docs),
            },
        }


# ----------------------------------------------------------------------------------------------------------------------
# The example: documents written for it, each with its questions. "Q? | answer | another accepted answer"

EXAMPLE_VERSION = 1  # raise it when the texts below change, and an older example is built again

TOPICS: dict[str, list[tuple[str, str, list[str]]]] = {
    "train": [
        ("Machine learning", "Machine learning is the study of programs that improve with data instead of being given "
         "every rule by hand. The term was coined by Arthur Samuel in 1959 for a program that played checkers. Its "
         "three main branches are supervised, unsupervised and reinforcement learning.",
         ["What is machine learning? | the study of programs that improve with data",
          "Who coined the term machine learning? | Arthur Samuel | Samuel",
          "Which game did Arthur Samuel's learning program play? | checkers"]),
        ("Neural network", "A neural network is a chain of layers that multiply their inputs by weights and bend the "
         "result with a simple function. The perceptron, an early one, was shown by Frank Rosenblatt in 1958. Networks "
         "with many layers are called deep.",
         ["Who showed the perceptron? | Frank Rosenblatt | Rosenblatt",
          "What are networks with many layers called? | deep"]),
        ("Backpropagation", "Backpropagation finds how much each weight contributes to the error by applying the chain "
         "rule from the last layer to the first. It became widely known through a paper in Nature in 1986 by "
         "Rumelhart, Hinton and Williams.",
         ["Which rule of calculus does backpropagation apply? | the chain rule | chain rule",
          "In which journal did the 1986 backpropagation paper appear? | Nature"]),
        ("Decision tree", "A decision tree answers by a series of questions about single features, from the root down "
         "to a leaf. Trees are easy to read but overfit; a random forest averages hundreds of them, each grown on a "
         "different sample.",
         ["What does a random forest average? | hundreds of trees | trees | decision trees",
          "Where does a decision tree begin? | the root | at the root"]),
        ("Photosynthesis", "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen. In plants it "
         "happens in the chloroplasts, whose pigment chlorophyll absorbs red and blue light and reflects green.",
         ["Where in a plant does photosynthesis happen? | the chloroplasts | in the chloroplasts",
          "Which color of light does chlorophyll reflect? | green"]),
        ("Mount Kilimanjaro", "Kilimanjaro in Tanzania is the highest mountain of Africa, at 5,895 meters. It is a "
         "dormant volcano with three cones: Kibo, Mawenzi and Shira. The summit on Kibo is called Uhuru Peak.",
         ["How high is Kilimanjaro? | 5,895 meters", "In which country is Kilimanjaro? | Tanzania",
          "What is the summit of Kilimanjaro called? | Uhuru Peak"]),
        ("Printing press", "Around 1450 Johannes Gutenberg built a press with movable metal type in Mainz. His Bible, "
         "of which about 180 copies were made, has 42 lines on most pages.",
         ["In which city did Gutenberg build his press? | Mainz",
          "How many copies of Gutenberg's Bible were made? | about 180 | 180"]),
        ("Octopus", "An octopus has eight arms, three hearts and blue blood, which carries oxygen with copper instead "
         "of iron. Most of its neurons sit in the arms, and it escapes by squirting ink.",
         ["How many hearts does an octopus have? | three | 3",
          "Which metal carries oxygen in an octopus's blood? | copper"]),
        ("Suez Canal", "The Suez Canal joins the Mediterranean Sea to the Red Sea through Egypt. It was opened in 1869 "
         "after ten years of work led by Ferdinand de Lesseps, and has no locks.",
         ["When was the Suez Canal opened? | 1869 | in 1869",
          "Who led the work on the Suez Canal? | Ferdinand de Lesseps | de Lesseps"]),
        ("Violin", "The violin has four strings tuned in fifths: G, D, A and E. The best known makers, Stradivari and "
         "Guarneri, worked in Cremona in northern Italy around 1700.",
         ["How many strings does a violin have? | four | 4", "In which city did Stradivari work? | Cremona"]),
    ],
    "val": [
        ("Reinforcement learning", "In reinforcement learning an agent acts, receives rewards and learns a policy that "
         "earns more. TD-Gammon, written by Gerald Tesauro in 1992, learned backgammon by playing against itself.",
         ["Who wrote TD-Gammon? | Gerald Tesauro | Tesauro", "Which game did TD-Gammon learn? | backgammon",
          "What does an agent learn in reinforcement learning? | a policy | a policy that earns more"]),
        ("Penicillin", "Penicillin was discovered in London in 1928 by Alexander Fleming, who saw that a mold had "
         "killed the bacteria in a dish. Howard Florey and Ernst Chain made it into a medicine at Oxford.",
         ["Who discovered penicillin? | Alexander Fleming | Fleming",
          "At which university was penicillin made into a medicine? | Oxford"]),
        ("Lake Baikal", "Lake Baikal in Siberia is the deepest lake on Earth, 1,642 meters deep, and holds about a "
         "fifth of the unfrozen fresh water. The Baikal seal lives nowhere else.",
         ["How deep is Lake Baikal? | 1,642 meters",
          "Which animal lives only in Lake Baikal? | the Baikal seal | Baikal seal"]),
        ("Chess clock", "A chess clock has two dials and stops one while the other runs. The first tournament with "
         "mechanical clocks was held in London in 1883.",
         ["In which city was the first tournament with mechanical chess clocks? | London"]),
    ],
    "test": [
        ("Support vector machine", "A support vector machine separates two classes by the line or plane with the "
         "widest margin. The examples that touch the margin are the support vectors. The soft margin was introduced in "
         "1995 by Corinna Cortes and Vladimir Vapnik.",
         ["When was the soft margin introduced? | 1995 | in 1995",
          "What are the examples that touch the margin called? | support vectors | the support vectors"]),
        ("Honey bee", "Honey bees tell each other where food is by a waggle dance, whose angle gives the direction "
         "from the sun. Karl von Frisch decoded it and shared a Nobel Prize in 1973. A colony has one queen.",
         ["Who decoded the waggle dance? | Karl von Frisch | von Frisch",
          "How many queens does a bee colony have? | one | 1"]),
        ("Panama Canal", "The Panama Canal, opened in 1914, joins the Atlantic to the Pacific. Ships are lifted 26 "
         "meters to Gatun Lake by locks and lowered again on the other side.",
         ["When was the Panama Canal opened? | 1914 | in 1914",
          "To which lake do locks lift ships in the Panama Canal? | Gatun Lake"]),
        ("Rosetta Stone", "The Rosetta Stone carries one decree in hieroglyphs, Demotic and Greek. It was found in "
         "Egypt in 1799 and let Jean-François Champollion read hieroglyphs in 1822. It is kept in the British Museum.",
         ["Where is the Rosetta Stone kept? | the British Museum | British Museum",
          "Who could read hieroglyphs in 1822? | Jean-François Champollion | Champollion",
          "When was the Rosetta Stone found? | 1799 | in 1799"]),
    ],
}  # fmt: skip

# about things that no document mentions
UNANSWERABLE = {
    "train": [
        "Who painted the Mona Lisa?",
        "What is the boiling point of mercury?",
        "How many keys does a piano have?",
    ],
    "val": ["Who wrote Don Quixote?", "What is the wingspan of an albatross?"],
    "test": ["Which planet has the most moons?", "Who composed The Magic Flute?"],
}


def example_documents() -> list[Document]:
    """The example's documents, one a topic."""
    return [
        Document(_slug(title), title, content, source="nanochat example", metadata={"split": split})
        for split in SPLITS
        for title, content, _ in TOPICS[split]
    ]


def example_queries() -> dict[str, list[dict]]:
    """The example's questions by split."""
    queries: dict[str, list[dict]] = {}
    for split in SPLITS:
        rows = queries[split] = []
        for title, _, questions in TOPICS[split]:
            for n, line in enumerate(questions, 1):
                question, *answers = line.split(" | ")
                rows.append(_query(f"{_slug(title)}-{n}", question, answers, [_slug(title)], "single"))
        for n, question in enumerate(UNANSWERABLE[split], 1):
            rows.append(_query(f"unanswerable-{split}-{n}", question, [ABSTENTION], [], "unanswerable"))
    return queries


def _query(id: str, query: str, answers: list[str], gold: list[str], type: str) -> dict:
    return dict(zip(FIELDS, (id, query, answers[0], answers, gold, 1, type), strict=True))


def _slug(title: str) -> str:
    return title.lower().replace(" ", "-")


if __name__ == "__main__":
    run(main, Config)
