"""The house's rules: who imports whom, and that graph, parameters, commands and flow name the same stages."""

import ast
import inspect
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import vlmdiff
from vlmdiff.cli import app
from vlmdiff.core.dvc import stage_names
from vlmdiff.core.params import CaptionFile, Endpoint, Params, Retrieval, VisionLanguageModel, load

ROOT = Path(__file__).parents[2]
ROOMS = ["core", "data", "captions", "model", "training", "detection", "evaluation", "registry", "production", "setup"]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


SOURCES = sorted((ROOT / "vlmdiff").rglob("*.py"))
MODULES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for file in [*SOURCES, *sorted((ROOT / "flows").glob("*.py"))]
}


def imports(file: Path) -> set[str]:
    """The modules that a file imports, at the top or anywhere else, by their full names."""
    return imported(ast.parse(file.read_text()))


def imported(code: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(code):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            # Of a package either its modules are imported or what it defines itself.
            found |= names & MODULES.keys() if names & MODULES.keys() else {node.module}
    return found


def sources_of(stage: str) -> set[str]:
    """The files that a stage runs: stages.py, what it imports for this stage, and what those import.

    The `__init__.py` files hold no code of a stage. A room whose pages or views are templates reads them all.
    """
    body = ast.parse((ROOT / "vlmdiff/stages.py").read_text()).body
    known = {name: file for name, file in MODULES.items() if file.name != "__init__.py"}
    others = [node for node in body if not (isinstance(node, ast.FunctionDef) and node.name in STAGES)]
    own = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == stage)
    waiting = imported(ast.Module([own, *others], [])) & known.keys()
    found = {"vlmdiff.stages"}
    while waiting:
        found.add(name := waiting.pop())
        waiting |= imports(known[name]) & known.keys() - found
    templates = {room for name in found for room in re.findall(r'PackageLoader\("([\w.]+)"', known[name].read_text())}
    folders = (f"{room.replace('.', '/')}/templates" for room in templates)
    return {known[name].relative_to(ROOT).as_posix() for name in found} | set(folders)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_all_the_code_that_it_runs_and_on_no_other(stage) -> None:
    listed = {path for path in STAGES[stage]["deps"] if path.startswith("vlmdiff/")}
    needed = sources_of(stage)
    missing = {path for path in needed if not listed & {path, *map(str, Path(path).parents)}}
    assert not missing, f"dvc.yaml: editing {sorted(missing)} does not run {stage} again"
    for path in listed - {"vlmdiff/core"} - needed:
        files = {file.relative_to(ROOT).as_posix() for file in (ROOT / path).glob("[!_]*.py")}
        # A room instead of most of its files.
        assert 2 * len(files & needed) > len(files), f"dvc.yaml: {stage} runs little or nothing of {path}"


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_the_package_knows_neither_prefect_nor_dvc(file) -> None:
    assert {name.partition(".")[0] for name in imports(file)}.isdisjoint({"prefect", "dvc", "flows"})


@pytest.mark.parametrize("position", range(len(ROOMS)), ids=lambda position: ROOMS[position])
def test_a_room_imports_only_from_those_before_it(position) -> None:
    later = {f"vlmdiff.{name}" for name in [*ROOMS[position + 1 :], "stages", "cli"]}
    for file in (ROOT / "vlmdiff" / ROOMS[position]).rglob("*.py"):
        found = {".".join(name.split(".")[:2]) for name in imports(file)} & later
        assert not found, f"{file.relative_to(ROOT)} imports {found}"


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {name: imports(file) & MODULES.keys() for name, file in MODULES.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_only_the_rooms_stages_and_commands_stand_at_the_root_of_the_package() -> None:
    assert {file.parent.name for file in (ROOT / "vlmdiff").glob("*/__init__.py")} == set(ROOMS)
    assert {file.name for file in (ROOT / "vlmdiff").glob("*.py")} == {"__init__.py", "stages.py", "cli.py"}


@pytest.mark.parametrize(
    ("what", "pattern", "place"),
    [
        ("converts an image to RGB", r"""\.convert\(["']RGB["']\)""", "vlmdiff/data/images.py"),
        ("decodes an image", r"\bImage\.open\([^)]*formats", "vlmdiff/data/images.py"),
        (
            "hashes a file by SHA-256",
            r"""file_digest\([^)]*["']sha256["']|sha256\([^)]*read_bytes""",
            "vlmdiff/core/files.py",
        ),
        ("renames what it wrote", r"\bos\.(replace|rename)\(", "vlmdiff/core/files.py"),
        ("takes a lock", r"\bFileLock\(", "vlmdiff/core/locks.py"),
        ("starts DVC", r"""["']dvc["'],""", "vlmdiff/core/dvc.py"),
        ("starts git", r"""\[["']git["']""", "vlmdiff/core/git.py"),
    ],
    ids=lambda value: value if " " in value else "",
)
def test_one_file_alone(what, pattern, place) -> None:
    found = {file.relative_to(ROOT).as_posix() for file in MODULES.values() if re.search(pattern, file.read_text())}
    assert found == {place}, f"only {place} {what}, but so do {sorted(found - {place})}"


def test_text_is_read_and_written_in_utf_8_whatever_the_locale() -> None:
    guessed = re.compile(r"\.read_text\(\)|\.write_text\((?!.*encoding=)|text=True|universal_newlines")
    found = [file.relative_to(ROOT) for file in MODULES.values() if guessed.search(file.read_text())]
    assert not found, f"{found} leave the encoding to the locale: give encoding='utf-8'"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_has_a_command_and_sections_of_the_parameters(stage) -> None:
    assert STAGES[stage]["cmd"] == f"vlmdiff {stage}"
    assert CliRunner().invoke(app, [stage, "--help"]).exit_code == 0

    sections = {field.alias or name for name, field in Params.model_fields.items()}
    assert stage in STAGES[stage]["params"]
    assert set(STAGES[stage]["params"]) <= sections


def test_the_commands_of_the_stages_stand_in_the_order_of_the_graph() -> None:
    commands = [command.name for command in app.registered_commands]
    assert [name for name in commands if name in STAGES] == list(STAGES)


def test_the_graph_lists_every_stage_after_those_that_it_needs() -> None:
    made: set[str] = set()
    for name, stage in STAGES.items():
        later = set(outputs(STAGES)) - made - set(outputs({name: stage}))
        assert not later & set(stage["deps"]), f"{name} needs what a later stage makes"
        made |= set(outputs({name: stage}))


def outputs(stages: dict) -> Iterator[str]:
    for stage in stages.values():
        yield from stage.get("outs", []) + stage.get("metrics", [])


def test_the_flow_takes_the_stages_from_the_graph(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    assert stage_names() == list(STAGES)


def test_what_a_stage_depends_on_of_the_sources_exists() -> None:
    for name, stage in STAGES.items():
        for path in stage["deps"]:
            if path.startswith("vlmdiff/"):
                assert (ROOT / path).exists(), f"{name} depends on {path}"


def test_the_default_parameters_are_those_of_the_code() -> None:
    assert load(ROOT / "params.yaml") == Params()


@pytest.mark.parametrize("file", sorted((ROOT / "presets").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_preset_is_a_valid_parameters_file_with_every_section_that_dvc_asks_for(file) -> None:
    load(file)
    graph = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    asked = {section for stage in graph["stages"].values() for section in stage["params"]}
    assert asked <= yaml.safe_load(file.read_text()).keys()


def test_the_tests_that_the_documents_name_exist() -> None:
    code = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    named = {name for file in (ROOT / "docs").glob("*.md") for name in re.findall(r"`(test_\w+)`", file.read_text())}
    assert named and not {name for name in named if f"def {name}(" not in code}


def test_every_key_of_the_default_parameters_is_written_out() -> None:
    written = yaml.safe_load((ROOT / "params.yaml").read_text())
    defaults = Params().model_dump(mode="json", by_alias=True)
    # A floor that is not set is not written.
    defaults["gate"]["floors"] = {
        metric: {kind: value for kind, value in floor.items() if value is not None}
        for metric, floor in defaults["gate"]["floors"].items()
    }
    assert keys(written) == keys(defaults)


def test_what_the_comments_of_the_default_parameters_say_is_the_default_is_it() -> None:
    comments = " ".join(line.partition("# ")[2].strip() for line in (ROOT / "params.yaml").read_text().splitlines())
    for key, value in Retrieval().model_dump(mode="json").items():
        assert f" {key}: {json.dumps(value).strip(chr(34))} (" in comments, key
    for kind in (CaptionFile, VisionLanguageModel, Endpoint):
        name = kind.model_fields["kind"].annotation.__args__[0]
        (said,) = map(yaml.safe_load, re.findall(rf"{{kind: {name}, [^}}]*}}", comments))
        for key, field in kind.model_fields.items():
            # A word in capitals stands for what has no default.
            if key in said and not field.is_required() and not str(said[key]).isupper():
                assert said[key] == field.default, f"{name}: {key}"


def keys(values: dict, prefix: str = "") -> set[str]:
    found = set()
    for key, value in values.items():
        found |= keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
    return found


def test_the_command_says_its_version() -> None:
    answer = CliRunner().invoke(app, ["--version"])
    assert (answer.exit_code, answer.output) == (0, f"vlmdiff {vlmdiff.__version__}\n")


def test_help_answers_without_the_heavy_imports() -> None:
    code = "import sys, vlmdiff.cli; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    heavy = {
        "pydantic",
        "torch",
        "numpy",
        "pandas",
        "transformers",
        "diffusers",
        "mlflow",
        "great_expectations",
        "matplotlib",
    }
    assert heavy.isdisjoint(modules.split())


@pytest.mark.parametrize("module", ["registry.promotion", "evaluation.report", "production.queue"])
def test_verdicts_reports_and_the_queue_load_no_networks(module) -> None:
    code = f"import sys, vlmdiff.{module}; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert {"torch", "diffusers", "transformers"}.isdisjoint(modules.split())


def test_every_import_is_declared_as_a_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=\[]", item)[0].replace("-", "_").lower() for item in project["dependencies"]}
    names = {"PIL": "pillow", "sklearn": "scikit_learn", "yaml": "pyyaml", "ruamel": "ruamel.yaml"}
    found = set()
    for file in [*SOURCES, *(ROOT / "flows").glob("*.py")]:
        found |= {name.partition(".")[0] for name in imports(file)}
    found -= set(sys.stdlib_module_names) | {"vlmdiff", "flows"}
    assert {names.get(name, name).lower() for name in found} <= declared


def test_public_functions_of_the_flows_say_what_they_do() -> None:
    from flows import deployments, gpu, monitor, pages, retrain, score, servers

    for module in (deployments, gpu, monitor, pages, retrain, score, servers):
        for name, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_"):
                assert value.__doc__ or name == "main", f"{module.__name__}.{name} has no docstring"
