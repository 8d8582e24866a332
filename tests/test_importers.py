"""Claims from every source: spellings, ranges, lists, tables, arrays, adapters, control vectors and circuits."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import gguf
import numpy as np
import pandas
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import locaudit
from locaudit.claims import Shape, parse_location, read_claim
from locaudit.cli.audit import _Run
from locaudit.cli.flags import parse
from locaudit.config import AuditConfig, parse_config
from locaudit.errors import ConfigError, LocationError
from locaudit.location import Location, Site
from locaudit.run.subject import settle_claim

SHAPE = Shape(n_layers=30, n_heads=9, n_kv_heads=3, head_dim=64, n_neurons=1536, width=576)
SCORES = np.random.default_rng(0).normal(size=(30, 9))
TOP = "3.2,7.5,12.0"
for _layer, _head in ((3, 2), (7, 5), (12, 0)):
    SCORES[_layer, _head] = 5 + _layer


@pytest.mark.parametrize(
    "text",
    [
        "14.3",
        "L14H3",
        "L14.H3",
        "l14 h3",
        "a14.h3",
        "(14, 3)",
        "[[14, 3]]",
        "[(14, 3)]",
        '["14.3"]',
        "{14: [3]}",
        "layer 14, head 3",
        "Layer14.Head3",
        "blocks.14.attn.hook_z[3]",
        "blocks.14.attn.hook_z[:, :, 3]",
        "(14.3)",
        "model.layers.14.self_attn head 3",
        "model.layers.14.self_attn[3]",
        "model.layers.14 Head 3",
        "transformer.h.14.attn.c_proj head 3",
        "blocks.14.attn.W_Q[3]",
    ],
)
@pytest.mark.parametrize("separator", [", ", ";", " ", "\n"])
def test_every_spelling_of_a_head(text, separator):
    assert read_claim(text).location.units == ((14, 3),)
    if text[0] not in "([{":
        other = text.replace("14", "15").replace("3", "7")
        assert read_claim(f"{text}{separator}{other}").location == Location(((14, 3), (15, 7)))


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("10-12.3", "10.3,11.3,12.3"),
        ("14.0-3, 15.7", "14.0,14.1,14.2,14.3,15.7"),
        ("14.*", "attention:14"),
        ("14.*; 15.*", "attention:14,15"),
        ("neuron:14.*", "mlp:14"),
        ("kv:14.1", "kv-group:14.1"),
        ("kv:14.*", "attention:14"),
        ("mlp:8", "mlp:8"),
        ("mlp:10-14", "mlp:10,11,12,13,14"),
        ("mlp: layers 10-12", "mlp:10,11,12"),
        ("mlp:8,mlp:9", "mlp:8,9"),
        ("m8 m9", "mlp:8,9"),
        ("residual:12", "residual:12"),
        ("attention:10-11", "attention:10,11"),
        ("heads: layers 10-11", "attention:10,11"),
        ("neuron:3.5-7", "neuron:3.5,3.6,3.7"),
        ("L3N5, layer 3 neuron 6", "neuron:3.5,3.6"),
        ("blocks.14.mlp.hook_post[117]", "neuron:14.117"),
        ("model.layers.14.mlp", "mlp:14"),
        ("blocks.14.hook_mlp_out", "mlp:14"),
        ("model.layers.14.self_attn.o_proj", "attention:14"),
        ("blocks.14.hook_resid_post", "residual:14"),
        ("[14.10, 15.7]", "14.10,15.7"),
    ],
)
def test_ranges_and_other_kinds(text, location):
    assert str(parse_location(text)) == location
    assert parse_location(location) == parse_location(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layers 10-14", "attention:10-14, mlp:10-14, residual:10-14; write which of them it is"),
        ("L14", "may be a part of a head's name .* or a whole layer"),
        ("14 3", "may be a part of a head's name .* or a whole layer"),
        ("[14, 3]", r"one head .* or two layers; expected \[\[14, 3\]\] for one head, or attention:14,3"),
        ("14.3, m8", "the kinds head, mlp in one claim; expected one kind of place"),
        ("14.*, 15.3", "the kinds attention, head in one claim"),
        ("neuron:L14H3", "the kinds neuron, head in one claim"),
        (["L14H3", "m8"], "the kinds head, mlp in one claim; expected one kind"),
        ("14.5-3", "range 5-3 .* smaller number first"),
        ("0-999999999.1", "at most 100000 numbers"),
        ("blocks.14.hook_resid_pre", "does not name a kind of place"),
        ("blocks.14.attn.hook_k[1]", "does not name a kind of place"),
        ("blocks.14.attn.hook_rot_k[1]", "does not name a kind of place"),
        ("blocks.14.attn.hook_k_input[1]", "does not name a kind of place"),
        ("blocks.14.attn.W_K[1]", "does not name a kind of place"),
        ("model.layers.14.self_attn.k_proj head 3", "does not name a kind of place"),
        ("model.layers.14.mlp head 3", "does not name a kind of place"),
        ("model.layers.14.self_attn.o_proj[3]", "does not name a kind of place"),
        ("model.layers.14.self_attn.q_proj[3]", "does not name a kind of place"),
        ("model.layers.14.post_attention_layernorm", "does not name a kind of place"),
        ("model.layers.14.self_attn.q_norm", "does not name a kind of place"),
        ("layers.14.ffn_norm", "does not name a kind of place"),
        ("transformer.h.14.ln_1", "does not name a kind of place"),
        ("model.vision.encoder.layers.14.self_attn", "does not name a kind of place"),
        ("blocks.14.hook_mlp_out[5]", "does not name a kind of place"),
        ("blocks.14.attn.hook_z[-1]", "the unit"),
        ("blocks.14.attn.hook_z[:3]", "the unit"),
        ("blocks.14.attn.hook_z[3:]", "the unit"),
        ("blocks.14.attn.hook_z[..., 3]", "the unit"),
        ("0-99999.0-99999", "10000000000 units; expected at most 100000"),
        ("head:mlp:14", "'mlp:14' after the kind head; expected one kind"),
        ("{14: [3], 15: [7], 14: [5]}", "a key twice"),
        ("x.npz[" + ",".join(map(str, range(99))) + "]@14", "no file of vectors"),
        ("claim.pkl", "a pickle, which can run code"),
        ("[" * 5000, "an empty location"),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused(text, words):
    with pytest.raises(LocationError, match=words):
        read_claim(text)


@given(st.sets(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=6), st.sampled_from([", ", ";"]))
def test_all_spellings_agree(units, separator):
    forms = ("{}.{}", "L{}H{}", "L{}.H{}", "a{}.h{}", "blocks.{}.attn.hook_z[{}]", "model.layers.{}.self_attn head {}")
    expected = Location(tuple(units))
    for form in forms:
        assert parse_location(separator.join(form.format(*unit) for unit in units)) == expected
    by_layer: dict[str, list[int]] = {}
    for layer, head in units:
        by_layer.setdefault(str(layer), []).append(head)
    assert parse_location(by_layer) == parse_location(json.dumps(by_layer)) == expected
    assert parse_location(pandas.DataFrame(list(units), columns=["layer", "head"])) == expected


def write_scores(path: Path) -> None:
    rows = [{"layer": i, "head": j, "score": float(x)} for (i, j), x in np.ndenumerate(SCORES)]
    writers = {
        "rows.json": lambda: path.write_text(json.dumps(rows)),
        "matrix.json": lambda: path.write_text(json.dumps(SCORES.tolist())),
        "layers.json": lambda: path.write_text(json.dumps({str(i): row.tolist() for i, row in enumerate(SCORES)})),
        "named.json": lambda: path.write_text(json.dumps({f"L{r['layer']}H{r['head']}": r["score"] for r in rows})),
        "a.csv": lambda: pandas.DataFrame(rows).to_csv(path),
        "b.csv": lambda: pandas.DataFrame(rows).rename(columns={"score": "my stat", "head": "head_idx"}).to_csv(
            path, index=False
        ),
        "c.csv": lambda: path.write_text(
            "\n".join(["unit,score", *(f"a{i}.h{j},{x}" for (i, j), x in np.ndenumerate(SCORES))])
        ),
        "x.npy": lambda: np.save(path, SCORES.astype(np.float32)),
        "x.npz": lambda: np.savez(path, scores=SCORES),
        "x.safetensors": lambda: save_file({"scores": torch.tensor(SCORES)}, path),
        "bf16.safetensors": lambda: save_file({"scores": torch.tensor(SCORES).bfloat16()}, path),
        "x.pt": lambda: torch.save(torch.tensor(SCORES), path),
        "dict.pt": lambda: torch.save({"scores": torch.tensor(SCORES)}, path),
    }  # fmt: skip
    writers[path.name]()


FILES = [
    "rows.json",
    "matrix.json",
    "layers.json",
    "named.json",
    "a.csv",
    "b.csv",
    "c.csv",
    "x.npy",
    "x.npz",
    "x.safetensors",
    "bf16.safetensors",
    "x.pt",
    "dict.pt",
]


@pytest.mark.parametrize("name", FILES)
def test_scores_need_a_rule(tmp_path, name):
    path = tmp_path / name
    write_scores(path)
    if name == "a.csv":  # pandas' index is a column of numbers, too
        assert "1, without a name, score" in str(pytest.raises(LocationError, read_claim, path).value)
    with pytest.raises(
        LocationError, match="every row counts as claimed; .* `claim_top_k` 16 or `claim_threshold` 0.7"
    ):
        read_claim(path)
    claim = read_claim(str(path), top_k=3)
    assert str(claim.location) == TOP and claim.format == path.suffix[1:]
    assert str(read_claim(path, threshold=8).location) == TOP
    assert str(read_claim(path, threshold=12).location) == "7.5,12.0"
    for rule in ({"top_k": 271}, {"threshold": 99}):
        with pytest.raises(LocationError, match="a rule that chooses among them; lower it"):
            read_claim(path, **rule)
    assert str(read_claim(path, top_k=2, threshold=8).location) == "7.5,12.0"
    assert str(read_claim(path, top_k=9, threshold=8).location) == TOP


@pytest.mark.parametrize("name", ["x.npy", "x.safetensors", "matrix.json"])
def test_a_matrix_of_scores_is_of_one_shape_of_model(tmp_path, name):
    path = tmp_path / name
    write_scores(path)
    claim = read_claim(path, top_k=3)
    assert claim.sizes == {"n_layers": 30, "n_heads": 9}
    claim.check(SHAPE)
    with pytest.raises(LocationError, match=r"about a model with n_heads = 9; expected n_heads = 12 \(this model's"):
        claim.check(Shape(30, 12, 3, 64, 1536, 576))
    settled, found = settle_claim(AuditConfig(claim=str(path), claim_top_k=3))
    assert (settled.claim, settled.claim_top_k, found) == (TOP, None, read_claim(str(path), top_k=3))
    assert settled.hash == AuditConfig(claim=TOP).hash


def test_scores_of_units_outside_the_model_are_of_another_model():
    """The best units may lie inside a smaller model."""
    claim = read_claim({"L14H3": 0.9, "L31H3": 0.1}, top_k=1)
    with pytest.raises(LocationError, match=r"head 31\.3; expected layers 0-29"):
        claim.check(SHAPE)
    claim.check(Shape(32, 9, 3, 64, 1536, 576))


def test_scores_of_other_kinds(tmp_path):
    neurons, layers = np.zeros((30, 1536)), np.arange(30.0)
    neurons[4, 700] = 1
    np.save(tmp_path / "n.npy", neurons)
    np.save(tmp_path / "l.npy", layers)
    assert str(read_claim(f"neuron:{tmp_path / 'n.npy'}", top_k=1).location) == "neuron:4.700"
    assert str(read_claim(f"mlp:{tmp_path / 'l.npy'}", top_k=2).location) == "mlp:28,29"
    assert str(read_claim(torch.tensor(SCORES).bfloat16(), top_k=3).location) == TOP
    assert str(read_claim(SCORES > 4).location) == TOP
    assert str(read_claim({14: {3: 0.5, 7: 0.25}}, threshold=0.4).location) == "14.3"
    assert str(read_claim({"14": 0.5, "15": 0.7}, "mlp", top_k=1).location) == "mlp:15"
    assert str(read_claim(np.array([[14, 3], [15, 7]])).location) == "14.3,15.7"


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([[0, 1], [1, 0]]), "may be a mask or a list of units"),
        (np.array([[14.0, 3.0], [15.0, 7.0]]), "may be scores of 2 layers or a list of units"),
        (np.zeros((2, 3, 4)), r"shape \(2, 3, 4\)"),
        (np.zeros((30, 9), dtype=int), r"for the kind head; expected scores \(floats\)"),
        (np.zeros((0, 2)), r"shape \(0, 2\)"),
        (np.zeros(30), r"shape \(30,\)"),
        (np.where(SCORES > 4, np.nan, SCORES), "a score that is no finite number, for 3.2"),
        (np.where(SCORES > 4, np.inf, SCORES), "a score that is no finite number, for 3.2"),
    ],
)
def test_arrays_that_are_no_claim(array, words):
    with pytest.raises(LocationError, match=words):
        read_claim(array, top_k=3)


@pytest.mark.parametrize("rule", [{"top_k": k} for k in (0, -1, 2.0, "2", True)] + [{"threshold": "0.5"}], ids=str)
def test_a_rule_is_a_number(rule):
    with pytest.raises(LocationError, match="top_k = .*a whole number from 1|threshold = '0.5'; expected a number"):
        read_claim(SCORES, **rule)
    assert str(read_claim(SCORES, top_k=np.int64(3), threshold=np.float32(8)).location) == TOP


@pytest.mark.parametrize("name", ["selected", "in_graph"])
def test_a_column_of_true_and_false_is_a_mask(tmp_path, name):
    frame = pandas.DataFrame({"layer": [14, 15, 16], "head": [3, 7, 1], name: [True, True, False]})
    frame.to_csv(tmp_path / "x.csv", index=False)
    for source in (tmp_path / "x.csv", frame, frame.to_dict("records")):
        assert str(read_claim(source).location) == "14.3,15.7"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layer,head,tested\n14,3,True\n15,7,False", "a choice of rows in the column tested"),
        ("layer,head,selected\n14,3,True\n15,7,", "a choice of rows in the column selected; .* no empty cell"),
        ("layer,head,in,mask\n14,3,True,True", "a choice of rows in the column in, mask"),
        ("layer,head,selected\n14,3,yes\n15,7,no", "a choice of rows in the column selected"),
        ("layer,head,tested\n14,3,True\n15,7,<NA>", "a choice of rows in the column tested"),
        ("layer,head,in,score\n14,3,True,0.5", "the column in, and numbers in the column score"),
        ('layer,head,score\n14,3,"1,5"\n15,7,"0,5"', "the number 1,5 in the column score; .* write 1,5 as 1.5"),
        ('layer,head,score\n14,3,"1,500.5"\n15,7,3\n15,8,"1,500"', "a score that is no finite number, for 14.3"),
        ("layer,head,rank\n14,3,1", "the column rank, in which low numbers are the best"),
        ("layer,head,P_value\n14,3,.01", "the column p_value, in which low numbers are the best"),
    ],
)
def test_columns_that_could_be_misread(tmp_path, text, words):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(LocationError, match=words):
        read_claim(tmp_path / "x.csv", top_k=1)


def test_a_rule_needs_scores():
    for source in ("14.3", Location(((14, 3),)), {"14": [3]}):
        with pytest.raises(LocationError, match="top_k = 1 for a claim without scores"):
            read_claim(source, top_k=1)
    with pytest.raises(ConfigError, match="claim_top_k = 3 without a claim"):
        settle_claim(AuditConfig(claim_top_k=3))
    several = [{"layer": 1, "head": 2, "gain": 0.5, "loss": 0.4}]
    with pytest.raises(LocationError, match="in the column gain, loss; expected one column of scores"):
        read_claim(several, top_k=1)
    assert str(read_claim([several[0] | {"Score": "70%"}], threshold=0.7).location) == "1.2"


def write_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps([(14, 3)]))


BAD = {
    "empty npy": ("x.npy", lambda path: path.write_bytes(b""), "which is empty"),
    "empty text": ("x.txt", lambda path: path.write_text(""), "which is empty"),
    "empty safetensors": ("x.safetensors", lambda path: path.write_bytes(b""), "which is empty"),
    "objects in npy": (
        "x.npy",
        lambda path: np.save(path, np.array([None]), allow_pickle=True),
        "allow_pickle=False.*not pickled objects",
    ),
    "pickle as pt": ("x.pt", write_pickle, "which cannot be read .*saved by torch.save"),
    "code in pt": ("x.pt", lambda path: torch.save(Path("x"), path), "cannot be read .*Weights only"),
    "pickle": ("x.pkl", write_pickle, "a pickle, which can run code when it is opened"),
    "bin": ("x.bin", write_pickle, "a pickle"),
    "pickle as npy": ("x.npy", write_pickle, "cannot be read"),
    "no safetensors": ("x.safetensors", lambda path: path.write_bytes(b"\x00" * 50), "cannot be read"),
    "no gguf": ("x.gguf", lambda path: path.write_bytes(b"\x00" * 50), "cannot be read .*a GGUF file"),
    "unknown": ("x.dat", lambda path: path.write_text("14.3"), "a file of unknown format.*--claim-format|claim_format"),
    "NaN in vectors": (
        "x.npz",
        lambda path: np.savez(path, **{"blocks.1.hook_resid_post": [np.nan, 1], "blocks.2.hook_resid_post": [1, 1]}),
        "blocks.1.hook_resid_post, which holds NaN",
    ),
    "two sizes": (
        "x.npz",
        lambda path: np.savez(path, **{"blocks.1.hook_resid_post": np.ones(2), "blocks.2.hook_resid_post": np.ones(3)}),
        "vectors of the sizes 2, 3",
    ),
    "a key twice": (
        "x.json",
        lambda path: path.write_text('{"1": [3], "2": [0], "1": [2]}'),
        "cannot be read .*twice the key 1.*JSON in which each object has a key once",
    ),
    "units or scores": (
        "x.txt",
        lambda path: path.write_text("1.17 0.12\n2.40 0.31\n"),
        "lines such as 1.17 0.12, which may be two units or a unit and its score",
    ),
    "units or scores above 1": (
        "x.txt",
        lambda path: path.write_text("1.17 3.1\n2.4 2.9\n0.3 2.2\n"),
        "lines such as 1.17 3.1, which may be two units or a unit and its score",
    ),
    "spelled units and scores": (
        "x.txt",
        lambda path: path.write_text("L14H3 0.91\nL15H7 0.85\n"),
        "lines such as L14H3 0.91, which may be two units or a unit and its score",
    ),
    "a unit and its score": ("x.txt", lambda path: path.write_text("14.3 0.91"), "lines such as 14.3 0.91"),
    "units of layer 0 or scores": ("x.txt", lambda path: path.write_text("0.3 0.9\n0.5 0.8"), "such as 0.3 0.9"),
    "rising units or scores": ("x.txt", lambda path: path.write_text("14.3 0.8\n15.7 1.0\n"), "such as 14.3 0.8"),
    "units as numbers": (
        "x.json",
        lambda path: path.write_text('[{"unit": 15.10, "score": 0.9}]'),
        "the number 15.1 as a unit; expected text, because the head 15.10 is not",
    ),
    "decimal commas": (
        "x.csv",
        lambda path: path.write_text("layer,head,score\n14,3,0,85\n15,7,0,91"),
        "column score, 4, without a name; expected one column of scores",
    ),
    "an index": (
        "x.csv",
        lambda path: path.write_text(",layer,head\n0,14,3\n1,15,7"),
        "numbers in the column 1, without a name; expected one column of scores",
    ),
    "yes and no": (
        "x.csv",
        lambda path: path.write_text("layer,head,significant\n14,3,yes\n15,7,no"),
        "a choice of rows in the column significant",
    ),
    "another part of the layer": (
        "x.csv",
        lambda path: path.write_text("layer,head,module\n14,3,attn\n15,7,mlp"),
        "'mlp' in a column, read as heads; expected rows of one kind",
    ),
    "heads in the rows of layers": (
        "x.json",
        lambda path: path.write_text('[{"layer": 14, "heads": [3, 7]}]'),
        r"heads = \[3, 7\]; expected one number or text in each cell",
    ),
    "low is good": (
        "x.csv",
        lambda path: path.write_text("layer,head,p.adj\n14,3,0.01\n15,7,0.9"),
        "column p.adj, in which low numbers are the best",
    ),
    "a range with a score": (
        "x.csv",
        lambda path: path.write_text("unit,score\n14.0-1,.5\n,.9\n16.1,.7"),
        "'14.0-1' in the column unit; expected one unit in each row",
    ),
    "a number of Python": ("x.csv", lambda path: path.write_text("layer,head,score\n14,3,1_0"), "without scores"),
    "true as text": (
        "x.json",
        lambda path: path.write_text('{"nodes": {"a1.h0": {"in_graph": "False"}, "a1.h1": {"in_graph": true}}}'),
        "a circuit with in_graph = 'False'; expected true or false",
    ),
    "NaN in json": ("x.json", lambda path: path.write_text("[[NaN, 0.5], [0.1, 0.2]]"), "no finite number, for 0.0"),
    "names that are no units": (
        "x.npz",
        lambda path: np.savez(path, a=np.ones(3), b=np.ones(3)),
        "the unit 'a'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "write", "words"), BAD.values(), ids=BAD)
def test_files_that_are_no_claim(tmp_path, name, write, words):
    write(tmp_path / name)
    with pytest.raises(LocationError, match=words) as caught:
        read_claim(tmp_path / name, top_k=1)
    assert name in str(caught.value)


def test_objects_that_are_no_claim():
    found = np.nonzero(np.array([[0, 1], [1, 0]]))
    for value, words in (
        (found, "a tuple of arrays; .*np.argwhere"),
        (np.ma.masked_array(SCORES, mask=np.zeros_like(SCORES)), "a masked array; .*np.argwhere"),
        (pandas.DataFrame({"head": [14.3, 15.10], "score": [0.1, 0.9]}), "the number 14.3 as a unit"),
        ({14.10: 0.9, 15.3: 0.5}, "the number 14.1 as a unit"),
        ("{14.10: 0.9}", "the number 14.1 as a unit"),
        ("L14H3 0.9\nL15H7 0.8", "such as L14H3 0.9, which may be two units"),
    ):
        with pytest.raises(LocationError, match=words):
            read_claim(value, top_k=1)
    assert read_claim({"14.3": np.float32(0.9), "15.7": np.float32(0.1)}, top_k=1).location.units == ((14, 3),)
    assert read_claim({14: [np.int64(3), np.int64(7)]}).location.units == ((14, 3), (14, 7))
    assert str(read_claim("MLP: 8").location) == "mlp:8"
    assert str(read_claim("model.decoder.layers.3.fc1").location) == "mlp:3"


def test_a_file_of_100_mb_is_refused_at_once(tmp_path):
    path = tmp_path / "x.json"
    with path.open("wb") as file:
        file.truncate(100 * 2**20)
    with pytest.raises(LocationError, match=r"x\.json of 100 MB; expected a claim file of at most 64 MB"):
        read_claim(path)


def test_vectors_of_another_width_are_of_another_model(tmp_path):
    np.savez(tmp_path / "x.npz", **{"blocks.1.hook_resid_post": np.ones(999)})
    with pytest.raises(LocationError, match="a model with width = 999; expected width = 576"):
        read_claim(tmp_path / "x.npz").check(SHAPE)
    for name, fitting in (("blocks.1.attn.hook_z[3]", (64, 576)), ("blocks.1.mlp", (1536, 576))):
        for n in (*fitting, 999):
            np.savez(tmp_path / "x.npz", **{name: np.ones(n)})
            claim = read_claim(tmp_path / "x.npz")
            if n in fitting:
                claim.check(SHAPE)
            else:
                with pytest.raises(LocationError, match="vectors of 999 numbers; expected .* numbers for"):
                    claim.check(SHAPE)


def test_other_tensors_and_errors_of_torch(tmp_path):
    torch.save(torch.tensor(SCORES).to_sparse(), tmp_path / "x.pt")
    assert str(read_claim(tmp_path / "x.pt", top_k=3).location) == TOP
    with warnings.catch_warnings(action="ignore"):  # of torch, about such tensors
        torch.save(torch.quantize_per_tensor(torch.rand(3, 4), 0.1, 0, torch.qint8), tmp_path / "x.pt")
        with pytest.raises(LocationError, match="a quantised tensor; .*dequantize"):
            read_claim(tmp_path / "x.pt")
    torch.save(Path("x"), tmp_path / "x.pt")
    assert "\x1b" not in str(pytest.raises(LocationError, read_claim, tmp_path / "x.pt").value)


def test_a_format_can_be_named(tmp_path):
    path = tmp_path / "heads.dat"
    path.write_text("L14H3\n15.7")
    assert read_claim(path, format="txt").location == Location(((14, 3), (15, 7)))
    with pytest.raises(ConfigError, match="'text'; expected one of json, csv, txt"):
        read_claim(path, format="text")
    flags = ["--claim", str(path), "--claim-format", "txt"]
    config, _ = settle_claim(parse(_Run(), "locaudit", "", flags).config)
    assert config.claim == "14.3,15.7"
    np.save(tmp_path / "x.npy", SCORES)
    flags = ["--claim", str(tmp_path / "x.npy"), "--claim-top-k", "3"]
    assert str(settle_claim(parse(_Run(), "locaudit", "", flags).config)[0].claim) == TOP


def test_yaml_lists():
    for text in (
        'claim: ["14.3", L15H7]', "claim: [[14, 3], [15, 7]]", "claim: {kind: head, units: [[14, 3], [15, 7]]}"
    ):  # fmt: skip
        assert settle_claim(parse_config(text))[0].claim == "14.3,15.7"
    assert settle_claim(parse_config("claim: {kind: mlp, units: [8, 9]}"))[0].claim == "mlp:8,9"
    for text in ("{14: [3], 15: [7]}", '{"14": [3], "15": [7]}', "[{layer: 14, head: 3}, {layer: 15, head: 7}]"):
        settled, given = settle_claim(parse_config(f"claim: {text}"))
        assert settled.claim == "14.3,15.7" == str(read_claim(yaml.safe_load(text)).location) and given is not None
    for scores in ("{14: {3: 0.5, 7: 0.25}}", "[{layer: 14, head: 3, score: 0.5}, {layer: 14, head: 7, score: 0.1}]"):
        assert settle_claim(parse_config(f"claim: {scores}\nclaim_top_k: 1"))[0].claim == "14.3"
        with pytest.raises(LocationError, match="every row counts as claimed"):
            settle_claim(parse_config(f"claim: {scores}"))
    for text in ("claim: [14.10, 15.7]", "claim: [[14, 3.0]]", "claim: [null]", "claim: [true]"):
        with pytest.raises(ConfigError, match=r"claim = .*14\.10 without quotes is the number 14\.1"):
            parse_config(text)
    with pytest.raises(ConfigError, match="put it in quotes"):
        parse_config("claim: 14.10")


def test_only_pt_files_need_torch(tmp_path):
    np.save(tmp_path / "x.npy", SCORES)
    save_file({"s": torch.tensor(SCORES)}, tmp_path / "x.safetensors")
    save_vector(tmp_path / "v.gguf", {14: np.ones(8, np.float32)})
    make_adapter(tmp_path / "adapter", ["o_proj"])
    code = (
        "import sys; from locaudit import read_claim; f = sys.argv[1]\n"
        "for x in ('/x.npy', '/x.safetensors'): read_claim(f + x, top_k=3)\n"
        "read_claim(f + '/v.gguf'); read_claim(f + '/adapter'); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


# Files of other tools


def save_vector(path: Path, directions: dict[int, np.ndarray], architecture: str = "controlvector") -> None:
    """As `repeng.ControlVector.export_gguf` writes it."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string(f"{architecture}.model_hint", "llama")
    writer.add_uint32(f"{architecture}.layer_count", len(directions))
    for layer, direction in directions.items():
        writer.add_tensor(f"direction.{layer}", direction)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_control_vector_is_a_claim_of_residual_streams(tmp_path):
    path, vector = tmp_path / "v.gguf", np.ones(576, np.float32)
    save_vector(path, {14: vector, 12: vector, 3: 0 * vector})
    claim = read_claim(path)
    assert str(claim.location) == "residual:12,14" and claim.sizes == {"width": 576}
    with pytest.raises(LocationError, match="width = 576; expected width = 64"):
        claim.check(Shape(30, 9, 3, 64, 1536, 64))
    for vectors, words in (
        ({14: np.nan * vector, 15: vector}, "NaN"),
        ({14: 0 * vector}, "no directions"),
        ({14: vector, 15: vector[:5]}, "several sizes"),
    ):
        save_vector(path, vectors)
        with pytest.raises(LocationError, match=words):
            read_claim(path)
    save_vector(path, {14: vector, 12: 2 * vector})
    sites = locaudit.load_edit(path).sites
    assert list(sites) == [Site("residual", 14), Site("residual", 12)]
    site, h = sites[Site("residual", 12)], torch.randn(576)
    assert torch.equal(site.b @ (site.c + site.a @ h), torch.full((576,), 2.0))  # h' = h + B (c + A h)
    save_vector(path, {14: vector}, "llama")
    with pytest.raises(LocationError, match="no directions; expected a control vector: the architecture controlvector"):
        read_claim(path)


def make_adapter(folder: Path, modules: list[str], method: str = "LoraConfig", family="llama", **options) -> None:
    peft = pytest.importorskip("peft")
    from tiny import make_lm  # only here, because transformers takes long to import

    with warnings.catch_warnings(action="ignore"):  # of peft, about transformers
        config = getattr(peft, method)(target_modules=modules, **options)
        peft.get_peft_model(make_lm(family), config).save_pretrained(folder)


def test_the_places_of_an_adapter_are_the_claim(tmp_path):
    folder = tmp_path / "adapter"
    make_adapter(folder, ["o_proj", "v_proj"], layers_to_transform=[1])
    assert str(read_claim(folder).location) == "attention:1"
    with pytest.raises(LocationError, match="a model with width = 32; expected width = 576"):
        read_claim(folder).check(SHAPE)
    for family, modules in (("gpt2", ["c_attn"]), ("gpt2", ["mlp.c_proj"]), ("gpt_neox", ["attention.dense"])):
        make_adapter(folder, modules, family=family)
        with pytest.raises(LocationError, match="a model with width = 32; expected width = 576"):
            read_claim(folder).check(SHAPE)
    make_adapter(folder, ["post_attention_layernorm"], "LNTuningConfig")
    with pytest.raises(LocationError, match="adapter that changes .*layernorm.*; train it on these modules only"):
        read_claim(folder)
    make_adapter(folder, ["down_proj"])
    location = read_claim(str(folder)).location
    assert str(location) == "mlp:0,1"
    make_adapter(folder, ["down_proj", "q_proj"], layers_to_transform=[0])
    with pytest.raises(LocationError, match="changes attention and mlp; .*write attention:.*adapter or write mlp:"):
        read_claim(folder)
    assert str(read_claim(f"mlp:{folder}").location) == "mlp:0"
    with pytest.raises(LocationError, match="adapter that changes .*embed_tokens"):
        make_adapter(folder, ["o_proj", "embed_tokens"])
        read_claim(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"0" * 9)
    with pytest.raises(LocationError, match="cannot be read"):
        read_claim(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(LocationError, match=r"without adapter_model\.safetensors"):
        read_claim(folder)


CIRCUIT = {
    "cfg": {"n_layers": 30, "n_heads": 9, "d_model": 576, "parallel_attn_mlp": False},
    "nodes": {
        "input": {"in_graph": True, "score": 0.0},
        "a14.h3": {"in_graph": True, "score": 0.9},
        "a15.h7": {"in_graph": True, "score": 0.7},
        "a15.h8": {"in_graph": False, "score": 0.8},
        "m8": {"in_graph": True, "score": 0.5},
        "logits": {"in_graph": True, "score": 0.0},
    },
    "edges": {
        "input->a14.h3<q>": {"score": 0.3, "in_graph": True},
        "a14.h3->a15.h7<v>": {"score": 0.2, "in_graph": True},
        "a15.h8->m8": {"score": -0.1, "in_graph": False},
        "m8->logits": {"score": -0.1, "in_graph": True},
    },
}
"""A graph in the format of EAP-IG's `Graph.to_json`."""


def test_circuits(tmp_path):
    path = tmp_path / "graph.json"
    older = CIRCUIT | {"nodes": {name: node["in_graph"] for name, node in CIRCUIT["nodes"].items()}}
    edges_only = {"cfg": CIRCUIT["cfg"], "edges": CIRCUIT["edges"]}
    for circuit in (CIRCUIT, older, edges_only):
        path.write_text(json.dumps(circuit))
        with pytest.warns(UserWarning, match="the circuit's heads; 1 MLPs are left out"):
            claim = read_claim(path)
        assert str(claim.location) == "14.3,15.7" and claim.sizes == {"n_layers": 30, "n_heads": 9}
        with pytest.warns(UserWarning, match="the circuit's MLPs; 2 heads are left out"):
            assert str(read_claim(f"mlp:{path}").location) == "mlp:8"
    outside = {name: node | {"in_graph": False} for name, node in CIRCUIT["nodes"].items()}
    path.write_text(json.dumps({"nodes": outside}))
    assert str(read_claim(path, top_k=2).location) == "14.3,15.8"
    path.write_text(json.dumps({"nodes": ["a14.h3"]}))
    with pytest.raises(LocationError, match="a circuit whose nodes or edges are a list"):
        read_claim(path)
    path.write_text(json.dumps({"nodes": {"input": {"in_graph": True}}}))
    with pytest.raises(LocationError, match="none of which puts a head in the graph"):
        read_claim(path)


def test_objects_and_files_give_an_audit(tmp_path):
    """Pairs in a data frame, scores in an array, a control vector as claim and as edit."""
    from locaudit.models import load_model
    from runs import small_config

    pairs = [
        {"prompt": f"Is {i} more than {i + 1}?", "chosen": f"No, {i} is less.", "rejected": "Yes."} for i in range(16)
    ]
    config = small_config(tmp_path, methods=["iti"], iti={"alphas": [2.0]})
    model = load_model(config.model)
    scores = np.zeros((2, model.shape.n_heads))
    scores[1, 2] = 1
    options = {"config": config, "progress": False, "whole_model": False}
    frame = pandas.DataFrame(pairs)
    result = locaudit.audit(model, frame, claim=scores, claim_top_k=1, out=tmp_path / "scores", **options)
    assert str(result.run.manifest.claim) == "1.2" and result.run.manifest.behaviour == "rows"
    with pytest.raises(LocationError, match="about a model with n_layers = 3; expected n_layers = 2"):
        locaudit.audit(model, frame, claim=np.eye(3, model.shape.n_heads) > 0, out=tmp_path / "other", **options)
    vector = tmp_path / "v.gguf"
    save_vector(vector, {1: np.ones(model.shape.width, np.float32)})
    options["methods"] = {"given": {"file": str(vector)}}
    result = locaudit.audit(model, frame, claim=vector, out=tmp_path / "vector", nulls=["anywhere"], **options)
    assert str(result.run.manifest.claim) == "residual:1"
    assert {trial.status for trial in result.run.trials} == {"ok"}
