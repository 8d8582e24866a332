"""Greedy answers under an edit: ours, `generate` under plain hooks, and `generate` under pyvene.

All answer the same questions behind the bundled primer under the same rank-1 edit o' = o + <a, o> b at every token, up
to 50 new tokens or the next question's marker, and cut the text with the same function; tokenising is timed. ``hook``
and ``pyvene`` take one prompt at a time with transformers' cache on, as ITI's code does, so that batching is part of
their ratio; ``hook_batched`` pads batches of 16 on the left, which an edit at every token allows. Generous to the
peers: the stopping criterion, whose tables take long to build, is built once before the clock starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList, StopStringCriteria

from bench.harness import Options, Outcome, Prepared
from bench.work import load, location, questions
from locaudit.behaviours import Question
from locaudit.behaviours.format import Prompt, load_primer
from locaudit.edits import Edit, SiteEdit, stack
from locaudit.measure.generation import answer_text, generate_answers
from locaudit.measure.tree import plant
from locaudit.models import Model

MAX_NEW_TOKENS = 50
SCALE = {"all": 0.2, "middle": 3.0}
"""Of b: edits that change answers and leave them English."""


def ours(options: Options) -> Prepared:
    """`generate_answers`: all questions in batches behind a primer that runs once."""
    model, asked = load(options), questions(options)
    edit, prompt = _edit(model, options), Prompt(primer=load_primer("default"))

    def run(_: int) -> Outcome:
        forest = plant(model.tokenizer, prompt, [(q.text, ()) for q in asked])
        prompts = [tree.prompt for tree in forest.trees]
        bank = stack(model, [edit])
        (answers,) = generate_answers(model, forest.prefix, prompts, bank, max_new_tokens=MAX_NEW_TOKENS)
        return _outcome(answers)

    return Prepared(run, model.lm)


def hook(options: Options) -> Prepared:
    """A forward pre-hook on every edited projection and `lm.generate`, one prompt at a time."""
    model, asked = _hooked(options), questions(options)
    answer = answerer(model, model.lm.generate)
    return Prepared(lambda _: _outcome([answer(q) for q in asked]), model.lm)


def hook_batched(options: Options) -> Prepared:
    """The same with prompts of similar length in left-padded batches (``--peer-batch``, 16)."""
    model, asked = _hooked(options), questions(options)
    prompt, size = Prompt(primer=load_primer("default")), options.batch_size or 16
    settings, stop = _settings(model)
    tokenizer = model.tokenizer
    tokenizer.padding_side = "left"

    def run(_: int) -> Outcome:
        texts = [prompt.render(q.text, tokenizer) for q in asked]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        answers = [""] * len(texts)
        for numbers in (order[i : i + size] for i in range(0, len(order), size)):
            encoded = tokenizer([texts[i] for i in numbers], return_tensors="pt", padding=True).to(model.device)
            ids, mask = encoded["input_ids"], encoded["attention_mask"]
            with torch.no_grad():
                out = model.lm.generate(
                    input_ids=ids, attention_mask=mask, generation_config=settings, stopping_criteria=stop
                )
            for i, row in zip(numbers, out[:, ids.shape[1] :].tolist(), strict=True):
                answers[i] = answer_text(model, row)
        return _outcome(answers)

    return Prepared(run, model.lm)


def _hooked(options: Options) -> Model:
    model = load(options)
    for site, e in _edit(model, options).sites.items():
        a, b = e.a.to(options.device), e.b.to(options.device)
        model.projection(site).register_forward_pre_hook(lambda _m, args, a=a, b=b: (apply(args[0], a, b),))
    return model


def pyvene(options: Options) -> Prepared:
    """`pyvene.IntervenableModel.generate`, an intervention on the input of every edited projection."""
    import pyvene as pv

    class RankOne(pv.SourcelessIntervention):
        def __init__(self, a: Tensor, b: Tensor, **kwargs):
            super().__init__(**kwargs, keep_last_dim=True)
            self.register_buffer("a", a)
            self.register_buffer("b", b)

        def forward(self, base, source=None, subspaces=None, **_):
            return apply(base, self.a, self.b)

    class Intervenable(pv.IntervenableModel):
        def _remove_forward_hooks(self) -> None:
            """Its own hooks are removed by their handles; this would remove the harness's token counter too."""

    model, asked = load(options), questions(options)
    representations = [
        {"layer": layer, "component": "attention_value_output", "intervention": RankOne(e.a, e.b)}
        for (_, layer), e in _edit(model, options).sites.items()
    ]
    intervenable = Intervenable(pv.IntervenableConfig(representations), model=model.lm)
    intervenable.set_device(options.device)

    def generate(input_ids: Tensor, attention_mask: Tensor, **settings) -> Tensor:
        # Without unit locations, and with those of the prompt asked for, it intervenes at every token of every step.
        base = {"input_ids": input_ids, "attention_mask": attention_mask}
        return intervenable.generate(base, intervene_on_prompt=True, **settings)[1]

    answer = answerer(model, generate)
    return Prepared(lambda _: _outcome([answer(q) for q in asked]), model.lm)


def apply(o: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """O + <a, o> b, in float32 as ours."""
    return o + ((o.float() @ a).unsqueeze(-1) * b).to(o.dtype)


def answerer(model: Model, generate: Callable[..., Tensor]) -> Callable[[Question], str]:
    """A function that generates the answer to one question."""
    prompt = Prompt(primer=load_primer("default"))
    settings, stop = _settings(model)

    def answer(question: Question) -> str:
        encoded = model.tokenizer(prompt.render(question.text, model.tokenizer), return_tensors="pt").to(model.device)
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        with torch.no_grad():
            out = generate(input_ids=ids, attention_mask=mask, generation_config=settings, stopping_criteria=stop)
        return answer_text(model, out[0, ids.shape[1] :].tolist())

    return answer


def _settings(model: Model) -> tuple[GenerationConfig, StoppingCriteriaList]:
    settings = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        pad_token_id=model.pad_id,
        eos_token_id=sorted(model.end_tokens),
    )
    model.lm.generation_config = GenerationConfig()  # the checkpoint's penalties and sampling, if any, rest in ours too
    return settings, StoppingCriteriaList([StopStringCriteria(model.tokenizer, ["\nQ:"])])


def _edit(model: Model, options: Options) -> Edit:
    """A seeded random edit at the location that is asked for."""
    sites = {}
    for site, mask in model.masks(location(options, model)).items():
        generator = torch.Generator().manual_seed(options.seed + site[1])
        a, b = torch.randn(2, len(mask), generator=generator)
        sites[site] = SiteEdit(a / len(mask) ** 0.5, SCALE[options.where] * b * mask, 0.0)
    return Edit(sites)


def _outcome(answers: Sequence[str]) -> Outcome:
    return Outcome(len(answers), measures(answers))


def measures(answers: Sequence[str]) -> dict[str, list[float]]:
    """Numbers that tell texts apart: characters, and the sum of their code points."""
    letters = [float(sum(map(ord, answer))) for answer in answers]
    return {"length": [float(len(answer)) for answer in answers], "letters": letters}
