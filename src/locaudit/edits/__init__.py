"""Edits h' = where(mask, mean, h) + B (c + A h) of vectors h inside a model: one alone, or K at once in a bank."""

from locaudit.edits.bank import EditBank, roles_at, stack, stack_sites
from locaudit.edits.edit import Edit, load_edit, zero_edit
from locaudit.edits.export import Form, folded, save_merged
from locaudit.edits.hooks import SiteEdit

__all__ = [
    "Edit",
    "EditBank",
    "Form",
    "SiteEdit",
    "folded",
    "load_edit",
    "roles_at",
    "save_merged",
    "stack",
    "stack_sites",
    "zero_edit",
]
