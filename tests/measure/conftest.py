"""A word tokenizer and its text, so that nothing is read from a network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # for `tiny`

from measure_models import VOCABULARY


@pytest.fixture(scope="session")
def tokenizer():
    """Words w0 ... w95 and [UNK], split at white space."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = {"[UNK]": 0} | {f"w{i}": i for i in range(1, VOCABULARY)}
    inner = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[UNK]")


@pytest.fixture(scope="session")
def words() -> str:
    """600 words drawn at random."""
    generator = torch.Generator().manual_seed(3)
    return " ".join(f"w{int(i)}" for i in torch.randint(1, VOCABULARY, (600,), generator=generator))
