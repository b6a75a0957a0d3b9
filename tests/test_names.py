"""Names that clash: our `kernels` beside transformers, and other packages with our names."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version

import kernels
from loop import names

ROOT = Path(__file__).resolve().parent.parent
CHECK = """
from loop import names
from store.errors import UserError
try:
    names.check()
except UserError as error:
    print(error)
"""
FORWARD = """
import kernels
import torch
import transformers
from transformers.utils.import_utils import is_kernels_available

import loop
from loop import names
from store.records import Prompt

names.check()
config = transformers.LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
)
model = transformers.LlamaForCausalLM(config)
logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits
print(kernels.__file__)
print(loop.__file__)
print(is_kernels_available(), tuple(logits.shape))
"""


def python(code: str, cwd: Path, *first: Path) -> subprocess.CompletedProcess[str]:
    """Run code with these folders first on the path."""
    path = os.pathsep.join(map(str, first))
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=300,
    )


def test_our_version_is_none_that_transformers_takes_for_hugging_faces_kernels():
    from transformers.utils import import_utils

    low = Version(import_utils.KERNELS_MIN_VERSION)
    high = Version(import_utils.KERNELS_MAX_VERSION)
    ours = Version(version("ratchet-loop"))
    assert low < high <= Version("1.0") <= ours
    assert not low <= Version(kernels.__version__) < high
    assert not import_utils.is_kernels_available()


def test_our_kernels_is_imported_at_no_cost_and_with_a_version_too_old_to_be_used():
    tree = ast.parse((ROOT / "kernels" / "__init__.py").read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert kernels.__version__ == "0.0.0"


def test_all_five_packages_are_ours_here():
    names.check()
    assert {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()} - {
        "tests"
    } == set(names.OURS)


@pytest.mark.parametrize("name", ["kernels", "judges", "roles", "store"])
def test_a_package_that_shadows_ours_is_named_with_its_file(tmp_path, name):
    other = tmp_path / "site" / name
    other.mkdir(parents=True)
    (other / "__init__.py").touch()
    done = python(CHECK, tmp_path, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    assert f"the package {name!r} is not Ratchet's" in done.stdout
    assert str(other / "__init__.py") in done.stdout
    assert "uninstall" in done.stdout


def test_a_folder_without_an_init_is_not_taken_for_ours(tmp_path):
    shutil.copytree(ROOT / "loop", tmp_path / "loop")
    shutil.copytree(ROOT / "store", tmp_path / "store")
    (tmp_path / "kernels").mkdir()
    done = python(CHECK, tmp_path, tmp_path)
    assert "is not Ratchet's" in done.stdout, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Our wheel, built without a network from a copy of the tree."""
    copy = tmp_path_factory.mktemp("wheel") / "tree"
    copy.mkdir()
    for kept in (*names.OURS, "tests", "pyproject.toml", "README.md", "LICENSE"):
        source = ROOT / kept
        if source.is_dir():
            shutil.copytree(source, copy / kept, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / kept)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    build += ["--no-deps", "--no-build-isolation", "--wheel-dir", str(copy / "dist"), str(copy)]
    subprocess.run(build, check=True, capture_output=True, timeout=300)
    (built,) = (copy / "dist").glob("*.whl")
    return built


def test_the_wheel_holds_recipes_entry_points_and_no_tests(wheel):
    with zipfile.ZipFile(wheel) as opened:
        files = opened.namelist()
        entry_points = next(file for file in files if file.endswith("entry_points.txt"))
        declared = opened.read(entry_points).decode()
    tops = {file.split("/")[0] for file in files}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(names.OURS)
    assert "loop/default.toml" in files
    folder = ROOT / "loop" / "recipes"
    recipes = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert {file.removeprefix("loop/recipes/") for file in files if "/recipes/" in file} == recipes
    texts = {path.name for path in (ROOT / "judges").glob("*.txt")}
    assert {file.split("/")[1] for file in files if file[:7] + file[-4:] == "judges/.txt"} == texts
    for line in ("[console_scripts]", "loop = loop.cli:main", "ratchet = loop.cli:main"):
        assert line in declared
    assert "verifier = judges.verifier:Verifier" in declared


def test_transformers_builds_a_model_beside_our_installed_wheel(wheel, tmp_path):
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install += ["--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True, timeout=300)
    (tmp_path / "elsewhere").mkdir()
    done = python(FORWARD, tmp_path / "elsewhere", target)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str(target / "kernels" / "__init__.py"),
        str(target / "loop" / "__init__.py"),
        "False (1, 3, 32)",
    ]
