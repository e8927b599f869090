"""Attention of kept rows alone, by what the model's own attention is.

Notation: b batch, s sequence, m the most kept rows of a sequence, h query heads, h' key heads,
e head width, k key positions.
"""

import torch
import torch.nn.functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dlr.routing.families import FLASH, FLEX
from dlr.routing.rows import Rows


def attend(own, rows: Rows, module, query, key, value, attention_mask, places=None,
           **kwargs) -> torch.Tensor:
    """Attention of kept rows `[b, h, m, e]` to all keys `[b, h', k, e]` by `own`: `[b, m, h, e]`.

    SDPA without a mask and FlashAttention are causal by row number, which is not a kept row's
    place: kept rows go to SDPA in blocks, with masks by place.

    Args:
        attention_mask: as the layer got it for all rows: None, `[b, 1, s, k]`, `[b, k]` (real keys,
            FlashAttention) or a BlockMask (FlexAttention).
        places: `[1, s]` position_ids of all rows, where FlashAttention finds packed documents.
    """
    if rows.length == 1:                       # a step of decoding: a row's place is the last
        return own(module, query, key, value, attention_mask, **kwargs)[0]
    name = _name_of(own)
    if name in FLASH:
        packed = places if attention_mask is None and rows.batch == 1 else None
        return _causal(rows, query, key, value, kwargs.get("scaling"), attention_mask,
                       kwargs.get("sliding_window"), packed, key.shape[2] - rows.length)
    if name == FLEX:
        mask = _by_place(rows, key.shape[2], attention_mask)
        return own(module, query, key, value, mask, **kwargs)[0]
    if attention_mask is None and name == "sdpa":
        return _causal(rows, query, key, value, kwargs.get("scaling"))
    if attention_mask is not None:
        attention_mask = rows.chosen(attention_mask.expand(rows.batch, -1, -1, -1))
    return own(module, query, key, value, attention_mask, **kwargs)[0]


def _name_of(own) -> str | None:
    """The name under which transformers knows an attention function."""
    return next((name for name in ("sdpa", *FLASH, FLEX)
                 if name in ALL_ATTENTION_FUNCTIONS and own is ALL_ATTENTION_FUNCTIONS[name]), None)


def _causal(rows: Rows, query, key, value, scale: float | None, real: torch.Tensor | None = None,
            window: int | None = None, places: torch.Tensor | None = None,
            earlier: int = 0) -> torch.Tensor:
    """Causal attention of kept rows, a block at a time over the keys that block can see.

    Query heads that share keys become rows of one head, so that no block copies keys for each.

    Args:
        real: `[b, k]`, which keys are no padding.
        window: how many keys a row sees, its own the last.
        places: `[1, s]`; where they do not rise by one, another document begins.
        earlier: how many keys stand in front of the first row's own.
    """
    kept = query.shape[2]
    shared = query.shape[1] // key.shape[1]  # query heads a key head
    query = query.unflatten(1, (-1, shared)).transpose(2, 3).contiguous()  # [b, h', m, h / h', e]
    number = torch.arange(key.shape[2], device=query.device)
    document = None
    if places is not None and not earlier:
        document = (places[0].diff(prepend=places[0, :1] - 1) != 1).cumsum(0)
    outputs = []
    for start, stop, newest in rows.blocks or ((0, kept, rows.length),):
        keys = newest + earlier
        last = earlier + rows.padded[:, start:stop].repeat_interleave(shared, 1)[..., None]
        mask = number[:keys] <= last
        if window is not None:
            mask &= number[:keys] > last - window
        if document is not None:
            mask &= document[:keys] == document[last]
        if real is not None:                                    # no row is left without a key
            mask &= real[:, None, :keys].bool() | (number[:keys] == last)
        block = query[:, :, start:stop].flatten(2, 3)
        outputs.append(F.scaled_dot_product_attention(
            block, key[:, :, :keys], value[:, :, :keys], attn_mask=mask.unsqueeze(1), scale=scale))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)
    return out.unflatten(2, (kept, shared)).permute(0, 2, 1, 3, 4).flatten(2, 3)


def _by_place(rows: Rows, keys: int, mask):
    """A FlexAttention mask of kept rows: that of all rows, asked at each kept row's place."""
    from torch.nn.attention.flex_attention import create_block_mask
    earlier = keys - rows.length

    def causal(batch, head, place, key):
        return key <= place + earlier
    rule = causal if mask is None else mask.mask_mod

    def kept(batch, head, row, key):
        return rule(batch, head, rows.padded[batch, row], key)
    return create_block_mask(kept, rows.batch, None, rows.padded.shape[1], keys,
                             device=rows.padded.device)
