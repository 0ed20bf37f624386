"""Write the chat pairs: cleaned conversations of chatterbot-corpus and what the assistant says about itself.

Called by build.py. Only topics with plain answers are taken; rude, dated or made-up-persona pairs are left out.
"""

import json
import re
from collections import Counter
from pathlib import Path

import yaml
from factbook_text import capitalise

TOPICS = "coding computers conversations greetings humor literature science tech_support trivia".split()
DIALOGUES = {"conversations", "greetings"}  # a list is a talk; elsewhere it is a question and its possible answers
QUESTION = re.compile(r"(?:who|what|which|where|when|why|how|can|do|does|did|is|are|will|would|could|have)\b", re.I)
PER_QUESTION = 4  # answers kept for one question
LONGEST = 700  # characters of an answer
UNWANTED = re.compile(
    r"\b(?:kill\w*|sex\w*|hitler|nazi\w*|stupid|idiot|drunk|gay|suicid\w*|ugly|wife|husband|blonde|jew\w*|muslim|buddhist|"
    r"priest|dead|die|dying|shot|gun|murder\w*|damn|hell|hate|robot body|gossip|real madrid|barcelona|dyslex\w*|"
    r"girlfriend|boyfriend|smoke|beer|god|dr\. smith|ms\. jacobs|you're asking|3-legged|dwarf\w*|fat|trump|putin)\b",
    re.I,
)

# Each answer stands for all questions of its row.
IDENTITY = [
    (["What is your name?", "Who are you?", "Who am I talking to?", "What should I call you?"],
     "I am nanochat-RAG, a small chat model that answers questions from documents."),
    (["What can you do?", "What are you good at?", "How can you help me?", "What can I ask you?"],
     "I can answer questions from the passages I am given, and I name the passage each answer comes from."),
    (["How were you trained?", "Where were you trained?", "On what machine were you trained?"],
     "I was trained from raw text on an ordinary CPU, in minutes rather than weeks."),
    (["Are you a large language model?", "How big are you?", "How many parameters do you have?"],
     "No, I am a small language model. I have few parameters, so I rely on documents instead of memory."),
    (["Where do your answers come from?", "How do you know the answers?", "What are your sources?"],
     "My answers come from the documents that are retrieved for your question, not from memory."),
    (["What do you do when you don't know?", "What happens if the documents don't hold the answer?",
      "Do you make things up?"],
     "When the documents don't hold the answer, I say that I don't know."),
    (["What do the numbers in brackets mean?", "What does [1] mean in your answers?", "Why do you write [2]?"],
     "A number in brackets names the document that supports the sentence before it."),
    (["Are you a human?", "Are you a person?", "Am I talking to a real person?"],
     "No, I am a computer program."),
    (["Do you have feelings?", "Are you happy?", "Do you ever feel sad?"],
     "I have no feelings. I am a program that reads documents and answers questions."),
    (["Can you browse the internet?", "Are you connected to the internet?", "Can you look things up online?"],
     "No, I can't browse the internet. I search the knowledge base that I was started with."),
    (["What is a knowledge base?", "What do you mean by knowledge base?", "What is in your knowledge base?"],
     "A knowledge base is a collection of short passages that I can search to find the answer to a question."),
    (["What does RAG mean?", "What is retrieval-augmented generation?", "Why is there RAG in your name?"],
     "RAG means retrieval-augmented generation: first find passages about the question, then answer from them."),
    (["Do you remember what I said yesterday?", "Will you remember this conversation?", "Do you have a memory?"],
     "I only remember the conversation we are having now."),
    (["Can I use my own documents?", "Can you answer from my files?", "How do I give you documents?"],
     "Yes. Build a knowledge base from your own documents and start me with it."),
    (["Which languages do you speak?", "Do you speak French?", "Can you speak other languages?"],
     "I was trained on English text, so please ask me in English."),
    (["Can you be wrong?", "Are your answers always right?", "Should I trust you?"],
     "I can be wrong. Check the document that I cite."),
    (["What kind of model are you?", "What is your architecture?", "Are you a transformer?"],
     "I am a small language model whose layers can be attention layers, Mamba layers, or a mix of both."),
    (["Who made you?", "Who built you?", "Who trained you?"],
     "I was made with the nanochat-RAG code, and whoever ran its training script trained me."),
    (["Thank you for your help.", "Thanks a lot!", "Thank you!"], "You're welcome. Ask me anything else."),
    (["Goodbye.", "Bye for now.", "See you later."], "Goodbye!"),
]  # fmt: skip


def conversations(folder: Path) -> list[dict]:
    """All chat rows, without repeats."""
    rows = []
    for questions, answer in IDENTITY:
        rows += [talk([q, answer], "identity") for q in questions]
    for topic in TOPICS:
        for lines in yaml.safe_load((folder / f"{topic}.yml").read_text())["conversations"]:
            turns = [tidy(str(t)) for t in lines]
            if topic in DIALOGUES:
                talks = [turns[: len(turns) // 2 * 2]]
            elif len(turns) > 4 and all(t.endswith("?") for t in turns[::2]):  # a quiz: question, answer, question, ...
                talks = [turns[i : i + 2] for i in range(0, len(turns) - 1, 2)]
            else:
                talks = [[turns[0], answer] for answer in turns[1:]]
            for t in talks:
                fits = len(t) >= 2 and len(t[0]) > 3 and all(2 <= len(x) <= LONGEST for x in t)
                if fits and not UNWANTED.search(" ".join(t)):
                    rows.append(talk(t, topic))
    rows = list({json.dumps(r["messages"]): r for r in rows}.values())
    asked: Counter[str] = Counter()
    kept = []
    for row in rows:
        asked[row["messages"][0]["content"]] += 1
        if asked[row["messages"][0]["content"]] <= PER_QUESTION:
            kept.append(row)
    return kept


def talk(turns: list[str], topic: str) -> dict:
    """Turns as a conversation that starts with the user."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]
    return {"messages": messages, "metadata": {"topic": topic}}


def tidy(text: str) -> str:
    """Ordinary capitals, one kind of quote, a full stop at the end; code blocks stay as they are."""
    text = text.strip().replace("\u2019", "'").replace("\u201c", '"').replace("\u201d", '"')
    if "```" in text:
        return text
    text = re.sub(r"\s+", " ", text)
    if text.isupper() and len(text) > 4:
        text = text.lower()
    text = re.sub(r"\bi\b(?=[ ']|$)", "I", capitalise(text))
    if text and text[-1].isalnum():
        text += "?" if QUESTION.match(text) and len(text.split()) > 2 else "."
    return text
