"""Answer-tree scoring: all answers of a question in one row."""

from locaudit.scoring.forward import (
    ROW_LENGTH,
    ROW_TOKENS,
    Prefix,
    Start,
    answer_log_probs,
    batches,
    branch_sums,
    check_depth,
    check_length,
    collate_bank,
    default_row_tokens,
    packed_rows,
    run_prefix,
    token_log_probs,
)
from locaudit.scoring.head import head_log_probs
from locaudit.scoring.residual import Residuals
from locaudit.scoring.tree import Forest, Tree, TreeBatch, additive_mask, collate, encode_tree, pack, plant

__all__ = [
    "ROW_LENGTH",
    "ROW_TOKENS",
    "Forest",
    "Prefix",
    "Residuals",
    "Start",
    "Tree",
    "TreeBatch",
    "additive_mask",
    "answer_log_probs",
    "batches",
    "branch_sums",
    "check_depth",
    "check_length",
    "collate",
    "collate_bank",
    "default_row_tokens",
    "encode_tree",
    "head_log_probs",
    "pack",
    "packed_rows",
    "plant",
    "run_prefix",
    "token_log_probs",
]
