"""The map of a passage: it is of one text, and shows the gates that are recorded."""

import matplotlib.pyplot as plt
import numpy as np
import torch

from dlr.figures.analysis import record_of
from dlr.figures.tokens import passage, token_map
from dlr.measure.record import Record
from dlr.runs import Run, project_root

SAVED = record_of(Run(project_root() / "results/token_analysis/nano"))


def test_a_passage_is_of_one_text_and_is_the_most_varied():
    chosen = passage(SAVED, 32)
    assert chosen.stop - chosen.start == 32 and len(set(SAVED.document[chosen].tolist())) == 1
    assert 0 < SAVED.position[chosen][0], "the opening token's plan is forced"
    spread = SAVED.active_layers[chosen].double().std()
    assert spread > SAVED.active_layers.double().std()


def test_the_map_shows_the_gates_and_how_many_are_open():
    chosen = passage(SAVED, 20)
    upper, lower = token_map(SAVED, 20).axes
    (image,) = lower.get_images()
    np.testing.assert_array_equal(image.get_array(), SAVED.gates[chosen].T)
    assert [bar.get_height() for bar in upper.patches] == SAVED.active_layers[chosen].tolist()
    assert [label.get_text() for label in lower.get_yticklabels()] == [str(layer) for layer in range(4, 16)]
    plt.close("all")


def test_a_text_shorter_than_a_passage_is_shown_whole():
    few = {name: getattr(SAVED, name)[:9] for name in ("ids", "document", "position", "gates", "logits", "loss_dense",
           "loss_routed", "entropy_dense", "kl", "top_dense", "top_routed", "top_dense_probability",
           "top_routed_probability")}
    short = Record(**few, tokens=SAVED.tokens[:9], meta=SAVED.meta)
    (image,) = token_map(short).axes[1].get_images()
    assert torch.equal(torch.as_tensor(np.array(image.get_array())), short.gates.T)
    plt.close("all")
