"""Encoders of Hugging Face, from a folder or from the hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from metafast.integrations.huggingface import NAME, register

__all__ = ["load", "load_saved", "save", "train_last"]


def load(name: str) -> tuple[Any, Any]:
    """The encoder of a model, with metafast's attention, in float32 and in evaluation mode, and its tokenizer.

    Args:
        name: a folder of config.json, weights and a tokenizer, or a name on the hub.

    Raises:
        ImportError: transformers is missing.
        ValueError: there is no such model, or it is no encoder that reads texts.
    """
    register()
    from transformers import AutoModel, AutoTokenizer

    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model: expected a folder with config.json, got {name!r} without")
        place = str(path)
    elif path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ValueError(
            f"model: expected 'bytes', the folder of a Hugging Face model or a name on the hub, got {name!r}"
        )
    else:
        place = name
    with _quiet():
        try:
            encoder, info = AutoModel.from_pretrained(place, attn_implementation=NAME, output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(place)
        except Exception as error:
            # Broken files raise errors of safetensors, of tokenizers and of json.
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"model: expected a Hugging Face model with its tokenizer in {name!r}, or 'bytes' ({reason})"
            ) from error
    # A pooler is not used.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ValueError(
            f"model: expected all weights in {name!r}, got none of {missing[0]} and {len(missing) - 1} others"
        )
    if getattr(encoder.config, "is_encoder_decoder", False):
        raise ValueError(f"model: expected an encoder, got the encoder–decoder {type(encoder).__name__} in {name!r}")
    return encoder.float().eval(), tokenizer


def save(encoder: Any, tokenizer: Any, folder: Path) -> None:
    """Writes what :func:`load_saved` reads: the architecture and the tokenizer, without weights.

    Raises:
        OSError: they cannot be written.
    """
    try:
        encoder.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except Exception as error:
        # The tokenizers' own errors have no class of their own.
        raise OSError(f"{folder} could not be written ({error})") from error


def load_saved(folder: Path) -> tuple[Any, Any]:
    """An encoder of the saved architecture, with random weights, and the tokenizer.

    Raises:
        ImportError: transformers is missing.
        ValueError: the folder does not hold them.
    """
    register()
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    with _quiet():
        try:
            config = AutoConfig.from_pretrained(str(folder))
            encoder = AutoModel.from_config(config, attn_implementation=NAME)
            return encoder.float().eval(), AutoTokenizer.from_pretrained(str(folder))
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"checkpoint: expected the model's config.json and tokenizer in {folder} ({reason})"
            ) from error


def train_last(encoder: Any, count: int) -> None:
    """Leaves the last ``count`` layers to train; at least as many as there are: all of the encoder but a pooler.

    Raises:
        ValueError: the architecture has no list of its layers.
    """
    total = encoder.config.num_hidden_layers
    if count >= total:
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(not name.startswith("pooler."))
        return
    lists = (module for module in encoder.modules() if isinstance(module, nn.ModuleList) and len(module) == total)
    layers = next(lists, None)
    if layers is None and count:
        raise ValueError(
            f"trained_layers: expected 0 or at least {total}, all, of {type(encoder).__name__}, which has no list of its "
            f"layers, got {count}"
        )
    encoder.requires_grad_(False)
    if layers is not None and count:
        for layer in layers[-count:]:
            layer.requires_grad_(True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars and the remarks of transformers about weights that are not used."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
