"""A judge that ships with the library: it compares an answer with the references of its question."""

from locaudit.judges.reference.judge import ReferenceJudge, load_reference_judges

__all__ = ["ReferenceJudge", "load_reference_judges"]
