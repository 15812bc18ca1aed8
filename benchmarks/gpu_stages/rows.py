"""Results, one JSON line each."""

from __future__ import annotations

import json
from pathlib import Path


class Rows:
    """A file of JSON lines that several processes append to, each line in one write."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, row: dict) -> None:
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        with open(self.path, "a+b", buffering=0) as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":  # a process was killed while it wrote
                    line = b"\n" + line
            file.write(line)

    def read(self) -> list[dict]:
        """All whole lines; the last one of a killed process may be cut off."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_bytes().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def size(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0
