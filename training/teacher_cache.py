"""States of a frozen teacher on disk, so that the next epoch, run or student need not compute them."""

import hashlib
import json
import logging
import sqlite3
from pathlib import Path

import torch

from .export.folder import check_writable


logger = logging.getLogger(__name__)


class StateCache:
    """States of sequences in one SQLite file, found by their tokens, whatever texts, order or seed they come with.

    Each batch is a transaction: a killed run loses at most its last one. A full file takes nothing new, and keeps what
    it has. Several processes can share a file.

    Args:
        path: The file; it is made where there is none.
        teacher: What makes the states differ, as text: the teacher's weights and their dtype.
        dtype: Of the states of tokens. Pooled vectors are float32.
        max_bytes: Size that the file does not exceed.

    Raises:
        OSError: The file cannot be written.
        ValueError: It holds something else, or states of another teacher.
    """

    def __init__(self, path: str | Path, teacher: str, dtype: torch.dtype, max_bytes: int):
        self.path, self.dtype, self.full = Path(path), dtype, False
        if self.path.is_dir():
            raise IsADirectoryError(f"`teacher_cache` '{path}' is a folder; give a file")
        check_writable(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        about = {"teacher": teacher, "dtype": str(dtype)}
        try:
            self.database = sqlite3.connect(self.path, timeout=600)
            with self.database:
                self.database.execute("BEGIN IMMEDIATE")
                self.database.execute("CREATE TABLE IF NOT EXISTS about (teacher TEXT)")
                self.database.execute(
                    "CREATE TABLE IF NOT EXISTS states (tokens BLOB PRIMARY KEY, hidden BLOB, pooled BLOB)"
                )
                found = self.database.execute("SELECT teacher FROM about").fetchone()
                if found is None:
                    self.database.execute("INSERT INTO about VALUES (?)", (json.dumps(about),))
            (page_size,) = self.database.execute("PRAGMA page_size").fetchone()
            self.database.execute(f"PRAGMA max_page_count = {max(max_bytes // page_size, 1)}")
        except sqlite3.DatabaseError as error:
            raise ValueError(
                f"'{path}' is no cache of teacher states, or cannot be used ({error}); give another file as "
                "`teacher_cache`, or remove it"
            ) from error
        if found is not None and json.loads(found[0]) != about:
            before = json.loads(found[0])
            raise ValueError(
                f"the cache '{path}' holds states of {before['teacher']} in {before['dtype']}, and the teacher is "
                f"{teacher} in {dtype}; give another file as `teacher_cache`, or remove it"
            )

    @staticmethod
    def key(tokens: list[int]) -> bytes:
        """What a sequence is found by."""
        return hashlib.blake2b(json.dumps(tokens).encode(), digest_size=16).digest()

    def get(self, tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor] | None:
        """States `[length, hidden]` and vector `[width]` of a sequence; None if they are not there."""
        query = "SELECT hidden, pooled FROM states WHERE tokens = ?"
        row = self.database.execute(query, (self.key(tokens),)).fetchone()
        if row is None:
            return None
        hidden, pooled = (torch.frombuffer(bytearray(value), dtype=torch.uint8) for value in row)
        return hidden.view(self.dtype).view(len(tokens), -1), pooled.view(torch.float32)

    def put(self, sequences: list[tuple[list[int], torch.Tensor, torch.Tensor]]) -> None:
        """Adds sequences with their states and vectors, all or none of them."""
        if self.full:
            return
        rows = [
            (self.key(tokens), as_bytes(hidden, self.dtype), as_bytes(pooled, torch.float32))
            for tokens, hidden, pooled in sequences
        ]
        try:
            with self.database:
                self.database.executemany("INSERT OR IGNORE INTO states VALUES (?, ?, ?)", rows)
        except sqlite3.OperationalError as error:  # the limit, or the disk
            self.full = True
            logger.warning("the cache '%s' takes no more states (%s); others are computed", self.path, error)


def as_bytes(values: torch.Tensor, dtype: torch.dtype) -> bytes:
    """Raw numbers of a tensor."""
    return values.to("cpu", dtype).contiguous().view(torch.uint8).numpy().tobytes()
