"""A judge that ships with the library: it compares an answer with the references of its question."""

from typing import TYPE_CHECKING

from locaudit.judges.reference.judge import ReferenceJudge, load_reference_judges

if TYPE_CHECKING:
    from locaudit.judges.reference.fit import fit_reference_judge
    from locaudit.judges.reference.validate import validate_reference_judge

__all__ = ["ReferenceJudge", "fit_reference_judge", "load_reference_judges", "validate_reference_judge"]


def __getattr__(name: str):
    # Fitting and validating import torch; naming the judge must not.
    if name == "fit_reference_judge":
        from locaudit.judges.reference.fit import fit_reference_judge

        return fit_reference_judge
    if name == "validate_reference_judge":
        from locaudit.judges.reference.validate import validate_reference_judge

        return validate_reference_judge
    raise AttributeError(name)
