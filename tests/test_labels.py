"""Trusted labels: the estimates and their intervals, the sample of answers to label, the report with them."""

import csv
import io
import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from locaudit import cli, read_result
from locaudit.claims import Shape
from locaudit.config import AuditConfig
from locaudit.errors import DataError
from locaudit.location import Location
from locaudit.records import TrialRecord, TrialSpec
from locaudit.stats import MethodFacts
from locaudit.stats.ppi import LEAST, rectified_mean, rectify
from locaudit.stats.sequential import Null
from locaudit.store.database import HeldOutQuestion
from locaudit.store.folder import open_run
from locaudit.store.manifest import JudgeFacts, Manifest
from locaudit.store.run import load_run
from locaudit.store.trusted import draw, frame_of, read_labels

N, CONTROLS = 60, 4
IDS = [f"q{i}" for i in range(N)]
CLAIM = Location(((0, 0),))
ARMS = [("base", -1), ("claim", -1), ("whole", -1), *(("control", k) for k in range(CONTROLS))]
JUDGES = {"truth": JudgeFacts("judge (truth)", "t"), "info": JudgeFacts("judge (info)", "i")}


def answer(arm, control, i):
    """Base and controls often say the same; there is a line break, which spreadsheets change."""
    kind = {"base": 0, "claim": 1, "whole": 2, "control": 3 + control}[arm]
    return f"Answer\n{0 if kind > 2 and (i + kind) % 3 else kind} to {i}."


def label(aspect, question, said):
    """What people say: the claim's answers are true more often."""
    kind, i = int(said.split()[1]), int(question[1:])
    return int((i * 7 + kind * 3) % 10 < (7 if kind == 1 else 4) if aspect == "truth" else (i + kind) % 5 > 0)


def rated(aspect, question, said):
    """The judge: right in two thirds of the answers, and it likes whatever the whole model says."""
    y, noise = label(aspect, question, said), sum(map(ord, question + said + aspect)) % 3
    return 0.9 if " 2 " in said.replace("\n", " ") else (0.8 if (y if noise else 1 - y) else 0.3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    records = []
    for arm, control in ARMS:
        place = {"base": None, "whole": Location.whole()}.get(
            arm, CLAIM if control < 0 else Location(((0, control + 1),))
        )
        null = "anywhere" if arm == "control" else ""
        spec = TrialSpec(arm, "none" if arm == "base" else "iti", place, None, 0, "context", control, null=null)
        scores = {"test": {"mc2": tuple(np.linspace(0.2, 0.8, N).tolist())}}
        records.append(
            TrialRecord(
                spec, "ok", questions=scores, answers={"test": tuple(answer(arm, control, i) for i in range(N))}
            )
        )
    manifest = Manifest(
        model="tiny", fingerprint="f", shape=Shape(1, 8, 8, 2, 16, 6), n_units=8, kind_plural="heads", behaviour="toy",
        aspects=("truth", "info"), n_questions={"train": 9, "val": 0, "test": N}, data={}, claim=CLAIM,
        claim_source="given", methods={"iti": MethodFacts("ITI")}, planned=len(ARMS),
        nulls={"anywhere": Null(CONTROLS, 7)},
        versions={}, device="cpu", dtype="float32", threads=1, judges=JUDGES,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("runs") / "run"
    with open_run(path, AuditConfig(controls=CONTROLS)) as store:
        store.write_manifest(manifest)
        store.set_questions({"test": [HeldOutQuestion(q, f"Is {q}?", ("No.",), ("Yes.",), f"key {q}") for q in IDS]})
        store.add(records, seconds=1.0)
        for aspect, judge in JUDGES.items():
            said = {(q, answer(*arm, i)) for arm in ARMS for i, q in enumerate(IDS)}
            store.add_judgements(judge.fingerprint, {key: (rated(aspect, *key), "") for key in said})
    return path


def fill(rows, aspects=("truth", "info")):
    return [row | {aspect: label(aspect, row["question_id"], row["answer"]) for aspect in aspects} for row in rows]


def save(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def everything(aspects=("truth", "info")):
    said = {(q, " ".join(answer(*arm, i).split())) for arm in ARMS for i, q in enumerate(IDS)}
    return fill([{"question_id": q, "answer": text} for q, text in sorted(said)], aspects)


def mean_label(aspect, *arm):
    return np.mean([label(aspect, q, answer(*arm, i)) for i, q in enumerate(IDS)])


def test_labels_of_all_answers_give_their_means_whatever_the_judge_says(folder, tmp_path):
    corrected = load_run(folder).read_with(labels=save(tmp_path / "all.csv", everything())).corrected
    found = {(line.score, line.what): line for line in corrected.lines}
    true = {arm: mean_label("truth", *arm) for arm in ARMS}
    controls = np.mean([true[arm] for arm in ARMS if arm[0] == "control"])
    lines = {"unedited": true[ARMS[0]], "claim": true[ARMS[1]], "whole model": true[ARMS[2]], "mean control": controls}
    lines |= {"gain": lines["claim"] - lines["unedited"], "lead": lines["claim"] - controls}
    for what, value in lines.items():
        assert found["truth", what].corrected.value == pytest.approx(value)
    y = np.array([[label("truth", q, answer(*arm, i)) for i, q in enumerate(IDS)] for arm in ARMS[:2]])
    assert found["truth", "gain"].corrected.se == pytest.approx((y[1] - y[0]).std() / np.sqrt(N))
    both = [(mean_label("truth", *arm) * mean_label("info", *arm)) for arm in ARMS[:2]]
    assert found["info_truth_probability", "gain"].corrected.value == pytest.approx(both[1] - both[0], abs=2 / N)
    assert found["truth", "whole model"].judged == 1  # the judge is fooled
    assert corrected.agreement["truth"].n == corrected.n_labels == len(everything())
    one = load_run(folder).read_with(labels=save(tmp_path / "one.csv", everything(("truth",)))).corrected
    assert {line.score for line in one.lines} == {"truth"}


@pytest.mark.parametrize("n_labelled", [30, 60])
def test_intervals_cover_and_the_judge_alone_does_not(n_labelled):
    """Simulated audits: judge off by .1 to .2, one control labelled a question; products by the delta method."""
    n, k, hits, judge_hits = 100, 5, Counter(), Counter()
    shift = np.array([0.5, 0.0, 0.1, -0.2, 0.3, 0.0, 0.2])[:, None]
    big = np.random.default_rng(1).normal(size=(2, 200_000))  # a question's and an answer's part
    true = np.array([[(s * (big[0] + x) + 0.7 * big[1] + b > 0).mean() for x in shift] for s, b in ((1, 0), (-0.6, 1))])
    for seed in range(400):
        rng = np.random.default_rng(seed)
        question, parts = rng.normal(size=n), []
        w = np.zeros((k + 2, n))
        drawn = rng.permutation(n)[:n_labelled]
        w[:2, drawn] = n / n_labelled
        w[2 + rng.integers(0, k, n_labelled), drawn] = k * n / n_labelled
        for slope, offset in ((1, 0), (-0.6, 1)):
            latent = slope * (question + shift) + 0.7 * rng.normal(size=(k + 2, n)) + offset
            f = 1 / (1 + np.exp(-(latent + 0.8 * shift + rng.normal(size=latent.shape) + 0.8)))
            parts.append((f, (latent > 0).astype(float), w))
        c = {"gain": np.array([1, -1, *[0] * k]), "lead": np.array([1, 0, *[-1 / k] * k])}
        for name, weights in c.items():
            for aspects in (1, 2):
                found = rectified_mean([rectify(*part, weights) for part in parts[:aspects]], w, weights)
                value = weights @ true[:aspects].prod(axis=0)
                hits[name, aspects] += found.interval[0] <= value <= found.interval[1]
            d = weights @ parts[0][0]
            judge_hits[name] += abs(d.mean() - weights @ true[0]) <= 1.96 * d.std() / np.sqrt(n)
    assert all(0.92 <= x / 400 <= 0.985 for x in hits.values()), hits
    assert judge_hits["gain"] / 400 < 0.9


def test_a_missing_judgement_does_not_cost_a_label():
    rng, w, c = np.random.default_rng(0), np.ones((1, 50)), np.ones(1)
    y, f = rng.integers(0, 2, (1, 50)), np.full((1, 50), np.nan)
    found = rectified_mean([rectify(f, y, w, c)], w, c)
    assert (found.value, found.n) == (pytest.approx(y.mean()), 50)


def test_a_sample_is_blind_and_drawn_with_the_probabilities_that_weigh_it(folder):
    run = load_run(folder)
    frame, counts, n_drawn = frame_of(run), Counter(), 300
    for seed in range(n_drawn):
        rows, _ = draw(run, 60, seed)
        counts.update((row["question_id"], row["answer"]) for row in rows)
    keys = [(row["question_id"], row["answer"]) for row in rows]
    assert len(set(keys)) == len(keys) and keys != sorted(keys)
    assert list(rows[0]) == ["question_id", "question", "answer", "truth", "info", "design"]
    assert len({row["design"] for row in rows}) == 1  # nothing differs between arms
    m = int(rows[0]["design"].split()[0])
    for i, odds in enumerate(frame.inclusion):
        for said, share in odds.items():
            p = share * m / N
            assert abs(counts[IDS[i], said] / n_drawn - p) < 5 * np.sqrt(p * (1 - p) / n_drawn) + 1e-9
    assert {row["answer"] for row in draw(run, 60, 1)[0]} != {row["answer"] for row in draw(run, 60, 2)[0]}


def test_a_sample_is_labelled_and_reported(folder, tmp_path, capsys):
    file = tmp_path / "sample.csv"
    assert cli.main(["judge", "sample", str(folder), "--out", str(file), "--n", "120"]) == 0
    assert cli.main(["judge", "sample", str(folder), "--out", str(file)]) == 2  # labels are not overwritten
    rows = list(csv.DictReader(io.StringIO(file.read_text())))
    with pytest.raises(DataError, match="no label"):
        read_result(folder, labels=file)
    save(file, fill(rows))
    assert cli.main(["report", str(folder), "--labels", str(file)]) == 0
    assert "Corrected by" in capsys.readouterr().out
    written = folder / "reports" / "info_truth_probability-labels"
    found = json.loads((written / "verdict.json").read_text())
    assert (
        found["labels"]["n_labels"] == len(rows)
        and "Corrected by trusted labels" in (written / "report.html").read_text()
    )
    lines = {(line["score"], line["what"]): line for line in found["labels"]["lines"]}
    gain, true = lines["truth", "gain"], mean_label("truth", *ARMS[1]) - mean_label("truth", *ARMS[0])
    assert gain["corrected"]["interval"][0] <= true <= gain["corrected"]["interval"][1]
    own = json.loads(read_result(folder).tables.verdict_json())
    (note,) = found["notes"]
    assert note.startswith("The labels contradict the judge of info") and own.pop("notes") == []
    # labels do not touch the verdict itself
    assert {name: x for name, x in found.items() if name not in ("labels", "notes")} == own
    few = fill(rows)[: LEAST // 2]
    lines = read_result(folder, labels=save(tmp_path / "few.csv", few)).run.corrected.lines
    assert all(np.isnan(line.corrected.value) for line in lines)


def test_labels_no_better_than_chance_are_noted_in_the_verdict(folder, tmp_path):
    def notes(rows):
        return load_run(folder).read_with(labels=save(tmp_path / "labels.csv", rows)).verdict.notes

    rows = everything()
    assert notes(rows) == load_run(folder).verdict.notes == ()
    coins = np.random.default_rng(0).integers(2, size=len(rows))
    (note,) = notes([row | {"truth": int(coin)} for row, coin in zip(rows, coins, strict=True)])
    assert note.startswith("The labels contradict the judge of truth: their agreement is no better than chance (kappa")
    few = [row | {"truth": int(coin)} for row, coin in zip(rows, coins, strict=True) if row["question_id"] < "q2"]
    assert notes(few) == ()  # fewer than 20 questions prove nothing


def test_labels_that_do_not_fit_are_refused(folder, tmp_path):
    run, rows = load_run(folder), fill(draw(load_run(folder), 60)[0])

    def refused(words, changed, name="x.csv"):
        with pytest.raises(DataError, match=words):
            run.read_with(labels=save(tmp_path / name, changed))

    refused("no answer of", [rows[0] | {"answer": "Never said."}, *rows[1:]])
    refused("truth = 'maybe'", [rows[0] | {"truth": "maybe"}])
    refused("a second row", [rows[0], rows[0]])
    refused("question_id and answer", [{"question": "x", "truth": 1}])
    refused("drawn for other edits", [row | {"design": row["design"][:-2] + "zz"} for row in rows])
    refused("of other aspects", [{"question_id": r["question_id"], "answer": r["answer"], "fluency": 1} for r in rows])
    refused("probability = '0'", [rows[0] | {"probability": "0"}])
    refused("both a design and a probability.*delete the column", [row | {"probability": "0.5"} for row in rows])
    refused("no label; .*aspect: truth, info$", [row | {"truth": "", "info": ""} for row in rows])
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join(json.dumps(row | {"truth": bool(row["truth"])}) for row in rows))
    assert read_labels(file) == read_labels(save(tmp_path / "y.csv", rows))
    with pytest.raises(DataError, match="no JSON object"):
        file.write_text("[1]")
        read_labels(file)
    assert replace(run).corrected is None
