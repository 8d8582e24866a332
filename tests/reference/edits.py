"""Slow twin of `locaudit.edits`: the formula as it is written, in hooks of its own, on a single row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from locaudit.edits import Edit, SiteEdit
from locaudit.location import Site
from locaudit.models import Model


def edited_vector(h: Tensor, e: SiteEdit) -> Tensor:
    """h' = where(mask, mean, h) + B (c + A h), of one vector (d,), in its own dtype."""
    kept = h if e.mask is None else torch.where(e.mask, e.mean.to(h.dtype), h)
    return kept + e.b.to(h.dtype) @ (e.c.to(h.dtype) + e.a.to(h.dtype) @ h)


def acts(positions: str, t: int, n_prompt: int, subject: int | None) -> bool:
    """Whether an edit acts on token t of a prompt of `n_prompt` tokens and its answer."""
    return {
        "all": True,
        "prompt": t <= n_prompt - 1,
        "answer": t >= n_prompt - 1,
        "last": t == n_prompt - 1,
        "subject": t == subject,
    }[positions]


@contextmanager
def edited_by_hand(model: Model, edit: Edit | None, n_prompt: int = 1, subject: int | None = None) -> Iterator[None]:
    """Run a row of one prompt of `n_prompt` tokens and its answer; the edit leaves all but its positions alone."""
    positions = edit.positions if edit else "all"

    def change(h: Tensor, e: SiteEdit) -> Tensor:
        tokens = h.view(-1, h.shape[-1])  # whatever the model's layout
        changed = [edited_vector(x, e) if acts(positions, t, n_prompt, subject) else x for t, x in enumerate(tokens)]
        return torch.stack(changed).view(h.shape)

    def at_input(e: SiteEdit):
        return lambda _module, args: (change(args[0], e), *args[1:])

    def at_output(e: SiteEdit):
        def post(_module, _args, output):
            return (change(output[0], e), *output[1:]) if isinstance(output, tuple) else change(output, e)

        return post

    with ExitStack() as stack:
        for (name, layer), e in (edit.sites if edit else {}).items():
            if name == "residual":
                handle = model.layer(layer).register_forward_hook(at_output(e))
            else:
                handle = model.projection(Site(name, layer)).register_forward_pre_hook(at_input(e))
            stack.callback(handle.remove)
        yield
