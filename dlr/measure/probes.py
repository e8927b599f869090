"""How much of each layer's worth for a token can be told from the token's state early in the model.

The R² of a probe from the router's own input estimates what a router that reads it can know (a
better probe or more text could raise it); probes at other depths tell what reading earlier or later
would change. Predictions are cross-fitted: whole documents are held out, so that every token is
predicted by a probe that saw nothing of its text.

Notation: n tokens, d width, U routable units.
"""

import warnings

import numpy as np
import pandas as pd
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dlr.measure.evaluate import bootstrap
from dlr.progress import tqdm

FOLDS = 3
# percentiles: a few tokens are hurt a hundred times more than the rest and would be all of R²
CLIP = (1, 99)
PROBES = ("linear", "MLP")
# chosen among 1, 30, 100, 300, 1000 on calibration documents, at the router's input
MLP_PENALTY = 30.0


def _probe(kind: str, seed: int):
    """A regression from standardised states: ridge (leave-one-out penalty), or one hidden layer."""
    if kind == "linear":
        return make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 5, 11)))
    return make_pipeline(StandardScaler(), MLPRegressor(
        hidden_layer_sizes=(128,), alpha=MLP_PENALTY, learning_rate_init=2e-3, early_stopping=True,
        n_iter_no_change=5, max_iter=60, random_state=seed))


def cross_fitted(states: np.ndarray, harm: np.ndarray, document: np.ndarray, kind: str = "linear",
                 seed: int = 0) -> np.ndarray:
    """Predictions `[n, U]` of `harm` from `states` `[n, d]`, by probes that saw other documents.

    Raises:
        ValueError: fewer documents than folds, or an unknown kind of probe.
    """
    if kind not in PROBES:
        raise ValueError(f"kind={kind!r} is no probe; there are: {', '.join(PROBES)}.")
    documents = len(np.unique(document))
    if documents < FOLDS:
        raise ValueError(f"{documents} documents are too few to hold some out in {FOLDS} folds; "
                         f"give at least {FOLDS}.")
    predictions = np.zeros_like(harm, dtype=np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for fit, held in GroupKFold(FOLDS).split(states, harm, document):
            centre, spread = harm[fit].mean(0), harm[fit].std(0) + 1e-12
            goal = (harm[fit] - centre) / spread
            probe = _probe(kind, seed).fit(states[fit], goal if goal.shape[1] > 1 else goal[:, 0])
            predictions[held] = probe.predict(states[held]).reshape(len(held), -1) * spread + centre
    return predictions


def clipped(harm: np.ndarray) -> np.ndarray:
    """`[n, U]` with each unit's values held between its CLIP percentiles."""
    low, high = np.percentile(harm, CLIP, axis=0)
    return harm.clip(low, high)


def r_squared(harm: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """1 - squared error / variance a unit `[U]`; negative where its mean would have done better."""
    error = ((harm - predicted) ** 2).sum(0)
    return 1 - error / np.maximum(((harm - harm.mean(0)) ** 2).sum(0), 1e-30)


def _interval(harm: np.ndarray, predicted: np.ndarray, document: np.ndarray) -> tuple[float, float]:
    """95 % interval over documents of the R² averaged over units."""
    units = harm.shape[1]
    columns = np.concatenate([(harm - predicted) ** 2, harm, harm**2, np.ones((len(harm), 1))], 1)
    sums = pd.DataFrame(columns).groupby(document).sum()

    def mean_r2(sums):
        error, first, second, n = np.split(sums.to_numpy(), [units, 2 * units, 3 * units], axis=1)
        return (1 - error / np.maximum(second - first**2 / n, 1e-30)).mean(1)

    return bootstrap(sums, mean_r2)


def predictability(states: dict[int, np.ndarray], harm: np.ndarray, document: np.ndarray,
                   seed: int = 0) -> list[dict]:
    """One row a depth and probe: R² a unit, its mean, and the mean's interval over documents.

    Args:
        states: `[n, d]` by the number of layers run.
        harm: `[n, U]` nats; clipped here at its 1st and 99th percentile.
    """
    goal = clipped(harm.astype(np.float64))
    rows = []
    for depth, kind in tqdm([(d, k) for d in states for k in PROBES], desc="probes", unit="probe"):
        predicted = cross_fitted(states[depth], goal, document, kind, seed)
        r2 = r_squared(goal, predicted)
        low, high = _interval(goal, predicted, document)
        rows.append({"depth": depth, "probe": kind, "r2": float(r2.mean()), "r2_low": low,
                     "r2_high": high, "by_unit": [float(v) for v in r2], "tokens": len(harm)})
    return rows
