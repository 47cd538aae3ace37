"""What each format would cost at each tensor: predicted KL divergence, measured once and kept as JSON.

To second order, changing a weight from W to W + D changes the distributions p_t of a model's next tokens by

    sum_t KL(p_t || p_t') ~= 1/2 E <D, G>^2,    G = d/dW sum_t log p_t(y_t),    y_t drawn from p_t itself,

the Fisher information with labels from the model (Martens 2020, section 5; Amari 1998). Labels of different
positions are independent given the text and their scores have mean zero, so one backward pass for a whole
sequence gives a G of which the square of the sum is the sum of squares, with all positions later than a token
and both uses of a tied matrix in it.

Rounding errors of different weights are as good as independent, so E <D, G>^2 is taken as sum_ij E[G_ij^2] D_ij^2:
all candidates are served by one number for each weight, which averages over thousands of weights where
<D, G>^2 itself is a chi-square of one degree of freedom for each sequence. On SmolLM2-135M, with all rows of 64 sequences of
128 tokens, the prediction for one matrix alone is within 9 % (one standard deviation; 5 % too low in the mean
at most) of the measured KL at 4 bits and within 15 % at 3, where <D, G>^2 is within 16 % and 26 %. At 2 bits, where
errors shrink the weights together and the second order ends, it is 17 % too low, within 23 %.

Of large weights a sample of the rows is rounded (`rounding_cost.py`), which moves the cost of a matrix by 5 % (one standard
deviation), less than the choice of the sequences does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.budget.fisher import cut, squared_gradients
from lowbit.budget.rounding_cost import SAMPLED, rounding_costs
from lowbit.calibration.windows import Frame
from lowbit.errors import OutputError, RecipeError, SourceError, nearest
from lowbit.formats import Format, parse_format
from lowbit.interchange.files.atomic import replace_file
from lowbit.interchange.progress import Progress
from lowbit.interchange.source import Source
from lowbit.interchange.tensors import TensorPlan
from lowbit.recipes.recipe import EMBED
from lowbit.weights.finite import check_finite

# 2.5 to 8.1 bits in steps of about 0.2 where models live.
CANDIDATES = (
    "int2:g32", "int2:g16", "int3:g128", "int3:g64", "int3:g32", "int4:g128", "int4:g64", "int4:g32", "iq4nl:g32",
    "int5:g64", "int5:g32", "int6:g64", "int6:g32", "int8:g128",
)  # fmt: skip
# Nats per token for a relative squared error of 1 in all layers together: SmolLM2-135M at 4 bits has 21.
_KL_PER_ERROR = 20.0
_VERSION = 1


@dataclass(frozen=True)
class Sensitivity:
    """Predicted KL(float || quantized) in nats per token of each tensor in each format, all others left in float.

    label        the class of the model, which is the same wherever it lies
    source       `Source.identity()` of the model it was measured on
    method       "fisher", or "relative error" where the model was not run
    settings     what it was measured with: sequences, length, seed, SHA-256 of the token ids
    candidates   canonical format texts
    kl           tensor name -> format text -> nats per token
    error        the same of |w - w_q| / |w|
    """

    label: str
    source: dict[str, Any]
    method: str
    settings: dict[str, Any]
    candidates: tuple[str, ...]
    kl: dict[str, dict[str, float]]
    error: dict[str, dict[str, float]]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what it depends on: model, method, settings, candidates."""
        return _digest(self.source, self.method, self.settings, self.candidates)

    def check(self, source: Source) -> None:
        """RecipeError when it was measured on another model than `source`."""
        if _plain(source.identity()) != _plain(self.source):
            raise RecipeError(
                f"this sensitivity was measured on another model than {source.label} (on a {self.label}); measure it again"
            )

    def scaled(self, factors: Mapping[str, float]) -> Sensitivity:
        """With the KL of formats multiplied, such as {"int3:g32": 0.5} for a solver better than round-to-nearest.

        A factor that all formats have in common changes no allocation but one for a KL target.
        """
        for text in factors:
            if text not in self.candidates:
                raise RecipeError(
                    f"{text!r} is not among the formats that were measured{nearest(text, self.candidates)}"
                )
        kl = {name: {f: v * factors.get(f, 1.0) for f, v in by.items()} for name, by in self.kl.items()}
        return replace(self, kl=kl)

    def save(self, path: str | Path) -> Path:
        """Write it as JSON. OutputError when the place cannot be written to."""
        path = Path(path)
        content = {"lowbit_sensitivity": _VERSION, "fingerprint": self.fingerprint, **asdict(self)}
        fresh = path.with_name(path.name + ".part")
        try:
            fresh.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            replace_file(fresh, path)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}; check the path and its permissions") from None
        finally:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
        return path

    @staticmethod
    def load(path: str | Path) -> Sensitivity:
        """Read what `save` wrote. SourceError when it is not that."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            version, fingerprint = content.pop("lowbit_sensitivity"), content.pop("fingerprint")
            found = Sensitivity(**{**content, "candidates": tuple(content["candidates"])})
            numbers = [v for table in (found.kl, found.error) for by in table.values() for v in by.values()]
            sound = all(isinstance(v, (int, float)) and v >= 0 and math.isfinite(v) for v in numbers)
            complete = all(set(found.candidates) <= set(by) for by in found.kl.values())
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SourceError(f"{path} is no sensitivity file of lowbit; measure it again") from None
        if version != _VERSION or fingerprint != found.fingerprint or not sound or not complete:
            raise SourceError(f"{path} is damaged or of another version of lowbit; measure it again")
        return found


def measure_sensitivity(
    source: Source, ids: Sequence[Tensor], candidates: Sequence[str | Format] = CANDIDATES, *, sequences: int = 64,
    length: int = 128, seed: int = 0, autocast: bool = False, device: torch.device | str = "cpu",
    progress: Progress | None = None, frame: Frame | None = None,
) -> Sensitivity:  # fmt: skip
    """The sensitivity of every tensor that may be quantized, by the Fisher information.

    `ids`: calibration text, int64 [any length] each, cut into `sequences` of `length` tokens spread over it. `frame`: what
    the tokenizer put around each of them (`Calibration.frame`), so that each sequence begins with it too.
    Needs the whole float model with gradients and their squares: 12 bytes a parameter; `estimate_sensitivity` needs
    one tensor at a time. `autocast`: computes in bfloat16, weights and gradients stay float32.
    Candidates are rounded to nearest by `search`, weighted by E[g^2 x^2] of each input x and output gradient g.
    `progress(what, steps done, steps in all)`. TextError when the text does not fill two sequences.
    """
    formats = _formats(candidates)
    rows, digest = cut(ids, sequences, length, frame or Frame())
    settings = {"sequences": len(rows), "length": length, "seed": seed, "rounded": SAMPLED, "calibration": digest}
    specs = _quantizable(source)
    steps = len(rows) + len(specs)
    if progress:
        progress("loading the model", 0, steps)
    model = source.load_float(torch.float32, device)
    for name, parameter in model.named_parameters():
        check_finite(parameter.detach(), name)
    rarely = {t.name: t.kind in ("embedding", "head") for t in specs}
    squares = squared_gradients(model, rarely, rows, seed, autocast, progress, steps)
    kl: dict[str, dict[str, float]] = {}
    errors: dict[str, dict[str, float]] = {}
    unused = []
    for i, t in enumerate(specs):
        if progress:
            progress(t.name, len(rows) + i, steps)
        fisher = squares.pop(t.name)
        weight = model.get_parameter(t.name).detach()
        if t.transposed:
            weight, fisher = weight.transpose(-1, -2), fisher.transpose(-1, -2)
        if not float(fisher.max()) > 0:
            unused.append(t.name)
        found = rounding_costs(t, weight, fisher, _formats_of(t, formats))
        kl[t.name] = {str(f): _short(cost / (2 * length)) for f, (cost, _) in found.items()}
        errors[t.name] = {str(f): _short(error) for f, (_, error) in found.items()}
    if progress and specs:
        progress(specs[-1].name, steps, steps)
    _fill(kl, errors, unused)
    return Sensitivity(
        source.inventory.model_class, source.identity(), "fisher", settings, tuple(map(str, formats)), kl, errors
    )


def estimate_sensitivity(
    source: Source, candidates: Sequence[str | Format] = CANDIDATES, *, progress: Progress | None = None
) -> Sensitivity:
    """A guess for models too large to run: KL in proportion to |w - w_q|^2 / |w|^2, the same for each tensor.

    Malinovskii et al. 2024 (HIGGS, the linearity theorem) show that perplexity rises in proportion to that error with
    a coefficient for each layer; here the coefficients are all alike. One tensor is in memory at a time. Sizes and
    formats are weighed rightly by it, and which layers are sensitive is not found.
    """
    formats, specs = _formats(candidates), _quantizable(source)
    errors: dict[str, dict[str, float]] = {}
    for i, t in enumerate(specs):
        if progress:
            progress(t.name, i, len(specs))
        weight = source.read(t.name).to(torch.float32)
        weight = weight.transpose(-1, -2) if t.transposed else weight
        found = rounding_costs(t, weight, None, _formats_of(t, formats))
        errors[t.name] = {str(f): _short(error) for f, (_, error) in found.items()}
    if progress and specs:
        progress(specs[-1].name, len(specs), len(specs))
    each = _KL_PER_ERROR / max(1, len(specs))
    kl = {name: {f: _short(each * e * e) for f, e in by.items()} for name, by in errors.items()}
    return Sensitivity(
        source.inventory.model_class, source.identity(), "relative error", {}, tuple(map(str, formats)), kl, errors
    )


def _fill(kl: dict[str, dict[str, float]], errors: dict[str, dict[str, float]], unused: Sequence[str]) -> None:
    """A tensor that the text did not reach (an expert never chosen) is taken to be like the median of the others."""
    ratios = [v / errors[n][f] ** 2 for n, by in kl.items() if n not in unused for f, v in by.items() if errors[n][f]]
    usual = sorted(ratios)[len(ratios) // 2] if ratios else 0.0
    for name in unused:
        kl[name] = {f: _short(usual * e * e) for f, e in errors[name].items()}


def _quantizable(source: Source) -> list[TensorPlan]:
    """Every tensor that may be quantized; `format` is not meant."""
    params = source.inventory.params
    return [
        TensorPlan(s.name, s.shape, params[s.name].kind, s.dtype, params[s.name].transposed, None, None)
        for s in source.tensors.values()
        if params[s.name].keep is None and s.dtype.is_floating_point
    ]


def _formats(candidates: Sequence[str | Format]) -> list[Format]:
    formats = [f if isinstance(f, Format) else parse_format(f) for f in candidates]
    if not formats:
        raise RecipeError("there are no formats to choose from; give at least one")
    return list(dict.fromkeys(formats))


def _formats_of(t: TensorPlan, formats: Sequence[Format]) -> list[Format]:
    """Embeddings and heads are measured in the format too that recipes give them unless told otherwise."""
    return [*formats, *([EMBED] if t.kind in ("embedding", "head") and EMBED not in formats else [])]


def _short(value: float) -> float:
    """Six digits: the last ones of a float32 sum depend on how many threads shared it."""
    return float(f"{value:.6g}")


def _plain(value: Any) -> Any:
    """As JSON would give it back."""
    return json.loads(json.dumps(value))


def _digest(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
