"""The pages and the README: their code runs, links lead somewhere, every message and variable of the code is explained."""

from __future__ import annotations

import ast
import importlib.util
import logging
import re
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from plain_loop import adaptation, at, distance, gradients, meta_gradients, task

import metafast

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^(?P<indent> *)```python(?P<attribute>[^\n]*)\n(?P<code>.*?)^ *```", re.MULTILINE | re.DOTALL)

pytestmark = [
    # Torch has no batching rule for some op, and runs a loop of its own.
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers", "ignore::DeprecationWarning:transformers"),
    # Torch's inference fast path of nn.TransformerEncoder.
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]


def load_hooks():
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


HOOKS = load_hooks()
GENERATED = {f"docs/{page.uri}": page for page in HOOKS.generated_pages()}


def label(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page):
    """The Python blocks of a page: what follows "python" in the fence, and the code."""
    return [(match["attribute"].strip(), textwrap.dedent(match["code"])) for match in FENCE.finditer(page.read_text())]


def namespace_of(page):
    """What the blocks of a page define, one after another; long loops are cut to two rounds."""
    # Dataclasses look their module up.
    name = f"docs_page_{re.sub(r'[^a-z0-9]', '_', label(page))}"
    module = type(sys)(name)
    sys.modules[name] = module
    for number, (attribute, code) in enumerate(blocks(page)):
        if attribute:
            continue
        short = re.sub(r"range\(\d{2,}\)", "range(2)", code)
        exec(compile(short, f"{label(page)}, block {number}", "exec"), module.__dict__)
    return module.__dict__


@pytest.fixture
def usual_logging():
    logger = logging.getLogger("metafast")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=label)
def test_the_code_runs(page, usual_logging, generator):
    if "transformers" in page.read_text() and any(not a and "transformers" in code for a, code in blocks(page)):
        pytest.importorskip("transformers")
    if any(not a and "import peft" in code for a, code in blocks(page)):
        pytest.importorskip("peft")
    namespace_of(page)


def test_blocks_that_do_not_run_say_why():
    for page in PAGES:
        for attribute, _ in blocks(page):
            assert not attribute or re.fullmatch(r"notest: \w.{9,}", attribute), (label(page), attribute)


# Extending.


def net():
    return torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1)).double()


def loss_fn(model, batch):
    return torch.nn.functional.mse_loss(model(batch[0]), batch[1])


def draw(generator, tasks=4):
    return [
        tuple(torch.randn(tasks, examples, size, dtype=torch.float64, generator=generator) for size in (3, 1))
        for examples in (5, 7)
    ]


@pytest.mark.parametrize(
    "options",
    [{}, {"checkpoint": True}, {"tasks_per_chunk": 3}, {"capture": True}, {"task_batching": "loop"}, {"order": 1}],
    ids=str,
)
def test_the_new_algorithm_is_a_plain_loop(options, generator):
    algorithm = namespace_of(DOCS / "extending" / "algorithm.md")["NearMAML"]
    model, (support, query) = net(), draw(generator)
    losses = []
    for index in range(4):
        found = adaptation(model, loss_fn, task(support, index), 2, 0.1, create_graph=options.get("order") != 1)
        start, end = found[0], found[-1]
        near = sum((end[name] - p).square().sum() for name, p in start.items())
        losses.append(loss_fn(at(model, end), task(query, index)) + 0.7 / 2 * near)
    loss = torch.stack(losses).mean()
    expected = gradients(loss, model.parameters())
    meta = algorithm(model, loss_fn, inner=metafast.inner.SGD(lr=0.1), steps=2, penalty=0.7, **options)
    # The second call of a captured learner is a replay.
    for _ in range(2):
        found_loss, found = meta_gradients(meta, support, query)
    torch.testing.assert_close(found_loss, loss.detach())
    assert distance(found, expected) < 1e-9


def test_the_new_algorithm_is_short():
    code = next(code for _, code in blocks(DOCS / "extending" / "algorithm.md") if "class NearMAML" in code)
    assert len(code.splitlines()) <= 40


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_new_rule_is_a_plain_loop(checkpoint, generator):
    rule_class = namespace_of(DOCS / "extending" / "rule.md")["SoftSign"]
    rule = rule_class(lr=0.1, weight_decay=0.02, learn={"lr": "step"}, clip_value=0.5)
    model, (support, query) = net(), draw(generator)
    meta = metafast.MAML(model, loss_fn, inner=rule, steps=3, checkpoint=checkpoint)
    losses = []
    for index in range(4):
        params = dict(model.named_parameters())
        averages = dict.fromkeys(params, 0.0)
        for step in range(3):
            loss = loss_fn(at(model, params), task(support, index))
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            for (name, p), grad in zip(list(params.items()), grads, strict=True):
                averages[name] = 0.9 * averages[name] + 0.1 * (grad.clamp(-0.5, 0.5) + 0.02 * p)
                params[name] = p - meta.rates.lr[step] * (averages[name] / 0.1).tanh()
        losses.append(loss_fn(at(model, params), task(query, index)))
    loss = torch.stack(losses).mean()
    expected = gradients(loss, meta.parameters())
    found_loss, found = meta_gradients(meta, support, query)
    torch.testing.assert_close(found_loss, loss.detach())
    assert distance(found, expected) < 1e-9


# Links.


def headings(text):
    """Anchors of a page: of its headings, and of what the reference documents."""
    fixed = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ +(.+?)\s*$", fixed, flags=re.MULTILINE)
    slugs = {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}
    return slugs | set(re.findall(r"^::: (\S+)", text, flags=re.MULTILINE))


def text_of(path):
    return GENERATED[path].text if path in GENERATED else (ROOT / path).read_text()


LINKED = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
LINKED += sorted((ROOT / "metafast").rglob("README.md"))


@pytest.mark.parametrize("page", LINKED, ids=label)
def test_links_lead_somewhere(page):
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    here = page.parent.relative_to(ROOT)
    for target in re.findall(r"\]\(([^()\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = label(page) if not name else (ROOT / here / name).resolve().relative_to(ROOT).as_posix()
        assert path in GENERATED or (ROOT / path).exists(), target
        if anchor:
            assert anchor in headings(text_of(path)), target


def test_links_on_the_site():
    text = (
        "[one](../../metafast/ops/attention/README.md#a), [two](../huggingface.md), [`tests/x.py`](../../tests/x.py)\n"
    )
    text += "![bars](../figures/bars.png)\n```python notest: why it is so\nf[0](x.y)\n```\n"
    assert HOOKS.for_the_site(text, "howto/data.md") == (
        "[one](../maths/ops/attention.md#a), [two](../huggingface.md), `tests/x.py`\n"
        "![bars](../figures/bars.png)\n```python\nf[0](x.y)\n```\n"
    )
    assert (
        HOOKS.for_the_site("![bars](../docs/figures/bars.png)", "howto/examples.md") == "![bars](../figures/bars.png)"
    )


def test_results_become_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(HOOKS, "RESULTS", tmp_path)
    assert "make bench" in HOOKS.results_page()
    (tmp_path / "cpu-all.json").write_text(
        '{"machine_info": {"device": "a machine"}, "datetime": "2026-01-01", "benchmarks": [{"group": "case", "name": "n", '
        '"stats": {"median": 0.5}, "extra_info": {"what": "ours", "comparisons": [{"of": "time", "own": 0.001, "with": '
        '"theirs", "other": 0.002, "ratio": 2.0, "bar": null}]}}, {"group": "alone", "name": "n", "stats": {"median": '
        '0.5}, "extra_info": {"what": "ours"}}]}'
    )
    page = HOOKS.results_page()
    assert "| case | ours | 1.00 ms | theirs | 2.00 ms | 2.00 |" in page
    assert "| alone | ours | 500.00 ms | | | |" in page


# Messages.

# Functions whose strings become parts of messages.
REASONS = {
    "_hook_reason",
    "_load",
    "_reasons_against_fused",
    "_side_by_side_or_loop",
    "_write_reason",
    "describe_not_finite",
    "difference",
    "reasons_against_fused",
}

# Messages that no user meets, by their beginning, and why.
INTERNAL = {
    "module … has no attribute": "Python's own",
    "torch.utils.checkpoint inside the model does not run under vmap": "caught: the reason of a loop over tasks",
    "… does not run under vmap as it does for one task": "caught: the reason of a loop over tasks",
    "as_strided on a tensor that shares its memory with other tasks": "caught by the loop over tasks",
    "attn_mask: only a floating mask has a gradient": "a contract between kernels",
    "compile_kernels: expected TRITON_INTERPRET to be unset when triton is imported": "for metafast's own checks",
    "cuobjdump: expected the resource usage of": "for metafast's own checks",
    "tune: expected a CUDA device, found none": "for metafast's own tuning",
    "expected an object": "caught: part of the warning about the file of choices",
    "expected four positive numbers for": "caught: part of the warning about the file of choices",
    "…: expected a rule with a formula of its own": "task_update refuses such a rule before",
    "decay: expected a number from 0 to 1": "outer updates are not public",
    "inplace: expected tensors that require no gradient": "outer updates are not public",
    "reduction: expected 'mean' or 'sum'": "outer updates are not public",
    "weights: expected": "outer updates are not public",
    "…: expected a container as that of the other tensors": "outer updates are not public",
    "…: expected at least one tensor, got none": "outer updates are not public",
    "…: expected as many tensors as the other container has": "outer updates are not public",
    "…[…]: expected": "outer updates are not public",
    "…: expected a tensor that requires no gradient, to be updated in place": "updates in place are not public",
}

LOGS = {"logger.info", "logger.warning", "warnings.warn", "warning_once"}
ENOUGH = 12


def template(node, constants):
    """A message with … for what is put in; None for one that is all put in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%(?:\.\d+\w|\w)", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        found = constants.get(node.value.id) if isinstance(node.value, ast.Name) else None
        return "…" if found is None else repr(found) if node.conversion == ord("r") else found
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left, constants) + template(node.right, constants)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "rstrip":
        return template(node.func.value, constants)
    return constants.get(node.id, "…") if isinstance(node, ast.Name) else "…"


def beginning(message):
    """As much of a message as has some fixed letters."""
    found = ""
    for part in re.split("(…)", re.sub("…+", "…", message)):
        if part == "…" and len(re.findall(r"\w", found)) >= ENOUGH:
            break
        found += part
    return re.sub(r"\s+", " ", found).strip()


def messages():
    """The beginning of every message of the library, and where it is."""
    found = {}
    for path in sorted((ROOT / "metafast").rglob("*.py")):
        tree = ast.parse(path.read_text())
        constants = {
            node.targets[0].id: template(node.value, {})
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        }
        constants = {name: text for name, text in constants.items() if "…" not in text}
        nodes = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                nodes += node.exc.args[:1]
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                is_error = called == "super().__init__" and node.args
                if called in LOGS or called.endswith(".warning_once") or is_error:
                    nodes += node.args[:1]
            elif isinstance(node, ast.FunctionDef) and node.name in REASONS:
                strings = [part for part in ast.walk(node) if isinstance(part, ast.JoinedStr | ast.Constant)]
                docstring = ast.get_docstring(node, clean=False)
                inside = {id(value) for part in strings if isinstance(part, ast.JoinedStr) for value in part.values}
                nodes += [
                    part
                    for part in strings
                    if id(part) not in inside and not (isinstance(part, ast.Constant) and part.value == docstring)
                ]
        for node in nodes:
            text = beginning(template(node, constants))
            if len(re.findall(r"\w", text)) >= ENOUGH and " " in text:
                found.setdefault(text, label(path))
    return found


def test_every_message_is_explained():
    page = re.sub(r"\s+", " ", (DOCS / "reference" / "messages.md").read_text().replace("`", ""))
    found = messages()
    assert len(found) > 150
    missing = {
        text: path
        for text, path in found.items()
        if text not in page and not any(text.startswith(known) for known in INTERNAL)
    }
    assert not missing, "docs/reference/messages.md lacks:\n" + "\n".join(f"{p}: {t}" for t, p in missing.items())


def test_every_variable_is_explained():
    page = (DOCS / "reference" / "environment.md").read_text()
    sources = [path for folder in ("metafast", "csrc", "tests") for path in (ROOT / folder).rglob("*.*")]
    sources += [ROOT / "setup.py", ROOT / "Makefile"]
    read = re.compile(r"(?:environ(?:\.get|\.setdefault)?|getenv)[\[(]\s*\"(\w+)\"|\b(METAFAST_\w+)=")
    names = {
        name
        for path in sources
        if path.suffix in (".py", ".cpp", ".h", "") and path.is_file() and path != Path(__file__)
        for pair in read.findall(path.read_text())
        for name in pair
        if name
    }
    assert {"METAFAST_BACKEND", "METAFAST_BUILD"} <= names
    assert not [name for name in sorted(names) if f"`{name}`" not in page]
