"""The driver: source to folder, one tensor at a time."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import lowbit
from lowbit.blockwise.model_tuner import tune_folder
from lowbit.blockwise.precision import Settings
from lowbit.blockwise.range_survey import remembered
from lowbit.blockwise.run import STATES, CalibratedRun
from lowbit.calibration.data import Calibration
from lowbit.interchange.files.folder_writer import FolderWriter
from lowbit.interchange.files.safetensors_reader import bytes_of
from lowbit.interchange.files.settings import read_json
from lowbit.interchange.hf import configs as older_readers
from lowbit.interchange.hf.loadable import check_loadable
from lowbit.interchange.hf.section import with_guard
from lowbit.interchange.progress import Progress
from lowbit.interchange.readers.left_out import to_json
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import TensorSpec
from lowbit.planning.plan import Plan
from lowbit.weights.solve import LayerLoss, Solved, solve, with_exponent

OnLayer = Callable[[Solved], None]


@dataclass(frozen=True)
class LayerReport:
    """What became of one tensor. `error`: |w - w_q| / |w|, 0 for a kept one.

    `output`: with calibration text, |x (w - w_q)'| / |x w'| of round-to-nearest and of the result, on how many tokens.
    `warning`: what a person has to know of it, such as values that are not finite, or too small for the format.
    """

    name: str
    format: str | None
    keep: str | None
    bits_per_weight: float
    error: float
    output: LayerLoss | None = None
    note: str = ""
    warning: str = ""


@dataclass(frozen=True)
class Report:
    """What quantizing did: layers, coverage (share of parameters quantized), bytes, bits per weight.

    `tuning`: what a tuner of the whole model said of its work, such as the loss before and after. `ranges`: of static
    inputs, which layers are not static because their range explodes.
    """

    recipe: str
    layers: tuple[LayerReport, ...]
    coverage: float
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
    linear_bits_per_weight: float
    kept: dict[str, tuple[int, int]]
    calibration: dict[str, Any] | None = None
    tuning: dict[str, Any] | None = None
    ranges: dict[str, Any] | None = None

    @property
    def warnings(self) -> dict[str, str]:
        """Name of a tensor -> what a person has to know of it."""
        return {layer.name: layer.warning for layer in self.layers if layer.warning}

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        kept = "; ".join(f"{count:,} in {n} of: {reason}" for reason, (n, count) in self.kept.items())
        return (
            f"{self.recipe}: {self.coverage:.2%} of parameters quantized, "
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes, {self.bits_per_weight:.3f} bits per weight "
            f"({self.linear_bits_per_weight:.3f} in linear layers); kept: {kept or 'nothing'}"
        )


def make_report(plan: Plan, facts: Mapping[str, Mapping[str, Any]], calibration: Calibration | None = None) -> Report:
    """The report of a finished plan; `facts` by tensor name, as the journal keeps them."""
    layers = tuple(
        LayerReport(
            t.name,
            None if (fmt := with_exponent(t.format, facts[t.name].get("exponent", 0))) is None else str(fmt),
            t.keep,
            8 * t.bytes_after / max(1, t.count),
            float(facts[t.name]["error"]),
            LayerLoss(**found) if (found := facts[t.name].get("output")) else None,
            "; ".join(filter(None, (str(facts[t.name].get("note", "")), plan.note_of(t.name)))),
            str(facts[t.name].get("warning", "")),
        )
        for t in plan.tensors
    )
    return Report(
        str(plan.recipe), layers, plan.coverage, plan.bytes_before, plan.bytes_after, plan.bits_per_weight,
        plan.linear_bits_per_weight, plan.kept(), None if calibration is None else calibration.to_json(),
        next((entry["tuned"] for entry in facts.values() if "tuned" in entry), None),
        None if plan.survey is None else plan.survey.to_json(),
    )  # fmt: skip


def solved_facts(solved: Solved) -> dict[str, Any]:
    """What the journal and the manifest keep of a solved tensor, beside its hashes."""
    facts: dict[str, Any] = {"error": solved.error}
    if solved.exponent:
        facts["exponent"] = solved.exponent
    if solved.warning:
        facts["warning"] = solved.warning
    if solved.output is not None:
        facts["output"] = asdict(solved.output)
    if solved.tuned is not None:
        facts["tuned"] = solved.tuned
    return facts | ({"note": solved.note} if solved.note else {})


def solved_tensors(
    plan: Plan, source: Source, progress: Progress | None = None, done: frozenset[str] = frozenset(),
    device: torch.device | str = "cpu", on_layer: OnLayer | None = None,
) -> Iterator[tuple[Solved, str]]:  # fmt: skip
    """Every tensor of the plan that is not `done`, solved, with the SHA-256 of its source bytes."""
    at, total = 0, plan.bytes_before
    for tensor in plan.tensors:
        if tensor.name not in done:
            weight = source.read(tensor.name)
            digest = hashlib.sha256(bytes_of(weight)).hexdigest()
            solved = solve(tensor, weight, plan.recipe, device)
            yield solved, digest
            if on_layer:
                on_layer(solved)
        at += tensor.bytes_before
        if progress:
            progress(tensor.name, at, total)


def reported(
    results: Iterator[tuple[Solved, str]], plan: Plan, progress: Progress | None, on_layer: OnLayer | None = None
) -> Iterator[tuple[Solved, str]]:
    """The results as they are, each told to `on_layer` and to `progress`."""
    at, total = 0, plan.bytes_before
    for solved, digest in results:
        yield solved, digest
        at += solved.plan.bytes_before
        if on_layer and solved.stored:
            on_layer(solved)
        if progress:
            progress(solved.plan.name, at, total)


def fingerprint(
    plan: Plan, source: Source, device: torch.device | str = "cpu", calibration: Calibration | None = None,
    settings: Settings | None = None,
) -> str:  # fmt: skip
    """What makes two runs the same: model, recipe, calibration text, layout, versions, kind of device."""
    import transformers

    facts = {
        "transformers": transformers.__version__, "device": torch.device(device).type,
        "source": source.identity(), "recipe": str(plan.recipe), "version": lowbit.__version__,
        "calibration": calibration and calibration.sha256, "settings": settings and asdict(settings),
        "torch": torch.__version__, "headers": [hashlib.sha256(s.header).hexdigest() for s in plan.shards],
    }  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def write_folder(
    plan: Plan, source: Source, out: str | Path, *, progress: Progress | None = None, overwrite: bool = False,
    solved: Iterator[tuple[Solved, str]] | None = None, device: torch.device | str = "cpu",
    calibration: Calibration | None = None, on_layer: OnLayer | None = None, again: bool = True,
) -> Report:  # fmt: skip
    """Quantize `source` into the folder `out`, or finish what a killed run left; verified before it gets its name.

    `solved`: results that are at hand already (a module quantized in memory); computed one by one otherwise. `again`: whether
    a second call has the same. With `calibration` block by block, in the order of the model.
    """
    _check_loadable(plan, source)
    settings = None if calibration is None else Settings.of_this_machine()
    run: CalibratedRun | None = None
    with FolderWriter(
        out, plan.shards, fingerprint(plan, source, device, calibration, settings), _origin(plan, source, calibration),
        overwrite, remembered(plan.survey), again,
    ) as writer:  # fmt: skip
        if writer.finished:
            return make_report(plan, writer.journal, calibration)
        done = frozenset(writer.journal)
        if solved is not None:
            results = solved
        elif len(done) == len(plan.tensors):
            results = iter(())
            shutil.rmtree(writer.partial / STATES, ignore_errors=True)  # the kill came between the journal and this
        elif calibration is not None and settings is not None:
            run = CalibratedRun(plan, source, calibration, writer.partial, settings, writer.flush)
            results = reported(run.results(), plan, progress, on_layer)
        else:
            results = solved_tensors(plan, source, progress, done, device, on_layer)
        for result, digest in results:
            if result.plan.name not in done:
                writer.write(result.plan.name, result.stored, source=digest, **solved_facts(result))
        run = None  # what it holds of the model
        if solved is None and calibration is not None and settings is not None:
            tune_folder(plan, source, calibration, writer, settings, progress)
        writer.verify()
        source.save_assets(writer.partial)
        write_config(plan, source, writer.partial, writer.journal)
        writer.finish()
    return make_report(plan, writer.journal, calibration)


def quantization_config(plan: Plan, facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What config.json says of the quantized weights; all that a reader needs beside the files.

    `facts` by tensor name, as `solved_facts` has them: formats have the exponents that values asked for. Before the work
    there are none, and formats are the planned ones.
    """
    tensors = {
        t.name: {
            "format": str(with_exponent(t.format, facts.get(t.name, {}).get("exponent", 0))),
            "shape": list(t.stored_shape),
        }
        | ({"transposed": True} if t.transposed else {})
        | ({"inputs": str(t.inputs)} if t.inputs is not None else {})
        for t in plan.tensors
        if t.format is not None
    }
    return {
        "quant_method": "lowbit", "version": lowbit.__version__, "recipe": str(plan.recipe),
        "tied": dict(plan.tied), "tensors": tensors,
    }  # fmt: skip


def write_config(plan: Plan, source: Source, folder: Path, facts: Mapping[str, Mapping[str, Any]]) -> None:
    """config.json: the source's own, with `quantization_config`, and refused where lowbit is not known. Nothing for a module that has no config."""
    if source.config is None:
        return
    config = copy.deepcopy(source.config)
    config.quantization_config = quantization_config(plan, facts)
    if not config.architectures:
        config.architectures = [source.inventory.model_class]
    older_readers.write_config(config, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(with_guard(read_json(path)), indent=2, sort_keys=True) + "\n", "utf-8")


def _check_loadable(plan: Plan, source: Source) -> None:
    """SourceError when the planned folder would not load as the model that it is made of."""
    if source.config is not None:
        stored = {n: TensorSpec(n, shape, dtype) for t in plan.tensors for n, (dtype, shape) in t.stored().items()}
        check_loadable(source.config, quantization_config(plan, {}), stored, frozenset(source.extra), source.label)


def _origin(plan: Plan, source: Source, calibration: Calibration | None = None) -> dict[str, Any]:
    """Where every byte comes from, as the manifest says it: hash of the source, recipe, versions. No time, no path."""
    import safetensors
    import transformers

    return (
        {
            "lowbit": lowbit.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
            "recipe": {"name": plan.recipe.name, "text": str(plan.recipe)},
            "source": source.identity(),
            "coverage": plan.coverage,
            "bits_per_weight": plan.bits_per_weight,
            "linear_bits_per_weight": plan.linear_bits_per_weight,
            "quantization": quantization_config(plan, {}),
            "notes": list(plan.notes),
            "left_out": to_json(source.left_out, source.left_files()),
        }
        | ({} if calibration is None else {"calibration": calibration.to_json()})
        | ({} if plan.survey is None else {"ranges": plan.survey.to_json()})
    )
