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

This page is written by `python tools/models.py > docs/models.md`, here with transformers {version} and PyTorch {torch}.

A model is supported if the `model_type` in its config.json is in the first column of the table. Each family was checked
with a tiny random model in float32. The checks are:

- A head's coordinates are that head's own: if the values of a key-value head are set to zero, the coordinates of the
  heads that it feeds become zero, and no others.
- If all answers share one row (an answer tree), their log-probabilities are those of one row per answer, within 1e-5.
  This also holds behind a cached prefix.
- Generation in a batch, with left padding and several edits, gives the same tokens as one prompt at a time without a
  cache.
- An edit equals a slow implementation that applies the formula token by token. An edit of a head changes no other
  head's coordinates.
- A PEFT adapter and a merged checkpoint give the logits of the hooked model, within 3e-5.
- The model's shape is known from config.json alone.

| family | kinds of place | projections | checks |
|---|---|---|---|
{rows}

**Mixtures of experts** have several MLPs in a layer, so that there is no single vector of neurons. Therefore `neuron`
and `mlp` are refused; the other kinds work.

**Multimodal models** (Gemma 3, Mistral 3, LLaVA, Idefics 2 and 3, InternVL and others that `AutoModelForCausalLM`
or `AutoModelForImageTextToText` loads) are audited as the text model inside them. This works if transformers has a
causal language model class for the text model, and if it gives the same logits on text as the whole model. Edits are
exported for the text model. The folder of an exported adapter also holds the text model's weights. Two groups of models
are refused: Qwen2-VL, Qwen2.5-VL and Qwen3-VL, because there is no such class for their text models, and Aya Vision and
BLIP-2, because the logits differ or cannot be computed.

**PEFT adapters**: give the adapter's folder as the model. Its base model is loaded and the adapter is merged into it;
the report says so. In float32, the logits equal those of the unmerged adapter within 3e-5; in 16 bits, merging rounds
the adapter's update. In Python, pass `copy.deepcopy(peft_model).merge_and_unload()` to `wrap_model`.

**Other architectures** work if their attention uses the mask and the position ids that it is given. Say where the
layers and projections are, as `print(model)` shows them:

    architecture: {{layers: model.layers, heads: self_attn.o_proj, neurons: mlp.down_proj}}

or `--architecture.layers model.layers --architecture.heads self_attn.o_proj --architecture.neurons mlp.down_proj`.
Leave out `neurons` where a layer has several MLPs. In Python: `load_model(name,
architecture=Architecture("model.layers", "self_attn.o_proj"))`. These paths are part of the model's identity.

Three families are not in the table, because a check failed:

- `diffllama`: two heads share their coordinates.
- `doge`: each token attends only to the keys that score best in the whole row. Therefore answer trees differ from
  single rows beyond 2,048 tokens, and with its mixture of experts from the first token on.
- `mimo_v2_flash`: layers differ in the number of heads that share keys and values.
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
