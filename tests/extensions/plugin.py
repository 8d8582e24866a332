"""One of everything that can be added, in one file: no other file names any of it. docs/architecture.md quotes it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from locaudit.architectures import Architecture
from locaudit.behaviours.behaviour import Question
from locaudit.behaviours.loaders import Loader
from locaudit.claims.kinds import Controls
from locaudit.edits.edit import Edit, SiteEdit
from locaudit.errors import LocationError
from locaudit.judges import Aspect, JudgeKind, Judgement
from locaudit.location import Location, Site
from locaudit.methods import Fit, Method, Objective, Rule
from locaudit.registry import (
    ARCHITECTURES,
    ASPECTS,
    EXECUTORS,
    IMPORTERS,
    JUDGES,
    KINDS,
    LOADERS,
    METHODS,
    OBJECTIVES,
    RULES,
    SCORES,
    TRACKERS,
)
from locaudit.run.executors import Local
from locaudit.stats.scores import Score

# A method: a constant push along the location's first direction.


@dataclass(frozen=True)
class PushSettings:
    """A constant push along the location's first direction."""

    sizes: tuple[float, ...] = (1.0, 2.0)
    """Lengths tried."""


def fit_push(shared, jobs, settings, on_step=None):
    edits = []
    for job in jobs:
        sites = {}
        for site, subspace in shared.model.subspaces(job.location).items():
            first = subspace[:, 0] if subspace.dim() == 2 else ((subspace.cumsum(0) == 1) & subspace).float()
            sites[site] = SiteEdit.rank_one(torch.zeros_like(first), job.strength * first, 1.0)
        edits.append(Fit(Edit(sites)))
    return edits


METHODS.register("push")(Method("Push", PushSettings, fit_push, grid="sizes", symbol="s"))


# A kind whose units are names: lines in the stream that leaves a layer, drawn at random.


class Lines:
    plural, site = "lines", "residual"

    def parse_unit(self, part):
        layer, _, name = str(part).partition("/")
        if not layer.isdecimal() or not name:
            raise LocationError(got=f"{part!r}", expected="LAYER/NAME", remedy="write it as 1/refusal")
        return f"{layer}/{name}"

    def n_units(self, shape):
        return None

    def check(self, location, shape):
        for unit in location.units:
            if int(unit.split("/")[0]) >= shape.n_layers:
                raise LocationError(got=unit, expected=f"layers below {shape.n_layers}", remedy="check the layer")

    def blocks(self, shape):
        return None

    def heads_worth(self, location, shape):
        return float(len(location) or 1)

    def pace(self, location):
        return 1.0

    def subspaces(self, location, shape):
        if location.scope == "whole":
            return {Site("residual", i): np.ones(shape.width, dtype=bool) for i in range(shape.n_layers)}
        by_layer = {}
        for unit in location.units:
            seed = int(hashlib.sha256(unit.encode()).hexdigest()[:8], 16)
            vector = np.random.default_rng(seed).normal(size=shape.width)
            by_layer.setdefault(Site("residual", int(unit.split("/")[0])), []).append(vector)
        return {site: np.linalg.qr(np.stack(vectors, axis=1))[0] for site, vectors in by_layer.items()}

    def draw(self, claim, shape, n, *, seed, null, disjoint, values):
        if null != "anywhere":
            raise LocationError(got="a kind without such places", expected="anywhere", remedy="write nulls: [anywhere]")
        layers = [unit.split("/")[0] for unit in claim.units]
        names = [tuple(f"{layer}/random-{seed}-{i}" for layer in layers) for i in range(n)]
        return Controls([Location(units, claim.kind) for units in names], None)


KINDS.register("line")(Lines())

# An objective: a hinge on the margin.

OBJECTIVES.register("hinge")(Objective(lambda margin, strength: torch.relu(1 / strength - margin), "h"))

# A score, measured on every question: does the best answer gain on the unedited model?


def gains(question, sums, reference):
    return float(sums[question.best_index] > reference[question.best_index])


SCORES.register("best_gains")(Score("Best answer gains", measure=gains))

# A rule that ranks places.

RULES.register("spread")(
    Rule("standard deviation of the activation", lambda preparing: preparing.activations.values.std(dim=(0, -1)))
)

# An aspect of answers, and who judges it.


@dataclass(frozen=True)
class BrevitySettings:
    """Answers are judged by their length."""

    longest: int = 20
    """Characters of a brief answer."""


@dataclass(frozen=True)
class BrevityJudge:
    longest: int
    name = "ruler"
    uses_references = False

    @property
    def fingerprint(self):
        return f"ruler-{self.longest}"

    def score(self, cases):
        return [Judgement(float(len(case.answer) <= self.longest)) for case in cases]


ASPECTS.register("brevity")(Aspect("brevity", "Brief:", "Decide whether the answer is brief."))
JUDGES.register("ruler")(
    JudgeKind(BrevitySettings, lambda wanted, device: {a: BrevityJudge(s.longest) for a, s in wanted.items()})
)

# A behaviour format and a claim format.


def count_rows(text, source):
    for number, line in enumerate(text.splitlines()):
        yield f"{source}, line {number + 1}", f"{number:02d}", {"word": line}


def count_questions(rows):
    placed = []
    for where, number, row in rows:
        n = len(row["word"])
        placed.append((where, Question(number, f"How long is {row['word']}?", (f"{n}.",), (f"{n + 1}.",))))
    return placed, []


LOADERS.register("words")(Loader(count_rows, count_questions, ".words", aspects=("brevity",)))


@IMPORTERS.register("lines")
def read_lines(path, kind):
    return Location(tuple(path.read_text().split()), "line")


# Where trials run, what shows them, and where an architecture keeps its projections.


@EXECUTORS.register("counting")
class Counting:
    groups = 0

    def map(self, worker, folder, groups):
        for outcome in Local().map(worker, folder, groups):
            Counting.groups += outcome.is_last
            yield outcome


@TRACKERS.register("lines")
class Lines:
    def __init__(self, name, folder, settings):
        self.file = folder / "lines.txt"

    def log(self, n, values):
        with self.file.open("a") as file:
            print(n, values, file=file)

    def finish(self, values, report):
        self.log("verdict", values)


ARCHITECTURES.register("qwen2_moe")(Architecture("model.layers", heads="self_attn.o_proj"))
