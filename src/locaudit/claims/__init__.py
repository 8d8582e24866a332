"""What is claimed? Kinds of places, their controls, and the files that claims come in."""

from locaudit.claims.importers import parse_location
from locaudit.claims.kinds import Controls, Kind, Shape, find_kind

__all__ = ["Controls", "Kind", "Shape", "find_kind", "parse_location"]
