"""Claims of directions: vectors at a site, their controls, their edits, and runs that outlive the vectors' file."""

from __future__ import annotations

import csv
import json
import re
from contextlib import contextmanager
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from locaudit import cli, fit_iti, fit_optimal, load_edit, read_claim, read_directions
from locaudit.claims import directions, draw_nulls
from locaudit.claims.directions import DICTIONARIES, VECTORS
from locaudit.claims.kinds import Shape
from locaudit.config import to_dict
from locaudit.edits import Edit, SiteEdit, save_merged
from locaudit.errors import ConfigError, LocationError
from locaudit.location import Location, Site
from locaudit.measure.activations import collect_activations
from locaudit.measure.residual import Residuals
from locaudit.methods import Job, ablate, given, optimal
from locaudit.methods.parameters import TrainableEdit
from locaudit.methods.settings import AblateSettings, ConstantSettings, GivenSettings
from locaudit.run.audit import open_worker, run_audit
from locaudit.run.export import export_edit
from locaudit.store.run import load_run
from runs import small_config, stopped_at
from tiny import logits, make_lm, random_ids, tiny
from toy import QUESTIONS, training_data

SHAPE = Shape(4, 4, 2, 8, 48, 32)
WIDTH, LAYER = 32, 1
ROWS = np.random.default_rng(0).standard_normal((12, WIDTH)).astype(np.float32)
SPREAD = np.diag(np.linspace(0.1, 3.0, WIDTH)).astype(np.float32)


def forget_all():
    """Make this process know no vectors, as a new one does."""
    VECTORS.clear()
    DICTIONARIES.clear()


@pytest.fixture(autouse=True)
def forgotten():
    forget_all()


def save_vectors(path):
    """A dictionary of 12 rows, and two vectors with names."""
    named = {"W_dec": ROWS, "refusal": ROWS[0] + ROWS[1], "truth": ROWS[2]}
    save_file({name: torch.tensor(x) for name, x in named.items()}, path)
    return path


def hashes(claim):
    return [unit.rpartition("#")[2] for unit in claim.location.units]


# Reading


def test_a_direction_is_read_from_every_kind_of_file_and_from_arrays(tmp_path):
    v = ROWS[3]
    np.save(tmp_path / "v.npy", v)
    np.save(tmp_path / "rows.npy", ROWS)
    np.savez(tmp_path / "v.npz", truth=ROWS[0], refusal=v)
    torch.save({"refusal": torch.tensor(v), "truth": torch.ones(WIDTH)}, tmp_path / "v.pt")
    save_file({"refusal": torch.tensor(v)}, tmp_path / "v.safetensors")
    claims = [
        read_claim(f"{tmp_path}/{text}")
        for text in ("v.npy@1", "rows.npy[3]@1", "v.npz[refusal]@1", "v.pt[refusal]@1", "v.safetensors@1")
    ]
    claims += [read_directions(v, 1), read_directions({"refusal": torch.tensor(v)}, layer=1)]
    claims += [read_directions(ROWS, 1, [3])]
    assert len({tuple(hashes(claim)) for claim in claims}) == 1
    np.testing.assert_array_equal(VECTORS[hashes(claims[0])[0]], v)
    assert [claim.location.units[0].partition("#")[0] for claim in claims[:3]] == ["1.v", "1.3", "1.refusal"]
    assert read_claim(str(claims[0].location)).location == claims[0].location
    heads = read_claim(f"heads-direction:{tmp_path}/v.npy@1").location
    assert (heads.kind, heads.units) == ("heads-direction", claims[0].location.units)


def test_several_rows_span_a_subspace(tmp_path):
    path = save_vectors(tmp_path / "sae.safetensors")
    location = read_claim(f"{path}[W_dec.2, W_dec.5]@1").location
    assert len(location) == 2
    assert len(read_claim(f"{path}[refusal,truth]@1").location) == 2
    assert len(read_directions(ROWS[:3], 0, "*").location) == 3
    (site, basis), *others = directions.KINDS["direction"].subspaces(location, SHAPE).items()
    assert site == Site("residual", 1) and not others and basis.shape == (WIDTH, 2)
    np.testing.assert_allclose(basis.T @ basis, np.eye(2), atol=1e-12)
    np.testing.assert_allclose(basis @ basis.T @ ROWS[2], ROWS[2], atol=1e-5)
    rest = directions.KINDS["direction"].subspaces(location.rest(), SHAPE)
    assert list(rest) == [Site("residual", i) for i in range(4)]
    np.testing.assert_allclose(rest[site] @ rest[site].T + basis @ basis.T, np.eye(WIDTH), atol=1e-12)
    assert all(x.dtype == bool and x.all() for key, x in rest.items() if key != site)
    whole = directions.KINDS["direction"].subspaces(Location.whole("direction"), SHAPE)
    assert len(whole) == 4 and all(x.all() for x in whole.values())


def broken(**arrays):
    return lambda path: np.savez(path, **arrays)


WRONG = {
    "missing row": ("x.npz[refusl]@1", broken(refusal=ROWS[0], truth=ROWS[1]), "without the row refusl.*mean refusal"),
    "no row named": ("x.npz@1", broken(refusal=ROWS[0], truth=ROWS[1]), r"with 2 rows, .*refusal, truth.*FILE\[\*\]"),
    "NaN": ("x.npz@1", broken(v=np.full(WIDTH, np.nan)), "the row v of .* zero or has NaN"),
    "zero": ("x.npz@1", broken(v=np.zeros(WIDTH)), "zero or has NaN"),
    "text": ("x.npz@1", broken(v=np.array(["a"])), "of which none is named.*numbers"),
    "several arrays": ("x.npz[a,b]@1", broken(a=ROWS[0], b=ROWS[0][:5]), "of different arrays or widths"),
    "a row twice": ("x.npz[a,a]@1", broken(a=ROWS[0], b=ROWS[1]), "named more than once"),
    "empty": ("x.npz@1", lambda path: path.write_bytes(b""), "which is empty"),
    "pickle": ("x.pkl@1", lambda path: path.write_bytes(b"\x80\x04."), "a pickle, which can run code"),
    "pickle as pt": ("x.pt@1", lambda path: path.write_bytes(b"\x80\x04N."), "cannot be read .*torch.save"),
    "absent": ("x.npz@1", lambda path: None, "not there.*RUN/config.yaml"),
    "csv": ("x.csv@1", lambda path: path.write_text("1,2"), "no file of vectors"),
    "outside float32": ("x.npz@1", broken(v=np.full(WIDTH, 1e300)), "the row v .*infinity in float32"),
    "zero in float32": ("x.npz@1", broken(v=np.full(WIDTH, 1e-300)), "the row v .*zero"),
    "two rows of one name": (
        "x.npz[v.1]@1",
        broken(**{"v": ROWS, "v.1": ROWS[0]}),
        "row v.1 .* a row of another array",
    ),
    "other kind": ("mlp:x.npz@1", broken(v=ROWS[0]), "claim of the kind mlp"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_cannot_be_used_is_refused(name, tmp_path):
    text, write, message = WRONG[name]
    kind, colon, file = text.rpartition(":")
    write(tmp_path / re.split(r"[\[@]", file)[0])
    with pytest.raises(LocationError, match=f"(?s){message}"):
        read_claim(f"{kind}{colon}{tmp_path}/{file}")


@pytest.mark.parametrize(
    ("location", "message"),
    [
        (lambda: read_directions(ROWS[0], -1), "the layer -1 of a direction; expected a whole number from 0"),
        (lambda: read_directions(ROWS[0], 1.5), "the layer 1.5 of a direction"),  # type: ignore[arg-type]
        (lambda: read_directions(ROWS[0], None), "the layer None of a direction"),  # type: ignore[arg-type]
        (lambda: read_directions(ROWS[0], 4), "layer 4.*layers 0-3"),
        (lambda: read_directions(ROWS[0][:20], 0), "of 20 coordinates.*32, the width of residual.*heads-direction"),
        (lambda: read_directions(np.stack([ROWS[0], 2 * ROWS[0]]), 0, "*"), "do not span a subspace of 2 of the 32"),
        (lambda: read_claim("direction:1.refusal#0123456789abcdef"), "not known here.*folder of its run as .out"),
    ],
)  # fmt: skip
def test_a_direction_that_does_not_fit_the_model_is_refused(location, message):
    with pytest.raises(LocationError, match=f"(?s){message}"):
        location().check(SHAPE)


def test_a_number_is_a_row():
    for row in (3, np.int64(3)):
        assert read_directions(ROWS, np.int64(1), row).location == read_directions(ROWS, 1, [3]).location


def test_a_dictionary_leaves_out_what_float32_cannot_hold():
    rows = np.concatenate([ROWS.astype(float), np.full((1, WIDTH), 1e39), np.full((1, WIDTH), 1e-300)])
    claim = read_directions(rows, 1, 3).location
    assert DICTIONARIES[str(claim)].size == len(ROWS)


def test_text_that_is_no_direction_says_how_to_write_one():
    with pytest.raises(LocationError, match=r"FILE\[ROW,...\]@LAYER"):
        read_claim("direction:refusal")


# Controls


def draw(claim, null, n, x=None, seed=0):
    return draw_nulls(claim.location, SHAPE, [null], n, seed=seed, values={"covariance": x})[0][null]


def unit_vectors(controls):
    found = np.stack([VECTORS[place.units[0].rpartition("#")[2]] for place in controls.locations]).astype(float)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_covariance_draws_have_the_covariance_of_the_activations():
    claim, rng = read_directions(ROWS[0], 1), np.random.default_rng(1)
    x = (rng.standard_normal((200, WIDTH)) @ SPREAD).astype(np.float32)
    x -= x.mean(axis=0)
    drawn = draw(claim, "covariance", 4000, x)
    assert drawn.population is None and {place.units[0][:13] for place in drawn.locations} == {"1.covariance-"}
    vectors = np.stack([VECTORS[place.units[0].rpartition("#")[2]] for place in drawn.locations])
    expected = x.T @ x
    error = np.linalg.norm(vectors.T @ vectors / len(vectors) - expected) / np.linalg.norm(expected)
    assert error < 0.1
    # A claim that is drawn alike is exchangeable with them: its rank among 19 is uniform, whatever is measured.
    measured = np.abs(vectors[:, 0]) / np.linalg.norm(vectors, axis=1)
    ranks = [int((measured[i + 1 : i + 20] >= measured[i]).sum()) for i in range(0, 4000, 20)]
    assert np.bincount(ranks, minlength=20).max() < 25 and np.mean(np.array(ranks) == 0) < 0.12


def test_uniform_draws_are_uniform_on_the_sphere():
    found = unit_vectors(draw(read_directions(ROWS[0], 1), "uniform", 4000))
    assert np.abs(found.mean(axis=0)).max() < 0.02
    np.testing.assert_allclose(found.T @ found / 4000, np.eye(WIDTH) / WIDTH, atol=0.005)


def test_dictionary_draws_are_other_rows(tmp_path):
    claim = read_claim(f"{save_vectors(tmp_path / 'sae.safetensors')}[W_dec.4]@1")
    drawn = draw(claim, "dictionary", 40)
    names = [place.units[0].partition("#")[0] for place in drawn.locations]
    assert drawn.population == 11 and set(names) == {f"1.W_dec.{i}" for i in range(12) if i != 4}
    two = read_claim(f"{tmp_path / 'sae.safetensors'}[W_dec.4,W_dec.5]@1")
    assert draw(two, "dictionary", 5).population == 65
    assert [len(place) for place in draw(two, "uniform", 3).locations] == [2, 2, 2]
    named = read_claim(f"{tmp_path / 'sae.safetensors'}[truth]@1")
    assert draw(named, "dictionary", 9).population == 1  # the other vector with a name
    assert draw(read_directions(np.stack([ROWS[0], 0 * ROWS[0], ROWS[1]]), 1, "0"), "dictionary", 9).population == 1


@pytest.mark.parametrize("null", ["covariance", "uniform", "dictionary"])
def test_the_first_controls_do_not_depend_on_their_number(null):
    claim = read_directions(ROWS, 1, "4,7")
    few, many = (draw(claim, null, n, ROWS[:9]).locations for n in (3, 8))
    assert few == many[:3] and len(set(many)) == 8 and claim.location not in many
    assert many != draw(claim, null, 8, ROWS[:9], seed=1).locations


def test_nulls_that_a_kind_does_not_have_are_named():
    alone = read_directions(ROWS[0], 1).location
    with pytest.raises(LocationError, match="no row of a dictionary"):
        draw_nulls(alone, SHAPE, ["dictionary"], 3)
    with pytest.raises(LocationError, match="the null layers for directions.*covariance"):
        draw_nulls(alone, SHAPE, ["layers"], 3)
    with pytest.raises(LocationError, match="the null uniform for heads"):
        draw_nulls(Location(((0, 1),)), SHAPE, ["uniform"], 3)
    found, notes = draw_nulls(alone, SHAPE, ["uniform", "dictionary"], 3)
    assert list(found) == ["uniform"] and "no controls of the null dictionary" in notes[0]


# Edits, each with its slow twin: a hook that is written out


@contextmanager
def hooked(model, kind, change):
    """Replace h at the claim's site by ``change(h)``."""

    def after(_module, _args, out):
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    if kind == "direction":
        handle = model.layer(LAYER).register_forward_hook(after)
    else:
        handle = model.projection(Site("heads", LAYER)).register_forward_pre_hook(lambda _m, args: (change(args[0]),))
    yield
    handle.remove()


def check_twin(model, kind, edit, change):
    ids = random_ids(3, 9)
    with edit.on(model):
        fast = logits(model, ids)
    with hooked(model, kind, change):
        slow = logits(model, ids)
    assert (fast - logits(model, ids)).abs().max() > 1e-3  # it does something
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)


def basis_of(claim):
    """An orthonormal basis of the claim's span, by Gram and Schmidt."""
    found = []
    for key in hashes(claim):
        v = torch.tensor(VECTORS[key]).double()
        for u in found:
            v = v - u * (u @ v)
        found.append(v / v.norm())
    return torch.stack(found, dim=1).float()


KINDS = pytest.mark.parametrize("kind", ["direction", "heads-direction"])
SPANS = pytest.mark.parametrize("rows", ["0", "0,3,4"])


def shared_of(model, claim, **more):
    return SimpleNamespace(model=model, config=SimpleNamespace(claim=str(claim.location)), **more)


@KINDS
@SPANS
def test_mean_ablation_puts_the_mean_into_the_span(llama, kind, rows):
    claim = read_directions(ROWS, LAYER, rows, kind=kind)
    mean, v = torch.tensor(ROWS[7]), basis_of(claim)
    name = "heads" if kind == "heads-direction" else "residual"
    shared = shared_of(llama, claim, prepared={"ablate": {f"{name}.{LAYER}": mean}})
    (fit,) = ablate.fit(shared, [Job(claim.location, None, 0)], AblateSettings())
    check_twin(llama, kind, fit.edit, lambda h: h - (h @ v) @ v.T + (mean @ v) @ v.T)


@KINDS
@SPANS
def test_iti_moves_along_the_difference_of_means_in_the_span(llama, kind, rows):
    claim = read_directions(ROWS, LAYER, rows, kind=kind)
    edit = fit_iti(llama, QUESTIONS, claim.location, alpha=3.0, positions="all", context="answer")
    whole = "attention" if kind == "heads-direction" else "residual"
    read = [collect_activations(llama, QUESTIONS, context=x, kind=whole) for x in ("answer", "next_question")]
    x, spread, v = read[0].values[:, LAYER, 0], read[1].values[:, LAYER, 0], basis_of(claim)
    u = v @ (v.T @ (x[read[0].is_true].mean(dim=0) - x[~read[0].is_true].mean(dim=0)))
    u = u / u.norm()
    sigma = (spread @ u).std(correction=0)
    check_twin(llama, kind, edit, lambda h: h + 3.0 * sigma * u)


@KINDS
@SPANS
def test_the_optimal_edit_never_leaves_the_span(llama, kind, rows):
    claim = read_directions(ROWS, LAYER, rows, kind=kind)
    edit, v = fit_optimal(llama, QUESTIONS, claim.location, epochs=1), basis_of(claim)
    ((site, e),) = edit.sites.items()
    assert site.layer == LAYER and e.b.norm() > 1e-3
    torch.testing.assert_close(v @ (v.T @ e.b), e.b, rtol=1e-5, atol=1e-6)
    if rows == "0":  # b is the direction, with a trained strength
        strength = (v.T @ e.b).item()
        check_twin(llama, kind, edit, lambda h: h + strength * (h @ e.a[0]).unsqueeze(-1) * v[:, 0])
    else:
        check_twin(llama, kind, edit, lambda h: h + (h @ e.a.T) @ e.b.T)


def test_the_optimal_edit_trains_a_reader_and_one_strength_per_direction(llama):
    for rows, k in (("0", 1), ("0,3,4", 3)):
        for rank in (1, 2):
            place = read_directions(ROWS, LAYER, rows).location
            parameters = [p.numel() for p in TrainableEdit(llama, place, rank=rank).parameters()]
            assert parameters == [rank * WIDTH, k * rank]
    rest = TrainableEdit(llama, place.rest())
    assert [p.numel() for p in rest.b] == [WIDTH, WIDTH - 3]  # layer 0, and what is left of layer 1


def test_directions_of_any_shape_learn_equally_fast(llama):
    """One step of the optimizer moves B equally far along a sparse and a dense direction."""
    lengths = []
    for v in (np.eye(WIDTH)[0], np.ones(WIDTH)):
        edit = TrainableEdit(llama, read_directions(v, LAYER).location, constant=True)
        with torch.no_grad():
            edit.b[0].fill_(0.01)
        ((_, e),) = edit.sites.items()
        lengths.append(e.b.norm().item())
    assert lengths == pytest.approx([0.01 * WIDTH**0.5] * 2)


@KINDS
def test_the_constant_edit_adds_a_multiple_of_the_direction(llama, kind):
    claim = read_directions(ROWS, LAYER, "5", kind=kind)
    data = training_data(llama, QUESTIONS)
    shared = shared_of(llama, claim, training=data, residuals={"train": Residuals(llama, data.forest)}, row_tokens=None)
    (fit,) = optimal.fit_constant(shared, [Job(claim.location, 0.2, 0)], ConstantSettings(epochs=1, learning_rate=0.05))
    ((_, e),) = fit.edit.sites.items()
    strength, v = (basis_of(claim).T @ e.b).item(), basis_of(claim)[:, 0]
    check_twin(llama, kind, fit.edit, lambda h: h + strength * v)


@SPANS
def test_a_given_edit_is_turned_into_the_controls_directions(llama, tmp_path, rows):
    claim = read_directions(ROWS, LAYER, rows)
    v, site = basis_of(claim), Site("residual", LAYER)
    a, b = torch.tensor(ROWS[8:10]), v @ torch.randn(v.shape[1], 2, generator=torch.Generator().manual_seed(0))
    Edit({site: SiteEdit(a, b, torch.ones(2))}).save(tmp_path / "edit.safetensors")
    control = draw(claim, "uniform", 1).locations[0]
    jobs = [Job(claim.location, None, 0), Job(control, None, 0)]
    settings = GivenSettings(str(tmp_path / "edit.safetensors"))
    same, turned = (fit.edit for fit in given.fit(shared_of(llama, claim), jobs, settings))
    torch.testing.assert_close(same.sites[site].b, b)
    new, onto = turned.sites[site].b, llama.subspaces(control)[site]
    torch.testing.assert_close(new.norm(dim=0), b.norm(dim=0))
    torch.testing.assert_close(onto @ (onto.T @ new), new, rtol=1e-4, atol=1e-6)
    check_twin(llama, "direction", turned, lambda h: h + (1 + h @ a.T) @ new.T)
    other = read_directions(ROWS, LAYER, "11")
    with pytest.raises(LocationError, match="writes outside"):
        given.fit(shared_of(llama, other), [Job(other.location, None, 0)], settings)


# Edits in other programs


def edits_in(model, claim):
    """What methods find at a claim: constants (`iti`, `constant`), a reader and a strength (`optimal`), an ablation."""
    v, ((site, _),) = basis_of(claim), model.subspaces(claim.location).items()
    w, a = torch.tensor([0.6, -0.4])[: v.shape[1]], torch.tensor(ROWS[8])
    return {
        "constant": Edit({site: SiteEdit.rank_one(torch.zeros(WIDTH), v @ w, 1.5)}),
        "optimal": Edit({site: SiteEdit.rank_one(a, v @ w)}),
        "ablate": Edit({site: ablate.mean_ablation(v, torch.tensor(ROWS[7]))}),
    }


def read_back(form, edit, model, folder):
    """Logits of the exported edit, loaded without locaudit."""
    name, ids = model.config.model_type, random_ids(2, 9)
    lm = make_lm(name)  # the same seed: the same weights
    (site,) = edit.sites
    change = None
    if form == "peft":
        lm = pytest.importorskip("peft").PeftModel.from_pretrained(lm, edit.to_peft(folder, model, base="org/base"))
    elif form == "merged":
        lm = AutoModelForCausalLM.from_pretrained(save_merged(model, edit, folder))
    elif form == "gguf":
        (tensor,) = gguf.GGUFReader(edit.to_gguf(folder / "v.gguf", model)).tensors
        assert tensor.name == f"direction.{LAYER}"
        change = lambda h: h + torch.tensor(np.array(tensor.data))  # noqa: E731
    else:
        folder.mkdir()
        edit.save(folder / "edit.safetensors")
        a, b, c = (load_numpy(folder / "edit.safetensors")[f"{site.name}.{LAYER}.{x}"] for x in "abc")
        change = lambda h: h + torch.tensor((h.numpy() @ a.T + c) @ b.T)  # noqa: E731
    if change is not None:
        with hooked(model, {"residual": "direction"}.get(site.name, ""), change):
            return logits(model, ids)
    with torch.no_grad():
        return lm.eval()(input_ids=ids, use_cache=False).logits


EXACT = {  # what can hold the edits of each method: with a bias in every projection (GPT-2), and without (Llama)
    ("direction", "constant"): ({"peft", "merged", "gguf"}, {"peft", "gguf"}),
    ("direction", "optimal"): (set(), set()),
    ("direction", "ablate"): (set(), set()),
    ("heads-direction", "constant"): ({"peft", "merged"}, {"peft"}),
    ("heads-direction", "optimal"): ({"peft", "merged"}, {"peft", "merged"}),
    ("heads-direction", "ablate"): ({"peft", "merged"}, {"peft"}),
}
REASONS = ("no bias by this model's config", "it reads the residual stream", "a control vector on the residual stream")


@KINDS
@pytest.mark.parametrize("rows", ["0", "0,3"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("form", [pytest.param("peft", marks=pytest.mark.parity), "merged", "gguf", "vectors"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*the targeted layer of type .* has no bias")
def test_edits_read_back_by_other_programs_do_the_same(form, name, kind, rows, tmp_path):
    model, claim = tiny(name), read_directions(ROWS, LAYER, rows, kind=kind)
    before = logits(model, random_ids(2, 9))
    for method, edit in edits_in(model, claim).items():
        with edit.on(model):
            expected = logits(model, random_ids(2, 9))
        assert (expected - before).abs().max() > 1e-2
        if form == "vectors" or form in EXACT[kind, method][name == "llama"]:
            assert not edit.cannot_become(form, model)
            found = read_back(form, edit, model, tmp_path / method)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        else:
            with pytest.raises(LocationError, match="|".join(REASONS)):
                read_back(form, edit, model, tmp_path / method)
            assert not (tmp_path / method).exists()


def test_a_control_vector_acts_on_every_token_of_a_later_layer(llama, tmp_path):
    edit = edits_in(llama, read_directions(ROWS, LAYER, "0"))["constant"]
    assert not edit.cannot_become("gguf", llama)
    assert "positions 'last'" in Edit(edit.sites, "last").cannot_become("gguf", llama)
    first = edits_in(llama, read_directions(ROWS, 0, "0"))["constant"]
    with pytest.raises(LocationError, match="cannot become a control vector: it acts after layer 0"):
        first.to_gguf(tmp_path / "v.gguf", llama)
    again = load_edit(edit.to_gguf(tmp_path / "v.gguf", llama))
    ids = random_ids(2, 9)
    found = []
    for one in (edit, again):
        with one.on(llama):
            found.append(logits(llama, ids))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)


# Whole runs

METHODS = {
    "iti": {"alphas": [2.0]},
    "optimal": {"strengths": [0.2], "epochs": 1, "bank_size": 1},
    "ablate": {},
}
NULLS = ["covariance", "uniform", "dictionary"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("directions")


def settings_of(home, **changes):
    path = save_vectors(home / "sae.safetensors")
    values = {"claim": f"{path}[W_dec.4]@1", "nulls": NULLS, "methods": METHODS, "rest": True, "placebos": 1}
    return small_config(home, **{**values, **changes})


@pytest.fixture(scope="module")
def audited(home):
    """A run from the command line, whose file of vectors is gone afterwards."""
    (home / "audit.yaml").write_text(yaml.safe_dump(to_dict(settings_of(home))))
    assert cli.main(["audit", str(home / "audit.yaml"), "--out", str(home / "run")]) == 0
    return home / "run"


def trials(folder):
    with (folder / "trials.csv").open() as file:
        return list(csv.DictReader(file))


def test_an_audit_of_a_direction_reads_well(audited):
    rows, verdict = trials(audited), json.loads((audited / "verdict.json").read_text())
    (key,) = hashes(read_directions(ROWS, 1, "4"))
    assert {row["location"] for row in rows if row["arm"] == "claim"} == {f"direction:1.W_dec.4#{key}"}
    assert {row["null"] for row in rows if row["arm"] == "control"} == set(NULLS)
    assert {row["arm"] for row in rows} == {"base", "claim", "control", "whole", "rest", "placebo"}
    page = (audited / "report.html").read_text()
    assert "random directions" in page and "heads" not in verdict["headline"]
    for words in ("with the activations' covariance", "drawn uniformly", "of its dictionary"):
        assert words in page.replace("&#x27;", "'").replace("&#39;", "'")
    optimal_edit = load_edit(audited / "edits" / "claim-optimal-0.2.safetensors")
    v = torch.tensor(ROWS[4] / np.linalg.norm(ROWS[4]))
    b = optimal_edit.sites[Site("residual", 1)].b
    torch.testing.assert_close(v.unsqueeze(1) * (v @ b), b, rtol=1e-4, atol=1e-6)


def test_a_run_reports_exports_grows_and_works_without_its_file(audited, home, tmp_path, capsys):
    (home / "sae.safetensors").unlink()
    config = str(audited / "config.yaml")
    before = (audited / "verdict.json").read_bytes()
    assert cli.main(["report", str(audited)]) == 0
    assert (audited / "verdict.json").read_bytes() == before
    export_edit(audited, "control-covariance-1/optimal", "vectors", tmp_path / "edit")
    assert cli.main(["export", str(audited), "--to", "gguf", "--out", str(tmp_path / "v")]) == 2
    assert "it reads the residual stream of layer 1" in capsys.readouterr().err and not (tmp_path / "v").exists()
    again = ["audit", config, "--out", str(audited)]
    forget_all()
    assert cli.main(again) == 0
    assert (audited / "verdict.json").read_bytes() == before
    forget_all()
    assert cli.main([*again, "--controls", "3"]) == 2  # the dictionary's third row is in the file only
    assert "more rows of the dictionary than the run folder holds" in capsys.readouterr().err
    save_vectors(home / "sae.safetensors")
    assert cli.main([*again, "--claim", f"{home / 'sae.safetensors'}[W_dec.4]@1", "--controls", "3"]) == 0
    assert len({row["location"] for row in trials(audited) if row["null"] == "dictionary"}) == 3


def test_a_run_that_was_killed_ends_as_if_it_had_not_been(home, tmp_path):
    config = settings_of(home, methods={"optimal": METHODS["optimal"]}, rest=False, placebos=0)
    run_audit(config, tmp_path / "whole", progress=False)
    forget_all()
    with stopped_at(4):
        run_audit(config, tmp_path / "killed", progress=False)
    forget_all()
    (home / "sae.safetensors").unlink()
    worker = open_worker(tmp_path / "killed")  # built from the folder alone
    assert len(worker.shared.vectors) == 7 and set(worker.shared.vectors) <= set(VECTORS)
    kept = load_run(tmp_path / "killed").config
    assert kept.claim.startswith("direction:1.W_dec.4#")
    run_audit(kept, tmp_path / "killed", progress=False)
    assert load_run(tmp_path / "killed").records == load_run(tmp_path / "whole").records
    VECTORS.clear()
    with pytest.raises(LocationError, match="not known here"):
        run_audit(kept, tmp_path / "elsewhere", progress=False)


def test_the_identity_of_trials_depends_on_the_vectors(home, tmp_path):
    ids = []
    for row in ("4", "5"):
        claim = read_directions(ROWS, 1, row)
        config = settings_of(home, claim=str(claim.location), methods={"ablate": {}}, nulls=["uniform"])
        run_audit(config, tmp_path / row, progress=False)
        ids.append({record.spec.trial_id for record in load_run(tmp_path / row).records if record.spec.arm == "claim"})
    assert not ids[0] & ids[1]


def test_directions_are_compared_with_their_covariance_by_default(home, tmp_path):
    config = settings_of(
        home, nulls=("anywhere", "layers"), methods={"given": {"file": str(tmp_path / "e.safetensors")}}
    )
    v = torch.tensor(ROWS[4])
    Edit({Site("residual", 1): SiteEdit.rank_one(torch.zeros_like(v), v, 1.0)}).save(tmp_path / "e.safetensors")
    run_audit(config, tmp_path / "run", progress=False)
    run = load_run(tmp_path / "run")
    assert run.config.nulls == ("covariance",) and list(run.manifest.nulls) == ["covariance"]
    controls = [record.spec for record in run.records if record.spec.arm == "control"]
    assert len({spec.location for spec in controls}) == 2 and all(spec.draw is None for spec in controls)


def test_a_registered_claim_names_the_vectors_not_the_file(home, tmp_path):
    path = save_vectors(home / "sae.safetensors")
    (tmp_path / "claim.yaml").write_text(f'claim: "{path}[W_dec.4]@1"\n')
    config = settings_of(home, claim=None, registered=str(tmp_path / "claim.yaml"))
    with pytest.raises(ConfigError, match=r'can change after it was registered.*claim: "direction:1.W_dec.4#'):
        run_audit(config, tmp_path / "run", progress=False)
