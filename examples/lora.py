"""MAML of a LoRA adapter: a frozen BERT learns to tell languages apart that it has never seen, from five names of each.

    python examples/lora.py

It needs the extras ``hf`` and ``demo``, and downloads nothing. A small BERT over bytes first learns to name the 83 training
languages of ``metafast.tasks.cldr``; it stands for a checkpoint. Then it is frozen, and ``peft.get_peft_model`` puts LoRA on
the queries and values of its attention and a head of five classes on top. MAML trains where these start. The inner loop
adapts nothing else: all tasks share the base, which is neither copied nor differentiated.

The table has the accuracy on test languages before any step and after some, with adapters as peft makes them and as MAML
leaves them: 40 s on one CPU core. ``--iterations`` makes it shorter or better.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import metafast
from metafast.tasks import FewShot, cldr
from metafast.tasks.text import Batch, encode
from metafast.training import evaluate, fit

WAYS, SHOTS, QUERIES, LENGTH = 5, 5, 10, 24
# On which accuracies are measured.
TASKS = 100


def inputs(batch: Batch) -> dict[str, Tensor]:
    """The arguments of a model of transformers. Bytes are its tokens, and the byte 0 is padding."""
    return {"input_ids": batch["text"], "attention_mask": (batch["text"] != 0).long()}


def loss_fn(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy of one task, and its accuracy."""
    logits = model(**inputs(batch)).logits
    accuracy = (logits.argmax(-1) == batch["label"]).float().mean()
    return F.cross_entropy(logits, batch["label"]), {"accuracy": accuracy}


def pretrained(iterations: int, generator: torch.Generator) -> BertForSequenceClassification:
    """A BERT that was trained to name the training languages."""
    names = [encode(of_language, LENGTH) for of_language in cldr.select(cldr.split().training).values()]
    config = BertConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        max_position_embeddings=LENGTH, num_labels=len(names), initializer_range=0.1,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config._attn_implementation = "metafast"
    model = BertForSequenceClassification(config)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(iterations):
        # One name of each language.
        drawn = [of[torch.randint(len(of), (), generator=generator)] for of in names]
        optimizer.zero_grad()
        loss, _ = loss_fn(model, {"text": torch.stack(drawn).long(), "label": torch.arange(len(drawn))})
        loss.backward()
        optimizer.step()
    return model


def with_adapter(base: BertForSequenceClassification) -> peft.PeftModel:
    """The base, frozen, with LoRA on its attention and a new head."""
    base.classifier = nn.Linear(base.config.hidden_size, WAYS)
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"])
    return peft.get_peft_model(base, lora)


def learner(model: nn.Module) -> metafast.MAML:
    """MAML over what requires a gradient: the adapter and the head."""
    return metafast.MAML(model, loss_fn, inner=metafast.inner.SGD(lr=0.1), steps=3)


def episodes(languages: Sequence[str], seed: int) -> FewShot:
    """Tasks among some languages, all texts padded to one length, so that a captured step is recorded once."""
    sizes = {"ways": WAYS, "shots": SHOTS, "queries": QUERIES, "max_length": LENGTH, "multiple": LENGTH}
    return FewShot(cldr.select(languages), **sizes, seed=seed)


def train(meta: metafast.MAML, iterations: int, seed: int) -> None:
    """Meta-trains on tasks of the training languages."""
    optimizer = torch.optim.Adam([p for p in meta.parameters() if p.requires_grad], 3e-3)
    meta.capture = True
    fit(meta, episodes(cldr.split().training, seed), optimizer, iterations=iterations)


def accuracies(meta: metafast.MAML, steps: Sequence[int], seed: int) -> list[float]:
    """Accuracies on tasks of the test languages after some numbers of steps on the support set."""
    found = evaluate(meta, episodes(cldr.split().test, seed), TASKS, steps=steps)
    return [found.interval("accuracy", count).mean for count in steps]


def main() -> None:
    """Trains, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretraining", type=int, default=300, help="iterations of the base")
    parser.add_argument("--iterations", type=int, default=100, help="of meta-training")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    metafast.integrations.huggingface.register()
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    started = time.perf_counter()
    model = with_adapter(pretrained(options.pretraining, generator))
    trained, total = model.get_nb_trainable_parameters()
    print(f"{trained} of {total} parameters are adapted; the base took {time.perf_counter() - started:.0f} s")
    print(f"{'steps':<24}{0:>6}{3:>6}{10:>6}")
    meta = learner(model)
    for label, iterations in (("a new adapter", 0), ("meta-trained by MAML", options.iterations)):
        if iterations:
            train(meta, iterations, options.seed)
        found = accuracies(meta, (0, 3, 10), options.seed)
        print(f"{label:<24}" + "".join(f"{value:>6.2f}" for value in found), flush=True)
    print(f"all of it: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
