"""Puts generated tables into a Markdown page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path


def fill(path: Path, tables: Mapping[str, Sequence[str]]) -> None:
    """Writes every table between `<!-- table:NAME -->` and `<!-- end -->`.

    Args:
      path: of the page.
      tables: name -> lines; each must have exactly one place there.

    Raises:
      SystemExit: a table without a place, or with several.
    """
    text = path.read_text()
    for name, lines in tables.items():
        pattern = rf"(<!-- table:{re.escape(name)} -->\n).*?(<!-- end -->)"
        parts = re.split(pattern, text, flags=re.S)
        if len(parts) != 4:
            raise SystemExit(
                f"{path.name} has {len(parts) // 3} places for table {name}, expected one"
            )
        text = f"{parts[0]}{parts[1]}" + "\n".join(lines) + f"\n{parts[2]}{parts[3]}"
    path.write_text(text)
