"""In which turn groups of trials run, if several run at once: each is the same group as if they ran one by one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from locaudit.records import Place, TrialSpec


class Turns:
    """The planned groups, by number, until all that follows from their results (`locaudit.run.rounds`) has run.

    - A group waits for every earlier one with one of its trials, and for what follows from it: if another null drew the
      same location, its trials must not run twice.
    - What follows from a group waits for all groups that have trials of the same places. Then it forms the same bank,
      whatever order the results came in.
    """

    def __init__(self, groups: Mapping[int, Sequence[TrialSpec]]):
        self.waiting = dict(sorted(groups.items()))
        """Number -> planned group that has not begun."""
        self.open: set[int] = set()
        """Numbers of groups that have begun, and from which more may follow."""
        self.running: dict[int, Sequence[TrialSpec]] = {}
        """Number -> trials that run now: the planned group, or what followed from it."""
        first: dict[str, int] = {}
        places: dict[tuple[str, Place], set[int]] = defaultdict(set)
        self._after: dict[int, set[int]] = {}
        for number, group in self.waiting.items():
            self._after[number] = {first.setdefault(spec.trial_id, number) for spec in group} - {number}
            for spec in group:
                places[spec.method, spec.place].add(number)
        self._parts: dict[int, set[int]] = defaultdict(set)
        """Number -> groups with trials of the places that end with this group."""
        for numbers in places.values():
            self._parts[max(numbers)] |= numbers

    def to_follow(self) -> int | None:
        """The number of a group whose results, and those of its places, are there."""
        unready = self.waiting.keys() | self.running.keys()
        return next((n for n in sorted(self.open) if n not in unready and not self._parts[n] & unready), None)

    def to_begin(self) -> int | None:
        """The number of the next group that can begin."""
        unready = self.waiting.keys() | self.open
        return next((n for n in self.waiting if not self._after[n] & unready), None)

    def begin(self, number: int) -> Sequence[TrialSpec]:
        """Take a planned group out of those that wait."""
        self.open.add(number)
        return self.waiting.pop(number)

    def end(self, group: Sequence[TrialSpec]) -> None:
        """Note that a group no longer runs."""
        self.running = {number: other for number, other in self.running.items() if other != group}
