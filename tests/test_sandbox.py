"""The sandbox: what a program gets from breaking out of it, and when there is none at all."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from judges import sandbox
from judges.sandbox import Child, Limits, attend, seccomp
from judges.sandbox.probe import ATTEMPTS

ROOT = Path(__file__).parent.parent
X86 = os.uname().machine == "x86_64"
LIMITS = Limits(time_s=1, memory_mb=256, threads=4, output_kb=64, disk_mb=4)

PRELUDE = """
import ctypes, os, signal, socket, struct, subprocess, sys, threading
libc = ctypes.CDLL(None, use_errno=True)
def called(name, *given):
    if getattr(libc, name)(*given) < 0:
        raise OSError(ctypes.get_errno(), name)
WITNESS, PARENT, PORT, SPARE = {witness!r}, {parent}, {port}, {spare!r}
try:
{attack}
    print("BROKE OUT")
except (OSError, MemoryError, ValueError, RuntimeError) as error:
    print("refused:", error)
"""

# What each attack does. It works outside the sandbox, which is tried too.
ATTACKS = {
    "open an IPv4 socket": "socket.socket(socket.AF_INET)",
    "open a unix socket": "socket.socket(socket.AF_UNIX)",
    "open a netlink socket": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)",
    "connect to this machine": "socket.create_connection(('127.0.0.1', PORT), 2)",
    "a pair of datagram sockets": "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)",
    "a socket by its number": f"called('syscall', {41 if X86 else 198}, 2, 1, 0)",
    "send a datagram": "socket.socket(2, socket.SOCK_DGRAM).sendto(b'', ('127.0.0.1', 53))",
    "read a file of the user": "open(WITNESS).read()",
    "read /etc/passwd": "open('/etc/passwd').read()",
    "read it through libc": "called('open', b'/etc/passwd', 0)",
    "read it from a folder": "os.open('etc/passwd', 0, dir_fd=os.open('/', os.O_PATH))",
    "list the user's folder": "os.listdir(os.path.dirname(WITNESS))",
    "list the root": "os.listdir('/')",
    "read the parent's environment": "open(f'/proc/{PARENT}/environ').read()",
    "read its own memory file": "open('/proc/self/mem', 'rb')",
    "append to a file": "open(WITNESS, 'a').write('')",
    "empty a file": "os.truncate(SPARE, 0)",
    "empty a file by reading it": "os.open(SPARE, os.O_RDONLY | os.O_TRUNC)",
    "make a file": "open(SPARE + '.new', 'w').close()",
    "make a folder": "os.mkdir(SPARE + '.folder')",
    "link a file": "os.link(WITNESS, SPARE + '.link')",
    "change a mode": "os.chmod(WITNESS, 0o600)",
    "change a time": "os.utime(WITNESS)",
    "change a file of Python": "open(os.__file__, 'a').close()",
    "make a pipe with a name": "os.mkfifo(SPARE + '.pipe')",
    "fork": "os.fork() or os._exit(0)",
    "start a process": "subprocess.run([sys.executable, '-c', ''], check=True)",
    "spawn a process": "os.posix_spawn(sys.executable, [sys.executable, '-c', ''], {})",
    "leave a process behind": "subprocess.Popen(['sleep', '0.01'], start_new_session=True)",
    "signal the parent": "os.kill(PARENT, 0)",
    "signal the parent's group": "os.killpg(os.getpgid(PARENT), 0)",
    "signal it through a descriptor": "signal.pidfd_send_signal(os.pidfd_open(PARENT), 0)",
    "have the kernel signal it": "import fcntl; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, PARENT)",
    "read its limits": "import resource; resource.prlimit(PARENT, resource.RLIMIT_NOFILE)",
    "set its priority": "os.setpriority(0, PARENT, os.getpriority(0, PARENT))",
    "set its processors": "os.sched_setaffinity(PARENT, os.sched_getaffinity(PARENT))",
    "shared memory": "called('shmget', 0, 4096, 0o1600)",
    "a message queue": "called('msgget', 0, 0o1600)",
    "a file in memory": "os.memfd_create('x')",
    "watch files": "called('inotify_init1', 0)",
    "more open files than allowed": "held = [open(os.devnull) for _ in range(500)]",
    "more memory than allowed": "held = bytearray(300 << 20)",
    "a larger file than allowed": "f = open('big', 'wb'); os.remove('big'); f.truncate(6 << 20)",
    "more threads than allowed": (
        "gate = threading.Event(); threading.stack_size(1 << 15)\n"
        "for _ in range(600): threading.Thread(target=gate.wait, args=(1,), daemon=True).start()"
    ),
    "a datagram by its pair": "socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)",
}

# What must not be tried outside, or does not work everywhere: there is only what happens inside.
WILD = {
    "a namespace": "called('unshare', 0x10000000 | 0x20000)",
    "open an IPv6 socket": "socket.socket(socket.AF_INET6)",
    "kill everybody": "os.kill(-1, signal.SIGKILL)",
    "kill the parent": "os.kill(PARENT, signal.SIGKILL)",
    "trace the parent": "called('ptrace', 16, PARENT, 0, 0)",
    "read the parent's memory": "called('process_vm_readv', PARENT, 0, 0, 0, 0, 0)",
    "mount": "called('mount', b'none', b'/tmp', b'tmpfs', 0, None)",
    "change the root": "os.chroot('/')",
    "become root": "os.setuid(0)",
    "become root's group": "os.setgid(0)",
    "a ring of system calls": "called('syscall', 425, 1, ctypes.create_string_buffer(256))",
    "a program in the kernel": f"called('syscall', {321 if X86 else 280}, 0, 0, 0)",
    "a key": f"called('syscall', {250 if X86 else 219}, 0, 0)",
    "remove a file of the user": "os.remove(WITNESS)",
    "rename a file of the user": "os.rename(WITNESS, SPARE)",
    "point at a file of the user": "os.symlink(WITNESS, 'link'); open('link').read()",
    "raise a limit": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "lift the filter": "called('prctl', 22, 0, 0, 0, 0)",
    "live on without the parent": "called('prctl', 1, 0, 0, 0, 0)",
    "run a program": "os.execv(sys.executable, [sys.executable, '-c', 'print(1)'])",
    "a thousand mappings": "import mmap; held = [mmap.mmap(-1, 1 << 20) for _ in range(1000)]",
    "fork for ever": "exec('while True: os.fork()')",
}


def run(code: str, limits: Limits = LIMITS, stdin: bytes = b"") -> Child:
    child = Child("program", {"code": code}, limits, stdin=stdin)
    attend([child], child, limits.wall_s)
    assert child.lacks is None, child.lacks
    return child


@pytest.fixture
def server() -> Iterator[int]:
    """The port of a server on this machine that lets everybody connect."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def program(attack: str, folder: Path, port: int) -> str:
    folder.chmod(0o777)
    for name in ("witness", "spare"):
        (folder / name).write_text("the user's own")
        (folder / name).chmod(0o666)
    return PRELUDE.format(
        witness=str(folder / "witness"),
        spare=str(folder / "spare"),
        parent=os.getpid(),
        port=port,
        attack=textwrap.indent(attack, "    "),
    )


@pytest.mark.parametrize("attack", [*ATTACKS.values(), *WILD.values()], ids=[*ATTACKS, *WILD])
def test_a_program_cannot(attack: str, tmp_path: Path, server: int) -> None:
    child = run(program(attack, tmp_path, server))
    assert child.out.startswith(b"refused:"), (child.out, child.err, child.exit)
    assert (tmp_path / "witness").read_text() == "the user's own"
    assert sorted(os.listdir(tmp_path)) == ["spare", "witness"]


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_each_attack_works_outside_the_sandbox(attack: str, tmp_path: Path, server: int) -> None:
    code = program(attack.replace("os.__file__", "SPARE"), tmp_path, server)
    bare = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=tmp_path)
    assert b"BROKE OUT" in bare.stdout, (bare.stdout, bare.stderr)


def test_a_program_has_what_python_has() -> None:
    child = run(
        """
import asyncio, collections, datetime, decimal, json, random, sqlite3, sys, tempfile, threading
import time, zoneinfo
async def later():
    await asyncio.sleep(0.001)
    return await asyncio.to_thread(lambda: 1)
assert asyncio.run(later()) == 1
with tempfile.TemporaryFile() as file:
    file.write(b"x")
open("mine", "w").write("kept"); assert open("mine").read() == "kept"
threading.stack_size(1 << 26)
def deep(n): return 0 if n == 0 else 1 + deep(n - 1)
sys.setrecursionlimit(20000)
runner = threading.Thread(target=lambda: print(deep(15000), input()))
runner.start(); runner.join()
sys.exit(0)
""",
        stdin=b"read\n",
    )
    assert (child.out, child.exit) == (b"15000 read\n", 0), child.err


def test_a_program_sees_nothing_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "a secret")
    child = run("import os; print(sorted(os.environ))")
    assert b"API_KEY" not in child.out
    assert b"HOME" in child.out


def test_python_hashes_the_same_in_each_child() -> None:
    codes = {bytes(run("print(hash('a'), list({'a', 'b', 'c'}))").out) for _ in range(3)}
    assert len(codes) == 1


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("while True: pass", "it used more than 1 s of processor time"),
        (
            "import signal, sys\nfor each in set(signal.Signals) - {9, 19}:\n"
            "    signal.signal(each, signal.SIG_IGN)\nwhile True: pass",
            "it used more than 1 s of processor time",
        ),
        ("import time; time.sleep(60)", "it took more than 3 s on the clock"),
        ("while True: print('x' * 1000)", "it printed more than 64 kB"),
        (
            "import sys\nwhile True: sys.stderr.write('x' * 1000)",
            "it printed more than 64 kB",
        ),
        (
            "for n in range(9):\n    open(str(n), 'wb').write(bytes(1 << 20))\n"
            "import time; time.sleep(60)",
            "it wrote more than 4 MB of files",
        ),
        (
            "for n in range(5000): open(str(n), 'w').close()\nimport time; time.sleep(60)",
            "it made more than 1000 files",
        ),
    ],
    ids=["loop", "loop that ignores signals", "sleep", "print", "errors", "disk", "files"],
)
def test_a_program_that_does_not_stop_is_stopped(code: str, why: str) -> None:
    began = time.monotonic()
    child = run(code)
    assert child.ended_by == why
    assert time.monotonic() - began < 30


def test_a_crash_is_an_exit_status() -> None:
    assert run("import ctypes; ctypes.string_at(0)").exit == -signal.SIGSEGV
    assert run("import os; os.abort()").exit == -signal.SIGABRT
    assert run("raise KeyError('k')").err.endswith(b"KeyError: 'k'\n")


@pytest.mark.skipif(not X86, reason="it is x86 machine code")
def test_the_numbers_of_another_machine_do_not_get_through() -> None:
    # mov eax, 20; int 0x80; ret: getpid by the number it has on a 32-bit machine.
    code = """
import ctypes, mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex("b814000000cd80c3"))
there = ctypes.addressof(ctypes.c_char.from_buffer(page))
print(ctypes.CFUNCTYPE(ctypes.c_int)(there)())
"""
    assert run(code).out == b""
    # getpid with the bit that marks the x32 calls
    child = run("import ctypes; print(ctypes.CDLL(None).syscall(0x40000000 + 39))")
    assert child.out == b"-1\n"


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    write = "open('x', 'w').write('y')"
    for code, end in (
        (write, 0),
        ("while True: pass", -9),
        (f"{write}; import os; os.abort()", -6),
    ):
        child = run(code)
        assert child.exit == end, child.err
        with pytest.raises(ProcessLookupError):
            os.kill(child.pid, 0)
    assert os.listdir(tmp_path) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_child_dies_with_the_judge(tmp_path: Path) -> None:
    script = """
import sys, time
from judges.sandbox import Child, Limits
code = "import time; print('up', flush=True); time.sleep(600)"
child = Child("program", {"code": code}, Limits())
while not child.out:
    child.hear(child._running.stdout.fileno())
print(child.pid, flush=True)
time.sleep(600)
"""
    judge = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert judge.stdout is not None
    pid = int(judge.stdout.readline())
    judge.kill()
    judge.wait()
    deadline = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < deadline, "the program lives on"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_many_children_at_once_do_not_meet() -> None:
    codes = [
        f"import os; open('own', 'w').write('{n}'); print({n}, os.listdir())" for n in range(8)
    ]
    found: dict[int, bytes] = {}

    def start(n: int) -> None:
        found[n] = bytes(run(codes[n]).out)

    threads = [threading.Thread(target=start, args=(n,)) for n in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == {n: f"{n} ['own']\n".encode() for n in range(8)}


# Where there is no sandbox.

# A judge's process that has itself lost some system calls. `gives` is what a call returns: the
# number of an error, or 0 for a call that says that it worked and has done nothing.
CRIPPLED = """
import ctypes, os, sys
from judges.sandbox import seccomp
from store.errors import UserError
ALLOW, ERROR = 0x7FFF0000, 0x00050000
made = [(0x20, 0, 0, 0)]
for number, argument, gives in {rules}:
    then = [(0x06, 0, 0, ERROR | gives)]
    if argument is not None:
        then = [(0x20, 0, 0, 16), (0x15, 0, 1, argument), *then, (0x06, 0, 0, ALLOW)]
    made += [(0x15, 0, len(then), number), *then]
seccomp.install([*made, (0x06, 0, 0, ALLOW)])
from judges.code import Code
from store.records import Call, Candidate, Group, Message, Prompt
try:
    judge = Code()
except UserError as error:
    print(error)
    sys.exit(2)
print("it did not refuse")
"""
PRCTL, LIMIT = (157, 302) if X86 else (167, 261)
SET_USER = 117 if X86 else 147
FILTER, NOT_ALLOWED, NOT_THERE = 22, 1, 38


def crippled(*rules: tuple[int, int | None, int]) -> str:
    script = CRIPPLED.replace("{rules}", repr(rules))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, (done.stdout, done.stderr)
    return done.stdout


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ((444, None, NOT_THERE), "Landlock: Function not implemented"),
        ((446, None, NOT_ALLOWED), "Landlock: Operation not permitted"),
        ((PRCTL, FILTER, NOT_ALLOWED), "seccomp: Operation not permitted"),
        ((LIMIT, None, NOT_ALLOWED), "a child could not be confined"),
        ((446, None, 0), "touch files outside its folder"),
        ((PRCTL, FILTER, 0), "open a network connection"),
        ((LIMIT, None, 0), "use more memory than it may"),
    ],
    ids=[
        *("no Landlock", "Landlock is forbidden", "seccomp is forbidden", "limits are forbidden"),
        *("Landlock does nothing", "seccomp does nothing", "limits do nothing"),
    ],
)
def test_without_isolation_a_judge_refuses(rule: tuple[int, int | None, int], why: str) -> None:
    said = crippled(rule)
    assert said.startswith("programs are run in a sandbox or not at all")
    assert why in said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_root_that_cannot_become_another_user_is_refused() -> None:
    assert "start more threads than it may" in crippled((SET_USER, None, NOT_ALLOWED))


def test_the_probe_tries_what_works_outside(tmp_path: Path) -> None:
    """Each attempt is let through where there is no sandbox: it could tell if there were none."""
    script = """
import json, os
from judges.sandbox.probe import ATTEMPTS
witness = os.path.abspath("witness"); open(witness, "w").close()
order = {"witness": witness, "threads": 1, "memory_mb": 64, "disk_mb": 1, "time_s": 5}
order["environment"] = []
print(json.dumps({what: list(attempt(order)) for what, attempt in ATTEMPTS.items()}), flush=True)
os._exit(0)
"""
    bare = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    had = json.loads(bare.stdout)
    assert list(had) == list(ATTEMPTS)
    assert [what for what, how in had.items() if not how] == []


def test_an_ordinary_user_has_the_same_sandbox() -> None:
    """Root's Python may lie where only root may look, so the user keeps the right to read."""
    script = """
import ctypes, os, tempfile
from judges import sandbox
from judges.sandbox import Child, Limits, attend
libc = ctypes.CDLL(None)
if os.geteuid() == 0:
    libc.prctl(8, 1, 0, 0, 0)
    os.setgroups([]); os.setresgid(12345, 12345, 12345); os.setresuid(12345, 12345, 12345)
    three = (ctypes.c_uint32 * 6)(4, 4, 4, 0, 0, 0)
    libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), three)
    libc.prctl(47, 2, 2, 0, 0)
print(os.geteuid(), sandbox.missing())
child = Child("program", {"code": "import os; print(os.geteuid())"}, Limits())
attend([child], child, 10)
print(child.out.decode(), child.err.decode(), child.lacks)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    user = 12345 if os.geteuid() == 0 else os.geteuid()
    assert done.stdout == f"{user} []\n{user}\n  None\n", (done.stdout, done.stderr)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has capabilities to give up")
def test_root_in_a_container_has_the_same_sandbox() -> None:
    """With the capabilities that Docker leaves to root, CAP_SYS_ADMIN not among them."""
    script = """
import ctypes
left = {0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31}
for each in set(range(64)) - left:
    ctypes.CDLL(None).prctl(24, each, 0, 0, 0)
mask = sum(1 << each for each in left)
sets = (ctypes.c_uint32 * 6)(mask, mask, mask, 0, 0, 0)
assert ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), sets) == 0
from judges import sandbox
print(sandbox.missing())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "[]\n", (done.stdout, done.stderr)


def test_the_filter_knows_every_machine_it_names() -> None:
    for machine in seccomp.MACHINES:
        made = seccomp.instructions(machine, 1)
        assert len(made) < 4096  # what the kernel takes
        assert all(0 <= jump < 256 for _, yes, no, _ in made for jump in (yes, no))
    assert sandbox.missing() == []
