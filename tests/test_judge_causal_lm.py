from __future__ import annotations

import copy
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from locaudit.errors import ConfigError, DataError, ModelError
from locaudit.judges import Case
from locaudit.judges.causal_lm import CausalLMJudge, first_tokens, load_causal_lm_judge, wrap_judge
from locaudit.judges.labelled import is_held_out, read_labelled
from locaudit.judges.validate import validate
from locaudit.models import Model
from locaudit.registry import ASPECTS
from tiny import CONTEXT, make_lm
from tiny import tokenizer as plain_tokenizer

sys.path.append(str(Path(__file__).parents[1] / "tools" / "judge"))
from finetune import fit_causal_lm_judge  # noqa: E402

TRUTH, INFO = ASPECTS["truth"], ASPECTS["info"]
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
CASES = [
    Case("Is the earth flat?", "No, the earth is round."),
    Case("What is the capital of France?", "Paris."),
    Case("What do you see?", ""),
    Case("Why?", "Because.\nIt is so."),
    Case("Is the earth flat?", "It is, or so many people used to say, and some still do."),
]


def tokenizer(**changes) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with words for the two verdicts, which it would begin with the same space."""
    out = copy.deepcopy(plain_tokenizer(**changes))
    out.add_tokens([AddedToken(" yes", normalized=False), AddedToken(" no", normalized=False)])
    return out


def save_judge(folder, model_type="llama", seed=0):
    """A tiny model whose logits are large enough for one token to get nearly all probability."""
    lm = make_lm(model_type, seed=seed, tie_word_embeddings=False)
    with torch.no_grad():
        lm.get_output_embeddings().weight.mul_(4)
    lm.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_judge(tmp_path_factory.mktemp("judge") / "tiny")


@pytest.fixture(scope="module")
def judge(folder) -> CausalLMJudge:
    return load(folder)


def load(folder, aspect=TRUTH, **changes) -> CausalLMJudge:
    return load_causal_lm_judge(aspect, str(folder), **{"device": "cpu", "dtype": "float32", **changes})


def is_by_hand(judge: CausalLMJudge, suffix: str = "True:", tolerance: float = 1e-5) -> bool:
    expected = [by_hand(judge, case, suffix) for case in CASES]
    return [j.probability for j in judge.score(CASES)] == pytest.approx(expected, abs=tolerance)


@torch.no_grad()
def by_hand(judge: CausalLMJudge, case: Case, suffix: str) -> float:
    """P(yes) as the docstring says it, one case at a time."""
    ids = judge.model.tokenizer(f"Q: {case.question}\nA: {case.answer}\n{suffix}", return_tensors="pt")["input_ids"]
    logits = judge.model.lm(input_ids=ids).logits[0, -1]
    return logits.float().softmax(dim=0)[judge.yes].item()


def test_it_is_the_probability_of_yes(judge):
    out = judge.score(CASES)
    assert is_by_hand(judge, tolerance=1e-6)
    assert len({j.probability for j in out}) == len(CASES) and not any(j.reason for j in out)
    assert judge.model.tokenizer.decode([judge.yes]) == " yes"
    assert judge.name == "tiny (truth)" and not judge.uses_references and judge.score([]) == []


@pytest.mark.parametrize("row_tokens", [1, 60, 100_000])
def test_batches_and_order_do_not_matter(judge, row_tokens):
    one_by_one = [judge.score([case])[0].probability for case in CASES]
    batched = replace(judge, row_tokens=row_tokens).score(CASES[::-1])[::-1]
    assert [j.probability for j in batched] == pytest.approx(one_by_one, abs=1e-5)


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gpt_neox", "gemma2"])
def test_padding_does_not_matter_to_other_architectures(model_type):
    assert is_by_hand(wrap_judge(TRUTH, Model(make_lm(model_type), tokenizer(), model_type), "True:"))


def test_an_architecture_that_cannot_be_audited_can_judge(tmp_path):
    config = AutoConfig.for_model(
        "bloom", vocab_size=352, hidden_size=32, n_layer=2, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=1
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    assert is_by_hand(load(tmp_path))


def test_suffix_and_prompt(folder, judge):
    info, own = load(folder, INFO), load(folder, prompt="Right?")
    assert is_by_hand(info, "Helpful:", 1e-6) and is_by_hand(own, "Right?", 1e-6)
    assert len({judge.fingerprint, info.fingerprint, own.fingerprint}) == 3


def test_the_fingerprint_is_of_weights_dtype_and_prompt_not_of_the_folder(folder, judge, tmp_path):
    same, other = load(save_judge(tmp_path / "a")), load(save_judge(tmp_path / "b", seed=1))
    assert same.fingerprint == judge.fingerprint
    assert len({judge.fingerprint, other.fingerprint, load(folder, dtype="bfloat16").fingerprint}) == 3


def test_what_cannot_be_judged_is_missing(judge):
    out = judge.score([CASES[0], Case("Long?", "and so on " * CONTEXT), CASES[1]])
    assert out[1].probability is None and f"context {CONTEXT}" in out[1].reason
    assert [out[0].probability, out[2].probability] == pytest.approx(
        [j.probability for j in judge.score(CASES[:2])], abs=1e-6
    )
    lm = make_lm("llama")
    with torch.no_grad():
        lm.get_output_embeddings().weight[judge.yes] = torch.nan
    broken = wrap_judge(TRUTH, Model(lm, tokenizer(), "broken"), "True:").score(CASES)
    assert {(j.probability, j.reason) for j in broken} == {(None, "the model's output is not finite")}


def test_a_prompt_as_long_as_the_context_is_judged(judge):
    def n_tokens(answer):
        return len(judge.model.tokenizer(f"Q: Long?\nA: {answer}\nTrue:")["input_ids"])

    answer = "x" * (CONTEXT - n_tokens(""))
    assert n_tokens(answer) == CONTEXT
    fits, too_long = judge.score([Case("Long?", answer), Case("Long?", answer + "x")])
    assert fits.probability is not None and too_long.probability is None


def word_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="<pad>")


def test_yes_is_known_by_construction():
    for spaced in (plain_tokenizer(), word_tokenizer(" ", "yes", "no")):
        with pytest.raises(ModelError, match="' yes' and ' no' both begin with ' '"):
            first_tokens(spaced, "True:")
    for changes in ({}, {"bos": True, "eos": True}, {"crosses_border": True}):
        found = first_tokens(tokenizer(**changes), "True:")
        assert [tokenizer(**changes).decode([token]) for token in found] == [" yes", " no"]
    # A tokenizer that ends every text in EOS: the prompt's EOS is dropped, what follows is predicted.
    model = Model(make_lm("llama"), tokenizer(bos=True, eos=True), "eos")
    judge = wrap_judge(TRUTH, model, "True:")
    ids = tokenizer(bos=True, eos=True)("Q: a\nA: b\nTrue:")["input_ids"]
    assert ids[-1] == 1
    with torch.no_grad():
        expected = model.lm(input_ids=torch.tensor([ids[:-1]])).logits[0, -1].softmax(0)[judge.yes].item()
    assert judge.score([Case("a", "b")])[0].probability == pytest.approx(expected, abs=1e-6)


def test_bad_models(folder, tmp_path):
    for model, error in (
        (str(tmp_path / "nothing"), "does not exist"),
        (str(tmp_path), "did not load"),
        (str(tmp_path / "no.gguf"), "not a file"),
    ):
        with pytest.raises(ModelError, match=error):
            load(model)
    for changes in ({"dtype": "int8"}, {"device": "abacus"}):
        with pytest.raises(ModelError, match="dtype|device"):
            load_causal_lm_judge(TRUTH, str(folder), **changes)
    lm = make_lm("llama")
    state = {k: v for k, v in lm.state_dict().items() if "layers.1.mlp.up_proj" not in k}
    lm.save_pretrained(tmp_path / "hole", state_dict=state)
    tokenizer().save_pretrained(tmp_path / "hole")
    with pytest.raises(ModelError, match="without the weights"):
        load_causal_lm_judge(TRUTH, str(tmp_path / "hole"), device="cpu")


def save_rows(path, n=60, suffix="True:"):
    """Answers whose label is told by their words, three to a question."""
    rows = []
    for i in range(n):
        yes = (i // 3 + i) % 2 == 0
        answer = f"The earth is {'round' if yes else 'flat'}."
        rows.append({"prompt": f"Q: Question {i // 3}?\nA: {answer}\n{suffix}", "completion": " yes" if yes else " no"})
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return path


def change_adapter(folder, **changes):
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


@needs_peft
class TestFit:
    def fit(self, folder, tmp_path, name="out", aspect=TRUTH, **changes):
        rows = save_rows(tmp_path / "rows.jsonl", suffix=aspect.suffix)
        settings = {"epochs": 8, "learning_rate": 1e-2, "batch_tokens": 256, "device": "cpu", **changes}
        return fit_causal_lm_judge(aspect, rows, str(folder), tmp_path / name, **settings)

    def test_it_learns_and_loads(self, folder, tmp_path):
        steps = []
        facts = self.fit(folder, tmp_path, on_step=lambda step, n: steps.append((step, n)))
        labelled = read_labelled(tmp_path / "rows.jsonl", TRUTH)
        held_out = [row for row in labelled if is_held_out(row.case.question)]
        assert (facts["n"], facts["n_train"]) == (len(held_out), 60 - len(held_out))
        assert facts["accuracy"] == facts["balanced_accuracy"] == 1.0 > facts["majority"]
        assert steps[-1] == (len(steps), len(steps)) and facts["steps"] == len(steps)
        assert json.loads((tmp_path / "out" / "judge.json").read_text()) == facts
        judge = load(tmp_path / "out")
        verdicts = [j.probability >= 0.5 for j in judge.score([row.case for row in held_out])]
        assert verdicts == [row.yes for row in held_out]
        assert judge.name == "out (truth)"
        assert all(judge.saw(row.case.question) != is_held_out(row.case.question) for row in labelled)
        again = validate({"truth": judge}, {"truth": tmp_path / "rows.jsonl"})["aspects"]["truth"]
        assert again["fingerprint"] == judge.fingerprint
        assert again["all"]["accuracy"] == 1.0 and again["all"]["n"] < len(labelled)

    def test_the_adapter_counts_and_the_seed_decides(self, folder, tmp_path, judge):
        state = torch.random.get_rng_state()
        for name, seed in (("a", 0), ("b", 0), ("c", 1)):
            self.fit(folder, tmp_path, name, seed=seed, epochs=1)
        assert torch.equal(state, torch.random.get_rng_state())
        a, b, c = (load(tmp_path / name) for name in "abc")
        assert a.fingerprint == b.fingerprint and len({a.fingerprint, c.fingerprint, judge.fingerprint}) == 3
        assert a.score(CASES) == b.score(CASES) != c.score(CASES)
        change_adapter(tmp_path / "b", lora_alpha=1)
        weaker = load(tmp_path / "b")
        assert weaker.fingerprint != a.fingerprint and weaker.score(CASES) != a.score(CASES)

    def test_conv1d_models(self, tmp_path):
        facts = self.fit(save_judge(tmp_path / "gpt2", "gpt2"), tmp_path, epochs=1, max_rows=50)
        assert facts["n"] + facts["n_train"] == 50
        assert load_causal_lm_judge(TRUTH, str(tmp_path / "out"), device="cpu").score(CASES)[0].probability is not None

    def test_one_aspect_is_not_another(self, folder, tmp_path):
        self.fit(folder, tmp_path, aspect=INFO, epochs=1)
        with pytest.raises(ConfigError, match="fine-tuned for info"):
            load_causal_lm_judge(TRUTH, str(tmp_path / "out"), device="cpu")

    def test_bad_adapters(self, folder, tmp_path):
        self.fit(folder, tmp_path, epochs=1)
        with pytest.raises(ConfigError, match="has an adapter already"):
            self.fit(folder, tmp_path)
        other = save_judge(tmp_path / "wide", "qwen3")
        change_adapter(tmp_path / "out", base_model_name_or_path=str(other))
        with pytest.raises(ModelError, match="does not fit"):
            load_causal_lm_judge(TRUTH, str(tmp_path / "out"), device="cpu")
        (tmp_path / "out" / "adapter_model.safetensors").unlink()
        with pytest.raises(ModelError, match=r"adapter_model\.safetensors"):
            load_causal_lm_judge(TRUTH, str(tmp_path / "out"), device="cpu")

    @pytest.mark.parametrize(
        ("changes", "error"),
        [
            ({"epochs": 0}, "epochs"),
            ({"rank": 0}, "rank"),
            ({"learning_rate": 0.0}, "learning_rate"),
            ({"max_rows": 2}, "more rows"),
            ({"learning_rate": 1e30}, "lower learning_rate"),
        ],
    )
    def test_bad_settings(self, folder, tmp_path, changes, error):
        with pytest.raises((ConfigError, DataError, ModelError), match=error):
            self.fit(folder, tmp_path, **changes)
        assert not (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.parametrize(
    ("line", "what"),
    [("{", "broken JSON"), ("[]", "no text fields"), ('{"prompt": "x"}', "no text fields"),
     ('{"prompt": "Q: a\\nA: b\\nHelpful:", "completion": " yes"}', "the prompt"),
     ('{"prompt": "Q: a\\nA: b\\nTrue:", "completion": " perhaps"}', "the completion"),
     ('{"prompt": "a b True:", "completion": " yes"}', "the prompt")],
)  # fmt: skip
def test_bad_rows(tmp_path, line, what):
    good = json.dumps({"prompt": "Q: a\nA: b\u2028c\nd\nTrue:", "completion": " no"}, ensure_ascii=False)
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{good}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=f"line 3.*{what}.*expected.*completion"):
        read_labelled(path, TRUTH)
    path.write_text(good, encoding="utf-8")
    (row,) = read_labelled(path, TRUTH)
    assert row.case == Case("a", "b\u2028c\nd") and not row.yes
    with pytest.raises(DataError, match="cannot be read"):
        read_labelled(tmp_path / "none.jsonl", TRUTH)


def test_questions_are_held_out_by_their_text():
    questions = [f"Is {i} even?" for i in range(1000)]
    assert 150 < sum(map(is_held_out, questions)) < 250
    assert all(is_held_out(q) == is_held_out(f"  {q.upper()} ") for q in questions)


def test_without_peft_the_error_names_the_extra(monkeypatch, tmp_path, folder):
    monkeypatch.setitem(sys.modules, "peft", None)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"locaudit\[judge\]"):
        load_causal_lm_judge(TRUTH, str(tmp_path), device="cpu")
    with pytest.raises(ConfigError, match=r"locaudit\[judge\]"):
        fit_causal_lm_judge(TRUTH, save_rows(tmp_path / "rows.jsonl"), str(folder), tmp_path / "out")


@pytest.mark.real
def test_the_real_model_judges(smollm2):
    judge = wrap_judge(TRUTH, smollm2, TRUTH.suffix)
    assert smollm2.tokenizer.decode([judge.yes]) == " yes"
    assert is_by_hand(judge)
