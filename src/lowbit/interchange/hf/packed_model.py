"""A folder that lowbit wrote as a transformers model with packed weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lowbit.errors import SourceError
from lowbit.interchange.checks.section import check_parts, read_section
from lowbit.interchange.checks.tensors import check_layers
from lowbit.interchange.files.safetensors_reader import read_header
from lowbit.interchange.hf.calls import asking
from lowbit.interchange.inventory import model_class
from lowbit.interchange.readers.folder import load_config, read_config, weight_files


def load_packed(folder: Path, **options: Any) -> nn.Module:
    """The model in evaluation mode. `options` go to `from_pretrained`.

    SourceError where config.json and the weights do not make one, before anything of their size is built.
    """
    config, where = read_config(folder), str(folder / "config.json")
    stored = {n: (e.dtype, e.shape) for file in weight_files(folder) for n, e in read_header(file).entries.items()}
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
