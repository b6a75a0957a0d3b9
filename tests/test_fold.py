"""The folds in C and Triton are held to the one in torch; which is used is a fact that is told."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import fold, fold_c, fold_torch
from kernels.fold_torch import Running, Scale

ROOT = Path(__file__).parents[1]
STATS = ("entropy", "mean_logit", "is_top1", "log_sum_sq")
SCALES = (Scale(), Scale(0.6), Scale(1.3, 4.0))


def folded(
    by: Any, logits: Tensor, target: Tensor, scale: Scale, columns: int
) -> tuple[Running, Tensor]:
    """What a fold makes of logits in tiles of so many columns: sums, and the gradient."""
    tiles = [part.clone() for part in logits.split(columns, dim=1)]
    running = Running.start(logits, len(logits), STATS)
    for number, tile in enumerate(tiles):
        by.forward(tile, target, number * columns, running, scale)
    grad = torch.linspace(-2, 1, len(logits))
    for number, tile in enumerate(tiles):
        by.backward(tile, target, number * columns, running.norm, grad, scale)
    return running, torch.cat(tiles, dim=1)


def case(dtype: torch.dtype, rows: int = 5, columns: int = 2500) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(rows, columns, generator=generator) * 6).to(dtype)
    logits[0, :7] = 1e4
    logits[1, 3::2] = -1e4
    logits[2, 5:] = -torch.inf
    target = torch.randint(columns, (rows,), generator=generator)
    target[0], target[1], target[2] = 0, columns - 1, 4
    return logits, target


def assert_equal_folds(by: Any, dtype: torch.dtype, columns: int, size: int = 2500) -> None:
    logits, target = case(dtype, columns=size)
    for scale in SCALES:
        found, grad = folded(by, logits, target, scale, columns)
        wanted, exact = folded(fold_torch, logits, target, scale, columns)
        for ours, theirs in zip(found.all(), wanted.all(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)
        rtol = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(grad, exact, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [2500, 1024, 37])
def test_the_fold_in_c_is_the_one_in_torch(dtype: torch.dtype, columns: int) -> None:
    assert fold.chosen("cpu").name == "c", fold.chosen("cpu").reason
    assert_equal_folds(fold_c, dtype, columns)


def test_the_fold_in_triton_is_the_one_in_torch() -> None:
    """In a process of its own: Triton reads at import whether it is to interpret."""
    pytest.importorskip("triton")
    code = (
        "import torch\n"
        "from kernels import fold, fold_triton\n"
        "from test_fold import assert_equal_folds\n"
        "assert fold.chosen('cpu').name == 'triton'\n"
        "for dtype in (torch.float32, torch.bfloat16):\n"
        "    for columns in (300, 97):\n"
        "        assert_equal_folds(fold_triton, dtype, columns, 300)"
    )
    run(code, RATCHET_FOLD="triton", TRITON_INTERPRET="1")


def test_the_fold_in_torch_is_the_definition() -> None:
    logits, target = case(torch.float64, rows=4, columns=90)
    logits[2, 5:] = -50.0
    for scale, columns in product(SCALES, (90, 40)):
        running, grad = folded(fold_torch, logits, target, scale, columns)
        y = logits.clone().requires_grad_()
        logp = scale.of(y).log_softmax(dim=1).gather(1, target[:, None])[:, 0]
        torch.testing.assert_close(running.logp, logp)
        (logp * torch.linspace(-2, 1, 4)).sum().backward()
        torch.testing.assert_close(grad, y.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fold_in_c_gives_the_same_bits_with_any_number_of_threads(dtype: torch.dtype) -> None:
    logits, target = case(dtype, rows=67, columns=70_000)  # as many as are worth several threads
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            running, grad = folded(fold_c, logits, target, Scale(), 70_000)
            found.append([*running.all(), grad])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            assert one is not None
            assert same is not None
            assert torch.equal(one, same)


def test_the_exponential_in_c_is_accurate_to_a_tenth_of_a_millionth() -> None:
    x = torch.linspace(-87, 0, 100_001).view(-1, 1)
    grad, zeros = -torch.ones(len(x)), torch.zeros(len(x))
    outside = torch.full((len(x),), -1)
    found = x.clone()
    fold_c.backward(found, outside, 0, fold_torch.Norm(zeros, zeros), grad, Scale())
    exact = x.double().exp()
    assert ((found - exact).abs() <= 1.2e-7 * exact).all()


def run(code: str, **environment: str) -> str:
    """What a process prints that runs this code with these variables."""
    whole = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=whole, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# A compiler that takes e^x for x, which compiles.
WRONG = """#!/bin/sh
[ "$1" = --version ] && exec cc --version
for each; do case "$each" in *fold.c) source=$each;; esac; done
sed 's/return p \\* from_bits(.*/return kept;/' "$source" > "$(dirname "$0")/wrong.c"
exec cc -O1 -shared -fPIC "$(dirname "$0")/wrong.c" -o "$(eval echo \\${$#})"
"""
TELL = "from kernels import fold; print(*fold.chosen('cpu'), sep='\\n')"


def test_without_a_compiler_torch_folds_and_the_reason_is_told(tmp_path: Path) -> None:
    code = (
        f"{TELL}\nimport os, torch; from kernels.linear_logprob import linear_logprob as op\n"
        "print(op(torch.zeros(1, 2), torch.zeros(8, 2), torch.tensor([3])).exp().item())\n"
        "os.environ['RATCHET_FOLD'] = 'c'\n"
        "try: fold.chosen('cpu')\n"
        "except ValueError as error: print(error)"
    )
    told = run(code, PATH=str(tmp_path), CC="", XDG_CACHE_HOME=str(tmp_path)).splitlines()
    assert told[0] == "torch"
    assert "there is no C compiler (cc, gcc or clang)" in told[1]
    assert float(told[2]) == pytest.approx(1 / 8)
    assert "RATCHET_FOLD asks for 'c' on cpu, but there is no C compiler" in told[3]


def built(monkeypatch: pytest.MonkeyPatch, **environment: str) -> fold_c.Built:
    """Find or build the library as a process with these variables would."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found: fold_c.Built = fold_c.built.__wrapped__()
    return found


def test_a_compiler_that_fails_is_told_with_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'fold.c: no such target' >&2\nexit 1\n")
    compiler.chmod(0o755)
    with pytest.raises(fold_c.Unavailable, match=r"cc failed on fold\.c: fold\.c: no such target"):
        built(monkeypatch, CC=str(compiler), XDG_CACHE_HOME=str(tmp_path))
    assert list((tmp_path / "ratchet").iterdir()) == []


def test_a_library_that_does_not_fold_as_torch_does_is_refused(tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(WRONG)
    compiler.chmod(0o755)
    name, reason = run(TELL, CC=str(compiler), XDG_CACHE_HOME=str(tmp_path)).splitlines()
    assert name == "torch"
    assert reason.endswith("what was compiled of fold_c does not fold as torch does")


def test_where_triton_finds_no_driver_torch_folds_and_the_reason_is_told() -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    code = (
        "from kernels import fold\n"
        "print(fold.tried('triton', 'cpu'), *fold.chosen('cuda'), sep='\\n')"
    )
    tried, name, reason = run(code, TRITON_INTERPRET="0").splitlines()
    assert tried.startswith("Triton cannot run a kernel: 0 active drivers")
    assert name == "torch"
    assert "on cuda is the slower one of torch: Triton cannot run a kernel: " in reason


def test_a_launcher_that_triton_cannot_compile_is_told_in_the_same_words_each_time(
    tmp_path: Path,
) -> None:
    """By the function that builds its launchers: a launcher itself takes a GPU."""
    pytest.importorskip("triton")
    code = (
        "from triton.runtime.build import compile_module_from_src\n"
        "from kernels import fold, fold_triton\n"
        "try: compile_module_from_src('int nothing;', 'nothing')\n"
        "except fold_triton.FAILURES as error: print(fold.said(error))"
    )
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nexit 3\n")
    compiler.chmod(0o755)
    cache = {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    assert run(code, CC=str(compiler), **cache) == f"{compiler} ended with exit status 3"
    without = f"import os; os.environ.pop('CC', None)\n{code}"
    assert run(without, PATH=str(tmp_path), **cache).startswith("Failed to find C compiler")


def test_a_triton_that_cannot_be_imported_is_told(tmp_path: Path) -> None:
    package = tmp_path / "triton"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libtriton.so: no such file\\nat all')")
    code = (
        "from kernels import fold\n"
        "try: fold.chosen('cpu')\n"
        "except ValueError as error: print(error)"
    )
    path = f"{tmp_path}:{ROOT}"
    told = run(code, RATCHET_FOLD="triton", TRITON_INTERPRET="1", PYTHONPATH=path)
    assert told == (
        "RATCHET_FOLD asks for 'triton' on cpu, but fold_triton cannot be imported: "
        "libtriton.so: no such file"
    )


ALONE = "built with the system's compiler for this process alone, since "


def test_what_others_could_have_written_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "ratchet"
    folder.mkdir()
    folder.chmod(0o777)
    how = built(monkeypatch, XDG_CACHE_HOME=str(tmp_path)).how
    assert how == f"{ALONE}others than this user own {folder} or can write to it"
    assert [*folder.iterdir()] == []
    folder.chmod(0o700)
    assert built(monkeypatch).how == "built with the system's compiler"
    (library,) = folder.glob("*.so")
    library.chmod(0o722)
    assert built(monkeypatch).how.endswith(f"own {library} or can write to it")


def test_without_a_cache_a_process_builds_its_own_and_the_reason_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "T").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "T"))
    found = built(monkeypatch, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert found.how == f"{ALONE}the cache folder cannot be used: Not a directory"
    assert found.library.ratchet_fold_forward.restype is None
    assert [*(tmp_path / "T").iterdir()] == [], "what was loaded is deleted"
    how = built(monkeypatch, XDG_CACHE_HOME="here").how
    assert how == f"{ALONE}the cache folder here/ratchet is no absolute path"
    name, reason = run(TELL, XDG_CACHE_HOME=str(tmp_path / "file")).splitlines()
    assert name == "c"
    assert ALONE in reason
    (tmp_path / "T").rmdir()
    with pytest.raises(fold_c.Unavailable, match=r"cannot be used: Not a .*; nor can a temporary"):
        built(monkeypatch, XDG_CACHE_HOME=str(tmp_path / "file"))


def test_a_compiler_that_waits_is_given_up_and_has_nothing_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\nread line || exec sleep 60\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(fold_c, "_PATIENCE", 0.2)
    with pytest.raises(fold_c.Unavailable, match=r"cc did not end within 0\.2 s"):
        built(monkeypatch, CC=str(compiler), XDG_CACHE_HOME=str(tmp_path))


def test_a_system_that_does_not_tell_whose_files_are_has_no_fold_in_c(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "getuid")
    with pytest.raises(fold_c.Unavailable, match="whose a file is"):
        built(monkeypatch)


def test_processes_that_build_at_once_leave_one_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", TELL]
    several = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [each.communicate()[0].splitlines()[0] for each in several] == ["c", "c"]
    (library,) = (tmp_path / "ratchet").glob("*.so")
    assert len([*library.parent.iterdir()]) == 2, "the library and its sum"
    assert library.stat().st_mode & 0o777 == 0o700


def test_a_library_that_was_cut_short_is_built_anew(tmp_path: Path) -> None:
    cache = {"XDG_CACHE_HOME": str(tmp_path)}
    run(TELL, **cache)
    (library,) = (tmp_path / "ratchet").glob("*.so")
    whole = library.read_bytes()
    # Loading the first 3000 bytes of it would end the process with a bus error.
    for left in (b"", whole[:3000], b"not a library"):
        library.write_bytes(left)
        assert run(TELL, **cache).splitlines()[0] == "c"
        assert library.read_bytes() == whole


EMPTY = """#!/bin/sh
for last; do :; done
[ "$last" = --version ] || echo 'int nothing;' | cc -shared -fPIC -xc - -o "$last"
"""


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (b"no program", "cc cannot be run"),
        (
            b"#!/bin/sh\nprintf 'not \\377 UTF-8' >&2\nexit 1\n",
            "cc failed on fold.c: not \ufffd UTF-8",
        ),
        (EMPTY.encode(), "has not its functions"),
    ],
)
def test_a_compiler_that_is_none_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: bytes, reason: str
) -> None:
    compiler = tmp_path / "cc"
    compiler.write_bytes(script)
    compiler.chmod(0o755)
    with pytest.raises(fold_c.Unavailable, match=reason):
        built(monkeypatch, CC=str(compiler), XDG_CACHE_HOME=str(tmp_path))
    with pytest.raises(fold_c.Unavailable, match="CC is no command"):
        built(monkeypatch, CC="cc '", XDG_CACHE_HOME=str(tmp_path))


def test_a_variable_forces_a_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATCHET_FOLD", "torch")
    assert fold.chosen("cpu").name == "torch"
    monkeypatch.setenv("RATCHET_FOLD", "cuda")
    with pytest.raises(ValueError, match="is one of torch, c, triton; found 'cuda'"):
        fold.chosen("cpu")
    monkeypatch.setenv("RATCHET_FOLD", "c")
    with pytest.raises(ValueError, match="asks for 'c' on cuda, but the C fold is for a CPU"):
        fold.chosen("cuda")
