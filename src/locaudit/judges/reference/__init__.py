"""The judge bundled with the library: it compares an answer with the reference answers of its question."""

from locaudit.judges.reference.judge import ReferenceJudge, load_reference_judges

__all__ = ["ReferenceJudge", "load_reference_judges"]
