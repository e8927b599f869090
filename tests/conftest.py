"""Fixtures shared by all tests."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:      # one of several, as are the kernels that it starts
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tiny_models import SMALL, tiny
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dlr.base.models import NANO
from dlr.routing.compact import OVERHEAD


@pytest.fixture
def llama():
    return tiny()


@pytest.fixture
def ids():
    return torch.randint(2, 97, (3, 14), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def by_rows(monkeypatch):
    """Layers of tiny models are run by rows too, although that never pays: the product would not.

    Modules that test compact execution ask for it:
    `pytestmark = pytest.mark.usefixtures("by_rows")`.
    """
    monkeypatch.setitem(OVERHEAD, "cpu", 0.0)


@pytest.fixture(scope="session")
def tokenizer():
    """The embedded model's."""
    return AutoTokenizer.from_pretrained(NANO)


@pytest.fixture
def model():
    """A random Llama with the embedded vocabulary."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "vocab_size": 4096})).eval()
