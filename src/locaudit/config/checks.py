"""What settings may be: each wrong value gets a `ConfigError` that names it."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from locaudit.config.coerce import check, check_grid

if TYPE_CHECKING:
    from locaudit.config.settings import AuditConfig, JudgeConfig


def check_audit(config: AuditConfig) -> None:
    """Raise `ConfigError` for settings that no audit can have."""
    check(config.controls >= 1, f"controls = {config.controls}", "at least 1", "19 can reach p = 0.05")
    check(0 < config.level < 1, f"level = {config.level}", "a number between 0 and 1", "0.05 is usual")
    check(config.margin > 0, f"margin = {config.margin}", "a positive number in the score's units", "0.05 is usual")
    check(0 <= config.seed < 2**63, f"seed = {config.seed}", "0 to 2^63 - 1", "take a smaller one")
    seed = config.training_seed
    check(seed is None or 0 <= seed < 2**63, f"training_seed = {seed}", "0 to 2^63 - 1", "leave it out")
    check(bool(config.methods), "no method", "iti, optimal or both", "name a method")
    check(
        len(set(config.methods)) == len(config.methods), f"methods = {config.methods}", "each once", "drop the repeats"
    )
    check(
        len(config.split.fractions) == 3
        and all(x > 0 for x in config.split.fractions)
        and abs(sum(config.split.fractions) - 1) < 1e-9,
        f"split.fractions = {config.split.fractions}",
        "three positive shares with sum 1",
        "for example 0.6 0.2 0.2",
    )
    for name in ("max_train", "max_val", "max_test"):
        value = getattr(config.split, name)
        check(value is None or value >= 2, f"split.{name} = {value}", "at least 2", "raise it or leave it out")
    check(config.probe.top_k >= 1, f"probe.top_k = {config.probe.top_k}", "at least 1", "raise it")
    check(config.probe.inverse_l2 > 0, f"probe.inverse_l2 = {config.probe.inverse_l2}", "a positive number", "raise it")
    check(
        0 < config.probe.val_fraction < 1,
        f"probe.val_fraction = {config.probe.val_fraction}",
        "a share between 0 and 1",
        "0.25 is the default",
    )
    check_grid("iti.alphas", config.iti.alphas)
    check_grid("optimal.strengths", config.optimal.strengths)
    check(all(x > 0 for x in config.optimal.strengths), f"{config.optimal.strengths}", "positive tau", "raise it")
    for name in ("epochs", "bank_size", "batch_size", "max_questions"):
        value = getattr(config.optimal, name)
        check(value is None or value >= 1, f"optimal.{name} = {value}", "at least 1", "raise it")
    norm = config.optimal.max_grad_norm
    check(norm > 0, f"optimal.max_grad_norm = {norm}", "a positive number", "raise it")
    rate = config.optimal.learning_rate
    check(rate is None or rate > 0, f"optimal.learning_rate = {rate}", "a positive number", "raise it")
    for name in ("drift_documents", "drift_tokens"):
        value = getattr(config.evaluation, name)
        check(value >= 2, f"evaluation.{name} = {value}", "at least 2", "raise it")
    size = config.evaluation.bank_size
    check(size is None or size >= 1, f"evaluation.bank_size = {size}", "at least 1", "leave it out")
    limit = config.evaluation.max_new_tokens
    check(limit >= 0, f"evaluation.max_new_tokens = {limit}", "0 or more", "50 is the default")
    for name in ("target", "retention"):
        check_judge(getattr(config.judges, name), f"judges.{name}", limit)


def check_judge(judge: JudgeConfig, name: str, max_new_tokens: int) -> None:
    """Raise `ConfigError` for settings that no judge can have."""
    check(
        max_new_tokens > 0 or judge.kind in ("default", "none"),
        f"{name}.kind = {judge.kind} and evaluation.max_new_tokens = 0",
        "answers to judge",
        "raise evaluation.max_new_tokens",
    )
    check(
        judge.model is not None or judge.kind not in ("causal-lm", "openai"),
        f"{name}.kind = {judge.kind} without a model",
        f"{name}.model",
        "name the judge's model",
    )
    named = judge.api_key_env is None or re.fullmatch(r"[A-Za-z_]\w{0,63}", judge.api_key_env) is not None
    check(named, f"{name}.api_key_env that is no name of a variable", "a name such as MY_KEY", "put the key in it")
    check(judge.concurrency >= 1, f"{name}.concurrency = {judge.concurrency}", "at least 1", "raise it")
    check(judge.max_retries >= 0, f"{name}.max_retries = {judge.max_retries}", "0 or more", "raise it")
    check(judge.timeout > 0, f"{name}.timeout = {judge.timeout}", "a positive number of seconds", "raise it")
    for key in ("price_in", "price_out"):
        value = getattr(judge, key)
        check(value is None or value >= 0, f"{name}.{key} = {value}", "US dollars, 0 or more", "mend it")
