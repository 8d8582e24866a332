"""What is claimed? Kinds of places, random controls for a claim, and readers of claims from text and files."""

from locaudit.claims.importers import Claim, parse_location, read_claim, read_directions
from locaudit.claims.kinds import Controls, Kind, Shape, draw_nulls, find_kind
from locaudit.claims.ranking import Ranking

__all__ = [
    "Claim", "Controls", "Kind", "Ranking", "Shape", "draw_nulls", "find_kind", "parse_location", "read_claim",
    "read_directions",
]  # fmt: skip
