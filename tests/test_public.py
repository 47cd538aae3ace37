"""What `import lowbit` promises: names, cost, no side effects, one direction of imports."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lowbit
from handmade_adapters import llama_factors, write
from tiers import mostly_nightly
from tiny import save_tiny

SRC = Path(lowbit.__file__).parent
# A room may import from itself and from those before it.
ROOMS = (
    "formats",
    "families",
    "kernels",
    "solvers",
    "nn",
    "interchange",
    "transforms",
    "tuning",
    "kv",
    "recipes",
    "adapters",
    "planning",
    "engine",
    "calibration",
    "weights",
    "blockwise",
    "pipeline",
    "training",
    "budget",
    "convert",
    "measure",
    "report",
    "cli",
)
FREE = ("discovery", "errors")


def run(code: str, *arguments: str) -> Any:
    """What a fresh interpreter prints as JSON."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_is_cheap_and_pulls_in_nothing_heavy() -> None:
    code = """
import json, sys, time
start = time.perf_counter()
import lowbit
took = time.perf_counter() - start
heavy = ("torch", "transformers", "numpy", "safetensors", "gguf", "huggingface_hub", "typer", "rich", "matplotlib")
print(json.dumps([took, [name for name in heavy if name in sys.modules]]))
"""
    runs = [run(code) for _ in range(3)]
    assert min(took for took, _ in runs) < 0.1
    assert all(heavy == [] for _, heavy in runs)


def test_importing_changes_nothing_but_one_finder_and_that_goes_again() -> None:
    code = """
import json, logging, os, signal, sys, warnings
def state():
    return [dict(os.environ), list(sys.path), sys.excepthook.__name__, len(warnings.filters), logging.getLogger().level,
            [str(signal.getsignal(s)) for s in (2, 15)], len(sys.path_hooks)]
before, finders = state(), list(sys.meta_path)
import lowbit
import lowbit._hook
lowbit._hook.install()
same = state() == before
added = [type(f).__name__ for f in sys.meta_path if f not in finders]
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING
left = [type(f).__name__ for f in sys.meta_path if type(f).__module__.startswith("lowbit")]
import transformers.quantizers.auto as table
known = ["lowbit" in AUTO_QUANTIZER_MAPPING, "lowbit" in AUTO_QUANTIZATION_CONFIG_MAPPING]
print(json.dumps([same, added, left, known, table.__spec__.loader.__class__.__name__, table.__file__ is not None]))
"""
    same, added, left, known, loader, has_file = run(code)
    assert same and added == ["_Finder"] and left == [] and known == [True, True]
    assert loader == "SourceFileLoader" and has_file


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("public")
    save_tiny("llama-tied", root / "float")
    lowbit.quantize(root / "float", "w8", root / "packed")
    return root


ORDERS = {
    "lowbit first": "import lowbit, transformers",
    "transformers first": "import transformers, lowbit",
    "classes first": "from transformers import AutoModelForCausalLM; import lowbit, transformers",
    "table first": "import transformers.quantizers.auto, transformers, lowbit",
    "twice": "import transformers, lowbit, importlib, lowbit._hook; lowbit._hook.install(); importlib.reload(lowbit)",
}


@pytest.mark.parametrize("order", mostly_nightly(ORDERS, every=lambda order: order in (0, 3)))
def test_from_pretrained_works_whichever_is_imported_first(order: str, folders: Path) -> None:
    code = f"""
{ORDERS[order]}
import json, sys
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(json.dumps([type(model.lm_head.weight).__name__, model.lm_head.weight is model.model.embed_tokens.weight]))
"""
    assert run(code, str(folders / "packed")) == ["PackedWeight", True]


def test_every_public_name_resolves() -> None:
    assert lowbit.__all__ == sorted(set(lowbit.__all__))
    for name in lowbit.__all__:
        assert getattr(lowbit, name) is not None and name in dir(lowbit)
    for name in (
        "quantize",
        "plan",
        "load",
        "evaluate",
        "compare",
        "quantize_tensor",
        "parse_format",
        "integer_matmul",
    ):
        assert callable(getattr(lowbit, name)) and getattr(lowbit, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = lowbit.quantise
    assert lowbit.__version__.count(".") >= 2


def test_errors_are_one_tree() -> None:
    from lowbit import errors

    kinds = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(kinds) > 5 and all(issubclass(kind, lowbit.LowbitError) for kind in kinds)


def imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, those only for type checkers too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = ["lowbit", *path.relative_to(SRC).parts][: -node.level] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            found |= {a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}
    return found


def test_imports_go_one_way() -> None:
    files = [path for path in SRC.rglob("*.py") if path.parent != SRC]
    assert {path.relative_to(SRC).parts[0] for path in files} == set(ROOMS)
    wrong = []
    for path in files:
        room = path.relative_to(SRC).parts[0]
        allowed = {*ROOMS[: ROOMS.index(room) + 1], *FREE}
        for name in imports(path):
            parts = name.split(".")
            inner = len(parts) > 1 and parts[0] == "lowbit"
            if inner and (parts[1] in ROOMS or parts[1] == "_hook") and parts[1] not in allowed:
                wrong.append(f"{path.relative_to(SRC)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_check_of_imports_sees_every_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SRC", tmp_path)
    (tmp_path / "nn").mkdir()
    file = tmp_path / "nn" / "x.py"
    file.write_text(
        "from ..cli import main\nfrom . import packed\nimport lowbit.report.api\nfrom lowbit import measure\n"
        "def f():\n    from lowbit.pipeline.api import load\n    importlib.import_module('lowbit.formats.parsing')\n"
    )
    assert imports(file) >= {
        "lowbit.cli.main", "lowbit.nn.packed", "lowbit.report.api", "lowbit.measure", "lowbit.pipeline.api", "lowbit.formats.parsing",
    }  # fmt: skip


def test_errors_import_nothing_of_the_package() -> None:
    assert not [name for name in imports(SRC / "errors.py") if name.startswith("lowbit")]


def test_only_transformers_needs_the_hook() -> None:
    heavy = {"torch", "transformers", "numpy"}
    top = ast.parse((SRC / "__init__.py").read_text()).body + ast.parse((SRC / "_hook.py").read_text()).body
    names = {alias.name.split(".")[0] for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {(node.module or "").split(".")[0] for node in top if isinstance(node, ast.ImportFrom)}
    assert not names & heavy


def test_type_checkers_and_editors_see_the_same_names_from_the_same_modules() -> None:
    (block,) = [
        node
        for node in ast.parse((SRC / "__init__.py").read_text()).body
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    ]
    seen = {alias.asname: (node.module, alias.name) for node in block.body for alias in node.names}  # type: ignore[attr-defined]
    assert seen == {name: (home, name) for name, home in lowbit._HOMES.items()}


# Each command and its function in Python; of its parameters, those that have another name there or none, with the reason.
COMMAND_LINE = "only the command line prints"
GENERATION = {"top_k", "top_p", "min_p", "temperature", "repetition_penalty", "seed"}
SPELLED = {
    "quantize": ("quantize", {
        "bits": "`recipe`, such as int4:g64", "group_size": "`recipe`", "data_free": "effort='none'",
        "target_format": "`quantize_as`, which gives what was exported", "keep": "`quantize_as`", "kv": "`quantize_as` and `export`",
        "target_size": "`allocate`, whose recipe goes to `quantize`", "target_bits": "`allocate`", "target_kl": "`allocate`",
        "fit_memory": "`allocate`", "context": "`allocate`", "sensitivity": "`allocate`",
        "text": "`evaluate` measures", "windows": "`evaluate` measures", "card": "`evaluate` measures, in limited time with `budget`", "no_card": "`evaluate` measures",
    }),
    "plan": ("plan", {"every": COMMAND_LINE, "bits": "`recipe`, such as int4:g64", "group_size": "`recipe`"}),
    "recommend": ("recommend", {}),
    "evaluate": ("evaluate", {"save": "`save_card`", "adapter": "`against`, which takes what `with_adapter` gives"}),
    "merge": ("merge", {
        "data_free": "effort='none'", "card": "`evaluate` measures", "no_card": "`evaluate` measures",
    }),
    "card": ("card", {"markdown": "README.md in the folder", "rewrite": "`save_card`"}),
    "check-kv": ("check_kv", {"plot": COMMAND_LINE, "write": "`lowbit.kv.folder.write_cache_format`"}),
    "compare": ("compare", {"markdown": "`to_markdown` of the result", "data_free": "effort='none'"}),
    "generate": ("generate", {}),
    "chat": ("chat", {"max_new_tokens": "of `ask`, for each answer", "stop": "of `ask`, for each answer"}),
    "bench": ("bench", {
        "models": "`model`, one or several", "program": "`programs`, by name", "markdown": "`to_markdown` of the result",
    }),
    "import": ("import_model", {}),  # `import` is a word of Python
    "dequantize": ("dequantize_model", {}),  # `dequantize` is of a model in memory
    "export": ("export", {"folder": "`model`, as what `quantize` returned does too"}),
    "inspect": ("inspect", {"every": COMMAND_LINE}),
    "explain": ("explain", {}),
    "doctor": ("doctor", {"every": COMMAND_LINE}),
    "recipes": ("catalogue", {}),  # `lowbit.recipes` is a package
}  # fmt: skip


def test_every_command_has_a_function_with_the_same_parameters() -> None:
    import inspect

    import typer.main

    from lowbit.cli.main import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(commands) == set(SPELLED)
    for name, (function, differs) in SPELLED.items():
        known = set(inspect.signature(getattr(lowbit, function)).parameters)
        known |= GENERATION if "sampling" in known else set()
        known |= (
            {"target_size", "target_bits", "target_kl", "fit_memory", "context"} if function == "allocate" else set()
        )
        ours = {parameter.name for parameter in commands[name].params} - {"as_json", "help"}
        assert ours - known == set(differs), name


def test_defaults_of_a_command_and_of_its_function_are_the_same() -> None:
    import inspect

    import typer.main

    from lowbit.cli.main import app

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    apart = set()
    for name, (function, _) in SPELLED.items():
        ours = inspect.signature(getattr(lowbit, function)).parameters
        for parameter in commands[name].params:
            mine = ours[parameter.name].default if parameter.name in ours else inspect.Parameter.empty
            theirs = parameter.default if not getattr(parameter, "required", False) else inspect.Parameter.empty
            if mine is not inspect.Parameter.empty and (mine or None) != (theirs or None):
                apart.add((name, parameter.name, mine, theirs))
    assert apart == {
        (
            "compare",
            "samples",
            32,
            None,
        ),  # the command tells whether the option was given, to refuse it where it is ignored
        ("compare", "windows", None, 8),  # the command is for people who wait
        ("plan", "recipe", "w4", None),  # where --bits says it, a recipe is refused
        ("quantize", "recipe", "w4", None),
        ("recommend", "windows", 2, None),  # the command tells whether the option was given
    }


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What examples of docstrings use: a float model, the same quantized and exported, a text, a folder to write in."""
    import torch

    from lowbit.measure.speed import SpeedSettings

    root = tmp_path_factory.mktemp("examples")
    save_tiny("llama", root / "model")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (root / "model" / "chat_template.jinja").write_text(template)
    lowbit.quantize(root / "model", "int4:g32", root / "quantized")
    lowbit.export(root / "quantized", "gptq", root / "gptq")
    write(root / "adapter", llama_factors())
    text = ["The cat sat on the mat and looked at the moon. " * 60]
    few = SpeedSettings(prompt=4, new=4, prefill=8, batch=0, repeats=1)
    return {
        "lowbit": lowbit, "torch": torch, "model": root / "model", "quantized": root / "quantized", "gptq": root / "gptq", "adapter": root / "adapter",
        "folder": root, "text": text, "few": few,
    }  # fmt: skip


FUNCTIONS = [name for name in lowbit.__all__ if name[0].islower()]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_has_an_example_that_runs(name: str, names: dict[str, Any]) -> None:
    import doctest

    function = getattr(lowbit, name)
    (test,) = doctest.DocTestFinder(recurse=False).find(function, name, module=False, globs=dict(names))  # type: ignore[arg-type]
    assert test.examples, f"{name} has no example"
    said: list[str] = []
    failed, tried = doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert tried and not failed, "".join(said)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_docstring_says_what_its_parameters_are(name: str) -> None:
    import inspect

    function = getattr(lowbit, name)
    said = inspect.getdoc(function) or ""
    usual = {
        "tokenizer",
        "overwrite",
        "max_shard_bytes",
        "device",
        "out",
        "options",
        "model",
        "recipe",
        "folder",
        "module",
        "a",
        "b",
        "x",
    }
    missing = [p for p in inspect.signature(function).parameters if p not in usual and not re.search(rf"\b{p}\b", said)]
    assert not missing, f"{name}: {missing}"
