"""Every field of every family's config: the engine computes what transformers does of it, or refuses by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import transformers
from engine_models import MODELS, apart, build_model, reference, tokens

from config_changes import changes
from lowbit import Engine
from lowbit.errors import EngineError
from lowbit.families import families
from lowbit.families.config_facts import ConfigFacts

FACTS = {name: family.config for name, family in families().items() if family.decoder}
ONE = {kind: "qwen2-sliding" if kind == "qwen2" else kind for kind in FACTS}  # the model of that name


def test_every_family_has_its_facts_and_its_test() -> None:
    known = (
        "llama mistral qwen2 qwen3 smollm3 granite gemma gemma2 gemma3_text phi3 olmo2 olmo3 mixtral qwen3_moe olmoe"
    )
    assert set(FACTS) >= set(known.split()) and None not in FACTS.values()
    assert set(ONE.values()) <= set(MODELS)


@pytest.mark.parametrize("kind", FACTS)
def test_every_field_of_the_class_is_listed(kind: str) -> None:
    """A field that a new transformers brings is to be added to the file of its family: read, fixed, or neutral."""
    missing = [name for name in transformers.CONFIG_MAPPING[kind]().to_dict() if name not in FACTS[kind]]
    assert not missing


@pytest.mark.parametrize("kind", FACTS)
def test_no_field_changes_transformers_logits_and_not_the_engines(kind: str) -> None:
    ids = tokens(40)
    refused, agreed = set[str](), set[str]()
    for name, value in changes(build_model(ONE[kind]).config):
        try:
            model = build_model(ONE[kind], **{name: value})
            right = reference(model, ids)
        except Exception:
            continue  # transformers itself has no such model
        try:
            engine = Engine.open(model, threads=1)
        except EngineError as error:
            assert name in str(error) or "heads of" in str(error) or repr(value) in str(error), error
            refused.add(name)
            continue
        assert apart(engine.logits(ids), right) < 0.02, (name, value)
        agreed.add(name)
    assert len(agreed) > 10 and (kind not in ("gemma", "gemma2") or "use_bidirectional_attention" in refused)


def test_a_field_in_no_list_is_refused_by_name_where_it_is_not_the_classes_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("granite")
    family = families()["granite"]
    assert family.config is not None
    less = ConfigFacts(family.config.read - {"residual_multiplier"}, family.config.fixed)
    monkeypatch.setitem(families(), "granite", replace(family, config=less))
    with pytest.raises(EngineError, match=r"field residual_multiplier, and this config has residual_multiplier=0\.6"):
        Engine.open(model)
    model.config.residual_multiplier = 1.0  # as the class has it
    model.config.something_else = 3  # of which no class knows
    Engine.open(model)


def test_share_of_a_head_with_scaled_positions_is_refused() -> None:
    model = build_model("llama")
    rope: dict[str, Any] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    model.config.rope_parameters = rope
    with pytest.raises(EngineError, match=r"partial_rotary_factor=0\.5"):
        Engine.open(model)
    model.config.rope_parameters = {**rope, "rope_type": "default"}
    Engine.open(model)
