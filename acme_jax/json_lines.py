"""A file of one JSON object a line, of which a killed process loses at most the last line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TextIO


class JsonLines:
    """The file, opened by the first `append`; a torn last line of an earlier process is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def lines(self) -> list[str]:
        """The complete lines; a last line without its end is torn."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(errors="replace").splitlines(keepends=True)
        return lines if not lines or lines[-1].endswith("\n") else lines[:-1]

    def replace(self, lines: list[str]) -> None:
        """Writes the file anew, so that it is either the old or the whole new one."""
        self.close()
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text("".join(lines))
        temporary.replace(self.path)

    def append(self, row: dict[str, Any]) -> None:
        """Appends one JSON-ready row."""
        if self._file is None:
            self.replace(self.lines())  # Without a torn line, to which the row would stick.
            self._file = self.path.open("a")
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()  # To the operating system: survives SIGKILL.

    def close(self) -> None:
        """The next row opens the file again."""
        if self._file is not None:
            self._file.close()
        self._file = None


def plain(value: Any) -> Any:
    """A JSON-ready copy: arrays become (nested lists of) numbers, NaN and infinity null."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
