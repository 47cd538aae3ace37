"""What a model is for, asked of its own class and of the automatic classes of transformers."""

from __future__ import annotations

from typing import Any

from torch import nn

# An automatic class -> what the hub calls the task of the models that it loads, and its pipeline.
TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForSemanticSegmentation": "image-segmentation",
    "AutoModelForObjectDetection": "object-detection",
    "AutoModelForZeroShotImageClassification": "zero-shot-image-classification",
    "AutoModelForAudioClassification": "audio-classification",
    "AutoModelForCTC": "automatic-speech-recognition",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
}


def loads_as(model: nn.Module, auto: str) -> bool:
    """Whether the automatic class `auto` of transformers, such as "AutoModelForCTC", loads a config as the class that the model has."""
    import transformers

    mapping = getattr(transformers, auto)._model_mapping
    config = type(getattr(model, "config", None))
    if config not in mapping:
        return False
    found: Any = mapping[config]
    return isinstance(model, tuple(found) if isinstance(found, (list, tuple)) else found)


def auto_class(architecture: str) -> str | None:
    """The automatic class of `TASKS` that loads models of the class of that name; None where none does. No model's code is imported."""
    import transformers

    for auto in TASKS:
        names = getattr(transformers, auto)._model_mapping._model_mapping.values()
        if any(architecture in ((name,) if isinstance(name, str) else name) for name in names):
            return auto
    return None


def predicts_tokens(model: nn.Module | type[nn.Module]) -> bool:
    """Whether a model, or models of a class, have logits for every token of a text, by which quality is measured. Modules of no
    library do."""
    able = getattr(model, "can_generate", None)
    if not callable(able):
        return True
    names = [cls.__name__ for cls in (model if isinstance(model, type) else type(model)).__mro__]
    reads = getattr(model, "main_input_name", "input_ids") == "input_ids"
    return reads and (bool(able()) or any("MaskedLM" in name for name in names))
