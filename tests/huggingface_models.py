"""Small models of transformers, from their configuration classes alone: nothing is downloaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import transformers
from torch import nn

VOCABULARY, CLASSES = 30, 3
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
    **SPECIAL,
}
GROUPED = {**SMALL, "num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {**GROUPED, "num_experts_per_tok": 2}
GEMMA = {**GROUPED, "num_hidden_layers": 2, "head_dim": 4, "sliding_window": 3}
ENCODER_DECODER = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    **SPECIAL,
    "decoder_start_token_id": 1,
}
CONVOLUTIONS = {"conv_dim": (16, 16), "conv_kernel": (4, 3), "conv_stride": (3, 2), "num_conv_pos_embeddings": 4}


class Case(NamedTuple):
    """A row of the table.

    Args:
        name: as readers know the architecture.
        has: what is particular about its attention.
        kind: "encoder", "decoder", "encoder-decoder", "vision" or "speech": what its inputs are.
        model: name of the class in transformers.
        config: name of its configuration class, and the settings.
        projections: ends of the names of the layers that LoRA changes.
        reference: attention of the plain loop, "eager", or "sdpa" where the model's eager attention computes in float32
            whatever the dtype.
        attention: of the row, None for "metafast" or what the model takes instead.
        generates: whether it has ``generate``.
        experts: how a mixture of experts computes; transformers' default does not take float64.
    """

    name: str
    has: str
    kind: str
    model: str
    config: tuple[str, dict[str, Any]]
    projections: tuple[str, ...]
    reference: str = "eager"
    attention: str | None = None
    generates: bool = False
    experts: str = "eager"

    @property
    def label(self) -> str:
        """The name, and what the row sets besides."""
        changed = [self.attention or "", self.experts if self.experts != "eager" else ""]
        changed = [f"`{name}`" for name in changed if name]
        return f"{self.name} ({', '.join([self.has] * bool(self.has) + changed)})" if self.has or changed else self.name


def encoder(name, has, prefix, projections, settings=SMALL, **options):
    return Case(name, has, "encoder", f"{prefix}ForMaskedLM", (f"{prefix}Config", settings), projections, **options)


def decoder(name, has, prefix, projections=("q_proj", "v_proj"), settings=SMALL, model=None, **options):
    model = model or f"{prefix}ForCausalLM"
    options = {"reference": "sdpa", **options}
    return Case(name, has, "decoder", model, (f"{prefix}Config", settings), projections, generates=True, **options)


CASES = [
    encoder("BERT", "", "Bert", ("query", "value")),
    encoder("RoBERTa", "", "Roberta", ("query", "value"), {**SMALL, "pad_token_id": 1, "bos_token_id": 0}),
    encoder(
        "DistilBERT", "", "DistilBert", ("q_lin", "v_lin"),
        {"vocab_size": VOCABULARY, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16, "max_position_embeddings": 32},
    ),
    encoder("ELECTRA", "", "Electra", ("query", "value"), {**SMALL, "embedding_size": 16}),
    encoder(
        "ALBERT", "layers shared", "Albert", ("query", "value"),
        {**SMALL, "num_hidden_layers": 2, "embedding_size": 16},
    ),
    encoder(
        "DeBERTa-v2", "disentangled", "DebertaV2", ("query_proj", "value_proj"),
        {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8},
    ),
    encoder("MPNet", "relative bias", "MPNet", ("attn.q", "attn.v"), {**SMALL, "pad_token_id": 1, "bos_token_id": 0}),
    encoder(
        "ModernBERT", "windowed", "ModernBert", ("Wqkv",),
        {
            **SMALL, "num_hidden_layers": 2, "local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 1,
            "sep_token_id": 2,
        },
        reference="sdpa",
    ),
    decoder(
        "GPT-2", "", "GPT2", ("c_attn",),
        {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, **SPECIAL},
        model="GPT2LMHeadModel", reference="eager",
    ),
    decoder("OPT", "", "OPT", settings={**SMALL, "ffn_dim": 16, "word_embed_proj_dim": 16}),
    decoder(
        "GPT-Neo", "windowed", "GPTNeo", settings={
            "vocab_size": VOCABULARY, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 16,
            "max_position_embeddings": 32, "attention_types": [[["global", "local"], 1]], "window_size": 3, **SPECIAL,
        },
        reference="eager",
    ),
    decoder("GPT-NeoX", "", "GPTNeoX", ("query_key_value",)),
    decoder("Llama", "grouped", "Llama", settings=GROUPED),
    decoder("Mistral", "grouped, windowed", "Mistral", settings={**GROUPED, "sliding_window": 3}),
    decoder("Qwen2", "grouped", "Qwen2", settings=GROUPED),
    decoder("Gemma 2", "grouped, windowed, soft-capped", "Gemma2", settings=GEMMA, reference="eager"),
    decoder("Gemma 2", "grouped, windowed, soft-capped", "Gemma2", settings=GEMMA, reference="eager", attention="eager"),
    decoder("Phi", "", "Phi"),
    decoder(
        "Falcon", "multi-query", "Falcon", ("query_key_value",),
        {**SMALL, "multi_query": True, "new_decoder_architecture": False, "alibi": False},
    ),
    decoder(
        "Falcon", "multi-query, ALiBi", "Falcon", ("query_key_value",),
        {**SMALL, "multi_query": True, "new_decoder_architecture": False, "alibi": True},
    ),
    decoder(
        "BLOOM", "ALiBi", "Bloom", ("query_key_value",),
        {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 1, "n_head": 2, **SPECIAL},
    ),
    decoder("Mixtral", "grouped, experts", "Mixtral", settings={**EXPERTS, "num_local_experts": 3}),
    decoder(
        "Mixtral", "grouped, experts", "Mixtral", settings={**EXPERTS, "num_local_experts": 3}, experts="batched_mm"
    ),
    decoder(
        "Qwen2-MoE", "grouped, experts", "Qwen2Moe",
        settings={**EXPERTS, "num_experts": 3, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    Case(
        "BART", "", "encoder-decoder", "BartForConditionalGeneration",
        ("BartConfig", {**ENCODER_DECODER, "max_position_embeddings": 32}), ("q_proj", "v_proj"), generates=True,
    ),
    Case(
        "T5", "relative bias", "encoder-decoder", "T5ForConditionalGeneration",
        (
            "T5Config",
            {
                "vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2,
                **SPECIAL, "decoder_start_token_id": 1,
            },
        ),
        (".q", ".v"), reference="sdpa", generates=True,
    ),
    Case(
        "ViT", "", "vision", "ViTForImageClassification",
        ("ViTConfig", {**SMALL, "image_size": 8, "patch_size": 4, "num_labels": CLASSES}),
        ("query", "value", "q_proj", "v_proj"),
        reference="sdpa",
    ),
    Case(
        "Wav2Vec2", "", "speech", "Wav2Vec2ForSequenceClassification",
        (
            "Wav2Vec2Config",
            {
                **SMALL, **CONVOLUTIONS, "num_feat_extract_layers": 2, "num_conv_pos_embedding_groups": 2,
                "feat_extract_norm": "layer", "num_labels": CLASSES, "apply_spec_augment": False, "classifier_proj_size": 16,
            },
        ),
        ("q_proj", "v_proj"),
    ),
    Case(
        "Whisper", "", "speech, text", "WhisperForConditionalGeneration",
        (
            "WhisperConfig",
            {
                **ENCODER_DECODER, "num_mel_bins": 4, "max_source_positions": 5, "max_target_positions": 32,
                "apply_spec_augment": False, "suppress_tokens": None, "begin_suppress_tokens": None,
            },
        ),
        ("q_proj", "v_proj"),
    ),
]  # fmt: skip


def build(case: Case, generator: torch.Generator) -> nn.Module:
    """The model in float64 and training mode, without dropout: other numbers than its initialization's, biases too."""
    kind, settings = case.config
    config = getattr(transformers, kind)(**settings)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    model = getattr(transformers, case.model)(config).double().train()
    if "experts" in case.has:
        model.set_experts_implementation(case.experts)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return model


@contextlib.contextmanager
def float64_throughout() -> Iterator[None]:
    """Models compute softmax, norms and rotary angles in float32 whatever their dtype. Here what is float64 stays so.

    Otherwise a last bit of float64 that differs may become one of float32, and the finite minimum of float64 infinite.
    """
    softmax, to, float_ = F.softmax, torch.Tensor.to, torch.Tensor.float

    def own_softmax(input: torch.Tensor, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
        return softmax(input, *args, dtype=None if input.dtype == torch.float64 else dtype, **kwargs)

    def own_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.dtype == torch.float64 and torch.float32 in (*args, *kwargs.values()):
            return self
        return to(self, *args, **kwargs)

    def own_float(self: torch.Tensor) -> torch.Tensor:
        return self if self.dtype == torch.float64 else float_(self)

    F.softmax, torch.Tensor.to, torch.Tensor.float = own_softmax, own_to, own_float
    try:
        yield
    finally:
        F.softmax, torch.Tensor.to, torch.Tensor.float = softmax, to, float_


def examples(
    case: Case, generator: torch.Generator, shape: tuple[int, ...], padded: str | None = None
) -> dict[str, Any]:
    """A batch ``[*shape, …]``: arguments of the model, and "labels" and "weights" of its outputs.

    Without ``padded``, a padding token is among the ids all the same, where nothing masks it.
    """
    length = 6
    labels = torch.randint(0, CLASSES, shape, generator=generator)
    if case.kind == "vision":
        pixels = torch.randn(*shape, 3, 8, 8, generator=generator, dtype=torch.float64)
        return {"pixel_values": pixels, "labels": labels}
    if case.kind == "speech":
        values = torch.randn(*shape, 40, generator=generator, dtype=torch.float64)
        batch = {"input_values": values, "labels": labels}
        return batch | ({} if padded is None else {"attention_mask": _mask(shape, 40, 25, padded, generator)})
    ids = torch.randint(3, VOCABULARY, (*shape, length), generator=generator)
    labels = torch.randint(3, VOCABULARY, (*shape, length), generator=generator)
    if case.kind == "speech, text":
        features = torch.randn(*shape, 4, 10, generator=generator, dtype=torch.float64)
        return {"input_features": features, "decoder_input_ids": ids, "labels": labels}
    pad = case.config[1].get("pad_token_id", 0)
    ids[..., 0, 1] = pad
    batch = {"input_ids": ids, "labels": labels}
    if padded is not None:
        mask = _mask(shape, length, 3, padded, generator)
        batch |= {"input_ids": torch.where(mask.bool(), ids, pad), "attention_mask": mask}
    if case.kind == "encoder-decoder":
        return batch | {"decoder_input_ids": ids.flip(-1)}
    # What stands at padding is nobody's business: a finite minimum and an exact mask differ there.
    return batch | ({} if padded is None else {"weights": batch["attention_mask"]})


def _mask(shape, length, fewest, padded, generator):
    lengths = torch.randint(fewest, length + 1, (*shape, 1), generator=generator)
    lengths[..., 0, :] = fewest  # one is padded for certain
    mask = (torch.arange(length) < lengths).long()
    return mask.flip(-1) if padded == "left" else mask


def loss_fn(net: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Cross-entropy of one task; the models' own is in float32."""
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "weights")}
    logits = net(**inputs).logits.flatten(0, -2)
    losses = F.cross_entropy(logits, batch["labels"].flatten(), reduction="none")
    if "weights" not in batch:
        return losses.mean()
    weights = batch["weights"].flatten()
    return (losses * weights).sum() / weights.sum()


class LoRA(nn.Module):
    """A layer of a model, frozen, and a learned change of rank 2 (Hu et al., arXiv 2106.09685)."""

    def __init__(self, layer: nn.Module, generator: torch.Generator) -> None:
        super().__init__()
        self.layer = layer
        inputs, outputs = layer.weight.shape if type(layer).__name__ == "Conv1D" else layer.weight.shape[::-1]
        self.down = nn.Parameter(torch.randn(inputs, 2, generator=generator, dtype=torch.float64) / 4)
        self.up = nn.Parameter(torch.randn(2, outputs, generator=generator, dtype=torch.float64) / 4)

    def forward(self, x):
        return self.layer(x) + x @ self.down @ self.up


def add_lora(case: Case, model: nn.Module, generator: torch.Generator) -> None:
    """Freezes the model, and puts :class:`LoRA` around its attention's projections."""
    model.requires_grad_(False)
    found = [name for name, _ in model.named_modules() if name.endswith(case.projections)]
    assert found, f"{case.name}: no projections {case.projections}"
    for name in found:
        parent, _, child = name.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, LoRA(getattr(owner, child), generator))
