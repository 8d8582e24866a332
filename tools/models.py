"""Run the checks of every family in the table of architectures, and print docs/models.md.

python tools/models.py > docs/models.md        (20 to 60 s; exit code 1 if a check fails)
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from transformers import CONFIG_MAPPING

from locaudit.models.quiet import quiet_libraries
from locaudit.registry import ARCHITECTURES, KINDS
from test_families import check_family
from tiny import tiny

TEXT = """\
# Models

Written by `python tools/models.py > docs/models.md`, here with transformers {version} and PyTorch {torch}.

A model is one of these families if the `model_type` in its config.json is. For each, a tiny random model in float32
showed that

- a head's coordinates are that head's own: without the values of a key-value head, those of the heads that it feeds
  vanish, and no others;
- answers in one tree, also behind a cached prefix, have the log-probabilities of one row per answer, within 1e-5;
- generation in a batch, with left padding and several edits, says what one prompt at a time without a cache says,
  token for token;
- an edit equals a slow twin that applies the formula token by token, and an edit of a head changes no other head's
  coordinates;
- a PEFT adapter and a merged checkpoint give the logits of the hooked model, within 3e-5;
- config.json alone tells the model's shape.

| family | kinds of place | projections | checks |
|---|---|---|---|
{rows}

**Mixtures of experts** have several MLPs in a layer, so that there is no single vector of neurons: `neuron` and
`mlp` are refused, the other kinds work.

**Multimodal models** (Gemma 3, Mistral 3, LLaVA, Idefics 2 and 3, InternVL and others that `AutoModelForCausalLM`
or `AutoModelForImageTextToText` loads) are audited as the text model inside, if transformers has a causal language
model for it and both give the same logits on text. Edits are exported for that text model; an adapter has its
weights beside it. Refused are Qwen2-VL, Qwen2.5-VL and Qwen3-VL, whose text models have no such class, and Aya
Vision and BLIP-2, which give other logits or none.

**PEFT adapters**: give the adapter's folder as the model. Its base model is loaded and the adapter merged; the
report says so. In 16 bits, merging rounds the adapter's update; in float32 the logits are the adapter's within
3e-5. In Python, `wrap_model` takes `copy.deepcopy(peft_model).merge_and_unload()`.

**Other architectures** work if their attention follows the mask and position ids that they are given. Say where the
layers and projections are, as `print(model)` shows them:

    architecture: {{layers: model.layers, heads: self_attn.o_proj, neurons: mlp.down_proj}}

or `--architecture.layers model.layers --architecture.heads self_attn.o_proj --architecture.neurons mlp.down_proj`.
Leave out `neurons` where a layer has several MLPs. In Python: `load_model(name,
architecture=Architecture("model.layers", "self_attn.o_proj"))`. These paths are part of the model's identity.

Left out, because a check failed: `diffllama` (two heads share their coordinates), `doge` (each token sees only the
keys that score best in the whole row, so trees differ from rows beyond 2,048 tokens, and its mixture of experts
from the first), `mimo_v2_flash` (layers differ in the number of heads that share keys and values).
"""


@quiet_libraries()
def check(name: str) -> tuple[str, bool]:
    """The family's row of the table, and whether nothing failed."""
    paths, result = ARCHITECTURES[name], "passed"
    sites = {"heads": paths.heads, "neurons": paths.neurons}
    kinds = [kind for kind in KINDS if sites.get(KINDS[kind].site, "") is not None]
    if name not in CONFIG_MAPPING:
        result = "not in this transformers"
    else:
        try:
            with tempfile.TemporaryDirectory() as folder:
                check_family(name, Path(folder))
            assert kinds == [kind for kind in KINDS if KINDS[kind].site not in tiny(name).lacks]
        except Exception as error:  # any failure is a row of the table
            result = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
    where = ", ".join(f"`{path}`" for path in (paths.layers, paths.heads, paths.neurons) if path)
    return f"| {name} | {', '.join(kinds)} | {where} | {result} |", not result.startswith("FAILED")


def main() -> int:
    """Print the page."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = [check(name) for name in sorted(ARCHITECTURES)]
    rows = "\n".join(row for row, _ in found)
    print(TEXT.format(version=transformers.__version__, torch=torch.__version__.partition("+")[0], rows=rows), end="")
    return 0 if all(is_fine for _, is_fine in found) else 1


if __name__ == "__main__":
    sys.exit(main())
