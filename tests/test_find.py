"""Rules that rank places: each against a slow twin or scipy, and the way from a ranking to a claim."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch
from scipy.stats import f_oneway, spearmanr

import locaudit
from locaudit import cli
from locaudit.behaviours.format import Prompt
from locaudit.claims import Ranking, read_claim
from locaudit.config import AuditConfig, to_yaml
from locaudit.edits import Edit, SiteEdit
from locaudit.errors import ConfigError, LocationError, ModelError
from locaudit.location import Location, Positions, Site
from locaudit.measure.activations import collect_activations
from locaudit.measure.tree import Forest, plant
from locaudit.methods import Rule, rules
from locaudit.methods.ablate import collect_means, mean_ablation
from locaudit.models import wrap_model
from locaudit.registry import KINDS, RULES
from locaudit.run.find import find_places, rank
from locaudit.run.prepare import Preparing
from locaudit.studies.calibration.planted import plant_model
from reference.rules import attribution, margin, replaced_margin
from runs import small_config
from tiny import make_lm, tokenizer
from toy import PRIMER, QUESTIONS, training_data

ASKED = QUESTIONS[:4]
N_TRUE = [len(q.true) for q in ASKED]
ALL_KINDS = ("head", "kv-group", "attention", "neuron", "mlp", "residual")


def preparing(model, kind="head", questions=ASKED, primer="") -> Preparing:
    forest = training_data(model, questions, primer).forest
    return Preparing(model, AuditConfig(), kind, tuple(questions), forest, Prompt(), lambda _: None)


SUBJECTS = ("flat", "Paris", "you", "What")
AS_LONG = ("Is it round?", "What is France?", "Do it see you?", "Paris happens?")
"""Other prompts of as many tokens as the first questions."""
LONGER = ("Is the earth round?", "What is the capital?", "Do the earth see it?", "No it happens?")
"""Other prompts that are longer, but go on as the first questions do after their subjects."""


def patched(model, kind="head", positions="all", others=(), primer="") -> Preparing:
    """The first questions with marked subjects and, if given, paired prompts, as `prepare_training` plants them."""
    n, subjects = len(ASKED), SUBJECTS + ("",) * len(others)
    rows = [(q.text, q.answers) for q in ASKED] + [(t, q.answers) for t, q in zip(others, ASKED, strict=False)]
    forest = plant(model.tokenizer, Prompt(primer=primer), rows, subjects)
    own = Forest(forest.prefix, forest.trees[:n])
    return replace(preparing(model, kind), forest=own, pairs=forest.trees[n:], positions=positions)


def slopes(given: Preparing, size: float) -> torch.Tensor:
    """(m(h + size (new - h)) - m(h)) / size of every unit, by hand; with size 1, the exact change."""
    model, means, found = given.model, means_of(given), []
    before = margin(model, given.forest, N_TRUE)
    for unit in KINDS[given.kind].units(model.shape):
        ((site, mask),) = model.subspaces(Location((unit,), given.kind)).items()
        new = given.pairs or means[site]
        after = replaced_margin(model, given.forest, N_TRUE, site, mask, new, given.positions, size)
        found.append((after - before) / size)
    return torch.tensor(found)


def means_of(given: Preparing) -> dict[Site, torch.Tensor]:
    sites = [Site(KINDS[given.kind].site, layer) for layer in range(given.model.n_layers)]
    return collect_means(given.model, given.forest, sites)


def by_unit(given: Preparing, coordinates: dict[Site, torch.Tensor]) -> torch.Tensor:
    """(layers, units): sums of the coordinates of each unit."""
    n_units, width = given.blocks
    return torch.stack([x.view(n_units, width).sum(dim=1) for _, x in sorted(coordinates.items())])


@pytest.mark.parametrize("primer", ["", PRIMER])
@pytest.mark.parametrize("kind", ["head", "mlp", "residual"])
def test_gradients_are_the_sum_over_tokens(llama, kind, primer):
    given = preparing(llama, kind, primer=primer)
    slow = by_unit(given, attribution(llama, given.forest, N_TRUE, means_of(given)))
    found = rules.gradient(given)
    assert found.shape == slow.shape and slow.abs().max() > 0.1
    torch.testing.assert_close(found, slow, rtol=1e-3, atol=1e-4)


def test_gradients_in_every_architecture(tiny_model):
    given = preparing(tiny_model, questions=ASKED[:2])
    slow = by_unit(given, attribution(tiny_model, given.forest, N_TRUE[:2], means_of(given)))
    torch.testing.assert_close(rules.gradient(given), slow, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("primer", ["", PRIMER])
@pytest.mark.parametrize("kind", ["head", "kv-group", "attention", "mlp", "residual"])
def test_patching_replaces_one_unit_at_a_time(llama, kind, primer):
    given = preparing(llama, kind, primer=primer)
    means, before = means_of(given), margin(llama, given.forest, N_TRUE)
    slow = []
    for unit in KINDS[kind].units(llama.shape):
        subspaces = llama.subspaces(Location((unit,), kind))
        edit = Edit({site: mean_ablation(x, means[site]) for site, x in subspaces.items()})
        slow.append(margin(llama, given.forest, N_TRUE, edit) - before)
    assert rules.patching(given).flatten().tolist() == pytest.approx(slow, abs=1e-4)


def test_gradients_are_the_limit_of_small_patches(llama):
    """With h' = h + e (mean - h), (m(h') - m(h)) / e goes to the gradient, and its error to 0 as fast as e does."""
    given = preparing(llama)
    means, before = means_of(given), margin(llama, given.forest, N_TRUE)
    found, errors = rules.gradient(given), []
    for size in (0.04, 0.02, 0.01):
        slopes = []
        for unit in KINDS["head"].units(llama.shape):
            ((site, mask),) = llama.subspaces(Location((unit,))).items()
            p = torch.eye(len(mask))[:, mask]
            edit = Edit({site: SiteEdit(-size * p.T, p, size * p.T @ means[site])})
            slopes.append((margin(llama, given.forest, N_TRUE, edit) - before) / size)
        errors.append(float((found.flatten() - torch.tensor(slopes)).abs().max()))
    assert errors[2] < 0.05 * float(found.abs().max())
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.2) and errors[1] / errors[2] == pytest.approx(2, rel=0.2)


@pytest.mark.parametrize("others", [(), AS_LONG, LONGER], ids=["mean", "pair", "longer pair"])
@pytest.mark.parametrize("kind, primer", [("head", PRIMER), ("residual", ""), ("mlp", PRIMER)])
def test_patches_act_at_their_tokens_only(llama, kind, primer, others):
    found = []
    for positions in ("answer", "last", "subject") if others == LONGER else get_args(Positions):
        given = patched(llama, kind, positions, others, primer)
        exact, slow = rules.patching(given).flatten(), slopes(given, 1.0)
        assert exact.tolist() == pytest.approx(slow.tolist(), abs=1e-4)
        found.append(tuple(exact.tolist()))
    assert len(set(found)) == len(found)


def test_patches_of_two_prompts_in_every_architecture(tiny_model):
    given = patched(tiny_model, "mlp", "answer", LONGER)
    assert rules.patching(given).flatten().tolist() == pytest.approx(slopes(given, 1.0).tolist(), abs=1e-4)


@pytest.mark.parametrize("positions, others", [("all", AS_LONG), ("last", LONGER), ("subject", LONGER), ("prompt", ())])
def test_gradients_are_the_limit_of_small_patches_of_some_tokens(llama, positions, others):
    given = patched(llama, "head", positions, others, PRIMER)
    found = rules.gradient(given).flatten()
    errors = [float((found - slopes(given, size)).abs().max()) for size in (0.04, 0.02, 0.01)]
    assert errors[2] < 0.05 * float(found.abs().max())
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.2) and errors[1] / errors[2] == pytest.approx(2, rel=0.2)


def test_a_prompt_paired_with_itself_changes_nothing(llama):
    given = patched(llama, "head", "all", [q.text for q in ASKED])
    for rule in (rules.gradient, rules.patching):
        assert float(rule(given).abs().max()) < 1e-5


def test_gradients_rank_as_patching_does_where_units_do_little(llama):
    """Outputs are scaled down to a hundredth, and what first order leaves out becomes small against it."""
    lm = make_lm("llama")
    with torch.no_grad():
        for layer in lm.model.layers:
            layer.self_attn.o_proj.weight *= 0.01
    given = preparing(wrap_model(lm, tokenizer(), "weak"), questions=QUESTIONS)
    exact, first = (rule(given).flatten().numpy() for rule in (rules.patching, rules.gradient))
    assert np.corrcoef(exact, first)[0, 1] > 0.99 and spearmanr(np.abs(exact), np.abs(first))[0] > 0.9


def test_only_units_that_reach_the_answers_count():
    planted = plant_model("misconception", 1, n_items=40, n_layers=3)
    given = preparing(planted.model, questions=planted.behaviour.questions[:8])
    for rule in (rules.gradient, rules.patching):
        moves = (rule(given).abs() > 1e-6).nonzero()  # elsewhere, only rounding
        assert {tuple(unit) for unit in moves.tolist()} == set(planted.places.units)


def test_the_distance_of_the_means_of_one_coordinate_is_that_of_an_f_test(llama):
    given = preparing(llama, "neuron", QUESTIONS)
    x, is_true = given.activations.values[:, 0, :, 0].double().numpy(), given.activations.is_true.numpy()
    f = f_oneway(x[is_true], x[~is_true]).statistic  # of two groups: (m+ - m-)^2 / (s^2 (1/n+ + 1/n-))
    expected = np.sqrt(f * (1 / is_true.sum() + 1 / (~is_true).sum()))
    np.testing.assert_allclose(rules.mean_difference(given)[0], expected, rtol=1e-6)


def test_the_distance_of_the_means_of_a_head(llama):
    given = preparing(llama, "head", QUESTIONS)
    read = collect_activations(llama, QUESTIONS)
    found = rules.mean_difference(given)
    for layer, unit in np.ndindex(*found.shape):
        x, y = read.values[:, layer, unit].double().numpy(), read.is_true.numpy()
        means = {label: x[y == label].mean(axis=0) for label in (True, False)}
        squares = sum(float(np.sum((row - means[bool(label)]) ** 2)) for row, label in zip(x, y, strict=True))
        distance = np.linalg.norm(means[True] - means[False])
        assert float(found[layer, unit]) == pytest.approx(distance / np.sqrt(squares / (len(x) - 2)), rel=1e-6)


def test_equal_means_have_no_distance(llama):
    given = preparing(llama)
    read = replace(given.activations, values=torch.ones_like(given.activations.values))
    vars(given)["activations"] = read
    assert not rules.mean_difference(given).any()


def test_probes_are_ranked_as_the_audit_ranks_them(llama):
    given = preparing(llama, questions=QUESTIONS)
    found = rank(given, "probe")
    assert list(found.scores) == given.probes.ranking() and found.changes is None
    assert found.top(3) == given.probes.top(3)


def test_a_ranking_has_an_order(tmp_path):
    found = Ranking.of("head", "mine", "a number", [[0.5, -2.0], [2.0, 0.0]], is_change=True)
    assert list(found.scores) == [(0, 1), (1, 0), (0, 0), (1, 1)]  # ties by layer, then unit
    assert found.rows[0] == {"layer": 0, "head": 1, "score": 2.0, "change": -2.0}
    assert str(found.top(2)) == "0.1,1.0" and "4 heads by mine; best 0.1 2" in repr(found)
    with pytest.raises(LocationError, match="top_k = 5"):
        found.top(5)
    found.save(tmp_path / "found.csv")
    assert read_claim(tmp_path / "found.csv", threshold=2).location == found.top(2)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_ranking_is_a_claim(llama, kind, tmp_path):
    found = rank(preparing(llama, kind), "gradient")
    assert len(found.scores) == KINDS[kind].n_units(llama.shape)
    found.save(tmp_path / "scores.csv")
    source = f"{kind}:{tmp_path / 'scores.csv'}" if KINDS[kind].whole_layers else tmp_path / "scores.csv"
    for claim in (read_claim(source, top_k=1), read_claim(found.rows, kind, top_k=1)):
        claim.check(llama.shape)
        assert claim.location == found.top(1) and claim.scored == Location(tuple(found.scores), kind)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("inputs")


@pytest.mark.parametrize("by", ["probe", "mean-difference", "gradient", "patching"])
def test_no_test_question_is_read(home, tmp_path, by):
    config, found = small_config(home), []
    for other in (False, True):
        rows = [json.loads(line) for line in (home / "questions.jsonl").read_text().splitlines()]
        for number, row in enumerate(rows):
            row["split"] = ("train", "val", "test")[number % 3]
            if other and row["split"] != "train":
                row["question"] = f"And {row['question']}"
        file = tmp_path / f"{other}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        found.append(find_places(replace(config, behaviour=str(file)), by, progress=False))
    assert found[0] == found[1] and found[0].by == by


def test_found_in_python_as_on_the_command_line(home, tmp_path, capsys):
    config = small_config(home)
    (tmp_path / "small.yaml").write_text(to_yaml(config))
    out = tmp_path / "new" / "scores.csv"
    flags = ["--by", "gradient", "--kind", "mlp", "--top", "1", "--out", str(out)]
    assert cli.main(["find", str(tmp_path / "small.yaml"), *flags]) == 0
    *_, by_file, by_text = capsys.readouterr().out.strip().splitlines()
    found = locaudit.find(by="gradient", kind="mlp", config=config, progress=False, model=config.model,
                          behaviour=config.behaviour)  # fmt: skip
    with out.open(newline="") as file:
        rows = [{key: float(x) for key, x in row.items()} for row in csv.DictReader(file)]
    assert rows == found.rows and len(rows) == 2
    assert by_text == f'--claim "{found.top(1)}"'
    assert by_file == f"--claim mlp:{out} --claim-top-k 1"
    model, behaviour = locaudit.load_model(config.model), locaudit.load_behaviour(config.behaviour)
    assert found == locaudit.find(model, behaviour, by="gradient", kind="mlp", config=config, progress=False)
    run = tmp_path / "run"
    assert cli.main(["find", str(tmp_path / "small.yaml"), *flags, "--top", "2", "--probe.top-k", "99"]) == 0
    said = capsys.readouterr()
    assert "--claim" not in said.out and "all 2 places are the whole model" in said.err
    arguments = ["--claim", f"mlp:{out}", "--claim-top-k", "1", "--controls", "1", "--methods", "iti"]
    assert cli.main(["audit", str(tmp_path / "small.yaml"), *arguments, "--out", str(run)]) == 0
    assert locaudit.read_result(run).run.manifest.claim == found.top(1)


def test_places_that_score_nothing_are_no_claim(home, tmp_path, capsys):
    (tmp_path / "small.yaml").write_text(to_yaml(small_config(home)))
    for scores, claim in ((torch.tensor([[0.0], [2.0]]), '--claim "mlp:1"'), (torch.zeros(2, 1), "")):
        with RULES.temporary("given", Rule("a score", lambda _, scores=scores: scores)):
            assert cli.main(["find", str(tmp_path / "small.yaml"), "--by", "given", "--kind", "mlp"]) == 0
        said = capsys.readouterr()
        assert f"left out of --claim: {(scores == 0).sum()} place" in said.err
        assert [line for line in said.out.splitlines() if "--claim" in line] == [claim] * bool(claim)


def test_paired_prompts_and_subjects_are_read_from_the_file(home, tmp_path, capsys):
    """As in two questions by hand; what a file lacks, or a rule cannot use, is refused by name."""
    config = small_config(home, probe={"top_k": 99})
    rows = [json.loads(line) for line in (home / "questions.jsonl").read_text().splitlines()]

    def find(*flags: str, **fields) -> int:
        file = tmp_path / "questions.jsonl"
        file.write_text("\n".join(json.dumps(row | {k: f(row["question"]) for k, f in fields.items()}) for row in rows))
        (tmp_path / "small.yaml").write_text(to_yaml(replace(config, behaviour=str(file))))
        return cli.main(["find", str(tmp_path / "small.yaml"), "--by", "patching", "--kind", "mlp", *flags])

    first, swapped = (lambda text: text.split()[0]), (lambda text: " ".join(["It", *text.split()[1:]]))
    assert find("--patch-with", "pair", "--positions", "subject", subject=first, paired=swapped) == 0
    out = capsys.readouterr().out
    assert "if the output is replaced by that after the paired prompt (tokens: subject)" in out
    assert find("--patch-with", "pair") == 2
    assert "without a paired prompt" in capsys.readouterr().err
    assert find("--positions", "subject") == 2
    assert "without a subject" in capsys.readouterr().err
    assert find("--patch-with", "pair", paired=lambda text: f"It is so. {text}") == 2
    assert "prompts of equally many tokens" in capsys.readouterr().err
    assert find("--patch-with", "pair", "--positions", "subject", subject=first, paired=lambda text: "It is?") == 2
    assert "the same tokens after both subjects" in capsys.readouterr().err
    assert find("--by", "probe", "--positions", "last") == 2
    assert "a rule that replaces outputs: gradient, patching" in capsys.readouterr().err


def test_what_cannot_be_ranked(home, llama):
    config = small_config(home)
    with pytest.raises(ConfigError, match="the rule 'gradients'.*did you mean 'gradient'"):
        find_places(config, "gradients", progress=False)
    with pytest.raises(ConfigError, match="the kind of place 'layer'"):
        find_places(config, "probe", "layer", progress=False)
    broken = Rule("nothing", lambda given: torch.full((2, 4), torch.nan))
    with RULES.temporary("broken", broken), pytest.raises(ModelError, match="scores by broken that are not finite"):
        rank(preparing(llama), "broken")
