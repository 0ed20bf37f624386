"""A file of key -> bytes that several processes may share: what is dear to compute and cheap to keep.

    cache = Cache(get_base_dir() / "cache" / "embeddings.sqlite")
    cache.put_many({key: vector.tobytes()})
    cache.get_many([key, other])  # {key: b"..."}: what is not there is left out

SQLite in WAL mode: what was put survives a kill, readers and one writer don't wait for each other. A cache is never
worth an error: a damaged file is put aside (`.broken`) and a new one begun; where nothing can be written (disk full,
read-only folder) there is one warning and the work goes on without. Deleting the file is always safe.
"""

import sqlite3
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

TIMEOUT = 30  # seconds to wait for another process's lock


class Cache:
    """`get_many` and `put_many` on one file. Threads may share an object, processes a file."""

    def __init__(self, path: str | Path):
        self.path, self.lock, self.warned = Path(path), threading.Lock(), False
        self.db: sqlite3.Connection | None = None

    def get_many(self, keys: Sequence[str]) -> dict[str, bytes]:
        """The values of those keys that are there."""

        def read(db: sqlite3.Connection) -> dict[str, bytes]:
            found = {}
            for start in range(0, len(keys), 500):  # old SQLites take 999 variables
                part = keys[start : start + 500]
                marks = ",".join("?" * len(part))
                found |= dict(db.execute(f"SELECT key, value FROM cache WHERE key IN ({marks})", part))
            return found

        return self._try(read) or {}

    def put_many(self, items: Mapping[str, bytes]) -> None:
        """Store the items, replacing older values, and commit: all of them or, after a kill, none."""

        def write(db: sqlite3.Connection) -> None:
            with db:  # commits, or rolls back on an error
                db.executemany("INSERT OR REPLACE INTO cache VALUES (?, ?)", items.items())

        self._try(write)

    def close(self) -> None:
        """Close the file; it is opened again when needed."""
        with self.lock:
            self._close()

    def _close(self) -> None:
        if self.db is not None:
            with suppress(sqlite3.Error):
                self.db.close()
        self.db = None

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.db = sqlite3.connect(self.path, timeout=TIMEOUT, check_same_thread=False)
        self._switch_to_wal()
        self.db.execute("PRAGMA synchronous = NORMAL")  # a kill loses nothing, a power cut perhaps the last commits
        self.db.execute("CREATE TABLE IF NOT EXISTS cache (key TEXT PRIMARY KEY, value BLOB NOT NULL)")
        return self.db

    def _switch_to_wal(self) -> None:
        """Another process that is creating the file holds a lock at which this statement fails, mostly without waiting
        for `timeout`: so it is tried again, in all for up to twice that long.
        """
        end = time.monotonic() + TIMEOUT
        while True:
            try:
                self.db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as e:
                if "locked" not in str(e) or time.monotonic() > end:
                    raise
                time.sleep(0.02)

    def _try(self, action):
        """`action` on the open file; once again on a new file if this one is damaged; None if it can't be done."""
        with self.lock:
            for _ in range(2):
                try:
                    return action(self.db or self._open())
                except (sqlite3.Error, OSError) as e:
                    self._close()
                    # "locked", "disk full", "read-only" are OperationalErrors and no damage
                    damaged = isinstance(e, sqlite3.DatabaseError) and not isinstance(e, sqlite3.OperationalError)
                    if damaged and self._put_aside():
                        continue
                    if not self.warned:
                        print(f"the cache {self.path} can't be used ({e}); going on without", file=sys.stderr)
                    self.warned = True
                    return None

    def _put_aside(self) -> bool:
        try:
            for end in ("-wal", "-shm"):
                Path(f"{self.path}{end}").unlink(missing_ok=True)
            self.path.replace(f"{self.path}.broken")
            return True
        except OSError:
            return False
