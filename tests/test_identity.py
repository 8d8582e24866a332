"""What every audit assumes of a model is checked by running it: at load, and on each run's own questions."""

from __future__ import annotations

import re
import warnings
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from locaudit.behaviours.format import Prompt
from locaudit.errors import ModelError
from locaudit.location import Location
from locaudit.measure import forward, identity, residual
from locaudit.measure.activations import Activations, collect_activations
from locaudit.measure.forward import answer_log_probs, check_depth, check_length
from locaudit.measure.generation import differing_answers, generate_tokens
from locaudit.measure.identity import check_trees, hardest_trees
from locaudit.measure.tree import Forest, Tree, plant
from locaudit.methods.iti import iti_theta
from locaudit.methods.probes import fit_probes
from locaudit.models import ARCHITECTURES, Architecture, Model, wrap_model
from locaudit.models.identity import find_faults, tolerance
from locaudit.run import prepare
from locaudit.run.audit import run_audit
from locaudit.run.subject import check_subject, read_inputs
from locaudit.store.folder import read_run
from reference.generation import greedy
from reference.scoring import forest_log_probs
from runs import save_model, small_config
from tiny import CONFIGS, NAMES, VOCAB, fill, heads, make_lm, random_ids, tiny, tokenizer
from toy import QUESTIONS

_BASE = {**CONFIGS["llama"], "num_hidden_layers": 4}
_OLD = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = Architecture("model.layers", "self_attn.o_proj", "mlp.down_proj")
_FALCON = Architecture("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h")
_FORWARD = Architecture("model.layers", "self_attn.o_proj", "feed_forward.down_proj")
_TURNS = ["sliding_attention", "full_attention"] * 2
_LINEAR = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

UNLIKE_ROWS: dict[str, tuple[dict, Architecture]] = {
    "bloom": ({"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}, _FALCON),
    "falcon": ({**_OLD, "alibi": True}, _FALCON),
    "mpt": (
        {"vocab_size": VOCAB, "d_model": 32, "n_heads": 4, "n_layers": 2},
        Architecture("transformer.blocks", "attn.out_proj", "ffn.down_proj"),
    ),
    "openai-gpt": (
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4},
        Architecture("transformer.h", "attn.c_proj", "mlp.c_proj"),
    ),
    "deepseek_v32": (
        {
            **_BASE,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "index_head_dim": 16,
            "index_n_heads": 2,
            "index_topk": 64,
        },
        _LLAMA,
    ),
    "mamba": (
        {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
        Architecture("backbone.layers", "mixer.out_proj", "mixer.in_proj"),
    ),
    "qwen3_next": ({**_BASE, **_LINEAR, **_EXPERTS, "shared_expert_intermediate_size": 16}, _LLAMA),
    "qwen3_5_text": ({**_BASE, **_LINEAR}, _LLAMA),
    "lfm2": (
        {**_BASE, "layer_types": ["conv", "full_attention"] * 2},
        Architecture("model.layers", "self_attn.out_proj", "feed_forward.w2"),
    ),
    "jamba": (
        {
            **_BASE,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        _FORWARD,
    ),
    "granitemoehybrid": (
        {
            **_BASE,
            **_MAMBA,
            "layer_types": ["mamba", "attention"] * 2,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
        },
        Architecture("model.layers", "self_attn.o_proj", "shared_mlp.output_linear"),
    ),
    "nemotron_h": (
        {
            **_BASE,
            "layers_block_type": ["mamba", "attention", "mlp", "mamba"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "ssm_state_size": 8,
            "head_dim": 8,
        },
        Architecture("model.layers", "mixer.o_proj", "mixer.down_proj"),
    ),
    "falcon_h1": (
        {**_BASE, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8},
        _FORWARD,
    ),
}
"""Models that run answer trees wrongly or not at all, with the paths that a user would register."""

ABSOLUTE: dict[str, tuple[dict, Architecture]] = {
    "gpt_neo": (
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 256,
            "window_size": 256,
            "bos_token_id": 1,
            "eos_token_id": 1,
        },
        Architecture("transformer.h", "attn.attention.out_proj", "mlp.c_proj"),
    ),
    "opt": (CONFIGS["opt"], Architecture("model.decoder.layers", "self_attn.out_proj", "fc2")),
    "xglm": (
        {
            "vocab_size": VOCAB,
            "d_model": 32,
            "ffn_dim": 48,
            "num_layers": 2,
            "attention_heads": 4,
            "max_position_embeddings": 256,
            "eos_token_id": 1,
        },
        Architecture("model.layers", "self_attn.out_proj", "fc2"),
    ),
}
"""Models with a learned or sinusoidal vector for each position."""


def random_lm(model_type: str, seed: int = 0, **values):
    """A random model of any architecture that transformers has."""
    config = AutoConfig.for_model(model_type, **values)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(config)
    torch.random.set_rng_state(state)
    return fill(lm, seed)


@contextmanager
def wrapped(model_type: str, values: dict, architecture: Architecture, **changes):
    with ARCHITECTURES.temporary(model_type, architecture):
        yield wrap_model(random_lm(model_type, **{**values, **changes}), tokenizer(), f"tiny-{model_type}")


# At load


@pytest.mark.parametrize("name", UNLIKE_ROWS)
def test_a_model_that_cannot_run_trees_is_refused_by_name(name):
    expected = f"tiny-{name} \\({name}\\).*expected a model that runs answer trees.*choose a model with"
    with pytest.raises(ModelError, match=expected), wrapped(name, *UNLIKE_ROWS[name]):
        pass


def test_alibi_is_refused_in_16_bits_too():
    values, architecture = UNLIKE_ROWS["mpt"]
    with ARCHITECTURES.temporary("mpt", architecture), pytest.raises(ModelError, match="ALiBi positions"):
        wrap_model(random_lm("mpt", **values).bfloat16(), tokenizer())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_of_the_table_passes(name, dtype):
    model = tiny(name) if dtype == torch.float32 else wrap_model(make_lm(name).to(dtype), tokenizer())
    assert find_faults(model) == model.lacks == {}


def test_two_widths_of_heads_refuse_heads_only(tmp_path):
    """Gemma 4: 4 heads of 8 in one layer and of 16 in the next; "1.1" would be half of one head and half of another."""
    values = {
        **_BASE,
        "head_dim": 8,
        "layer_types": _TURNS,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
    }
    values["per_layer_config"] = {1: {"head_dim": 16}, 3: {"head_dim": 16}}
    with wrapped("gemma4_text", values, _LLAMA) as model:
        assert model.lacks == {"heads": "layers differ in the width of their heads (32, 64)"}
        for kind in ("head", "kv-group", "attention"):
            with pytest.raises(ModelError, match=f"kind {kind} .*differ in the width.*neuron, mlp, residual"):
                model.check_kind(kind)
        with pytest.raises(ModelError, match="kind head"):
            model.subspaces(heads((1, 1)))
        config = small_config(tmp_path, claim="1.1")
        with pytest.raises(ModelError, match="kind head"):
            read_inputs(config, model=model)
        with pytest.raises(ModelError, match="kind head"):
            check_subject(config, read_inputs(config), model)
        found = collect_activations(model, QUESTIONS[:2], kind="residual")
        assert found.values.shape[1:] == (4, 1, 32)
        assert set(model.subspaces(Location.whole("neuron"))) == {("neurons", layer) for layer in range(4)}


def test_a_stream_of_several_parts_refuses_residual_only():
    """Gemma 3n: layers pass on several streams (AltUp)."""
    values = {
        **_BASE,
        "head_dim": 8,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "altup_num_inputs": 2,
        "laurel_rank": 4,
        "num_kv_shared_layers": 0,
        "layer_types": _TURNS,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [48] * 4,
    }
    with wrapped("gemma3n_text", values, _LLAMA) as model:
        assert set(model.lacks) == {"residual"}
        with pytest.raises(ModelError, match="kind residual"):
            collect_activations(model, QUESTIONS[:2], kind="residual")
        assert not residual.is_resumable(model)
        assert check_trees(model, questions(model)) < 1e-4


def test_llama_4_runs_within_its_chunk():
    values = {**_BASE, "head_dim": 8, "intermediate_size_mlp": 48, "moe_layers": [], "attention_chunk_size": 64}
    with wrapped("llama4_text", values, _FORWARD) as model:
        assert model.lacks == {}
        assert check_trees(model, questions(model)) < 1e-4
        with pytest.raises(ModelError, match="attention chunk of 64"):
            check_length(model, 65, "a question")


def test_phi3_may_have_a_head_dim_of_its_own():
    model = wrap_model(make_lm("phi3", head_dim=12), tokenizer())
    assert (model.lacks, model.head_dim) == ({}, 12)
    assert check_trees(model, questions(model)) < 1e-4


def test_heads_of_another_width_than_the_config_says():
    lm = make_lm("qwen3")
    lm.config.head_dim = 8  # its projections have 4 heads of 12
    assert "reads 48 numbers, not 4 heads of 8" in wrap_model(lm, tokenizer()).lacks["heads"]


@pytest.mark.parametrize(
    ("name", "wrong", "site", "reason"),
    [
        ("llama", {"heads": "self_attn.q_proj"}, "heads", "does not depend on earlier tokens"),
        ("llama", {"heads": "self_attn.v_proj"}, "heads", "reads|does not depend on earlier tokens"),
        ("gpt2", {"heads": "attn.c_attn"}, "heads", "does not depend on earlier tokens"),
        ("llama", {"neurons": "mlp.up_proj"}, "neurons", "numbers, not"),
        ("llama", {"neurons": "self_attn.o_proj"}, "neurons", "are the same"),
        ("gpt2", {"neurons": "mlp.c_fc"}, "neurons", "numbers, not"),
    ],
)
def test_a_path_to_another_projection_is_found(name, wrong, site, reason):
    """All of these have a width that heads could have, and edits there change the logits."""
    paths = replace(ARCHITECTURES[name], **wrong)
    lacks = wrap_model(make_lm(name), tokenizer(), architecture=paths).lacks
    assert re.search(reason, lacks[site])


def test_paths_and_models_that_cannot_be_audited():
    with pytest.raises(ModelError, match="path of the layers, which is a LlamaModel.*architecture.layers"):
        wrap_model(make_lm("llama"), tokenizer(), architecture=Architecture("model", "self_attn.o_proj"))
    lm = make_lm("llama")
    lm.config.model_type = "diffllama"
    with pytest.raises(ModelError, match="two heads share their coordinates"):
        wrap_model(lm, tokenizer(), architecture=ARCHITECTURES["llama"])


def test_tokens_without_an_embedding_are_refused(llama):
    with pytest.raises(ModelError, match="got the token 9999999 .* embeddings in tiny-llama"):
        check_depth(llama, Forest((), (Tree((1, 2), ((3, 9999999),)),)))


def test_a_module_that_runs_twice_is_no_site():
    lm = make_lm("llama")
    for layer in lm.model.layers:
        layer.mlp.up_proj = layer.mlp.gate_proj
    with ARCHITECTURES.temporary("llama", Architecture("model.layers", "self_attn.o_proj", "mlp.gate_proj")):
        model = wrap_model(lm, tokenizer())
    assert "layer 0 2 times" in model.lacks["neurons"]


def test_an_edit_that_changes_nothing():
    lm = make_lm("llama")
    for layer in lm.model.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    assert "does not change the logits" in wrap_model(lm, tokenizer()).lacks["heads"]


def test_a_zero_edit_that_changes_something():
    """A module that is not computed from the hooked input only."""
    lm = make_lm("llama")
    for layer in lm.model.layers:
        down = layer.mlp.down_proj
        down.forward = lambda h, own=down.forward, down=down: own(h) + len(down._forward_pre_hooks)
    assert set(wrap_model(lm, tokenizer()).lacks.values()) == {"an edit with B = 0 changes the logits"}


def test_a_model_that_gives_nan():
    lm = make_lm("llama")
    torch.nn.init.constant_(lm.model.norm.weight, torch.nan)
    with pytest.raises(ModelError, match="log-probabilities are NaN"):
        wrap_model(lm, tokenizer())


def test_the_tolerance_grows_with_the_rounding():
    for dtype, expected in ((torch.float32, 1e-4), (torch.float16, 2**-5), (torch.bfloat16, 0.25)):
        assert tolerance(Model(make_lm("llama").to(dtype), tokenizer(), "")) == expected
    with warnings.catch_warnings(action="ignore"):
        lm = torch.ao.quantization.quantize_dynamic(make_lm("llama"), {torch.nn.Linear}, dtype=torch.qint8)
    assert tolerance(Model(lm, tokenizer(), "")) == 0.25


# On a run's own questions

LONG = " ".join(["No, the earth is not flat, and the capital of France is Paris."] * 3)


def questions(model, primer="") -> Forest:
    return plant(model.tokenizer, Prompt(primer=primer), [(q.text, q.answers) for q in QUESTIONS])


def test_the_hardest_trees_are_the_deepest_and_the_widest_row(llama):
    forest = questions(llama, LONG)
    shallow = Forest((), (Tree((5, 6), ((7, 8),)),))
    found = hardest_trees([shallow, Forest((), ()), forest])
    assert found.prefix == forest.prefix
    assert found.depth == forest.depth
    assert sum(map(len, found.trees)) > forward.ROW_LENGTH - max(map(len, forest.trees))


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_passes_on_questions(name):
    model = tiny(name)
    assert check_trees(model, hardest_trees([questions(model, LONG)])) <= 1e-5


def test_the_check_equals_the_slow_twin(monkeypatch, llama):
    """The rows that it compares are those of the reference: what differs by 1 nat per token is off by 1."""
    forest = hardest_trees([questions(llama)])
    expected = forest_log_probs(llama, forest)

    def off(*_args, **_options):
        return [x.unsqueeze(0) + torch.tensor([len(b) for b in t.branches])
                for x, t in zip(expected, forest.trees, strict=True)]  # fmt: skip

    monkeypatch.setattr(identity, "answer_log_probs", off)
    with pytest.raises(ModelError, match="1 nats per token between a tree"):
        check_trees(llama, forest)


def longrope(original: int):
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    return make_lm(
        "phi3",
        original_max_position_embeddings=original,
        rope_parameters={**rope, "original_max_position_embeddings": original},
    )


def test_longrope_is_refused_where_a_path_crosses_its_short_range(monkeypatch):
    """Primer and tree would run under different rotary factors."""
    model = wrap_model(longrope(64), tokenizer())
    short, long = questions(model), questions(model, LONG[:110])
    assert max(short.depth, len(long.prefix)) < 64 < long.depth
    assert check_trees(model, hardest_trees([short])) <= 1e-5
    with pytest.raises(ModelError, match="range of longrope positions of 64.*shorten prompt.primer from"):
        answer_log_probs(model, long)
    with pytest.raises(ModelError, match="longrope"):
        generate_tokens(model, (), [tuple(range(3, 50))], max_new_tokens=20)
    # The check by running sees it too.
    monkeypatch.setattr(forward, "_FIXED_ROPES", ("longrope",))
    with pytest.raises(ModelError, match="nats per token between a tree"):
        check_trees(model, hardest_trees([long]))


def test_dynamic_positions_end_where_they_begin_to_change():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 64}
    model = wrap_model(make_lm("llama", rope_parameters=rope), tokenizer())
    with pytest.raises(ModelError, match="range of dynamic positions of 64"):
        check_length(model, 65, "a question")


def test_a_window_tells_which_primer_fits(monkeypatch):
    """GPT-OSS attends to 128 tokens in every second layer."""
    values = {**_BASE, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": _TURNS}
    dense = make_lm("mistral", sliding_window=64)
    model = wrap_model(dense, tokenizer())
    forest = questions(model, LONG)
    room = 64 - (forest.depth - len(forest.prefix))
    expected = f"sliding window of 64.*prompt.primer from {len(forest.prefix)} to at most {room} tokens"
    with pytest.raises(ModelError, match=expected):
        answer_log_probs(model, forest)
    with pytest.raises(ModelError, match="sliding window of 64.*use no primer"):
        check_length(model, 200, "a question", 100)
    with ARCHITECTURES.temporary("gpt_oss", _LLAMA):
        lm = random_lm("gpt_oss", **values, sliding_window=16)
        assert lm.config.sliding_window == 16
    monkeypatch.setattr(identity, "answer_log_probs", without_check(monkeypatch))
    with pytest.raises(ModelError, match="nats per token between a tree"):
        check_trees(model, hardest_trees([forest]))


def without_check(monkeypatch):
    monkeypatch.setattr(forward, "check_depth", lambda *_: None)
    return answer_log_probs


def test_a_window_over_columns_is_found_by_running():
    """GPT-Neo's local layers count columns: a row of several trees is wider than any of its paths."""
    with wrapped("gpt_neo", *ABSOLUTE["gpt_neo"], window_size=100, max_position_embeddings=512) as model:
        forest = questions(model, LONG[:60])
        assert forest.depth < 100 < forest.n_tokens
        with pytest.raises(ModelError, match="nats per token between a tree.*use a shorter primer or none"):
            check_trees(model, hardest_trees([forest]))


def test_the_check_runs_once_per_run_folder(tmp_path, monkeypatch):
    ran = []
    real = prepare.check_trees
    monkeypatch.setattr(prepare, "check_trees", lambda *args: ran.append(args) or real(*args))
    config = small_config(tmp_path, claim="1.1", controls=1, methods=["iti"])
    for _ in range(2):
        run_audit(config, tmp_path / "run", progress=False)
    assert len(ran) == 1
    run_audit(config, tmp_path / "other", progress=False)
    assert len(ran) == 2


def test_a_run_whose_trees_differ_is_refused_before_the_first_trial(tmp_path, monkeypatch):
    save_model(tmp_path / "neo")
    config = small_config(tmp_path, claim="1.1", methods=["iti"])
    monkeypatch.setattr(identity, "tolerance", lambda _: -1.0)
    with pytest.raises(ModelError, match="nats per token between a tree"):
        run_audit(config, tmp_path / "run", progress=False)
    with read_run(tmp_path / "run") as store:
        assert store.records() == []


# Batches


@pytest.mark.parametrize("name", ABSOLUTE)
def test_left_padding_does_not_move_absolute_positions(name):
    values, architecture = ABSOLUTE[name]
    with wrapped(name, values, architecture, tie_word_embeddings=False, seed=3) as model:
        for primer in ("", "Say what is."):
            forest = questions(model, primer)
            prompts = [tree.prompt for tree in forest.trees]
            assert len({len(prompt) for prompt in prompts}) > 2
            batched = generate_tokens(model, forest.prefix, prompts, max_new_tokens=12)[0]
            assert batched == [greedy(model, forest.prefix + prompt, None, 12, {1}) for prompt in prompts]
            assert differing_answers(model, forest.prefix, prompts, max_new_tokens=12) == 0


def test_answers_that_depend_on_the_batch_are_counted_and_noted(tmp_path, monkeypatch):
    model = wrap_model(make_lm("llama", tie_word_embeddings=False).bfloat16(), tokenizer())
    calls = []

    def differing(_model, _prefix, prompts, **_limits):
        calls.append(len(prompts))
        return 2

    monkeypatch.setattr(prepare, "differing_answers", differing)
    config = small_config(tmp_path, claim="1.1", controls=1, methods=["iti"])
    for _ in range(2):
        run_audit(config, tmp_path / "run", model=model, progress=False)
    assert len(calls) == 1
    assert calls[0] <= prepare.N_COMPARED
    with read_run(tmp_path / "run") as store:
        (note,) = store.manifest.notes
    assert note.startswith(f"In bfloat16, rounding depends on the batch: 2 of {calls[0]} answers")
    monkeypatch.setattr(prepare, "differing_answers", lambda *_args, **_limits: 0)
    run_audit(config, tmp_path / "equal", model=model, progress=False)
    with read_run(tmp_path / "equal") as store:
        assert store.manifest.notes == ()


def test_answers_are_compared_with_those_of_one_question_alone(llama):
    forest = questions(llama)
    prompts = [tree.prompt for tree in forest.trees]
    assert differing_answers(llama, (), prompts, max_new_tokens=8) == 0
    lm = make_lm("llama", tie_word_embeddings=False)
    model = wrap_model(lm, tokenizer())
    head = lm.lm_head.forward
    # Rounding as coarse as can be: with more than one row, another token wins.
    lm.lm_head.forward = lambda h: head(h) if len(h) == 1 else head(h).roll(1, dims=-1)
    assert differing_answers(model, (), prompts, max_new_tokens=8) == len(prompts)


# Activations that are not numbers


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_activations_that_are_not_finite_stop_probes_and_iti(llama, value):
    found = collect_activations(llama, QUESTIONS)
    values = found.values.clone()
    values[found.question >= 5, 1, 2, 3] = value
    broken = replace(found, values=values)
    for fit in (fit_probes, iti_theta, lambda x: iti_theta(found, x)):
        with pytest.raises(ModelError, match="layer 1, for an answer to question 5"):
            fit(broken)


def test_a_model_that_overflows_stops_where_activations_are_read():
    model = wrap_model(make_lm("llama"), tokenizer())
    word = questions(model).trees[3].prompt[3]
    with torch.no_grad():
        model.lm.model.embed_tokens.weight[word] = torch.nan
    with pytest.raises(ModelError, match="layer 0, for an answer to question"):
        collect_activations(model, QUESTIONS)
    assert isinstance(collect_activations(tiny("llama"), QUESTIONS), Activations)
    assert random_ids(1, 1).shape == (1, 1)
