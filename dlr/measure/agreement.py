"""Free-running generation: how long a model's greedy text is the base's, and how far it strays.

Base and model each continue a prompt for exactly N tokens, by transformers' `generate`. The largest
logit alone decides: the generation settings that a model brings (penalties, suppressed tokens) are
out of force. No text stops early: a token that ends texts is a token like any other, after which
both go on.

Notation: b prompts of a batch, s tokens of the longest, N tokens generated, U routable units. All
tables hold one row a prompt.
"""

import numpy as np
import pandas as pd
import torch
from transformers import GenerationConfig, LogitsProcessor

from dlr.measure.evaluate import bootstrap, likelihoods, skip_ratio
from dlr.measure.likelihood import frozen_base
from dlr.measure.logits import logits_of
from dlr.progress import tqdm
from dlr.routing.device import device_of
from dlr.routing.handle import Routing
from dlr.routing.plan import StaticPair
from dlr.routing.policy import (GivenPlan, LayerDrop, MixedStaticPlan, Policy, RandomPlan,
                                RecordedPlan, ShuffledPlan, StaticPlan)
from dlr.routing.weights import causal_lm

# Columns of the table: equal tokens in front, whether all N are, and mean KL(base || model) a token
# along the base's text and along the model's own, in nats.
MEASURES = ["agreed_tokens", "agreeing", "kl", "kl_own_text"]
# These draw, or hold, the gates of a pass: token by token they would give others than in one pass.
_BY_PASS = (GivenPlan, LayerDrop, RandomPlan, RecordedPlan, ShuffledPlan)


def _padded_on(side: str, ids: torch.Tensor, real: torch.Tensor) -> tuple:
    """ids and real `[b, s]` with each row's padding on its 'left' or 'right'."""
    order = (real if side == "left" else ~real).int().argsort(dim=1, stable=True)
    return ids.gather(1, order), real.gather(1, order)


class _Kept(LogitsProcessor):
    """Is called when a step of `generate` has its logits: counts the gates they were made under."""

    def __init__(self, routing: Routing):
        self.routing, self.counts = routing, 0

    def __call__(self, input_ids, scores):
        if self.routing.policy is None:
            gates = torch.ones(len(scores), self.routing.units)
        else:
            gates = self.routing.plan.gates[:, -1].float().cpu()
        self.counts = self.counts + (gates > 0.5)
        return scores


def _continued(model, routing: Routing, ids: torch.Tensor, real: torch.Tensor, tokens: int,
               policy: Policy | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(the greedy text `[b, N]`, how many of its tokens were chosen with a unit run `[b, U]`)."""
    ids, real = _padded_on("left", ids, real)
    causal, kept = causal_lm(model), _Kept(routing)
    settings, causal.generation_config = causal.generation_config, GenerationConfig()
    try:
        # two passes cannot use a cache; one gives the same result
        with routing.autocast(), routing.at(policy=policy, strategy="single_pass"):
            text = causal.generate(input_ids=ids, attention_mask=real.long(), do_sample=False,
                                   max_new_tokens=tokens, logits_processor=[kept],
                                   use_cache=routing.config.kv == "complete")
    finally:
        causal.generation_config = settings
    return text[:, ids.shape[1]:], kept.counts


def _kl(model, routing: Routing, ids: torch.Tensor, real: torch.Tensor, text: torch.Tensor,
        policy: Policy | None):
    """Mean KL(base || model) of a token of `text` `[b, N]` after its prompt; numpy `[b]`, nats."""
    ids, real = torch.cat([ids, text], 1), torch.cat([real, torch.ones_like(text).bool()], 1)
    ids, real = _padded_on("right", ids, real)
    # the prompt's last token is where the first logits are; those of the text's last are not asked
    first = real.sum(1, keepdim=True) - text.shape[1] - 1
    counted = real & (torch.arange(ids.shape[1], device=ids.device) >= first)
    with routing.autocast(), routing.using(policy):
        logits = logits_of(model, routing, ids, real.long())
    with routing.autocast(), frozen_base(model, routing):
        teacher = logits_of(model, routing, ids, real.long())
    return likelihoods(model, routing, ids, counted, logits, teacher)["kl"] / text.shape[1]


def _rows(model, routing: Routing, batch: dict, base: torch.Tensor,
          policy: Policy | None) -> pd.DataFrame:
    """Rows of `agreement` for a batch whose texts by the base are `base` `[b, N]`."""
    ids, real = (batch[name].to(base.device) for name in ("input_ids", "attention_mask"))
    real = real.bool()
    if hasattr(policy, "keys"):
        policy.keys = [str(row) for row in batch["row"].tolist()]
    text, counts = _continued(model, routing, ids, real, base.shape[1], policy)
    agreed = (text == base).long().cumprod(1).sum(1).cpu().numpy()
    return pd.DataFrame(
        {"doc": batch["row"].numpy(), "prompt_tokens": real.sum(1).cpu().numpy(),
         "tokens": base.shape[1], "agreed_tokens": agreed.astype(float),
         "agreeing": (agreed == base.shape[1]).astype(float),
         "kl": _kl(model, routing, ids, real, base, policy),
         "kl_own_text": _kl(model, routing, ids, real, text, policy),
         **{f"keep_{unit}": column for unit, column in enumerate(counts.T.numpy())}})


def _refuse(model, routing: Routing, prompts: list[dict], policy: Policy | None,
            tokens: int) -> None:
    if tokens < 1:
        raise ValueError(f"tokens={tokens}: at least one token must be generated to be compared.")
    context = getattr(causal_lm(model).config.get_text_config(), "max_position_embeddings", None)
    longest = max(batch["input_ids"].shape[1] for batch in prompts)
    if context is not None and longest + tokens > context:
        raise ValueError(f"A prompt of {longest} tokens and {tokens} generated ones do not fit the "
                         f"model's context of {context}; cut prompts shorter, or generate fewer.")
    if isinstance(policy, _BY_PASS) or getattr(policy, "training", False):
        raise ValueError(f"{type(policy).__name__} gives a token other gates when a text is "
                         "written, token by token, than when it is read, so the text scored would "
                         "be under another plan; give a policy that depends on the token's own "
                         "document and place (RouterPolicy, StaticPlan, RandomByDocument).")
    if getattr(policy, "reads_hidden", False) and routing.decode_plan != "exact":
        raise ValueError(f"decode_plan={routing.decode_plan!r} plans a token otherwise when it is "
                         "written than when it is read; measure agreement with 'exact'.")


@torch.no_grad()
def base_texts(model, routing: Routing, prompts: list[dict], tokens: int = 64,
               bar: bool = True) -> list[torch.Tensor]:
    """The base's greedy texts `[b, N]`, a batch each, for the `texts` of several `agreement`s."""
    device, texts = device_of(model), []
    for batch in tqdm(prompts, desc="base model's text", unit="batch", disable=not bar):
        ids, real = (batch[name].to(device) for name in ("input_ids", "attention_mask"))
        with frozen_base(model, routing):
            texts.append(_continued(model, routing, ids, real.bool(), tokens, None)[0])
    return texts


@torch.no_grad()
def agreement(model, routing: Routing, prompts: list[dict], policy: Policy | None,
              tokens: int = 64, *, texts: list[torch.Tensor] | None = None,
              describe: str = "generating", bar: bool = True) -> pd.DataFrame:
    """One row a prompt: MEASURES, and of its `tokens` how many ran each unit (`keep_<unit>`).

    Scoring reads prompt and text in one pass, in bounded memory (`dlr.measure.logits`); no token of
    the prompt is counted. A token counts as having run what chose it: of the prompt's last place
    and the text's but its last. Two static plans mixed to meet a budget (`MixedStaticPlan`,
    `StaticByDocument`) both run on every prompt; the row holds the expected values.

    Args:
        prompts: batches as `padded_batches` makes them, of documents cut to the prompt's length.
        policy: None is the model at full depth, adapters included.
        tokens: N, generated after every prompt.
        texts: what `base_texts` gave for these prompts, where several models share the base.

    Raises:
        ValueError: the context is too short, `texts` are of other prompts, or a plan that would be
            another one when the text is read than when it was written.
    """
    _refuse(model, routing, prompts, policy, tokens)
    shapes = [(len(batch["input_ids"]), tokens) for batch in prompts]
    if texts is not None and [tuple(text.shape) for text in texts] != shapes:
        raise ValueError(f"texts must be what base_texts gave for these {len(prompts)} batches and "
                         f"tokens={tokens}.")
    model.eval()
    rows = []
    for place, batch in enumerate(tqdm(prompts, desc=describe, unit="batch", disable=not bar)):
        base = base_texts(model, routing, [batch], tokens, bar=False)[0] if texts is None \
            else texts[place].to(device_of(model))
        if isinstance(policy, MixedStaticPlan):
            pair = StaticPair(*policy.plans, policy.share_more)
            rows.append(pair.mean(*(_rows(model, routing, batch, base, StaticPlan(plan))
                                    for plan in pair[:2])))
        else:
            rows.append(_rows(model, routing, batch, base, policy))
    return pd.concat(rows).sort_values("doc").reset_index(drop=True)


def _intervals(table: pd.DataFrame) -> dict:
    """Mean of each measure over prompts, with `<measure>_low` and `<measure>_high` (95 %)."""
    row = {}
    for name in MEASURES:
        low, high = bootstrap(table[[name]], lambda sums, name=name: sums[name] / len(table))
        row |= {name: float(table[name].mean()), f"{name}_low": low, f"{name}_high": high}
    return row


def summary(table: pd.DataFrame) -> dict:
    """MEASURES with their intervals over prompts, and the skip measured on generated tokens."""
    return {"prompts": len(table), "tokens": round(table["tokens"].mean()),
            "skip": skip_ratio(table), **_intervals(table)}


def paired_difference(first: pd.DataFrame, second: pd.DataFrame) -> dict:
    """MEASURES of `first` minus `second` on the same prompts, with paired intervals.

    `first` stays nearer to the base where agreed tokens are above 0, and KL is below.

    Raises:
        ValueError: the tables are not of the same prompts and as many tokens.
    """
    same = ["doc", "prompt_tokens", "tokens"]
    if len(first) != len(second) or not np.allclose(first[same], second[same]):
        raise ValueError("A paired difference needs two tables of the same prompts, continued for "
                         f"as many tokens; these are of {len(first)} and {len(second)} prompts.")
    return _intervals(first[MEASURES] - second[MEASURES])
