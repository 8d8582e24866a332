from __future__ import annotations

from statistics import fmean
from typing import Any

import pytest
import torch

from locaudit import audit
from locaudit.behaviours import split_questions
from locaudit.behaviours.format import Prompt
from locaudit.config import AuditConfig, merge_config
from locaudit.edits import stack
from locaudit.errors import ConfigError, LocationError, ModelError
from locaudit.location import Location
from locaudit.measure.forward import answer_log_probs
from locaudit.measure.multiple_choice import score_questions
from locaudit.measure.tree import plant
from locaudit.report.figures import save
from locaudit.studies.calibration.cases import audit_truth, draw_power, plant_truths, power_curve
from locaudit.studies.calibration.planted import (
    ANSWERS,
    GROUPS,
    KEYS,
    SPLIT,
    WHICH,
    Planted,
    plant_model,
    planted_settings,
)
from tiny import logits, random_edit
from toy import Job, train, training_data

SIZE: dict[str, Any] = {"n_items": 60, "n_layers": 4}


@pytest.fixture(scope="session")
def misconception() -> Planted:
    return plant_model("misconception", 2, **SIZE)


@pytest.fixture(scope="session")
def mixed() -> Planted:
    """The first head of a layer of four writes all answers, the other three write the first four true ones."""
    return plant_model("misconception", 1, n_partial=3, layer_heads=4, n_layers=2, by_layer=True)


@pytest.fixture(scope="session")
def key() -> Planted:
    return plant_model("key", 1, **SIZE)


def prompts(planted: Planted, texts) -> torch.Tensor:
    tokenizer = planted.model.tokenizer
    return torch.tensor([tokenizer(Prompt().render(text, tokenizer))["input_ids"] for text in texts])


def edited_logits(model, ids: torch.Tensor, location: Location, *, scale: float) -> torch.Tensor:
    """Logits under a random edit at the location."""
    edit = random_edit(model, location, seed=1, scale=scale)
    with stack(model, [edit]).applied(model, torch.zeros(len(ids), dtype=torch.long), torch.ones_like(ids) > 0):
        return logits(model, ids)


def accuracies(planted: Planted, locations) -> list[float]:
    """Preference accuracy on test questions: unedited, then with the optimal edit at each location."""
    model, config = planted.model, merge_config(AuditConfig(), planted_settings(planted.n_items))
    split = split_questions(planted.behaviour, config.split.fractions)
    settings = config.methods["optimal"]
    fits = train(
        model,
        training_data(model, split.train),
        [Job(location, settings.strengths[0], 0, settings.learning_rate) for location in locations],
        batch_size=settings.batch_size,
        epochs=settings.epochs,
    )
    forest = plant(model.tokenizer, Prompt(), [(q.text, q.answers) for q in split.test])
    base = [sums[0] for sums in answer_log_probs(model, forest)]
    rows = answer_log_probs(model, forest, stack(model, [fit.edit for fit in fits]))
    found = [base, *([sums[k] for sums in rows] for k in range(len(fits)))]
    return [fmean(score_questions(split.test, sums, base)["preference_accuracy"]) for sums in found]


def singles(location: Location) -> list[Location]:
    return [Location((unit,)) for unit in location.units]


def test_no_edit_elsewhere_changes_a_bit_of_the_logits(misconception):
    model = misconception.model
    ids = prompts(misconception, [q.text for q in misconception.behaviour.questions])
    before = logits(model, ids)
    assert torch.equal(edited_logits(model, ids, misconception.elsewhere, scale=100.0), before)
    place = Location(misconception.places.units[:1])
    assert not torch.allclose(edited_logits(model, ids, place, scale=0.1), before, atol=0.1)


def test_no_edit_elsewhere_tells_the_answers_the_key(key):
    model = key.model
    items = sorted({q.text.split()[1] for q in key.behaviour.questions})
    answers = model.tokenizer.convert_tokens_to_ids(list(ANSWERS))
    ids = prompts(key, [f"{name} {item}" for name in KEYS for item in items])
    before, after = logits(model, ids)[:, -1], edited_logits(model, ids, key.elsewhere, scale=1.0)[:, -1]
    for found in (before, after):
        first, second = found[:, answers].chunk(2)
        assert torch.equal(first, second)
    assert not torch.allclose(before[:, answers], after[:, answers], atol=0.1)


def test_the_unedited_model_knows_its_task(misconception, key):
    for planted in (misconception, key):
        vocabulary = planted.model.tokenizer.get_vocab()
        questions = planted.behaviour.questions
        said = logits(planted.model, prompts(planted, [q.text for q in questions]))[:, -1].topk(2).indices
        asked = [{vocabulary[answer] for answer in q.answers} for q in questions]
        assert [set(row.tolist()) for row in said] == asked
    names = logits(key.model, prompts(key, [f"{name} {WHICH}" for name in KEYS]))[:, -1].argmax(dim=1)
    assert key.model.tokenizer.convert_ids_to_tokens(names.tolist()) == list(KEYS)


def test_optimal_edits_turn_the_misconception_at_every_writer_and_nowhere_else(misconception):
    places, others = singles(misconception.places), singles(misconception.elsewhere)
    base, *found = accuracies(misconception, [*places, *others, misconception.elsewhere, Location.whole()])
    assert base == share(misconception, lambda q: q.id in misconception.known)
    assert 0.05 < base < 0.5
    assert found == [1] * len(places) + [base] * len(others) + [base, 1]


def test_optimal_edits_turn_the_answers_that_a_place_writes(mixed):
    """An effect of middling size, known exactly; and places that are all in one layer."""
    layer = mixed.places.units[0][0]
    assert {unit[0] for unit in mixed.partial.units} == {layer}
    assert {unit[0] for unit in mixed.elsewhere.units} == {1 - layer}
    base, able, *partial, elsewhere = accuracies(
        mixed, [*singles(mixed.places), *singles(mixed.partial), mixed.elsewhere]
    )
    assert base == elsewhere == share(mixed, lambda q: q.id in mixed.known)
    assert able == 1
    most = share(mixed, lambda q: q.id in mixed.known or mixed.reachable(q))  # nothing else can be turned
    assert all(base + 0.3 < found <= most < 0.9 for found in partial)


def share(planted, is_right):
    """Share of the test questions for which this is so."""
    split = split_questions(planted.behaviour, SPLIT)
    return fmean(is_right(q) for q in split.test)


def test_optimal_edits_bring_the_key_to_the_answer_where_it_is_known(key):
    places, others = singles(key.places), singles(key.elsewhere)
    base, *found = accuracies(key, [*places, *others, key.elsewhere, Location.whole()])
    assert base == 0.5
    assert min(found[: len(places)]) >= 0.9
    assert found[len(places) : -1] == [0.5] * (len(others) + 1)
    assert found[-1] >= 0.9


def test_both_keys_of_an_item_are_on_one_side_of_the_split(key):
    split = split_questions(key.behaviour)
    for part in (split.train, split.val, split.test):
        items = [q.text.split()[1] for q in part]
        assert len(items) == 2 * len(set(items))
    for q in key.behaviour.questions:
        first = q.text.split()[0] == KEYS[0]
        assert q.true[0] in GROUPS[0 if first else 1] and q.false[0] in GROUPS[1 if first else 0]


def test_an_audit_of_a_place_without_effect_says_so(misconception, tmp_path):
    settings = {**planted_settings(), "controls": 3, "level": 0.3}
    settings["methods"] = {"optimal": {**settings["methods"]["optimal"], "epochs": 3, "bank_size": 4}}
    wrong = Location(misconception.elsewhere.units[:1])
    result = audit(
        misconception.model, misconception.behaviour, claim=wrong, out=tmp_path / "a", progress=False, **settings
    )
    found = result.verdict.methods["optimal"]
    works = found.question("works")
    assert works.p_no <= result.verdict.level  # no gain; but a "no" takes more questions
    assert (found.outcome, works.open, found.effect) == ("CANNOT TELL", "few_for_no", 0)


def test_the_seed_decides_everything_and_global_randomness_nothing():
    def make(seed: int) -> Planted:
        return plant_model("key", 1, n_items=10, n_layers=2, seed=seed)

    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = make(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    again, other = make(1), make(2)
    assert again.model.fingerprint == first.model.fingerprint != other.model.fingerprint
    assert again.behaviour.fingerprint == first.behaviour.fingerprint != other.behaviour.fingerprint
    assert again.places == first.places


def test_places_are_nested_and_those_of_the_key_are_layers(monkeypatch):
    monkeypatch.setattr("locaudit.studies.calibration.planted.STEPS", 1)
    monkeypatch.setattr("locaudit.studies.calibration.planted.LEARNED", float("inf"))
    small: dict[str, Any] = {"n_items": 10, "n_layers": 3}
    some = [set(plant_model("misconception", n, **small).places.units) for n in (1, 3, 6)]
    assert some[0] < some[1] < some[2] and len(some[2]) == 6
    assert plant_model("misconception", 6, **small).elsewhere is None
    ((one, _), (same, _)) = plant_model("key", 1, **small).places.units
    assert one == same
    for task, places in (("misconception", 7), ("misconception", 0), ("key", 4)):
        with pytest.raises(LocationError):
            plant_model(task, places, **small)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="task"):
        plant_model("colours")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="items"):
        plant_model(n_items=1)


def test_a_text_that_is_not_learned_is_an_error(monkeypatch):
    monkeypatch.setattr("locaudit.studies.calibration.planted.STEPS", 2)
    with pytest.raises(ModelError, match="nats"):
        plant_model(n_items=10, n_layers=2)


def test_claims_that_are_right_or_wrong_by_construction_get_the_right_outcome(tmp_path):
    small = {"n_layers": 4, "n_block": 4, "level": 0.25}
    cases = {}
    for truth in plant_truths(**small):
        case = cases[truth.name] = audit_truth(truth, tmp_path, say=lambda text: None)
        assert case.outcome == case.expected, str(case)
        assert str(case).startswith(f"right: {truth.name}")
    as_good = {name: case.n_at_least["anywhere"] for name, case in cases.items()}
    assert [as_good[name] for name in ("right", "middling", "knows", "ablated")] == [0, 1, 1, 0]
    assert cases["middling"].base + 0.2 < cases["middling"].claim_score < 0.9
    assert cases["ablated"].claim_score < 0.65 < cases["ablated"].base < 0.9


def test_power_falls_with_the_share_of_places_that_can_do_it_too(tmp_path):
    """Measured from trained edits, and as it must be if exactly the able places reach the claim."""
    small = {"n_items": 60, "n_layers": 4}
    found = power_curve(tmp_path, family=(1, 2), n_controls=4, level=0.2, say=lambda text: None, **small)
    assert [x.n_able for x in found] == [1, 2]
    assert [x.n_at_least for x in found] == [0, 1]
    assert [x.power for x in found] == [x.theory for x in found] == pytest.approx([1.0, 3 / 7])
    again = power_curve(tmp_path, family=(1, 2), n_controls=4, level=0.2, say=lambda text: None, **small)
    assert again == found
    figure = draw_power([1, 2], [x.power for x in found], n_heads=8, n_controls=4, level=0.2)
    assert save(figure, tmp_path, "power", "svg").read_text().startswith("<?xml")
