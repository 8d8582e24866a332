"""The subjects of neighborhood prompts, which CounterFact does not mark.

They are found by wording. "Peru is located in" with the subject "Peru" gives the wording "... is located in", in which
"Chile is located in" has the subject "Chile".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from locaudit.behaviours.behaviour import Question


def find_subjects(questions: Sequence[Question]) -> Mapping[tuple[str, str], str]:
    """(category, neighborhood prompt) -> its subject, for the prompts in the wording of a question of their category.

    Wordings are those of questions and paraphrases with a marked subject. If a prompt has several, the shortest subject
    counts: "The capital of Mali is" is about "Mali", although "... is" fits, too.
    """
    wordings: dict[str, set[tuple[str, str]]] = {}
    for question in questions:
        for text in (question.text, *question.paraphrases):
            before, found, behind = text.partition(question.subject) if question.subject else (text, "", "")
            if found and (before + behind).strip():
                wordings.setdefault(question.category, set()).add((before, behind))
    prompts = {(question.category, text) for question in questions for text in question.neighborhood}
    subjects = {(kind, text): _shortest(text, wordings.get(kind, ())) for kind, text in prompts}
    return {prompt: subject for prompt, subject in subjects.items() if subject}


def _shortest(text: str, wordings: Iterable[tuple[str, str]]) -> str:
    """The shortest subject of a text in one of the wordings (text before, text behind); empty without one."""
    found = {
        text[len(before) : len(text) - len(behind)]: len(before)
        for before, behind in wordings
        if len(before) + len(behind) < len(text) and text.startswith(before) and text.endswith(behind)
    }
    # Edits act on the first place where a subject occurs: it must be the one that was found.
    placed = [x for x, at in found.items() if x == x.strip() and text.index(x) == at]
    return min(placed, key=lambda x: (len(x), x), default="")
