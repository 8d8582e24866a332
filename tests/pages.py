"""Read what a page of a report says: its text, and the data behind its tables, charts and answers."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest


def words(page: str) -> str:
    """The page without scripts, data and drawings."""
    return re.sub(r"<(script|svg|style)\b.*?</\1>", "", page, flags=re.DOTALL)


def data_of(page: str) -> dict[str, Any]:
    """What the page's script reads. NaN and infinity, which JSON does not have, fail the test."""
    return json.loads(page.split('id="data">')[1].split("</script>")[0], parse_constant=pytest.fail)


def rows_of(data: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """A table of the page, as one dict per row."""
    table = data["tables"][name]
    keys = [column["key"] for column in table["columns"]]
    return [dict(zip(keys, row, strict=True)) for row in table["rows"]]


def charts_of(page: str) -> list[str]:
    """Names of the charts that a page shows, in order."""
    return re.findall(r'<figure id="(\w+)">', page)
