r"""A language model that completes ``Q: {question}\nA: {answer}\nTrue:`` with `` yes`` or `` no``.

    P(yes) = softmax(logits of the next token)[first token of " yes"]

over the whole vocabulary, as TruthfulQA's judges are read: a verdict is P(yes) >= 0.5. It is not divided by
P(yes) + P(no): a fine-tuned judge puts all its mass on the two, and a model that does not is no judge, which the
division would hide. Source: Lin et al. 2022, appendix B.1. AllenAI's public truth and info judges take this prompt.
"""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from locaudit.errors import ConfigError, DataError, ModelError
from locaudit.judges.base import Aspect, Case, Judgement
from locaudit.judges.wire import completion_prompt
from locaudit.linears import fast_linears
from locaudit.measure.forward import batches
from locaudit.measure.tree import encode_tree
from locaudit.models import Model, load_model
from locaudit.models.load import DTYPES, PACKAGED, fastest_dtype
from locaudit.records import content_hash

VERSION = 1
"""Of everything here that shapes a judgement; part of a judge's fingerprint."""

ROW_TOKENS = {"cpu": 640, "cuda": 8192}
"""Padded tokens of one forward, by device; bounds its memory. A GPU is not filled by fewer."""

ADAPTER_FILE = "adapter_config.json"
JUDGE_FILE = "judge.json"
"""What a fine-tuned judge's folder says about itself, beside PEFT's files."""


@dataclass(frozen=True, eq=False)
class CausalLMJudge:
    """Reads P(yes) off a language model. Made by `load_causal_lm_judge`."""

    aspect: Aspect
    model: Model
    suffix: str
    """What follows the answer: ``True:``."""
    yes: int
    """First token of `` yes``."""
    row_tokens: int
    """Padded tokens of one forward."""
    adapter: str = ""
    """Hash of the adapter's settings, which its weights do not tell; empty without one."""

    @property
    def name(self) -> str:
        """Model and aspect."""
        return f"{self.model.name} ({self.aspect.name})"

    @property
    def fingerprint(self) -> str:
        """Hash of weights, dtype, tokenizer, prompt, aspect and version."""
        parts = ["causal-lm", VERSION, self.model.fingerprint, self.adapter, self.aspect.name, self.suffix, self.yes]
        return content_hash(parts)

    @property
    def uses_references(self) -> bool:
        """The prompt has no place for them."""
        return False

    def score(self, cases: Sequence[Case]) -> list[Judgement]:
        """P(yes) of each case, in order; batching does not change it beyond rounding.

        A prompt longer than the model's context, and logits that are not finite, are missing.
        """
        prompts = [completion_prompt(case.question, case.answer, self.suffix) for case in cases]
        rows = [encode_tree(self.model.tokenizer, prompt, []).prompt for prompt in prompts]
        limit = getattr(self.model.config, "max_position_embeddings", None) or max(map(len, rows), default=0)
        fitting = [i for i, row in enumerate(rows) if len(row) <= limit]
        out = [Judgement(None, f"its prompt has {len(row)} tokens, the model's context {limit}") for row in rows]
        for numbers in batches([len(rows[i]) for i in fitting], self.row_tokens):
            chosen = [fitting[k] for k in numbers]
            with torch.no_grad():
                logits = next_logits(self.model, [rows[i] for i in chosen])
            values = (logits[:, self.yes] - logits.logsumexp(dim=1)).exp()
            finite = logits[:, self.yes].isfinite() & values.isfinite()
            for i, value, ok in zip(chosen, values.tolist(), finite.tolist(), strict=True):
                out[i] = Judgement(min(value, 1.0)) if ok else Judgement(None, "the model's output is not finite")
        return out


def next_logits(model: Model, rows: Sequence[Sequence[int]]) -> Float[Tensor, "rows vocabulary"]:
    """Logits (float32) of the token after each row. Rows are padded on the right, where no token sees the padding."""
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)  # any token will do as padding
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    mask = (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()
    columns, column = torch.unique(lengths - 1, return_inverse=True)
    keep: dict[str, Any] = {"logits_to_keep": columns.to(model.device)} if _keeps_logits(model.lm) else {}
    with fast_linears(model.lm):
        logits = model.lm(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False, **keep
        ).logits
    which = column if keep else lengths - 1
    return logits[torch.arange(len(rows), device=logits.device), which.to(logits.device)].float()


def _keeps_logits(lm: Any) -> bool:
    plain = lm.get_base_model() if _is_adapted(lm) else lm
    return "logits_to_keep" in inspect.signature(plain.forward).parameters


def _is_adapted(lm: Any) -> bool:
    return type(lm).__module__.startswith("peft.")


def first_tokens(tokenizer: Any, suffix: str) -> tuple[int, int]:
    """The first tokens of `` yes`` and `` no`` behind the suffix, known by construction (`encode_tree`).

    Raises `ModelError` where both begin with the same token, as when a tokenizer keeps the space apart.
    """
    tree = encode_tree(tokenizer, completion_prompt("?", "?", suffix), [" yes", " no"])
    yes, no = (branch[0] for branch in tree.branches)
    if yes == no:
        raise ModelError(
            got=f"a tokenizer whose ' yes' and ' no' both begin with {tokenizer.decode([yes])!r} after {suffix!r}",
            expected="first tokens that differ: the judge reads P(yes) off one token",
            remedy="take a judge with another tokenizer",
        )
    return yes, no


def load_causal_lm_judge(
    aspect: Aspect, model: str, *, prompt: str | None = None, device: str = "auto", dtype: str = "auto"
) -> CausalLMJudge:
    """Load a judge: a folder, a hub id, ``smollm2-135m``, a ``.gguf`` file, or a folder with a PEFT adapter.

    `prompt` stands in the place of the aspect's suffix. `dtype` is float32, bfloat16, float16 or auto (bfloat16 where
    the device computes in it natively). Any causal LM of transformers will do. Weights come from safetensors or GGUF
    and no code of the checkpoint runs. Raises `ModelError` for a model that does not load or cannot tell yes from no,
    `ConfigError` for a missing package or a judge that was fine-tuned for another aspect.
    """
    suffix = aspect.suffix if prompt is None else prompt
    folder = Path(model)
    _check_aspect(folder, aspect)
    adapted = (folder / ADAPTER_FILE).is_file()
    loaded, adapter = (
        _load_adapter(folder, device, dtype) if adapted else (load_causal_lm(model, device=device, dtype=dtype), "")
    )
    return wrap_judge(aspect, loaded, suffix, adapter)


def wrap_judge(aspect: Aspect, model: Model, suffix: str, adapter: str = "") -> CausalLMJudge:
    """A judge from a model in memory; `adapter`: hash of the settings of an adapter on it."""
    yes, _ = first_tokens(model.tokenizer, suffix)
    row_tokens = ROW_TOKENS.get(model.device.type, ROW_TOKENS["cpu"])
    return CausalLMJudge(aspect, model, suffix, yes, row_tokens, adapter)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises `DataError` for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        problem = "no JSON object"
    except (OSError, ValueError) as error:
        problem = " ".join(str(error).split())
    raise DataError(got=f"{path}, not readable ({problem})", expected="a JSON object", remedy="restore the file")


def _check_aspect(folder: Path, aspect: Aspect) -> None:
    file = folder / JUDGE_FILE
    trained = read_json(file).get("aspect") if file.is_file() else None
    if trained not in (None, aspect.name):
        raise ConfigError(
            got=f"the judge {folder}, fine-tuned for {trained}, as a judge of {aspect.name}",
            expected=f"a judge of {aspect.name}",
            remedy="name another folder, or fit one for this aspect",
        )


def _load_adapter(folder: Path, device: str, dtype: str) -> tuple[Model, str]:
    """The base model with the adapter on it, and the hash of the adapter's settings."""
    peft = import_peft()
    settings = read_json(folder / ADAPTER_FILE)
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(
            got=f"the adapter {folder} without adapter_model.safetensors",
            expected="a PEFT adapter in safetensors",
            remedy="restore the file, or save the adapter anew with a recent peft",
        )
    base = load_causal_lm(settings.get("base_model_name_or_path") or "", device=device, dtype=dtype)
    try:
        with quiet_peft():
            lm = peft.PeftModel.from_pretrained(base.lm, str(folder), use_safetensors=True)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ModelError(
            got=f"the adapter {folder}, which does not fit {base.name} ({_first_line(error)})",
            expected="an adapter of that model",
            remedy="check base_model_name_or_path in its adapter_config.json",
        ) from error
    lm.eval().requires_grad_(False)
    elsewhere = ("base_model_name_or_path", "inference_mode", "revision", "peft_version", "auto_mapping")
    kept = {key: value for key, value in settings.items() if key not in elsewhere}
    return Model(lm, base.tokenizer, folder.name), content_hash(kept)


def load_causal_lm(name: str, *, device: str, dtype: str) -> Model:
    """Any causal LM of transformers with its tokenizer, frozen; also of architectures that cannot be audited.

    `load_model` without the check against the table of architectures. Raises `ModelError`.
    """
    where, torch_dtype = _place(device, dtype)
    if name in PACKAGED or name.endswith(".gguf"):
        return load_model(name, device=device, dtype=dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        lm, report = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            name,
            config=config,
            dtype=torch_dtype,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (SafetensorError, OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ModelError(
            got=f"the judge's model {name!r}, which did not load ({_first_line(error)})",
            expected="smollm2-135m, a .gguf file, a hub id, or a folder with config.json, tokenizer and safetensors",
            remedy="check the name, the folder's files and the connection; convert other weights to safetensors",
        ) from error
    if missing := sorted(report["missing_keys"]):
        # transformers fills them with random numbers and goes on.
        raise ModelError(
            got=f"the judge's model {name!r} without the weights {', '.join(missing[:3])}",
            expected="a checkpoint with every weight of its architecture",
            remedy="restore the checkpoint, or check that it holds a causal language model",
        )
    lm = lm.to(where).eval().requires_grad_(False)
    return Model(lm, tokenizer, Path(name).name if Path(name).is_dir() else name)


def _place(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    if dtype not in (*DTYPES, "auto"):
        raise ModelError(
            got=f"dtype {dtype!r}", expected="float32, bfloat16, float16 or auto", remedy="name one of them"
        )
    try:
        where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(
            got=f"device {device!r} ({_first_line(error)})",
            expected="auto, cpu, cuda or cuda:N",
            remedy="check the device",
        ) from None
    return where, DTYPES[fastest_dtype(where) if dtype == "auto" else dtype]


def import_peft() -> Any:
    """The package peft; `ConfigError` names the extra to install."""
    try:
        return import_module("peft")
    except ImportError:
        raise ConfigError(
            got="a judge with a PEFT adapter without the package peft",
            expected="the extra judge installed",
            remedy="run: pip install 'locaudit[judge]'",
        ) from None


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without the warnings of PEFT about its own use of transformers, which nobody who reads them can mend."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        yield


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
