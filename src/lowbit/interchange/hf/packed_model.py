"""A folder that lowbit wrote as a transformers model with packed weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lowbit.errors import SourceError
from lowbit.interchange.checks.section import check_parts, read_section
from lowbit.interchange.checks.tensors import check_layers
from lowbit.interchange.files.settings import read_config
from lowbit.interchange.files.weights import entries_of
from lowbit.interchange.hf.calls import asking
from lowbit.interchange.hf.loading import load_config
from lowbit.interchange.hf.models import model_class


def load_packed(folder: Path, **options: Any) -> nn.Module:
    """The model in evaluation mode. `options` go to `from_pretrained`.

    SourceError where config.json and the weights do not make one, before anything of their size is built.
    """
    config, where = read_config(folder), str(folder / "config.json")
    stored = {name: (e.dtype, e.shape) for name, (_, e) in entries_of(folder).items()}
    check_parts(read_section(config.get("quantization_config"), where), stored, str(folder))
    check_layers(config, stored, where)
    build: Any = model_class(load_config(folder))
    with asking(
        "transformers", str(folder), f"load {build.__name__} from it", "copy the folder or quantize the model again"
    ):
        model, found = build.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    if found["missing_keys"]:
        raise SourceError(f"{folder} lacks {', '.join(sorted(found['missing_keys'])[:5])}; copy or quantize it again")
    return model.eval()
