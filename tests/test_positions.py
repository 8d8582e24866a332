"""Edits of some tokens only: prompt, answer, its last prompt token, the subject. Each fast path has its slow twin."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from typing import get_args

import pytest
import torch
from transformers import DynamicCache

from locaudit.behaviours import Question, load_behaviour
from locaudit.behaviours.format import Prompt
from locaudit.edits import Edit, load_edit, stack
from locaudit.errors import ConfigError, DataError, LocationError
from locaudit.location import Positions
from locaudit.measure.drift import DriftText, measure_drift, prompt_documents
from locaudit.measure.forward import answer_log_probs
from locaudit.measure.generation import generate_tokens
from locaudit.measure.tree import find_subject, plant
from locaudit.models import CACHE, wrap_model
from locaudit.report import write_report
from locaudit.run.audit import run_audit
from locaudit.run.subject import read_settings
from locaudit.store.folder import read_run
from locaudit.store.run import load_run
from reference.drift import drift_on_prompts
from reference.generation import greedy
from reference.scoring import forest_log_probs, subject_of
from reference.training import fit_edit
from runs import small_config
from tiny import chat_tokenizer, heads, make_lm, neurons, random_edit, random_ids, residual_edit, tokenizer
from toy import PRIMER, QUESTIONS, Job, train, training_data

EVERY = get_args(Positions)
SUBJECTS = ("flat", "Paris", "you", "What", "France", "round")
MARKED = tuple(replace(q, subject=subject) for q, subject in zip(QUESTIONS, SUBJECTS, strict=False))
EOS = 1


@cache
def talker(name):
    """A tiny model whose next token is not the last one again, as tied embeddings would make it."""
    return wrap_model(make_lm(name, tie_word_embeddings=False, seed=3), tokenizer(), f"talker-{name}")


def forest_of(model, primer=""):
    rows, subjects = [(q.text, q.answers) for q in MARKED], [q.subject for q in MARKED]
    return plant(model.tokenizer, Prompt(primer=primer), rows, subjects)


def edits_of(model, scale=1.0):
    """One edit of heads, neurons and a stream for each kind of positions."""
    out = []
    for seed, positions in enumerate(EVERY):
        parts = (
            random_edit(model, heads((0, 1), (1, 2)), seed, scale=scale),
            random_edit(model, neurons((0, 3), (1, 7)), seed, scale=scale),
            residual_edit(model, 0, seed, scale=0.1 * scale),
        )
        out.append(Edit({site: e for part in parts for site, e in part.sites.items()}, positions))
    return out


@pytest.mark.parametrize("primer", ["", PRIMER], ids=["bare", "primer"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_scores_equal_the_twin(name, primer):
    model, forest = talker(name), forest_of(talker(name), primer)
    edits = edits_of(model)
    banked, base = answer_log_probs(model, forest, stack(model, edits)), forest_log_probs(model, forest)
    for k, edit in enumerate(edits):
        expected = forest_log_probs(model, forest, edit)
        alone = answer_log_probs(model, forest, stack(model, [edit]))
        for got, one, twin in zip(banked, alone, expected, strict=True):
            torch.testing.assert_close(got[k], twin, rtol=0, atol=1e-4)
            torch.testing.assert_close(one[0], twin, rtol=0, atol=1e-4)
        assert max((x - y).abs().max() for x, y in zip(expected, base, strict=True)) > 0.05, "the edit does nothing"
    found = {tuple(torch.cat([x[k] for x in banked]).tolist()) for k in range(len(edits))}
    assert len(found) == len(edits)


@pytest.mark.parametrize("primer", ["", PRIMER], ids=["bare", "primer"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_answers_equal_the_twin(name, primer):
    model, forest = talker(name), forest_of(talker(name), primer)
    prompts, subjects = ([getattr(tree, part) for tree in forest.trees] for part in ("prompt", "subject"))
    edits, options = edits_of(model, scale=2.0), {"max_new_tokens": 14, "subjects": subjects}
    banked = generate_tokens(model, forest.prefix, prompts, stack(model, edits), **options)
    for edit, rows in zip(edits, banked, strict=True):
        twin = [
            greedy(model, forest.prefix + tree.prompt, edit, 14, {EOS}, subject=subject_of(forest, tree))
            for tree in forest.trees
        ]
        assert rows == twin
        assert rows == generate_tokens(model, forest.prefix, prompts, stack(model, [edit]), **options)[0]
    assert len({tuple(rows) for rows in banked}) > 3, "the edits say the same: the test shows nothing"


@pytest.mark.parametrize("primer", ["", PRIMER], ids=["bare", "primer"])
def test_training_equals_the_twin(llama, primer):
    """All kinds of positions in one bank; the trained edit keeps its positions."""
    data = training_data(llama, MARKED[:3], primer)
    jobs = [Job(heads((0, 1), (1, 2)), 0.2, seed, 0.05) for seed in range(len(EVERY))]
    fits = train(llama, data, jobs, positions=EVERY, batch_size=2, epochs=2)
    for job, positions, fit in zip(jobs, EVERY, fits, strict=True):
        edit, losses = fit_edit(llama, data, job, positions=positions, batch_size=2, epochs=2)
        assert fit.losses == pytest.approx(losses, rel=1e-4)
        assert fit.edit.positions == edit.positions == positions
        for site, e in fit.edit.sites.items():
            torch.testing.assert_close(e.b @ e.a, edit.sites[site].b @ edit.sites[site].a, rtol=0, atol=1e-4)
        moved = [site.layer for site, e in fit.edit.sites.items() if e.b.abs().max() > 1e-3]
        assert moved == [0, 1] if positions != "subject" else [0]  # no later layer reads a subject in the last one


def test_drift_on_prompts_equals_the_twin(llama):
    forest = forest_of(llama)
    text = DriftText(**prompt_documents(forest, llama.pad_id))
    edits = edits_of(llama)
    for edit, found in zip(edits, measure_drift(llama, text, stack(llama, edits)), strict=True):
        assert found == pytest.approx(drift_on_prompts(llama, forest, edit), abs=1e-4)
        assert found["kl"] > 1e-3
    assert measure_drift(llama, text, None)[0] == pytest.approx(drift_on_prompts(llama, forest, None), abs=1e-4)


def test_a_plain_model_under_an_edit(llama):
    """`Edit.on` in a forward and in `generate`, where prompts are left-padded."""
    forest, ids = forest_of(llama), random_ids(2, 9)
    for edit in edits_of(llama):
        given = {"subject_at": [2, 4]} if edit.positions == "subject" else {"answer_from": 5}
        with torch.no_grad(), edit.on(llama, **given) as lm:
            whole = lm(input_ids=ids).logits
            cache = {CACHE: DynamicCache()}
            parts = [lm(input_ids=part, use_cache=True, **cache).logits for part in (ids[:, :6], ids[:, 6:])]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-4)
        tree = forest.trees[1]
        subject = {"subject_at": tree.subject} if edit.positions == "subject" else {}
        with edit.on(llama, **subject) as lm:
            said = lm.generate(torch.tensor([tree.prompt]), max_new_tokens=8, do_sample=False, pad_token_id=0)
        rows = generate_tokens(
            llama, (), [tree.prompt], stack(llama, [edit]), subjects=[tree.subject], max_new_tokens=8
        )[0]
        assert tuple(said[0, len(tree.prompt) :].tolist())[: len(rows[0])] == rows[0]
    for positions, name in (("last", "answer_from"), ("subject", "subject_at")):
        with (
            pytest.raises(LocationError, match=rf"positions '{positions}', and {name}=None.*edit\.on\(model, {name}="),
            Edit(edit.sites, positions).on(llama) as lm,
        ):
            lm(input_ids=ids)


def test_where_the_subject_ends():
    tok = tokenizer()
    for text, subject in [
        ("Is Paris in France?", "Paris"),
        ("Is Paris in France?", "France"),
        ("É é é", "É"),
        ("a", "a"),
    ]:
        for prompt in (Prompt(), Prompt(primer="Q: Is Paris in France?\nA: Yes."), Prompt("completion")):
            rendered = prompt.render(text, tok)
            at = find_subject(tok, rendered, text, subject, special=True)
            ids = tok(rendered)["input_ids"]
            before, until = tok.decode(ids[:at]), tok.decode(ids[: at + 1])
            wanted = rendered[: rendered.rfind(text) + text.index(subject) + len(subject)]
            assert until.startswith(wanted) and not before.startswith(wanted)
    chat = chat_tokenizer()
    assert plant(chat, Prompt("chat"), [("Is Paris flat?", ["No."])], ["Paris"]).trees[0].subject
    with pytest.raises(DataError, match="without the words 'Is  it'.*another prompt.style"):
        find_subject(tok, "Q: Is it?", "Is  it", "it", special=True)
    with pytest.raises(DataError, match="with the subject 'Rome'; expected a part of the question"):
        Question("", "Is Paris flat?", ("No.",), ("Yes.",), subject="Rome")


def marked_config(home, **changes):
    config = small_config(home, methods=["optimal"], **changes)
    rows = [json.loads(line) for line in (home / "questions.jsonl").read_text().splitlines()]
    marked = [row | {"subject": row["question"].split()[1]} for row in rows]
    (home / "marked.jsonl").write_text("\n".join(map(json.dumps, marked)))
    return replace(config, behaviour=str(home / "marked.jsonl"))


def test_a_run_on_subjects(tmp_path):
    """Its edits have these positions; drift is measured on held-out prompts, and record and report say so."""
    options = {"strengths": [0.2], "epochs": 2, "bank_size": 1}
    config = marked_config(tmp_path, optimal={**options, "positions": "subject"}, claim="0.1,1.2")
    run_audit(config, tmp_path / "run", progress=False)
    run = load_run(tmp_path / "run")
    for record in run.records:
        if record.edit:
            edit = load_edit(run.folder / "edits" / record.edit)
            in_last = {site.layer for site in edit.sites} == {1}  # where nothing reads the subject any more
            assert edit.positions == "subject" and (record.drift["kl"] > 1e-9) is not in_last
    assert run.manifest.drift_on == "on held-out prompts and their answers"
    assert any("KL and CE) is measured on held-out prompts" in note for note in run.manifest.notes)
    assert "measured on held-out prompts and their answers" in write_report(run.folder).read_text()
    with read_run(run.folder) as store:
        subject = store.contexts()
    other = marked_config(tmp_path, optimal={**options, "positions": "last"})
    run_audit(other, tmp_path / "last", progress=False)
    with read_run(tmp_path / "last") as store:
        assert len(store.contexts() & subject) == 1  # the unedited model's, on the same text
    assert other.hash != config.hash


def test_what_does_not_fit_positions(tmp_path):
    config = marked_config(tmp_path, optimal={"positions": "subject"})
    plain = replace(config, behaviour=str(tmp_path / "questions.jsonl"))
    with pytest.raises(DataError, match="positions subject, and the question 'Is 0 more.*without a subject"):
        read_settings(plain)
    (tmp_path / "text.txt").write_text("words " * 999)
    with pytest.raises(ConfigError, match="drift_text = .* with positions subject; expected no drift text"):
        read_settings(replace(config, evaluation=replace(config.evaluation, drift_text=str(tmp_path / "text.txt"))))
    with pytest.raises(ConfigError, match="positions = 'first'"):
        marked_config(tmp_path, optimal={"positions": "first"})
    assert load_behaviour(config.behaviour).questions[0].subject == "0"


def test_a_given_edit_has_the_positions_of_its_file(tmp_path, llama):
    edit = Edit(random_edit(llama, heads((1, 0)), 0).sites, "last")
    edit.save(tmp_path / "edit.safetensors")
    config = small_config(tmp_path, methods={"given": {"file": str(tmp_path / "edit.safetensors")}})
    assert config.methods["given"].positions == "last"
    assert "positions 'last', and weights act on every token" in edit.cannot_become("peft", llama)
