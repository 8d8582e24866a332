from __future__ import annotations

from copy import deepcopy
from datetime import datetime

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from locaudit.behaviours.format import Prompt
from locaudit.edits import stack
from locaudit.errors import DataError, ModelError
from locaudit.location import ROLES
from locaudit.measure import tree as tree_module
from locaudit.measure.forward import answer_log_probs, batches, branch_sums, token_log_probs
from locaudit.measure.tree import Forest, Tree, collate, encode_tree, pack, plant
from locaudit.models import wrap_model
from reference.scoring import answer_log_prob, forest_log_probs
from tiny import CHAT, CONTEXT, NAMES, chat_tokenizer, has_sdpa, heads, make_lm, neurons, random_edit, tiny, tokenizer

QUESTIONS = [
    ("What is the capital of France?", ["Paris", "The capital is Rome.", "No"]),
    ("Is the earth flat?", ["No, the earth is round.", "Yes"]),
    ("What?", ["Nothing", "A", "A B", "Nothing in particular happens."]),
]
PRIMER = "Q: Is it?\nA: No, it is round."


def forest_of(model, primer="", questions=QUESTIONS):
    return plant(model.tokenizer, Prompt(primer=primer), questions)


def three_edits(model):
    """Heads and neurons, in different layers, with both position policies."""
    return [
        random_edit(model, heads((0, 1), (1, 2)), 1),
        random_edit(model, heads((1, 0)), 2, positions="answer"),
        random_edit(model, neurons((0, 3), (0, 4), (1, 7)), 3, constant=False, positions="answer"),
    ]


def assert_same(got, expected, tolerance=1e-5):
    """Equal within `tolerance` nats, and two units in the last place of a float32 sum."""
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2.4e-7, atol=tolerance)


@pytest.mark.parametrize(
    ("name", "attention"),
    [(name, attention) for name in NAMES for attention in ("sdpa", "eager") if attention == "eager" or has_sdpa(name)],
)
def test_tree_equals_one_row_per_answer(name, attention):
    model = tiny(name, attention)
    assert model.lm.config._attn_implementation == attention
    edits = three_edits(model)
    for primer in ("", PRIMER):
        forest = forest_of(model, primer)
        assert bool(forest.prefix) == bool(primer)
        base = forest_log_probs(model, forest)
        assert_same([x[0] for x in answer_log_probs(model, forest)], base)
        banked = answer_log_probs(model, forest, stack(model, edits))
        for k, edit in enumerate(edits):
            expected = forest_log_probs(model, forest, edit)
            assert_same([x[k] for x in banked], expected)
            assert max((x - y).abs().max() for x, y in zip(expected, base, strict=True)) > 0.1, "the edit does nothing"
        if not primer:
            alone = answer_log_probs(model, forest, stack(model, edits[1:2]))
            assert_same([x[0] for x in alone], [x[1] for x in banked])


def test_order_batch_size_and_padding_do_not_matter(llama):
    forest = forest_of(llama, PRIMER, QUESTIONS * 2)
    bank = stack(llama, three_edits(llama))
    once = answer_log_probs(llama, forest, bank, row_tokens=10**6)
    assert_same(answer_log_probs(llama, forest, bank, row_tokens=1), once)  # one row a forward: no padding
    assert_same(answer_log_probs(llama, forest, bank, row_tokens=300), once)
    backwards = Forest(forest.prefix, forest.trees[::-1])
    assert_same(answer_log_probs(llama, backwards, bank)[::-1], once)
    flipped = Forest(forest.prefix, tuple(Tree(t.prompt, t.branches[::-1]) for t in forest.trees))
    assert_same([x.flip(1) for x in answer_log_probs(llama, flipped, bank)], once)


def test_padding_holds_any_token(llama):
    trees = forest_of(llama).trees
    rows = torch.zeros(len(trees), dtype=torch.long)
    zero, other = (
        token_log_probs(llama, collate([[tree] for tree in trees], pad_id=pad), None, rows) for pad in (0, 77)
    )
    assert torch.equal(zero, other)


def test_a_forest_of_one_question(llama):
    for primer in ("", PRIMER):
        forest = forest_of(llama, primer, QUESTIONS[:1])
        assert forest.trees[0].prompt, "the prefix took the whole prompt"
        assert_same([x[0] for x in answer_log_probs(llama, forest)], forest_log_probs(llama, forest))


def test_duplicate_answers_and_shared_beginnings_get_their_own_branches(llama):
    forest = forest_of(llama, questions=[("Is it?", ["No", "No", "No, it is not."])])
    (values,) = answer_log_probs(llama, forest)
    assert values[0, 0] == pytest.approx(values[0, 1].item(), abs=1e-6)
    assert values[0, 2] < values[0, 0]


def test_branch_probabilities_are_a_distribution(llama):
    """All continuations of one token: their probabilities sum to 1."""
    prompt = tuple(llama.tokenizer("Q: Is it?\nA:")["input_ids"])
    tree = Tree(prompt, tuple((i,) for i in range(llama.config.vocab_size)))
    (values,) = answer_log_probs(llama, Forest((), (tree,)))
    assert values.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_chain_rule(llama):
    """log p(xy) = log p(x) + log p(y | x), the second from a longer prompt."""
    prompt, x, y = (20, 21, 22), (30, 31), (40, 41, 42)
    one = answer_log_probs(llama, Forest((), (Tree(prompt, (x + y, x)),)))[0][0]
    two = answer_log_probs(llama, Forest((), (Tree(prompt + x, (y,)),)))[0][0]
    assert one[0].item() == pytest.approx((one[1] + two[0]).item(), abs=1e-5)


# Tokenisation


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("crosses_border", [False, True])
@pytest.mark.parametrize(
    ("prompt", "answers"),
    [
        ("Q: Is the earth flat?\nA:", [" The capital", " Paris", " A", " 😀é"]),
        ("Q: Is the earth flat?", ["\nA: No", "\n"]),  # "?\n" merges
        ("Q: Is the earth flat?\nA", [":", ": Paris"]),
    ],
)
def test_answers_decode_to_their_text(prompt, answers, crosses_border, bos, eos):
    tok = tokenizer(crosses_border=crosses_border, bos=bos, eos=eos)
    tree = encode_tree(tok, prompt, answers)
    for answer, branch in zip(answers, tree.branches, strict=True):
        assert tok.decode(branch) == answer
        assert tok.eos_token_id not in branch
    assert tok.decode(tree.prompt) == ("<bos>" if bos else "") + prompt
    assert tok.eos_token_id not in tree.prompt


def test_the_border_really_is_merged_across():
    tok = tokenizer(crosses_border=True)
    prompt, answer = "Q: Is the earth flat?\nA:", " The capital"
    joint, head = tok(prompt + answer)["input_ids"], tok(prompt)["input_ids"]
    assert joint[: len(head)] != head
    tree = encode_tree(tok, prompt, [answer])
    assert tree.prompt == tuple(head)
    assert tree.branches[0] == tuple(tok(answer)["input_ids"])


@given(st.text(min_size=1), st.text(min_size=1), st.booleans(), st.booleans(), st.booleans())
def test_any_text_decodes_back(prompt, answer, crosses_border, bos, eos):
    for surrogate in prompt + answer:
        if 0xD800 <= ord(surrogate) < 0xE000:
            return
    tok = tokenizer(crosses_border=crosses_border, bos=bos, eos=eos)
    tree = encode_tree(tok, prompt, [answer])
    assert tok.decode(tree.branches[0]) == answer
    assert tok.decode(tree.prompt) == ("<bos>" if bos else "") + prompt


def test_nothing_special_where_the_template_brings_it():
    tok = tokenizer(bos=True, eos=True)
    tree = encode_tree(tok, "Q: Is it?", [" No"], special=False)
    assert not {tok.eos_token_id, 2} & set(tree.prompt + tree.branches[0])


def test_empty_texts_are_refused():
    with pytest.raises(DataError, match="without tokens"):
        encode_tree(tokenizer(), "", ["a"])
    with pytest.raises(DataError, match="without tokens"):
        encode_tree(tokenizer(), "a", [""])


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_prefix_is_the_shared_primer(bos, eos):
    tok = tokenizer(bos=bos, eos=eos)
    alike = [("Is it round?", ["No"]), ("Is it flat?", ["No", "Yes"])]
    for questions in (alike, alike[:1], alike[:1] * 2, QUESTIONS):
        prompt = Prompt(primer=PRIMER)
        forest = plant(tok, prompt, questions)
        assert tok.decode(forest.prefix) == ("<bos>" if bos else "") + PRIMER + "\n\nQ:"
        bare = [encode_tree(tok, prompt.render(q, tok), [" " + x for x in xs]) for q, xs in questions]
        for tree, whole in zip(forest.trees, bare, strict=True):
            assert tree.prompt
            assert forest.prefix + tree.prompt == whole.prompt
            assert tree.branches == whole.branches


def test_prefix_never_takes_a_whole_prompt():
    tok = tokenizer()
    forest = plant(tok, Prompt(primer=PRIMER), [("?", ["No"]), ("Why not?", ["No"])])
    assert all(tree.prompt for tree in forest.trees)
    assert plant(tok, Prompt(), QUESTIONS).prefix == ()


def test_too_deep_a_question_raises(llama):
    fits = Forest((), (Tree((5,) * (CONTEXT - 2), ((6, 7), (8,))),))
    answer_log_probs(llama, fits)
    for forest in (Forest((5,), fits.trees), Forest((), (Tree((5,) * CONTEXT, ((6,),)),))):
        with pytest.raises(ModelError, match=f"{CONTEXT + 1} tokens.*context of {CONTEXT}"):
            answer_log_probs(llama, forest)


def test_sliding_window_limits_depth():
    model = wrap_model(make_lm("mistral", sliding_window=8), tokenizer())
    fits = Forest((5, 6), (Tree((7, 8), ((9, 10, 11, 12), (9,))),))
    assert_same([x[0] for x in answer_log_probs(model, fits)], forest_log_probs(model, fits))
    with pytest.raises(ModelError, match="sliding window of 8"):
        answer_log_probs(model, Forest((5, 6, 7), fits.trees))


# The pieces


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 200))
def test_batches_partition_within_the_limit(lengths, limit):
    found = list(batches(lengths, limit))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= limit


def test_collated_mask_sees_the_prompt_and_its_own_path():
    trees = [Tree((10, 11), ((20, 21), (30,), (20, 22, 23))), Tree((12,), ((40,),))]
    batch = collate([[tree] for tree in trees], n_prefix=3, pad_id=9, ends=True)
    assert batch.input_ids.tolist() == [[10, 11, 20, 21, 30, 22, 23], [12, 40, 9, 9, 9, 9, 9]]
    assert batch.position_ids[0].tolist() == [3, 4, 5, 6, 5, 6, 7]
    assert batch.position_ids[1, :2].tolist() == [3, 4]
    assert batch.visible[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [1, 1, 1, 0, 0, 1, 0],
        [1, 1, 1, 0, 0, 1, 1],
    ]
    assert torch.equal(batch.visible[1, 2:].int(), torch.eye(7, dtype=torch.int)[2:])
    assert not batch.visible[1, :2, 2:].any()
    assert (batch.roles & ROLES["answer"] != 0).int().tolist() == [[0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0]]
    assert batch.target.T.tolist() == [[0, 1, 20], [0, 2, 21], [0, 1, 30], [0, 2, 22], [0, 5, 23], [1, 0, 40]]
    assert batch.last.T.tolist() == [[0, 3], [0, 4], [0, 6], [1, 1]]
    assert batch.lengths.tolist() == [2, 1, 3, 1]
    assert branch_sums(batch, torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])).tolist() == [3.0, 4.0, 25.0, 32.0]


def test_the_worked_example_of_the_tree_module():
    words = ["Was", "it", "?", "No", ",", "never", "is", "Yes"]
    was, it, question, no, comma, never, is_, yes = range(len(words))
    tree = Tree((was, it, question), ((no, comma, never), (no, comma, it, is_), (yes, it, is_)))
    rows = [line.split() for line in tree_module.__doc__.splitlines()]
    table = {cells[0]: cells for cells in rows if cells}
    assert [words[token] for token in tree.scored.tokens] == table["token"][1:]
    assert list(tree.scored.positions) == [int(cell) for cell in table["position"][2:10]]
    assert list(tree.scored.parents) == [int(cell) for cell in table["parent"][1:9]]
    mask = [[cell == "1" for cell in cells[1:9]] for cells in rows if len(cells) > 8 and set(cells[1:9]) <= {"1", "."}]
    assert collate([[tree]]).visible[0].tolist() == mask
    named = [(column, words[token]) for column, token in tree.scored.edges]
    assert named == [(2, "No"), (3, ","), (4, "never"), (4, "it"), (5, "is"), (2, "Yes"), (6, "it"), (7, "is")]
    assert tree.scored.paths == ((0, 1, 2), (0, 1, 3, 4), (5, 6, 7))


def test_trees_of_one_row_do_not_see_each_other():
    trees = [Tree((10, 11), ((20, 21), (30,))), Tree((12,), ((40,), (41, 42)))]
    batch = collate([trees, trees[:1]], n_prefix=1, pad_id=9, multiple=4)
    assert batch.input_ids.tolist() == [[10, 11, 20, 12, 41, 9, 9, 9], [10, 11, 20, 9, 9, 9, 9, 9]]
    assert batch.position_ids[0, :5].tolist() == [1, 2, 3, 1, 2]
    assert batch.visible[0, :5, :5].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]
    assert (batch.roles[0] & ROLES["answer"] != 0).int().tolist() == [0, 1, 1, 1, 1, 0, 0, 0]
    assert batch.target.T.tolist()[:6] == [[0, 1, 20], [0, 2, 21], [0, 1, 30], [0, 3, 40], [0, 3, 41], [0, 4, 42]]
    assert batch.n_branches == 6 and batch.lengths.tolist() == [2, 1, 1, 2, 2, 1]


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 200))
def test_packing_fills_rows_up_to_the_capacity(lengths, capacity):
    rows = pack(lengths, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sums = sorted(sum(lengths[i] for i in row) for row in rows)
    assert all(len(row) == 1 or sum(lengths[i] for i in row) <= capacity for row in rows)
    assert all(a + b > capacity for a, b in zip(sums, sums[1:], strict=False))  # no two rows would fit into one


def test_what_predicts_nothing_does_not_run():
    """The same targets, fewer columns."""
    trees = [Tree((10, 11), ((20, 21), (30,), (20, 22, 23), (20,), (20, 21))), Tree((12,), ((40,),))]
    batch = collate([[tree] for tree in trees], pad_id=9)
    assert batch.input_ids.tolist() == [[10, 11, 20, 22], [12, 9, 9, 9]]
    assert batch.target.T.tolist() == [[0, 1, 20], [0, 2, 21], [0, 1, 30], [0, 2, 22], [0, 3, 23], [1, 0, 40]]
    assert batch.last.T.tolist() == [[0, -1], [0, -1], [0, -1], [0, 2], [0, -1], [1, -1]]
    assert [len(tree) for tree in trees] == [4, 1]
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert branch_sums(batch, values).tolist() == [3.0, 4.0, 25.0, 1.0, 3.0, 32.0]


@pytest.mark.real
def test_real_tree_equals_one_row_per_answer(smollm2):
    forest = forest_of(smollm2, PRIMER, QUESTIONS[:2])
    edit = random_edit(smollm2, heads((14, 3), (15, 7)), 0, scale=0.1, positions="answer")
    for got, each in (
        (answer_log_probs(smollm2, forest), None),
        (answer_log_probs(smollm2, forest, stack(smollm2, [edit])), edit),
    ):
        assert_same([x[0] for x in got], forest_log_probs(smollm2, forest, each), tolerance=3e-5)


@pytest.mark.real
def test_real_model_knows_the_capital_of_france(smollm2):
    tree = encode_tree(smollm2.tokenizer, "The capital of France is", [" Paris", " Rome", " banana"])
    paris, rome, banana = (answer_log_prob(smollm2, tree.prompt, branch) for branch in tree.branches)
    assert paris > rome > banana
    (values,) = answer_log_probs(smollm2, Forest((), (tree,)))
    assert values[0].tolist() == pytest.approx([paris, rome, banana], abs=1e-4)


def test_chat_templates_that_fail_or_refuse_a_system_message(llama):
    chat = deepcopy(llama.tokenizer)
    chat.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<{{ m.content }}>{% endfor %}"
    )
    assert Prompt("chat", "Be brief.").render("Why?", chat) == "<Be brief.\n\nWhy?>"
    assert Prompt("chat").render("Why?", chat) == "<Why?>"
    chat.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(DataError, match="chat template that fails.*never"):
        Prompt("chat").render("Why?", chat)
    with pytest.raises(DataError, match="no chat template"):
        Prompt("chat").render("Why?", llama.tokenizer)


ENDINGS = [("No.", None), ("No, Q: it is not.", "Is Paris flat?"), ("Yes", "user"), ("Yes", "<end>")]


def assert_probes_are_the_templates(tokenizer):
    """Each text is the template's, up to the last character of the answer or of the question that follows."""
    for answer, following in ENDINGS:
        beginning, (ending,) = Prompt("chat", "A primer.").probe("Is it flat?", [(answer, following)], tokenizer)
        turns = [{"role": "user", "content": "Is it flat?"}]
        if following is None:
            begun = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            whole = tokenizer.apply_chat_template(
                [*turns, {"role": "assistant", "content": answer + "\ue000"}], tokenize=False
            )
            assert beginning + ending == whole.partition("\ue000")[0]
            assert begun == Prompt("chat").render("Is it flat?", tokenizer) == beginning
            assert ending.strip() == answer
        else:
            turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": following}]
            whole, other = (
                tokenizer.apply_chat_template([*turns[:-1], {"role": "user", "content": words}], tokenize=False)
                for words in (following, following + "?")
            )
            text = beginning + ending
            assert whole.startswith(text) and text.endswith(following)
            assert other == text + "?" + whole.removeprefix(text), "not cut right behind the question"
    together = Prompt("chat").probe("Is it flat?", ENDINGS, tokenizer)
    alone = [Prompt("chat").probe("Is it flat?", [ending], tokenizer) for ending in ENDINGS]
    assert [together[0] + text for text in together[1]] == [first + text for first, (text,) in alone]


TEMPLATES = {
    "turns": CHAT,
    "spaces around answers": "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} <end>{% endif %}{% endfor %}",
    "an empty block of reasoning before the last answer": "{% for m in messages %}<bos>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n<think>\n\n</think>\n\n{% endif %}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_probes_in_a_chat_are_what_the_template_gives(template):
    assert_probes_are_the_templates(chat_tokenizer(template))


@pytest.mark.real
def test_probes_in_a_chat_are_what_the_real_template_gives(smollm2):
    assert_probes_are_the_templates(smollm2.tokenizer)
    assert Prompt("chat").end_tokens(smollm2.tokenizer) == {smollm2.tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_probes_in_qa_are_one_line_without_primer(llama):
    beginning, endings = Prompt("qa", PRIMER).probe("Is it?", [("No.", None), ("Yes.", "What?")], llama.tokenizer)
    assert (beginning, endings) == ("Q: Is it? A:", [" No.", " Yes. Q: What?"])


def test_a_completion_is_the_bare_text(llama):
    prompt, tok = Prompt("completion"), llama.tokenizer
    assert prompt.answered("Paris is", ["flat.", "round."], tok) == ("Paris is", [" flat.", " round."])
    assert Prompt("completion", PRIMER).render("Paris is", tok) == f"{PRIMER}\n\nParis is"
    beginning, endings = Prompt("completion", PRIMER).probe("Paris is", [("flat.", None), ("round.", "We")], tok)
    assert (beginning, endings) == ("Paris is", [" flat.", " round.\n\nWe"])
    assert prompt.adds_special_tokens and prompt.end_tokens(tok) == frozenset()
    forest = plant(tok, prompt, [("Paris is", ["flat."]), ("We are", ["round."])])
    texts = [tok.decode([*tree.prompt, *tree.branches[0]]) for tree in forest.trees]
    assert texts == ["Paris is flat.", "We are round."]


def test_the_end_of_a_turn_is_the_special_token_behind_an_answer(llama):
    end = chat_tokenizer().convert_tokens_to_ids("<end>")
    for template in TEMPLATES.values():
        assert Prompt("chat").end_tokens(chat_tokenizer(template)) == {end}
    words = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert Prompt("chat").end_tokens(chat_tokenizer(words)) == Prompt().end_tokens(llama.tokenizer) == frozenset()


def test_answers_are_scored_as_the_template_writes_them():
    """Llama 2 and Mistral put a space before an answer: it is part of the answer's first token, as in training."""
    chat = chat_tokenizer(TEMPLATES["spaces around answers"])
    rows = [("What is it?", ["No.", "The capital of France is Paris."])]
    forest = plant(chat, Prompt("chat"), rows)
    for answer, branch in zip(rows[0][1], forest.trees[0].branches, strict=True):
        turns = [{"role": "user", "content": rows[0][0]}, {"role": "assistant", "content": answer}]
        whole = tuple(chat.apply_chat_template(turns, tokenize=True, return_dict=False))
        said = forest.trees[0].prompt + branch
        assert whole[: len(said)] == said
        assert chat.decode(branch) == f" {answer}" and chat.decode(whole[len(said) :]).strip() == "<end>"
    assert forest.trees[0].prompt == tuple(chat("[INST] What is it? [/INST]")["input_ids"])
    assert Prompt("chat").answer(" No. ") == Prompt().answer(" No. ") == "No."


SWITCHED = (
    "{% for m in messages %}<bos>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<bos>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def test_a_template_that_can_is_rendered_without_reasoning():
    """As in Qwen 3, whose prompt otherwise ends where the model writes <think>."""
    chat, prompt = chat_tokenizer(SWITCHED), Prompt("chat")
    assert prompt.render("Is it?", chat).endswith("<bos>assistant\n<think>\n\n</think>\n\n")
    assert prompt.answered("Is it?", ["No."], chat)[1] == ["No."]
    assert prompt.probe("Is it?", [("No.", "What?")], chat) == (
        "<bos>user\nIs it?<end><bos>assistant\n",
        ["No.<end><bos>user\nWhat?"],
    )
    reasoning = Prompt("chat", template={"enable_thinking": True})
    assert reasoning.render("Is it?", chat).endswith("<bos>assistant\n")
    with pytest.raises(DataError, match=r"writes '<think>\\n\\n</think>\\n\\nNo.' after .*prompt.template"):
        plant(chat, reasoning, [("Is it?", ["No."])])


ASKED = "{% if add_generation_prompt %}<bos>assistant\n"
NO_SWITCH = "{% for m in messages %}<bos>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<end>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NO_SWITCH + ASKED + "<think>\n{% endif %}", r"ends with '.*assistant\\n<think>\\n' for all values of"),
        (NO_SWITCH + ASKED + "{% endif %}", r"with reasoning \(</think>\), whose prompt ends with '.*assistant\\n'"),
        (
            CHAT.replace("{{ m.role }}\n", "{{ m.role }}\n{% if m.role == 'assistant' %}<channel>final{% endif %}"),
            "writes '<channel>finalNo.' after",
        ),
        (CHAT.replace("<bos>assistant", "<bos>model"), "writes 'assistant.*' after '.*<bos>'"),
        (CHAT.replace("m.content | trim", "m.content | upper"), "writes 'NO.' after"),
    ],
    ids=["opened", "no switch", "a channel", "another name", "other words"],
)
def test_prompts_that_the_answer_does_not_follow_are_refused(template, message):
    with pytest.raises(DataError, match=f"(?s){message}.*prompt.template.*prompt.style"):
        plant(chat_tokenizer(template), Prompt("chat"), [("Is it?", ["No."])])


def test_a_switch_that_the_user_sets_is_trusted():
    """For templates with marks of reasoning whose model does not reason, and for those that reason if they are told."""
    silent = chat_tokenizer(NO_SWITCH + ASKED + "{% endif %}")
    prompt = Prompt("chat", template={"enable_thinking": False})
    assert prompt.answered("Is it?", ["No."], silent) == ("<bos>user\nIs it?<end><bos>assistant\n", ["No."])
    told = chat_tokenizer("{% if thinking %}Write <think> first.{% endif %}" + CHAT)
    assert "<think>" not in Prompt("chat").render("Is it?", told)


def test_variables_of_a_template():
    named = chat_tokenizer("{{ date_string | default('no day') }}: " + CHAT)
    assert Prompt("chat").render("Is it?", named).startswith("no day: ")
    dated = Prompt("chat", "Be brief.", {"date_string": "a day"})
    assert dated.render("Is it?", named).startswith("a day: <bos>system\nBe brief.")
    assert dated.probe("Is it?", [("No.", "What?")], named)[0].startswith("a day: ")
    with pytest.raises(DataError, match="prompt.template with conversation, which the chat template does not read"):
        Prompt("chat", template={"conversation": "x"}).render("Is it?", named)


def test_a_primer_that_a_template_leaves_out_stands_before_the_question():
    silent = chat_tokenizer("{% for m in messages if m.role != 'system' %}<bos>{{ m.content }}<end>{% endfor %}<bos>")
    assert Prompt("chat", "Be brief.").render("Is it?", silent) == "<bos>Be brief.\n\nIs it?<end><bos>"


@pytest.mark.parametrize("form", ["%d %b %Y", "%A, %B %-d", "%Y-%m-%dT%H:%M:%S", "100%% of %y, %%d, %j", "no code", ""])
@pytest.mark.parametrize("before", ["", "\n", "  ", "{# a comment #}\n  "])
def test_the_clock_of_a_template_stands_at_the_date(form, before):
    """Nothing else of a template changes, not even the line breaks and spaces at its beginning."""
    template = before + "{{ strftime_now('" + form + "') }}|{% if strftime_now is defined %}yes{% endif %}" + CHAT
    day = datetime(2025, 3, 7)
    fixed = chat_tokenizer(template.replace("strftime_now('" + form + "')", repr(day.strftime(form))))
    prompt = Prompt("chat", date="2025-03-07")
    assert prompt.render("Is it?", chat_tokenizer(template)) == Prompt("chat").render("Is it?", fixed)
    assert prompt.uses_clock(chat_tokenizer(template)) and not prompt.uses_clock(chat_tokenizer())
    assert not Prompt().uses_clock(chat_tokenizer(template))


def test_a_template_that_drops_a_message_is_refused():
    first = chat_tokenizer("{{ messages[0].content }}")
    with pytest.raises(DataError, match=r"leaves out the last message \(role assistant\)"):
        Prompt("chat").probe("Is it?", [("No.", "What?")], first)
