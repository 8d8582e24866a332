"""Speed of greedy generation under an edit: locaudit, against `generate` with plain hooks and with pyvene.

All sides answer the same questions after the bundled primer, under the same rank-1 edit h' = h + <a, h> b at every
token. They generate up to 50 new tokens or the next question's marker and cut the text with the same function.
Tokenising is timed.

``hook`` and ``pyvene`` run one prompt at a time with transformers' cache on, as ITI's code does, so their ratio
includes the gain from batching. ``hook_batched`` runs left-padded batches of 16, which is possible because the edit
acts at every token. The peers get one advantage: the stopping criterion, which is slow to build, is built before the
clock starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList, StopStringCriteria

from bench.harness import Options, Outcome, Prepared, Task
from bench.work import PRIMED, Model, Question, Site, answer_text, generate, grow, location, rank_one

MAX_NEW_TOKENS = 50
SCALE = {"all": 0.2, "middle": 3.0}
"""Scale of b, by location: large enough to change answers, small enough to leave them English."""


def ours(options: Options) -> Prepared:
    """`generate_answers`: all questions in batches, after a primer that runs once."""
    model, asked = options.load()
    edit = rank_one(_vectors(model, options))

    def run(_: int) -> Outcome:
        return _outcome(generate(model, grow(model, asked, PRIMED, answers=False), [edit], MAX_NEW_TOKENS)[0])

    return Prepared(run, model.lm)


def hook(options: Options, batch_size: int = 1) -> Prepared:
    """A forward pre-hook on every edited projection and `lm.generate`, one prompt at a time."""
    model, asked = options.load()
    for site, (a, b) in _vectors(model, options).items():
        a, b = a.to(model.device), b.to(model.device)
        model.projection(site).register_forward_pre_hook(lambda _m, args, a=a, b=b: (apply(args[0], a, b),))
    answer = answerer(model, batch_size)
    return Prepared(lambda _: _outcome(answer(asked)), model.lm)


def hook_batched(options: Options) -> Prepared:
    """As `hook`, with left-padded batches of prompts of similar length (``--peer-batch``, default 16)."""
    return hook(options, options.peer_batch or 16)


def pyvene(options: Options) -> Prepared:
    """`pyvene.IntervenableModel.generate` with an intervention on the input of every edited projection."""
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
            """Do nothing: hooks are removed by handle, and this would also remove the harness's token counter."""

    model, asked = options.load()
    representations = [
        {"layer": layer, "component": "attention_value_output", "intervention": RankOne(a, b)}
        for (_, layer), (a, b) in _vectors(model, options).items()
    ]
    intervenable = Intervenable(pv.IntervenableConfig(representations), model=model.lm)
    intervenable.set_device(options.subject.device)

    def generate(input_ids: Tensor, attention_mask: Tensor, **settings) -> Tensor:
        # With no unit locations given and intervene_on_prompt, it intervenes at every token of every step.
        base = {"input_ids": input_ids, "attention_mask": attention_mask}
        return intervenable.generate(base, intervene_on_prompt=True, **settings)[1]

    answer = answerer(model, generate=generate)
    return Prepared(lambda _: _outcome(answer(asked)), model.lm)


def apply(o: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return o + <a, o> b, with the inner product in float32, as ours."""
    return o + ((o.float() @ a).unsqueeze(-1) * b).to(o.dtype)


def answerer(
    model: Model, batch_size: int = 1, generate: Callable[..., Tensor] | None = None
) -> Callable[[Sequence[Question]], list[str]]:
    """Make a function that generates answers to questions, in batches of prompts of similar length.

    `generate` is called in place of the model's own method.
    """
    tokenizer, lm = model.tokenizer, cast(Any, model.lm)
    settings = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        pad_token_id=model.pad_id,
        eos_token_id=sorted(model.end_tokens),
    )
    model.lm.generation_config = GenerationConfig()  # drops the checkpoint's penalties and sampling, as ours does
    stop = StoppingCriteriaList([StopStringCriteria(tokenizer, ["\nQ:"])])

    @torch.no_grad()
    def answer(asked: Sequence[Question]) -> list[str]:
        texts = [PRIMED.render(q.text, tokenizer) for q in asked]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        answers = [""] * len(texts)
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            batch = [texts[i] for i in numbers]
            encoded = tokenizer(batch, return_tensors="pt", padding=True, padding_side="left").to(model.device)
            ids, mask = encoded["input_ids"], encoded["attention_mask"]
            out = (generate or lm.generate)(
                input_ids=ids, attention_mask=mask, generation_config=settings, stopping_criteria=stop
            )
            for i, row in zip(numbers, out[:, ids.shape[1] :].tolist(), strict=True):
                answers[i] = answer_text(model, row)
        return answers

    return answer


def _vectors(model: Model, options: Options) -> dict[Site, tuple[Tensor, Tensor]]:
    """Seeded random (a, b) at the sites of the chosen location; b is masked to it."""
    sites = {}
    for site, mask in model.subspaces(location(model, options.where)).items():
        a, b = torch.randn(2, len(mask), generator=torch.Generator().manual_seed(site[1]))
        sites[site] = a / len(mask) ** 0.5, SCALE[options.where] * b * mask
    return sites


def _outcome(answers: Sequence[str]) -> Outcome:
    return Outcome(len(answers), measures(answers))


def measures(answers: Sequence[str]) -> dict[str, list[float]]:
    """Numbers that identify a text: its length in characters and the sum of its code points."""
    letters = [float(sum(map(ord, answer))) for answer in answers]
    return {"length": [float(len(answer)) for answer in answers], "letters": letters}


TASK = Task(
    "generating",
    "questions",
    {"ours": ours, "hook": hook, "hook_batched": hook_batched, "pyvene": pyvene},
    tolerances={"length": 0.0, "letters": 0.0},
    bars={(device, where): bar for device, bar in (("cpu", 4), ("cuda", 30)) for where in ("all", "middle")},
    questions=64,
)
