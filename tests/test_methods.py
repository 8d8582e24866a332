"""Methods that train nothing (ITI, ablation, a given edit), and the parameters of those that do."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from locaudit.edits import Edit, SiteEdit, stack
from locaudit.edits.hooks import apply_edit
from locaudit.errors import ConfigError, LocationError
from locaudit.location import Site
from locaudit.measure.activations import collect_activations
from locaudit.measure.tree import Forest, Tree
from locaudit.methods import Job, ablate, given, iti
from locaudit.methods.parameters import TrainableEdit, onto, stack_trainable
from locaudit.methods.settings import AblateSettings, GivenSettings, ITISettings
from locaudit.models import Model
from locaudit.registry import METHODS
from reference.edits import edited_vector
from reference.probes import site_vectors
from tiny import ablation, every_site, heads, neurons, random_edit, random_ids, residual_edit
from toy import QUESTIONS

PLACE = heads((0, 1), (1, 0), (1, 3))
FOREST = Forest((), (Tree((3, 4, 5), ((6, 7), (6, 8, 9), (10,))), Tree((11, 12), ((13,), (14, 15)))))
TOKENS = {(3, 4, 5, 6, 7): (0, 1, 2, 3, 4), (3, 4, 5, 6, 8, 9): (4, 5), (3, 4, 5, 10): (3,),
          (11, 12, 13): (0, 1, 2), (11, 12, 14, 15): (2, 3)}  # fmt: skip
"""Every row of the forest, and its tokens that no row above it begins with."""


def subspace_of(model, site, k, seed=0):
    """An orthonormal basis (d, k)."""
    x = torch.randn(model.width(site), k, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(x).Q


@pytest.fixture
def tilted(llama, monkeypatch):
    """A model whose locations are planes of the stream that leaves layer 0, not coordinates."""
    site = Site("residual", 0)
    monkeypatch.setattr(Model, "subspaces", lambda self, _location: {site: subspace_of(self, site, 2)})
    return llama


# ITI


def test_iti_fits_each_job_at_its_strength(llama):
    theta = iti.iti_theta(collect_activations(llama, QUESTIONS[:4]))
    jobs = [Job(PLACE, 3.0, 0), Job(heads((1, 2)), 5.0, 0)]
    fits = iti.fit(SimpleNamespace(model=llama, prepared={"iti": {"theta": theta}}), jobs, ITISettings(positions="all"))
    for fit, job in zip(fits, jobs, strict=True):
        expected = iti.iti_edit(llama, job.location, theta, alpha=job.strength, positions="all")
        assert fit.edit.to_bytes() == expected.to_bytes() and not fit.losses and not fit.message


def test_iti_takes_any_blocks_of_coordinates(llama):
    """Also where the blocks are a layer's neurons one by one."""
    theta = torch.randn(2, llama.shape.n_neurons, 1, generator=torch.Generator().manual_seed(0))
    edit = iti.iti_edit(llama, neurons((0, 3), (1, 7)), theta, alpha=2.0)
    assert edit.sites["neurons", 0].b.flatten().nonzero().tolist() == [[3]]
    assert edit.sites["neurons", 1].b[7, 0] == theta[1, 7, 0]


# Ablation


def shared_means(model, means):
    prepared = {f"{site.name}.{site.layer}": mean for site, mean in means.items()}
    return SimpleNamespace(model=model, prepared={"ablate": prepared})


def test_means_are_over_all_tokens(tiny_model):
    """Against plain forwards of each row; what a question's answers begin with in common counts once."""
    sites = every_site(tiny_model)
    got = ablate.collect_means(tiny_model, FOREST, sites, row_tokens=7)
    seen = {site: [] for site in sites}
    for row, columns in TOKENS.items():
        for site, x in site_vectors(tiny_model, torch.tensor([row]), sites).items():
            seen[site] += [x[t] for t in columns]
    assert len(seen["heads", 0]) == 13
    for site in sites:
        assert got[site].dtype == torch.float32
        torch.testing.assert_close(got[site], torch.stack(seen[site]).mean(dim=0), rtol=1e-5, atol=2e-6)


def test_a_prefix_is_read_but_not_counted(llama):
    """The primer, which all prompts begin with, in front of two questions."""
    prefix = (20, 21, 22)
    sites = [Site("residual", 1)]
    got = ablate.collect_means(llama, Forest(prefix, FOREST.trees), sites)
    seen = [
        x[len(prefix) + t]
        for row, columns in TOKENS.items()
        for x in site_vectors(llama, torch.tensor([prefix + row]), sites).values()
        for t in columns
    ]
    torch.testing.assert_close(got[sites[0]], torch.stack(seen).mean(dim=0), rtol=1e-5, atol=2e-6)


def test_ablation_puts_the_mean_in_the_place(llama):
    means = ablate.collect_means(llama, FOREST, every_site(llama))
    (fit,) = ablate.fit(shared_means(llama, means), [Job(PLACE, None, 0)], AblateSettings())
    masks = llama.subspaces(PLACE)
    assert fit.edit.sites.keys() == masks.keys() and fit.edit.positions == "all"
    for site, e in fit.edit.sites.items():
        h = torch.randn(len(e.b), generator=torch.Generator().manual_seed(1))
        assert torch.equal(edited_vector(h, e), torch.where(masks[site], means[site], h))


def test_ablation_of_a_plane(tilted):
    """h' has the mean's component in the plane, and h's outside it."""
    site = Site("residual", 0)
    means = ablate.collect_means(tilted, FOREST, [site])
    (fit,) = ablate.fit(shared_means(tilted, means), [Job(PLACE, None, 0)], AblateSettings())
    h, q = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)), subspace_of(tilted, site, 2)
    got = apply_edit(h, stack(tilted, [fit.edit]).sites[site], None, None)
    torch.testing.assert_close(got @ q, (means[site] @ q).expand(2, 5, 2), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got - got @ q @ q.T, h - h @ q @ q.T, rtol=1e-4, atol=1e-5)


# A given edit


def fit_given(model, edit, path, *draws, location=PLACE, seed=0):
    edit.save(path)
    jobs = [Job(location, None, seed, draw) for draw in draws]
    return [fit.edit for fit in given.fit(SimpleNamespace(model=model), jobs, GivenSettings(str(path)))]


def test_the_given_edit_is_the_files(llama, tmp_path):
    edit = random_edit(llama, PLACE, 0, rank=2, positions="answer")
    (same,) = fit_given(llama, edit, tmp_path / "edit.safetensors", None)
    assert same.to_bytes() == edit.to_bytes()


@pytest.mark.parametrize("make", [lambda m: random_edit(m, PLACE, 0, rank=2, positions="answer"),
                                  lambda m: ablation(m, PLACE)])  # fmt: skip
def test_a_draw_has_the_same_norm_in_other_directions_of_the_place(llama, tmp_path, make):
    edit, path = make(llama), tmp_path / "edit.safetensors"
    one, again, two = fit_given(llama, edit, path, 0, 0, 1)
    (other_seed,) = fit_given(llama, edit, path, 0, seed=1)
    assert one.to_bytes() == again.to_bytes() and one.positions == edit.positions
    for site, mask in llama.subspaces(PLACE).items():
        e, drawn = edit.sites[site], one.sites[site]
        assert torch.equal(drawn.a, e.a) and torch.equal(drawn.c, e.c)
        before, after = (x.b if x.mask is None else (x.mean * x.mask).unsqueeze(1) for x in (e, drawn))
        assert not after[~mask].any() and after[mask].all()
        torch.testing.assert_close(after.norm(dim=0), before.norm(dim=0))
        for x in (e, two.sites[site], other_seed.sites[site]):
            others = x.b if x.mask is None else (x.mean * x.mask).unsqueeze(1)
            assert torch.cosine_similarity(after, others, dim=0).abs().max() < 0.95


def test_draws_are_uniform_over_the_place(llama):
    """Each coordinate of a head's unit sphere has mean 0 and mean square 1 / width; columns are independent."""
    (mask,) = llama.subspaces(heads((0, 1))).values()
    generator = torch.Generator().manual_seed(0)
    site = SiteEdit(torch.zeros(4000, 32), mask.float().unsqueeze(1).expand(32, 4000), torch.zeros(4000))
    b = given.random_directions(site, mask, generator).b[mask] / mask.sum() ** 0.5
    assert (b.mean(dim=1).abs() < 5 / (8 * 4000) ** 0.5).all()
    assert ((b @ b.T / 4000 - torch.eye(8) / 8).abs() < 0.02).all()


def test_a_draw_in_a_plane_stays_there(tilted, tmp_path):
    q = subspace_of(tilted, Site("residual", 0), 2)
    edit = Edit({Site("residual", 0): SiteEdit.rank_one(torch.zeros(32), q @ torch.tensor([3.0, 4.0]), 1.0)})
    (drawn,) = fit_given(tilted, edit, tmp_path / "edit.safetensors", 3)
    b = drawn.sites["residual", 0].b
    torch.testing.assert_close(q @ (q.T @ b), b)
    assert b.norm().item() == pytest.approx(5.0, rel=1e-5)


def test_an_edit_of_another_place_is_refused(llama, tmp_path):
    path = tmp_path / "edit.safetensors"
    wrong = [random_edit(llama, heads((0, 2)), 0), ablation(llama, heads((1, 0), (1, 1))), residual_edit(llama, 0, 0)]
    for edit in wrong:
        for draw in (None, 0):
            with pytest.raises(LocationError, match="writes outside of"):
                fit_given(llama, edit, path, draw)
    with pytest.raises(ConfigError, match=r"methods\.given\.file"):
        given.fit(SimpleNamespace(model=llama), [], GivenSettings())


# Parameters


@pytest.mark.parametrize("reader", ["layer", "location"])
@pytest.mark.parametrize("rank", [1, 3])
def test_trainable_edits_start_at_nothing_and_stay_in_the_place(llama, rank, reader):
    trainable = TrainableEdit(llama, PLACE, rank=rank, reader=reader, seed=5)
    masks = llama.subspaces(PLACE)
    for site, e in trainable.to_edit().sites.items():
        assert e.a.shape == (rank, 32) and not e.b.any() and not e.c.any()
        assert bool(e.a[:, ~masks[site]].any()) == (reader == "layer") and e.a.abs().max() <= 32**-0.5
        first = TrainableEdit(llama, PLACE, reader=reader, seed=5).to_edit().sites[site]
        assert torch.equal(first.a[0], e.a[0])
    for b in trainable.b:
        b.data.normal_(generator=torch.Generator().manual_seed(0))
    for site, e in trainable.to_edit().sites.items():
        assert not e.b[~masks[site]].any() and e.b[masks[site]].all()


def test_a_constant_edit_adds_a_vector(llama):
    trainable = TrainableEdit(llama, PLACE, rank=3, constant=True)
    assert not any(a.requires_grad for a in trainable.a)
    for e in trainable.to_edit().sites.values():
        assert e.a.shape == (1, 32) and not e.a.any() and e.c.tolist() == [1.0]


@pytest.mark.parametrize("reader", ["layer", "location"])
def test_parameters_of_a_plane(tilted, reader):
    site = Site("residual", 0)
    q = subspace_of(tilted, site, 2)
    trainable = TrainableEdit(tilted, PLACE, rank=3, reader=reader)
    assert trainable.b[0].shape == (2, 3)  # W: one row per direction
    trainable.b[0].data = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    e = trainable.to_edit().sites[site]
    torch.testing.assert_close(e.b, 4 * q @ trainable.b[0].detach())  # 4 = sqrt(32 / 2)
    inside = torch.allclose(e.a @ q @ q.T, e.a, atol=1e-6)
    assert inside == (reader == "location")
    torch.testing.assert_close(onto(q, e.b), e.b)


def test_a_bank_of_trainable_edits_is_that_of_their_edits(llama):
    """Of ranks 1 and 3 at different places; gradients reach each one's own parameters and no other's."""
    edits = [TrainableEdit(llama, PLACE, rank=3, seed=1), TrainableEdit(llama, heads((1, 2)), seed=2)]
    for edit in edits:
        for b in edit.b:
            b.data.normal_(generator=torch.Generator().manual_seed(0))
    bank, plain = stack_trainable(edits), stack(llama, [edit.to_edit() for edit in edits])
    for site in plain.sites:
        for name in ("a", "b", "c"):
            assert torch.equal(getattr(bank.sites[site], name), getattr(plain.sites[site], name))
    with bank.applied(llama, torch.tensor([0, 1]), torch.ones(2, 6, dtype=torch.bool)):
        out = llama.lm(input_ids=random_ids(2, 6), use_cache=False).logits
    out[1].square().sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in edits[0].parameters())
    assert all(p.grad.any() for p in edits[1].parameters())


def test_a_method_whose_grid_is_no_setting_is_refused():
    with pytest.raises(
        ConfigError,
        match=r"grid = 'alpha' in the method 'ITI'; expected the setting to search over, a field of .*alphas",
    ):
        replace(METHODS["iti"], grid="alpha")
