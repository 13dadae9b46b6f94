"""The house rules that a machine can check: imports go down only, heavy libraries stay in their
rooms, files stay readable, nothing of one machine is written down."""

from __future__ import annotations

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kaleido_jax"
MAX_LINES = 450

# Floor and group of every module. A module may import from lower floors and from its own group.
# Names are matched by their first parts, so `latents` covers `latents.bbox`.
GROUPS = {
    0: {
        "vocabulary": (
            "beside compiled compiling config diffusion distributed errors flops latents locks"
            " lora mesh prompts quantize rng schedule sidecars trainable types"
        ),
    },
    1: {
        "tokens": "tokens",
        "models": "models",
        "data": "data",
        "annotate": "annotate",
        "storage": "checkpoint bundle tensor_files model_card hub save_failures",
    },
    2: {
        "training": (
            "dry_run guards losses memory_plan optim preemption runlog train training_loop"
            " warm_start watchdog"
        ),
        "generation": (
            "batches decode diverse edit_methods editing generate grammar guidance outputs"
            " picture_folder resampling runner samplers session_folder settings stablehlo stages"
            " streaming thresholds written"
        ),
        "interop": "interop",
    },
    3: {
        "evaluation": "evaluate metrics bench",
    },
    4: {
        "command line": (
            "cli cli_arguments cli_annotate cli_bench cli_build cli_doctor cli_dry_run cli_edit "
            "cli_evaluate cli_figures cli_sample cli_serve cli_tasks cli_train cli_weights"
        ),
        "page": "ui",
        "demo": "demo figures",
    },
}
PLACES = {
    name: (floor, group)
    for floor, groups in GROUPS.items()
    for group, names in groups.items()
    for name in names.split()
}

# Imports sideways or between groups that the design allows, by (from, to) module prefixes.
ALLOWED = {
    ("data", "models.voken_tokenizer"),  # its codes are fitted on pictures of the data
    ("models", "tokens"),  # ids of padding and EOS
    ("checkpoint", "tokens"),  # a checkpoint carries its vocabulary
    ("bundle", "tokens"),
    ("data", "tokens"),  # a batch holds tokens
    ("annotate", "data"),  # it reads the same shards and crops as training does
    ("annotate", "models.voken_tokenizer"),
    ("cli_figures", "figures"),
    ("cli", "demo"),  # a verb starts the demo and the page, lazily
    ("cli_serve", "ui"),
}

# Where the heavy libraries may be imported. A star means at any level of the module, otherwise
# only inside functions.
HEAVY = {
    "tensorflow": {"data*"},
    "seqio": {"data*"},
    "tensorflow_datasets": {"data*"},
    "grain": {"data*"},
    "clu": {"data*", "train", "runlog"},  # its TensorBoard writer, when training starts
    "torch": {"annotate*", "interop"},  # interop reads .pth with weights_only=True
    "apache_beam": {"annotate*", "data.records", "data.beam_runs*"},  # build runs on Beam too
    "transformers": {"annotate*"},
    "gradio": {"ui*"},
    "huggingface_hub": {"hub"},
}


def modules() -> list[tuple[str, pathlib.Path]]:
    """Every module as ('latents.bbox', its file), without the package's own name."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = list(path.relative_to(PACKAGE).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        found.append((".".join(parts), path))
    return found


def imports(path: pathlib.Path, module: str) -> list[tuple[str, bool, int]]:
    """The absolute names that a file imports, whether at module level, and the line.

    `from package import name` gives 'package.name': the name may be a module. Imports under
    `if TYPE_CHECKING:` count as lazy: they load nothing.
    """
    tree = ast.parse(path.read_text("utf-8"))
    package = ["kaleido_jax", *module.split(".")] if module else ["kaleido_jax"]
    if path.name != "__init__.py":
        package = package[:-1]
    found = []

    def walk(node: ast.AST, top: bool) -> None:
        for child in ast.iter_child_nodes(node):
            inner = top and not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                inner = False
            if isinstance(child, ast.Import):
                found.extend((alias.name, top, child.lineno) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                name = ".".join([*base, *([child.module] if child.module else [])])
                found.extend((f"{name}.{alias.name}", top, child.lineno) for alias in child.names)
            else:
                walk(child, inner)

    walk(tree, True)
    return found


def place(module: str) -> tuple[int, str] | None:
    """Floor and group of 'latents.bbox', or None where the table does not know it."""
    return PLACES.get(module.split(".")[0])


def within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def allowed(source: str, target: str) -> bool:
    return any(within(source, a) and within(target, b) for a, b in ALLOWED)


def complaints(module: str, path: pathlib.Path) -> list[str]:
    """What is wrong with the imports of one file."""
    found = []
    own = place(module)
    for name, top, line in imports(path, module):
        where = f"kaleido_jax/{path.name} line {line}: {module} imports {name}"
        library = name.split(".")[0]
        if library in HEAVY and not _may_be_heavy(module, library, top):
            found.append(f"{where}: not here{' at module level' if top else ''}")
        if library in ("tests", "configs"):
            found.append(f"{where}: the package cannot lean on it")
        if library != "kaleido_jax" or own is None:
            continue
        target = name.removeprefix("kaleido_jax").lstrip(".")
        other = place(target)
        if other is None or allowed(module, target):
            continue
        if other[0] > own[0]:
            found.append(f"{where}: upward, floor {own[0]} to {other[0]}")
        elif other[0] == own[0] and other[1] != own[1]:
            found.append(f"{where}: sideways, {own[1]} to {other[1]}")
    return found


def _may_be_heavy(module: str, library: str, top: bool) -> bool:
    for room in HEAVY[library]:
        if within(module, room.rstrip("*")) and (room.endswith("*") or not top):
            return True
    return False


def test_every_module_has_a_floor():
    unknown = [name for name, _ in modules() if name and place(name) is None]
    assert not unknown, f"give these a floor in GROUPS: {unknown}"


def test_imports_go_down_only():
    found = [complaint for name, path in modules() if name for complaint in complaints(name, path)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        ("schedule", "from kaleido_jax import train", "upward"),
        ("schedule", "from . import train", "upward"),
        ("models.t5", "from ..data import loader", "sideways"),
        ("generate", "def f():\n    from kaleido_jax.train import x", "sideways"),
        ("models.unet", "import kaleido_jax.data.shapes", "sideways"),
        ("generate", "import tensorflow as tf", "not here"),
        ("train", "from clu import metric_writers", "at module level"),
        ("interop.mdm", "def f():\n    import tensorflow", "not here"),
        ("interop.mdm", "import torch", "at module level"),
        ("losses", "from tests import parity", "lean"),
    ],
)
def test_the_walk_finds_wrong_imports(tmp_path, module, source, words):
    path = tmp_path / "module.py"
    path.write_text(source, "utf-8")
    assert words in " ".join(complaints(module, path))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("train", "def f():\n    from clu import metric_writers"),
        ("data.tasks", "import tensorflow, seqio"),
        ("interop.mdm", "def f():\n    import torch"),
        ("generate", "from kaleido_jax import samplers, schedule"),
        ("data.sources", "from kaleido_jax.models.voken_tokenizer import PatchTokenizer"),
    ],
)
def test_the_walk_lets_right_imports_pass(tmp_path, module, source):
    path = tmp_path / "module.py"
    path.write_text(source, "utf-8")
    assert complaints(module, path) == []


def test_top_level_imports_only_the_standard_library():
    found = [
        name
        for name, top, _ in imports(PACKAGE / "__init__.py", "")
        if top and name.split(".")[0] not in sys.stdlib_module_names
    ]
    assert not found


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, kaleido_jax; assert kaleido_jax.__version__; import kaleido_jax.cli; "
        "print(*sorted(set(n.split('.')[0] for n in sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(result.stdout.split())
    assert not loaded & {"jax", "flax", "numpy", "optax", "orbax", "matplotlib", *HEAVY}


def test_lazy_names_resolve_and_unknown_ones_do_not():
    import kaleido_jax

    assert kaleido_jax.Pipeline.__module__ == "kaleido_jax.generate"
    assert kaleido_jax.LatentDocument.__module__ == "kaleido_jax.latents.document"
    assert {"Pipeline", "LatentDocument"} <= set(dir(kaleido_jax))
    with pytest.raises(AttributeError, match="Pipelin"):
        kaleido_jax.Pipelin  # noqa: B018


def sources() -> list[pathlib.Path]:
    """Every text of ours, wherever it lies in the tree."""
    folders = ("kaleido_jax", "configs", "tests", "docs", "launch", ".ci")
    found = [path for path in ROOT.iterdir() if path.is_file()]
    for folder in folders:
        found += [path for path in (ROOT / folder).rglob("*") if path.is_file()]
    endings = {".py", ".md", ".sh", ".toml", ".ini", ".txt", ".yaml"}
    named = {"run", "LICENSE"}
    return sorted(path for path in found if path.suffix in endings or path.name in named)


def test_files_stay_short():
    long = {
        str(path.relative_to(ROOT)): count
        for path in sources()
        if path.suffix == ".py" and (count := len(path.read_text("utf-8").splitlines())) > MAX_LINES
    }
    assert not long, f"over {MAX_LINES} lines: {long}"


def test_modules_open_with_annotations_and_a_docstring():
    bad = []
    for _, path in modules():
        tree = ast.parse(path.read_text("utf-8"))
        future = any(isinstance(n, ast.ImportFrom) and n.module == "__future__" for n in tree.body)
        if tree.body and not (ast.get_docstring(tree) and (future or len(tree.body) == 1)):
            bad.append(str(path.relative_to(ROOT)))
    assert not bad, f"no docstring, or no `from __future__ import annotations`: {bad}"


# Spelled in halves so that this file passes its own test.
MACHINE = re.compile(
    "|".join(
        [
            r"(?<![\w.])/(?:ho" + r"me|ro" + r"ot|Us" + r"ers)/",
            r"(?<![\w.])/wo" + r"rk/",
            r"/tm" + r"p/w/",
            r"py" + r"pi\.org|python" + r"hosted",
            r"--(?:extra-)?index" + r"-url",
        ]
    )
)


def test_nothing_of_one_machine_is_written_down():
    found = [
        f"{path.relative_to(ROOT)} line {number}: {line.strip()[:80]}"
        for path in sources()
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if MACHINE.search(line)
    ]
    assert not found, "\n".join(found)


def test_every_pin_that_setup_names_is_in_the_constraints():
    pinned = {
        line.split("==")[0]
        for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        if "==" in line and not line.startswith("#")
    }
    tree = ast.parse((ROOT / "setup.py").read_text("utf-8"))
    named = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and node.targets[0].id in (
            "CORE", "DATA", "ANNOTATE", "UI", "HUB", "TEST", "DEV",
        ):  # fmt: skip
            for item in ast.walk(node.value):
                if isinstance(item, ast.Constant):
                    named.add(re.match(r"[\w-]+", item.value).group().lower())
    assert len(named) > 25
    assert not named - pinned
