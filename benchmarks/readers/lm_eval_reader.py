"""lm-eval's `hf` model on a folder that lowbit wrote: bits per byte of a text. See README.md.

lowbit must be importable here; `import lowbit` is all that lm-eval needs to know of it. Nothing is downloaded: the task
is made from the text.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib import metadata
from pathlib import Path

import lm_eval
import yaml
from lm_eval.tasks import TaskManager

import lowbit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("text", type=Path)
    parser.add_argument("--characters", type=int, default=2000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as room:
        data = Path(room) / "text.jsonl"
        data.write_text(json.dumps({"text": given.text.read_text("utf-8")[: given.characters]}) + "\n")
        task = {
            "task": "one_text", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        }  # fmt: skip
        (Path(room) / "one_text.yaml").write_text(yaml.safe_dump(task))
        found = lm_eval.simple_evaluate(
            model="hf", model_args=f"pretrained={given.folder},dtype=float32,device=cpu", tasks=["one_text"],
            task_manager=TaskManager(include_path=room), batch_size=1, bootstrap_iters=0,
        )  # fmt: skip
    value = found["results"]["one_text"]["bits_per_byte,none"]
    versions = {"lm-eval": metadata.version("lm_eval"), "lowbit": lowbit.__version__}
    print(json.dumps({"versions": versions, "bits_per_byte": value}))


if __name__ == "__main__":
    main()
