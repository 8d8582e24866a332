"""How far rounding alone moves each score: an edit that does nothing, computed in several ways.

    python -m bench.rounding --questions 12 --model smollm2-135m --dtype bfloat16

All ways give the same numbers in exact arithmetic: unedited, one row at a time, with one or two threads, and an edit
that is zero, in banks of 1, 2 and 4, run from the first layer or from cached residual streams. Each is compared with
the unedited model as a run scores it. `locaudit.stats.scores` takes its tolerances from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import tyro
from torch import Tensor

from bench.command import Positive, header, line, run
from bench.work import (
    PRIMED,
    Forest,
    Model,
    Residuals,
    Subject,
    answer_log_probs,
    grow,
    load,
    location,
    log_probs,
    questions,
    score_questions,
    zero_edit,
)


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    subject: tyro.conf.OmitArgPrefixes[Subject] = field(default_factory=Subject)
    questions: Positive = 12


def ways(model: Model, forest: Forest) -> Iterator[tuple[str, Sequence[Tensor]]]:
    """Name of each way, and the log-probabilities of each question's answers."""
    yield "one row at a time", [x[0] for x in answer_log_probs(model, forest, row_tokens=1)]
    before = torch.get_num_threads()
    torch.set_num_threads(3 - min(before, 2))  # 2 where 1 was used, else 1
    yield "other number of threads", log_probs(model, forest)[0]
    torch.set_num_threads(before)
    every, middle = (zero_edit(model, [*model.subspaces(location(model, where))]) for where in ("all", "middle"))
    for size in (1, 2, 4):
        yield f"{size} zero edits of all heads", log_probs(model, forest, [every] * size)[-1]
        streams = Residuals(model, forest)
        yield f"{size} zero edits, cached streams", log_probs(model, forest, [middle] * size, streams)[-1]


def main(given: Settings) -> None:
    """Print, for each score and way, the largest difference at a question and the difference of the means."""
    asked, model = questions(given.subject, given.questions), load(given.subject)
    forest = grow(model, asked, PRIMED)
    (base,) = log_probs(model, forest)
    plain = score_questions(asked, base, base)
    print(header("way", *(f"{name}: question, mean" for name in ("log-probability", *plain))))
    for name, sums in ways(model, forest):
        found = {"log-probability": (np.concatenate(sums), np.concatenate(base))}
        scores = score_questions(asked, sums, base)
        found |= {score: (np.asarray(scores[score]), np.asarray(plain[score])) for score in plain}
        cells = (f"{np.abs(a - b).max():.1e}, {abs(a.mean() - b.mean()):.1e}" for a, b in found.values())
        print(line([name, *cells]), flush=True)


if __name__ == "__main__":
    run(main, Settings, __doc__)
