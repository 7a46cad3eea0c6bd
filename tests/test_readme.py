"""The README's Python blocks run as written."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"^## ([^\n]+)\n+```python\n(.*?)```", README.read_text(), flags=re.M | re.S)


@pytest.mark.parametrize("title", ["`nas` alone", "`fed` alone"])
def test_block_runs(title):
    names: dict = {}
    exec(dict(BLOCKS)[title], names)
    if "front" in names:
        assert int(names["front"].valid.sum()) > 1
    else:
        assert names["params"].shape == (4,)
        assert float(abs(names["params"]).sum()) > 0
