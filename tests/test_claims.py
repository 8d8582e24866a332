from __future__ import annotations

import json
import random
from collections import Counter
from itertools import combinations
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from locaudit.claims import Shape, find_kind, parse_location
from locaudit.claims.controls import count_controls
from locaudit.claims.controls import sample_controls as sample_from
from locaudit.claims.kinds import BUILT_IN, N_BINS
from locaudit.errors import ConfigError, LocationError
from locaudit.location import Location, Site
from locaudit.registry import KINDS

CLAIM = Location(((14, 3), (15, 7)))
NEURONS = Location(((3, 117), (3, 5)), "neuron")
units = st.sets(st.tuples(st.integers(0, 50), st.integers(0, 5000)), min_size=1, max_size=8)
kinds = st.sampled_from(["head", "neuron"])


def shape_of(n_layers, n_units, n_groups=None, width=2):
    """A model of so many heads, and as many neurons."""
    return Shape(n_layers, n_units, n_groups or n_units, width, n_units, 8)


def unit_strata(null, n_layers, n_units, *, n_groups=None, values=None):
    return BUILT_IN["head"].strata(null, shape_of(n_layers, n_units, n_groups), values)


@pytest.mark.parametrize(
    "claim",
    [
        "14.3,15.7",
        " 15.7 , 14.3 ",
        "14:3,15:7",
        "heads:14.3,15.7",
        "14.3,15.7,",
        "14.3;15.7",
        "14.3 15.7",
        ["14.3", "15:7"],
        [(14, 3), [15, 7]],
        [("14", " 3"), "15.7"],
        {"units": [[14, 3], [15, 7]]},
        {"kind": "heads", "units": "14.3,15.7"},
        CLAIM,
    ],
)
def test_forms_of_a_claim(claim):
    assert parse_location(claim) == CLAIM


@pytest.mark.parametrize(
    "claim", ["neurons:3.117,3.5", {"kind": "neurons", "units": ["3.5", "3.117"]}, {"units": "neurons:3.5,3.117"}]
)
def test_forms_of_a_claim_of_neurons(claim):
    assert parse_location(claim) == NEURONS
    assert parse_location("3.5,3.117", "neurons") == parse_location("3.5,3.117", "neuron") == NEURONS


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.json", '"14.3,15.7"', CLAIM),
        ("a.json", "[[14, 3], [15, 7]]", CLAIM),
        ("a.json", '\ufeff{"units": ["14.3", "15.7"]}', CLAIM),
        ("a.json", '{"kind": "neurons", "units": [[3, 117], [3, 5]]}', NEURONS),
        ("a.csv", "layer,head\n14,3\n15,7\n", CLAIM),
        ("a.csv", "\ufefflayer,head\r\n14,3\r\n\r\n15,7", CLAIM),
        ("a.csv", "note,head, layer\nthe best one,3,14\n,7,15", CLAIM),
        ("a.csv", "layer,neuron\n3,5\n3,117", NEURONS),
        ("a.csv", '"layer","head"\n"14","3"\n15,7', CLAIM),
    ],
)
def test_files(tmp_path, name, text, expected):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert parse_location(path) == expected
    assert parse_location(str(path)) == expected


@given(units, kinds)
def test_text_round_trips(units, kind):
    location = Location(tuple(units), kind)
    assert parse_location(str(location)) == location
    assert parse_location(json.loads(json.dumps({"kind": kind, "units": location.units}))) == location
    assert list(location.units) == sorted(units)
    assert hash(location) == hash(Location(tuple(reversed(location.units)), kind))


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ("", "empty"),
        (" , ", "empty"),
        ([], "empty"),
        ({"units": []}, "empty"),
        ("14", "LAYER.UNIT"),
        ("mlp:14.3", "a layer's number"),
        ("residual:x", "a layer's number"),
        ("14.3.2", "LAYER.UNIT"),
        ("14.-3", "LAYER.UNIT"),
        ("-1.3", "LAYER.UNIT"),
        ("a.b", "LAYER.UNIT"),
        ("layers:14.3", "LAYER.UNIT"),
        ("14.²", "LAYER.UNIT"),
        ([14.3], "LAYER.UNIT"),
        ([14, 3], "LAYER.UNIT"),
        ([(14, 3, 2)], "LAYER.UNIT"),
        ([(14, 3.0)], "LAYER.UNIT"),
        ([(True, False)], "LAYER.UNIT"),
        ([("14", "²")], "LAYER.UNIT"),
        ([None], "LAYER.UNIT"),
        ("14.3,15.7,14.3", "14.3 named more than once"),
        ("14.3,014.03", "14.3 named more than once"),
        ({"heads": [[14, 3]]}, "these keys and no others"),
        ({"units": 5}, "expected"),
        ({"units": None}, "expected"),
        (5, "expected"),
        (None, "expected"),
        ("no/such/file.json", "not a file"),
        ("no/such/file.csv", "not a file"),
        ("x" * 300 + ".csv", "not a file"),
    ],
)
def test_errors_say_what_was_wrong(claim, message):
    with pytest.raises(LocationError, match=message):
        parse_location(claim)


def test_an_unknown_kind_is_named_with_the_near_ones():
    with pytest.raises(ConfigError, match="'hedd'; expected one of head, .*did you mean 'head'"):
        parse_location({"kind": "hedd", "units": [[14, 3]]})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"not json"),
        ("a.json", b""),
        ("a.json", b"5"),
        ("a.json", b"null"),
        ("a.json", b"[5]"),
        ("a.json", b"[14.3]"),
        ("a.json", b"\xff\xfe\x00"),
        ("a.csv", b""),
        ("a.csv", b"14,3\n15,7"),
        ("a.csv", b"layer,unit\n14,3"),
        ("a.csv", b"layer,head\n14"),
        ("a.csv", b"layer,head\n"),
        ("a.csv", b"layer,head\n14,x"),
        ("a.csv", b"\xff\xfe\x00"),
    ],
)
def test_bad_files_raise(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(LocationError):
        parse_location(path)


def test_a_csv_header_in_capitals_is_read(tmp_path):
    (tmp_path / "c.csv").write_text("Layer,Head\n14,3\n15,7\n")
    assert str(parse_location(tmp_path / "c.csv")) == "14.3,15.7"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layer;head\n14;3", "with semicolons between its columns; expected .*; save it with commas"),
        ("layer\thead\n14\t3", "with tabs between its columns; expected .*; save it with commas"),
        ("14,3\n15,7", "whose first line is 14,3; expected .*; write layer,head as its first line"),
        ("layer,unit\n14,3", "with the columns .'layer', 'unit'.; expected .*; use these names in its first line"),
        ("layer,head\n14,3\n15.0,7.0", "layer, head = 15.0, 7.0; expected two whole numbers.*write 14.0 as 14"),
        ("layer,head\n14", "layer, head = 14; expected two whole numbers"),
    ],
)
def test_a_csv_that_is_no_claim_says_what_to_change(tmp_path, text, words):
    path = tmp_path / "heads.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(LocationError, match=words):
        parse_location(path)


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("score,head, layer\n0.5,3,14\n0.4,7,15", "score"),
        ("layer,head,importance\n14,3,\n15,7,-1e-3", "importance"),
        ("layer,head,effect,note\n14,3,+0.5,best\n15,7,nan,", "effect"),
        (",layer,head,weight\n0,14,3,70%\n1,15,7,30%", "1, without a name, weight"),
        ("layer,head\n14,3,0.5\n15,7,0.4", "3, without a name"),
        ("layer,neuron,score\n3,5,0.5", "score"),
    ],
)
def test_a_csv_with_scores_is_not_taken_for_a_claim(tmp_path, text, column):
    path = tmp_path / "heads.csv"
    path.write_text(text, encoding="utf-8")
    words = rf"heads\.csv with numbers in the column {column}; expected .*keep only the rows .* drop that column"
    with pytest.raises(LocationError, match=words):
        parse_location(path)


@pytest.mark.parametrize(
    "text",
    [
        "[[14, 3, 0.5], [15, 7, 0.4]]",
        '[["14.3", 0.5], ["15.7", 0.4], [1, 2, 3]]',
        '[{"layer": 14, "head": 3, "score": 0.5}]',
        '{"kind": "mlp", "units": [[14, 0.5]]}',
        '{"kind": "mlp", "units": [{"14": 0.5}]}',
    ],
)
def test_json_with_scores_is_not_taken_for_a_claim(tmp_path, text):
    path = tmp_path / "heads.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(LocationError, match="the unit .*without a score, and keep only those that are the claim"):
        parse_location(path)


def test_negative_indices_raise():
    with pytest.raises(LocationError, match="negative"):
        Location(((0, -1),))


@given(units, st.integers(1, 7))
def test_subspaces_are_the_units_slices(units, width):
    location = Location(tuple((layer, unit % 40) for layer, unit in units))
    shape = shape_of(51, 40, width=width)
    masks = find_kind(location).subspaces(location, shape)
    assert {site.layer for site in masks} == {layer for layer, _ in location.units}
    assert {site.name for site in masks} == {"heads"}
    found = {(site.layer, x // width) for site, mask in masks.items() for x in mask.nonzero()[0].tolist()}
    assert found == set(location.units)
    assert sum(int(mask.sum()) for mask in masks.values()) == len(location) * width
    rest = find_kind(location).subspaces(location.rest(), shape)
    whole = find_kind(location).subspaces(Location.whole(), shape)
    assert len(whole) == 51 and all(mask.all() for mask in whole.values())
    assert all((masks.get(site, ~mask) ^ mask).all() for site, mask in rest.items())


def test_kinds_cut_sites_into_blocks():
    shape = Shape(n_layers=3, n_heads=6, n_kv_heads=2, head_dim=4, n_neurons=10, width=16)

    def chosen(text):
        location = parse_location(text)
        masks = find_kind(location).subspaces(location, shape)
        return {site: mask.nonzero()[0].tolist() for site, mask in masks.items()}

    assert chosen("2.1") == {Site("heads", 2): [4, 5, 6, 7]}
    assert chosen("kv-group:2.1") == {Site("heads", 2): list(range(12, 24))}
    assert chosen("attention:2") == {Site("heads", 2): list(range(24))}
    assert chosen("neuron:0.3,0.9") == {Site("neurons", 0): [3, 9]}
    assert chosen("mlp:0,2") == {Site("neurons", layer): list(range(10)) for layer in (0, 2)}
    assert chosen("residual:1") == {Site("residual", 1): list(range(16))}
    assert [KINDS[name].n_units(shape) for name in BUILT_IN] == [18, 6, 3, 30, 3, 3]
    sizes = {"0.1,0.2": 2, "kv-group:0.1": 3, "attention:1": 6, "neuron:0.3,0.9": 2, "mlp:1": 10, "residual:1": 6}
    for text, size in sizes.items():
        assert find_kind(parse_location(text)).heads_worth(parse_location(text), shape) == size
    assert find_kind(Location.whole()).heads_worth(Location.whole(), shape) == 18
    with pytest.raises(LocationError, match=r"MLP layer 3; expected layers 0-2 \(this"):
        chosen("mlp:3")


@pytest.mark.parametrize("scope", ["listed", "whole", "rest"])
def test_values_round_trip_without_any_registry(scope):
    units = () if scope == "whole" else (("refusal", "deceit") if scope == "rest" else ((3,), (1,)))
    location = Location(units, "unheard-of", scope)
    assert Location.from_json(json.loads(json.dumps(location.to_json()))) == location
    assert Location.from_json(None) is None
    texts = {"listed": "unheard-of:1,3", "whole": "unheard-of:*", "rest": "unheard-of:*-deceit,refusal"}
    assert str(location) == texts[scope]


def test_checking_names_what_lies_outside():
    heads = BUILT_IN["head"]
    heads.check(CLAIM, shape_of(16, 8))
    with pytest.raises(LocationError, match=r"got head 15\.7;.*layers 0-14 and heads 0-7"):
        heads.check(CLAIM, shape_of(15, 8))
    with pytest.raises(LocationError, match=r"15\.7.*heads 0-6"):
        heads.check(CLAIM, shape_of(16, 7))
    with pytest.raises(LocationError, match="expected some that are not claimed"):
        heads.check(every_head(2, 2).rest(), shape_of(2, 2))


def every_head(n_layers, n_units):
    return Location(tuple((layer, unit) for layer in range(n_layers) for unit in range(n_units)))


# Controls


def sample_controls(claim, n_layers, n_units, n, *, seed, null="anywhere", disjoint=True):
    return sample_from(claim, unit_strata(null, n_layers, n_units), n, seed=seed, disjoint=disjoint)


@given(st.data(), st.sampled_from(["anywhere", "layers"]), kinds)
def test_controls_are_distinct_disjoint_and_matched(data, null, kind):
    n_layers, n_units = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 6))
    every = [(layer, u) for layer in range(n_layers) for u in range(n_units)]
    chosen = data.draw(st.lists(st.sampled_from(every), min_size=1, max_size=4, unique=True))
    claim = Location(tuple(chosen), kind)
    available = len(allowed(claim, n_layers, n_units, null))
    if not available:
        return
    n = data.draw(st.integers(0, min(available, 30)))
    seed = data.draw(st.integers(0, 2**63))
    controls = sample_controls(claim, n_layers, n_units, n, seed=seed, null=null)
    assert len(controls) == len(set(controls)) == n
    for control in controls:
        assert len(control) == len(claim)
        assert control.kind == kind
        assert not set(control.units) & set(claim.units)
        find_kind(control).check(control, shape_of(n_layers, n_units))
        if null == "layers":
            assert Counter(layer for layer, _ in control.units) == Counter(layer for layer, _ in claim.units)
    assert controls == sample_controls(claim, n_layers, n_units, n, seed=seed, null=null)
    # A longer list begins with the shorter one, so that controls can be added to a run.
    more = sample_controls(claim, n_layers, n_units, min(n + 1, available), seed=seed, null=null)
    assert more[:n] == controls


def allowed(claim, n_layers, n_units, null):
    """Every control that may be drawn, by enumeration."""
    free = [(layer, u) for layer in range(n_layers) for u in range(n_units) if (layer, u) not in claim.units]
    per_layer = Counter(layer for layer, _ in claim.units)
    return [
        units
        for units in combinations(free, len(claim))
        if null == "anywhere" or Counter(layer for layer, _ in units) == per_layer
    ]


def test_seeds_give_different_controls():
    draws = {tuple(sample_controls(CLAIM, 30, 9, 5, seed=seed)) for seed in range(20)}
    assert len(draws) == 20


@pytest.mark.parametrize("null", ["anywhere", "layers"])
def test_every_control_can_be_asked_for_and_not_one_more(null):
    claim = Location(((0, 0), (0, 1), (1, 2)))
    every = allowed(claim, 2, 4, null)
    assert len(every) == (comb(5, 3) if null == "anywhere" else comb(2, 2) * comb(3, 1))
    assert count_controls(claim, unit_strata(null, 2, 4), disjoint=True) == len(every)
    for more in (0, 1, 100):
        controls = sample_controls(claim, 2, 4, len(every) + more, seed=0, null=null)
        assert len(controls) == len(every)
        assert {c.units for c in controls} == set(every)


def test_a_claim_of_most_of_the_model_has_no_controls():
    with pytest.raises(LocationError, match="leaves no room for a control"):
        sample_controls(every_head(2, 4), 2, 4, 1, seed=0)
    with pytest.raises(LocationError, match="leaves no room for a control"):
        sample_controls(Location(((0, 0), (0, 1), (0, 2))), 2, 4, 1, seed=0, null="layers")


@pytest.mark.parametrize("null", ["anywhere", "layers"])
@pytest.mark.parametrize("n", [1, 3])
def test_drawing_is_uniform(null, n):
    """Each allowed set is drawn equally often, in each place of the list (chi-square over many seeds)."""
    claim = Location(((0, 0), (1, 1)))
    every = allowed(claim, 2, 4, null)
    draws = [sample_controls(claim, 2, 4, n, seed=seed, null=null) for seed in range(3000)]
    for place in range(n):
        counts = Counter(draw[place].units for draw in draws)
        assert set(counts) == set(every)
        assert chisquare([counts[units] for units in every]).pvalue > 1e-3


def test_overlapping_controls_are_any_set_but_the_claim():
    claim = parse_location("0.0,0.1")
    found = sample_controls(claim, 1, 4, 5, seed=0, disjoint=False)
    assert len({x.units for x in found}) == 5
    assert claim.units not in {x.units for x in found}
    assert len(sample_controls(claim, 1, 4, 6, seed=0, disjoint=False)) == 5  # all there are
    assert len(sample_controls(claim, 1, 4, 2, seed=0)) == 1


def test_strata_are_layers_groups_of_shared_keys_or_tenths_by_value():
    assert unit_strata("kv-groups", 2, 6, n_groups=2) == {
        (lay, u): 2 * lay + u // 3 for lay in (0, 1) for u in range(6)
    }
    values = [[(7 * layer + 3 * unit) % 40 for unit in range(10)] for layer in range(4)]
    strata = unit_strata("norm", 4, 10, values=values)
    assert set(Counter(strata.values()).values()) == {40 // N_BINS}
    bins = [[values[layer][unit] for (layer, unit), stratum in strata.items() if stratum == i] for i in range(N_BINS)]
    assert all(max(low) <= min(high) for low, high in zip(bins, bins[1:], strict=False))
    with pytest.raises(LocationError, match="the null norm without values"):
        unit_strata("norm", 4, 10)


@given(st.data())
def test_matched_controls_have_as_many_units_in_each_stratum(data):
    values = [[data.draw(st.integers(0, 5)) for _ in range(5)] for _ in range(4)]
    null = data.draw(st.sampled_from(["anywhere", "layers", "kv-groups", "probe-accuracy", "norm"]))
    strata = unit_strata(null, 4, 5, n_groups=5 if null == "kv-groups" else None, values=values)
    claim = Location(tuple(data.draw(st.lists(st.sampled_from(sorted(strata)), min_size=1, max_size=5, unique=True))))
    if not count_controls(claim, strata):
        return
    for control in sample_from(claim, strata, 6, seed=data.draw(st.integers(0, 99))):
        assert Counter(strata[u] for u in control.units) == Counter(strata[u] for u in claim.units)


def test_overlapping_controls_keep_the_level_where_disjoint_ones_do_not():
    """The null: the claim is a random set too. A set scores as its best unit, which disjoint controls cannot hold."""
    rng = random.Random(0)
    rejected = {True: 0, False: 0}
    n_audits, size = 400, 12
    for audit in range(n_audits):
        quality = [rng.paretovariate(1) for _ in range(40)]
        claim = Location(tuple((0, u) for u in rng.sample(range(40), size)))
        for disjoint in rejected:
            controls = sample_controls(claim, 1, 40, 19, seed=audit, disjoint=disjoint)
            best = [max(quality[u] for _, u in place.units) for place in (claim, *controls)]
            rejected[disjoint] += (1 + sum(x >= best[0] for x in best[1:])) / 20 <= 0.05
    assert rejected[False] / n_audits <= 0.05
    assert rejected[True] / n_audits > 0.15
