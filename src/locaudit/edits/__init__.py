"""Edits: o' = o + (c + <a, o>) b at the inputs of chosen projections."""

from locaudit.edits.bank import EditBank, stack
from locaudit.edits.edit import Edit, Positions, SiteEdit, load_edit, zero_edit
from locaudit.edits.export import folded, save_peft_adapter

__all__ = [
    "Edit",
    "EditBank",
    "Positions",
    "SiteEdit",
    "folded",
    "load_edit",
    "save_peft_adapter",
    "stack",
    "zero_edit",
]
