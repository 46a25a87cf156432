"""What meta-learning does with each architecture of transformers: the table of docs/huggingface.md, computed and compared.

``python tests/test_huggingface_table.py --write`` writes the page anew.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import re
import sys
from pathlib import Path

import pytest
import torch
from plain_loop import adaptation, distance, gradients, meta_gradients, query_losses, task
from some_cases import third
from torch.nn.attention import SDPBackend, sdpa_kernel

import metafast

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from huggingface_models import CASES, add_lora, build, examples, float64_throughout, loss_fn  # noqa: E402

from metafast.integrations import huggingface  # noqa: E402

pytestmark = [
    # Torch has no batching rule for some op, and runs a loop of its own.
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.usefixtures("fused_cpu"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::DeprecationWarning:transformers"),
]

PAGE = Path(__file__).parents[1] / "docs" / "huggingface.md"
COLUMNS = ("first order", "second order", "captured", "padded right", "padded left", "generate", "LoRA")
LR, STEPS, TASKS, EXAMPLES, TOLERANCE = 0.1, 2, 2, 2, 1e-8
WRONG = "wrong"


def attention_of(case):
    """What the row's models run with: ours where the model takes it, else what the model has instead."""
    if case.attention is not None:
        return case.attention
    model = build(case, torch.Generator())
    # Models that take no other attention say so, or keep their own in silence.
    with contextlib.suppress(ValueError):
        model.set_attn_implementation(huggingface.NAME)
    return model.config._attn_implementation


def twins(case, attention, generator, lora=False):
    """The model of the plain loop, and the same one of the learner."""
    theirs = build(case, generator)
    if lora:
        add_lora(case, theirs, generator)
    ours = copy.deepcopy(theirs)
    # The model's own attention; its dense form, which torch can differentiate twice.
    theirs.set_attn_implementation(case.reference)
    ours.set_attn_implementation(attention)
    return theirs, ours


def learner(ours, order, **options):
    return metafast.MAML(ours, loss_fn, inner=metafast.inner.SGD(lr=LR), steps=STEPS, order=order, **options)


def difference(meta, theirs, batches, order):
    """How far a call's loss and meta-gradient are from the plain loop's."""
    with sdpa_kernel(SDPBackend.MATH):
        losses = query_losses(theirs, loss_fn, *batches, STEPS, LR, create_graph=order == 2)
        expected = gradients(losses.mean(), [p for p in theirs.parameters() if p.requires_grad])
    loss, grads = meta_gradients(meta, *batches, params=[p for p in meta.model.parameters() if p.requires_grad])
    return max(abs(loss - losses.mean()).item(), distance(grads, expected))


def trained(case, attention, generator, order=2, padded=None, lora=False, calls=1, **options):
    theirs, ours = twins(case, attention, generator, lora)
    meta = learner(ours, order, **options)
    found = []
    for _ in range(calls):
        batches = [examples(case, generator, (TASKS, EXAMPLES), padded) for _ in range(2)]
        found.append(difference(meta, theirs, batches, order))
    return max(found)


def generated(case, attention, generator):
    """The scores of every token that each task's adapted model writes, beside those of the plainly adapted one's."""
    theirs, ours = twins(case, attention, generator)
    support = examples(case, generator, (TASKS, EXAMPLES))
    learners = learner(ours, 1).adapt(support)
    prompt = examples(case, generator, (TASKS, EXAMPLES), "left")
    options = {"max_new_tokens": 3, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    found = []
    for index in range(TASKS):
        inputs = {name: value for name, value in task(prompt, index).items() if name in ("input_ids", "attention_mask")}
        written = learners.model(index).eval().generate(**inputs, **options)
        with sdpa_kernel(SDPBackend.MATH):
            params = adaptation(theirs, loss_fn, task(support, index), STEPS, LR, create_graph=False)[-1]
            plain = copy.deepcopy(theirs).eval()
            for name, p in plain.named_parameters():
                p.data.copy_(params[name])
            expected = plain.generate(**inputs, **options)
        if not torch.equal(written.sequences, expected.sequences):
            return float("inf")
        finite = [score.isfinite() for score in expected.scores]
        found.append(
            distance(
                [score[where] for score, where in zip(written.scores, finite, strict=True)],
                [score[where] for score, where in zip(expected.scores, finite, strict=True)],
            )
        )
    return max(found)


CELLS = {
    "first order": lambda *row: trained(*row, order=1),
    "second order": trained,
    "captured": lambda *row: trained(*row, capture=True, calls=2),
    "padded right": lambda *row: trained(*row, padded="right"),
    "padded left": lambda *row: trained(*row, padded="left"),
    "generate": generated,
    "LoRA": lambda *row: trained(*row, lora=True, adapt_parameters=["*.down", "*.up"]),
}


def applies(case, column):
    if column == "generate":
        return case.generates
    return not column.startswith("padded") or case.kind not in ("vision", "speech, text")


class Heard(logging.Handler):
    """What the library said at WARNING."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def cell(case, attention, column, generator):
    if not applies(case, column):
        return "–"
    heard = Heard()
    logger = logging.getLogger("metafast")
    logger.addHandler(heard)
    try:
        off = CELLS[column](case, attention, generator)
    except Exception as error:  # whatever it is, the page says it
        return f"refused: {reason(str(error) or type(error).__name__)}"
    finally:
        logger.removeHandler(heard)
    if not off < TOLERANCE:
        return f"{WRONG}: off by {off:.0e}"
    loops = [message for message in heard.messages if message.startswith("tasks run one after another")]
    return f"loop: {reason(loops[0].partition('does not run under vmap: ')[2])}" if loops else "served"


# What a message holds -> what the table says of it, and the page beneath.
REASONS = {
    r"calling \.item\(\)": (
        "reads values",
        "without an `attention_mask`, the model looks whether the first or the last token is padding, to warn of it. Give "
        "an `attention_mask`, of ones where nothing is padded: the padded columns show that all tasks then run at once.",
    ),
    r"data-dependent control flow": (
        "decides by values",
        "the model takes no attention but its own, whose mask code asks whether anything is padded. Sort the padding out "
        "before, so that no mask is needed, or let it be: the numbers are right, at the speed of a loop.",
    ),
    r"output dynamic shape|aten\.nonzero": (
        "counts tokens",
        "a mixture of experts gathers the tokens of each expert, as many as there are. "
        '`model.set_experts_implementation("batched_mm")` computes the same in fixed shapes.',
    ),
    r"setup_context": (
        "old autograd function",
        "the model's activation is a `torch.autograd.Function` of a kind that `vmap` does not take. Let it be, or put "
        '`torch.nn.GELU(approximate="tanh")` in its place.',
    ),
    r"index_put_": (
        "writes a mask in place",
        "the model makes the mask of its features by writing into one. Cut or pad all examples of a task to the same length "
        "and leave the mask out, or let it be.",
    ),
    r"softcap": (
        "soft-capped scores",
        'the fused attention has no soft cap: load the model with `attn_implementation="eager"`, which is served.',
    ),
}


def reason(message):
    """A message in a cell: a short form of a known one, the first sentence of another."""
    for pattern, (short, _) in REASONS.items():
        if re.search(pattern, message):
            return short
    sentence = re.split(r"\. |\n", message.strip().removeprefix("vmap: "))[0].replace("|", "/")
    return sentence if len(sentence) <= 150 else sentence[:149].rstrip() + "…"


def row(case, seed):
    """The cells of a row, by column."""
    huggingface.register()
    attention = attention_of(case)
    found = {"attention": attention}
    with float64_throughout():
        for column in COLUMNS:
            found[column] = cell(case, attention, column, torch.Generator().manual_seed(seed))
    return found


INTRODUCTION = """# Hugging Face models

Register the attention once, load a model with it, and meta-train it as any other module:

```python notest: from_pretrained downloads a checkpoint
import metafast
from transformers import AutoModelForCausalLM

metafast.integrations.huggingface.register()
model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="metafast")


def loss_fn(model, batch):  # one task, mean loss
    return model(**batch).loss


meta = metafast.MAML(model, loss_fn, inner=metafast.inner.SGD(lr=0.01), steps=3, order=2)
meta(support, query).backward()  # dicts of tensors, the task first
text = meta.adapt(support).model(0).generate(ids, max_new_tokens=20)  # the adapted model of the first task
```

The table says what happens with each architecture, in a small configuration and in float64. Every cell was computed by
`tests/test_huggingface_table.py` and compared with a plain PyTorch loop over tasks with the model's own attention: loss and
meta-gradient to 1e-8.

- **served**: the same numbers, with all tasks at once.
- **loop**: the same numbers, one task after another, since the model does not run under `torch.func.vmap`. The log says so
  at WARNING.
- **refused**: an error that says why.
- **–**: does not apply.

| column | what runs |
| --- | --- |
| attention | what the model runs with: `metafast` where it takes it, else its own |
| first order, second order | `MAML(..., order=1)` and `order=2`; the ids hold padding tokens that nothing masks |
| captured | `capture=True`: the call that records, and a replay with another batch |
| padded right, padded left | second order, with an `attention_mask` |
| generate | `learners.model(task).generate` from a prompt padded on the left, against the plainly adapted model's scores |
| LoRA | second order; the base is frozen, adapters of rank 2 on the attention's projections are adapted |
"""


def made_with():
    torch_version, theirs = (
        ".".join(version.split(".")[:2]) for version in (torch.__version__, transformers.__version__)
    )
    return f"Made with torch {torch_version} and transformers {theirs} by `python tests/test_huggingface_table.py --write`."


def page(rows):
    """The page of these rows, by label."""
    columns = ("attention", *COLUMNS)
    lines = [
        INTRODUCTION,
        made_with(),
        "",
        f"| architecture | {' | '.join(columns)} |",
        "| --- " * (len(columns) + 1) + "|",
    ]
    lines += [f"| {label} | {' | '.join(cells[column] for column in columns)} |" for label, cells in rows.items()]
    said = {cell.partition(": ")[2] for cells in rows.values() for cell in cells.values()}
    advice = [f"- **{short}**: {what}" for short, what in REASONS.values() if short in said]
    return "\n".join([*lines, "", "## What to do about", "", *advice]) + "\n"


def read_page():
    """The page's rows by label, and whether it was made with the versions that are installed."""
    text = PAGE.read_text()
    columns = ("attention", *COLUMNS)
    rows = {}
    for line in text.partition("| architecture |")[2].splitlines()[2:]:
        if not line.startswith("| "):
            break
        label, *cells = (part.strip() for part in line.strip("|").split(" | "))
        rows[label] = dict(zip(columns, cells, strict=True))
    return rows, made_with() in text


@pytest.mark.parametrize("case", third(CASES), ids=lambda case: case.label)
def test_the_table(case, generator):
    found = row(case, generator.initial_seed())
    assert not [cell for cell in found.values() if cell.startswith(WRONG)], found
    rows, same_versions = read_page()
    if same_versions:
        assert found == rows[case.label], WRITE


def test_the_page_is_made_by_this_file():
    rows, same_versions = read_page()
    assert list(rows) == [case.label for case in CASES]
    assert len({case.name for case in CASES}) >= 25
    if same_versions:
        assert PAGE.read_text() == page(rows), WRITE
    said = {cell for cells in rows.values() for cell in cells.values() if cell.startswith(("loop: ", "refused: "))}
    assert {cell.partition(": ")[2] for cell in said} <= {short for short, _ in REASONS.values()}


WRITE = "the page is another one: python tests/test_huggingface_table.py --write, and look at what changed"


def write():
    """Computes every cell, and writes the page."""
    logging.getLogger("metafast").propagate = False
    rows = {}
    for case in CASES:
        rows[case.label] = row(case, seed=0)
        print(case.label, rows[case.label], flush=True)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(rows))


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit(f"usage: python {sys.argv[0]} --write")
    write()
