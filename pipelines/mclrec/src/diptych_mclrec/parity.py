"""The published MCLRec weights in our encoder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from diptych.contract import Weights
from diptych.errors import DataError
from diptych_mclrec.config import MCLRecConfig
from diptych_mclrec.model import Block, SequenceEncoder

MAX_BYTES = 4 * 2**30
_RENAMED = (
    (r"^LayerNorm\.", "input_norm."),
    (r"^trm_encoder\.layer\.(\d+)\.", r"blocks.\1."),
    (r"multi_head_attention\.LayerNorm\.", "attention_norm."),
    (r"multi_head_attention\.dense\.", "attention.output."),
    (r"multi_head_attention\.", "attention."),
    (r"feed_forward\.LayerNorm\.", "feed_forward_norm."),
    (r"feed_forward\.dense_1\.", "feed_forward.0."),
    (r"feed_forward\.dense_2\.", "feed_forward.2."),
)


def load_published(path: str | Path, *, heads: int = 2) -> SequenceEncoder:
    """An encoder with the weights of an official MCLRec checkpoint, in evaluation mode.

    Row r of the item table is the r-th distinct item in order of first appearance in the
    interaction file; the unused last row of the official table is kept.

    Args:
        path: ``model.pth`` as the official code writes it, or a safetensors file with its keys.
        heads: Attention heads, which the weights do not tell; 2 in all official scripts.

    Returns:
        The encoder, built from the shapes found.

    Raises:
        DataError: The file is missing, too large, no checkpoint, or not of this network.
    """
    path = Path(path)
    found = {_our_name(key): value for key, value in _read(path).items()}
    try:
        table = found["item_embedding.weight"]
        encoder = SequenceEncoder(
            len(table) - 2,
            dim=table.shape[1],
            layers=len({key.split(".")[1] for key in found if key.startswith("blocks.")}),
            heads=heads,
            inner=len(found["blocks.0.feed_forward.0.bias"]),
            max_len=len(found["position_embedding.weight"]),
            mask_row=True,
        )
        encoder.load_state_dict(found)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        reason = str(error).replace("\n", " ")
        raise DataError(
            f"{path}: is no official MCLRec checkpoint ({reason}): pass the model.pth of a SASRec "
            "or MCLRec training, or its state dictionary as safetensors"
        ) from error
    return encoder.eval()


def weights(config: MCLRecConfig, path: Path) -> Weights:
    """A published checkpoint as the runtime takes it: the encoder alone.

    Args:
        config: Gives the number of attention heads.
        path: As :func:`load_published` takes it.
    """
    encoder = load_published(path, heads=config.model.heads)
    first = encoder.blocks[0]
    assert isinstance(first, Block)
    shape = {
        "model.items": encoder.n_items,
        "model.dim": encoder.item_embedding.embedding_dim,
        "model.layers": len(encoder.blocks),
        "model.inner": first.feed_forward[0].out_features,
        "model.max_len": encoder.max_len,
        "model.norm": "post",
        "model.tied": True,
        "model.mask_row": True,
        "objective.kind": "sasrec",  # the checkpoint has no augmenters
    }
    facts = {"kind": "interactions", "codes": encoder.n_items}
    return Weights(shape, facts, {"encoder": encoder.state_dict()})


def _our_name(key: str) -> str:
    for pattern, name in _RENAMED:
        key = re.sub(pattern, name, key)
    return key


def _read(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise DataError(f"{path}: no such file: give the checkpoint's path")
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path}: has {path.stat().st_size} bytes: at most {MAX_BYTES} are read")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise many kinds for damaged files
        raise DataError(f"{path}: is no checkpoint of tensors ({type(error).__name__})") from error
    tensors = tensors.get("state_dict", tensors) if isinstance(tensors, Mapping) else tensors
    if not isinstance(tensors, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()
    ):
        raise DataError(f"{path}: holds no state dictionary: save model.state_dict()")
    return tensors
