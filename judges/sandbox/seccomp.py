"""The system calls that a sandboxed program may make: a list of what is allowed, all else refused.

A filter sees numbers and plain arguments, never what a pointer points to. So whatever is decided
by a path is left to Landlock, and a call whose danger lies behind a pointer is not on the list.
"""

from __future__ import annotations

import ctypes
import errno
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

MACHINES = {"x86_64": (0xC000003E, 1), "aarch64": (0xC00000B7, 2)}
"""What the kernel calls a machine, and where its numbers stand in the table below."""

# name:x86_64:aarch64, from the kernel's headers. aarch64 has no number for what a newer call of
# the list replaces.
_NUMBERS = """
read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 preadv:295:69
pwritev:296:70 preadv2:327:286 pwritev2:328:287 lseek:8:62 close:3:57 close_range:436:436
dup:32:23 dup2:33: dup3:292:24 pipe:22: pipe2:293:59 poll:7: ppoll:271:73 select:23:
pselect6:270:72 epoll_create:213: epoll_create1:291:20 epoll_ctl:233:21 epoll_wait:232:
epoll_pwait:281:22 epoll_pwait2:441:441 eventfd:284: eventfd2:290:19 timerfd_create:283:85
timerfd_settime:286:86 timerfd_gettime:287:87 signalfd4:289:74 stat:4: fstat:5:80 lstat:6:
newfstatat:262:79 statx:332:291 access:21: faccessat:269:48 faccessat2:439:439 readlink:89:
readlinkat:267:78 statfs:137:43 fstatfs:138:44 getcwd:79:17 chdir:80:49 fchdir:81:50 getdents:78:
getdents64:217:61 mkdir:83: mkdirat:258:34 rmdir:84: unlink:87: unlinkat:263:35 rename:82:
renameat:264:38 renameat2:316:276 ftruncate:77:46 fallocate:285:47 fsync:74:82 fdatasync:75:83
fadvise64:221:223 flock:73:32 umask:95:166 sendfile:40:71 copy_file_range:326:285 splice:275:76
mmap:9:222 munmap:11:215 mremap:25:216 mprotect:10:226 madvise:28:233 msync:26:227 mincore:27:232
brk:12:214 membarrier:324:283 futex:202:98 futex_waitv:449:449 set_robust_list:273:99
set_tid_address:218:96 rseq:334:293 gettid:186:178 getpid:39:172 getppid:110:173 getpgrp:111:
getpgid:121:155 getsid:124:156 getuid:102:174 geteuid:107:175 getgid:104:176 getegid:108:177
getresuid:118:148 getresgid:120:150 getgroups:115:158 capget:125:90 exit:60:93 exit_group:231:94
wait4:61:260 waitid:247:95 sched_yield:24:124 sched_getaffinity:204:123 sched_getparam:143:121
sched_getscheduler:145:120 sched_get_priority_max:146:125 sched_get_priority_min:147:126
getpriority:140:141 getcpu:309:168 rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139
rt_sigpending:127:136 rt_sigtimedwait:128:137 rt_sigsuspend:130:133 sigaltstack:131:132 pause:34:
alarm:37: setitimer:38:103 getitimer:36:102 timer_create:222:107 timer_settime:223:110
timer_gettime:224:108 timer_getoverrun:225:109 timer_delete:226:111 restart_syscall:219:128
nanosleep:35:101 clock_nanosleep:230:115 clock_gettime:228:113 clock_getres:229:114
gettimeofday:96:169 time:201: times:100:153 getrusage:98:165 getrlimit:97:163 setrlimit:160:164
uname:63:160 sysinfo:99:179 getrandom:318:278 arch_prctl:158: sendto:44:206 recvfrom:45:207
shutdown:48:210 getsockname:51:204 getpeername:52:205 getsockopt:55:209 open:2: openat:257:56
ioctl:16:29 fcntl:72:25 clone:56:220 kill:62:129 tgkill:234:131 prlimit64:302:261 prctl:157:167
socketpair:53:199 clone3:435:435 openat2:437:437
"""
NUMBERS = {name: numbers for name, *numbers in (each.split(":") for each in _NUMBERS.split())}

_LOAD, _AND, _IF_EQUAL, _RETURN = 0x20, 0x54, 0x15, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_NUMBER_AT, _MACHINE_AT, _ARGUMENTS_AT = 0, 4, 16

_SET_NO_NEW_PRIVILEGES, _SET_SECCOMP, _MODE_FILTER = 38, 22, 2


class Argument:
    """What an argument must be: `mask`ed, one of `values`, or none of them where `wanted` is off.

    Only its low 32 bits are looked at, which is all that the kernel reads of these arguments.
    """

    def __init__(self, position: int, mask: int, values: tuple[int, ...], wanted: bool = True):
        self.position, self.mask, self.values, self.wanted = position, mask, values, wanted


_WHOLE = 0xFFFFFFFF
_TRUNCATE, _ACCESS_MODE, _THREAD = 0o1000, 0o3, 0x10000
_UNIX, _STREAM, _SOCKET_TYPE = 1, 1, 0xF
_NAMES_OF_THREADS_AND_MEMORY = (15, 16, 0x53564D41)
# TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: what opening and reading a file takes.
_HARMLESS_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
# To duplicate, to get and set flags, to lock and to ask for a pipe's size. Not F_SETOWN and
# F_SETSIG, which send a signal of one's choice to any process of the same user.
_HARMLESS_FCNTLS = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)


def _checked(own_pid: int) -> dict[str, tuple[Argument, ...]]:
    """Calls that are allowed with some arguments only."""
    myself = (Argument(0, _WHOLE, (own_pid,)),)
    # Landlock before version 3 does not see that opening to read may also empty a file.
    reads = (_TRUNCATE | _ACCESS_MODE, (_TRUNCATE,), False)
    return {
        "open": (Argument(1, *reads),),
        "openat": (Argument(2, *reads),),
        "ioctl": (Argument(1, _WHOLE, _HARMLESS_IOCTLS),),
        "fcntl": (Argument(1, _WHOLE, _HARMLESS_FCNTLS),),
        "clone": (Argument(0, _THREAD, (_THREAD,)),),
        "kill": myself,
        "tgkill": myself,
        "prlimit64": (Argument(0, _WHOLE, (0, own_pid)),),
        "prctl": (Argument(0, _WHOLE, _NAMES_OF_THREADS_AND_MEMORY),),
        # What an event loop wakes itself with. A datagram one could be sent to any address.
        "socketpair": (Argument(0, _WHOLE, (_UNIX,)), Argument(1, _SOCKET_TYPE, (_STREAM,))),
    }


# Whoever asks for these has an older call to fall back on, whose arguments can be seen.
_NOT_THERE = ("clone3", "openat2")


def instructions(machine: str, own_pid: int) -> list[tuple[int, int, int, int]]:
    """The filter for a process of this machine and id: (code, if true, if false, constant)."""
    known, column = MACHINES[machine]
    checked = _checked(own_pid)
    made = [
        (_LOAD, 0, 0, _MACHINE_AT),
        (_IF_EQUAL, 1, 0, known),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    for name, numbers in NUMBERS.items():
        if not (number := numbers[column - 1]):
            continue
        if name in _NOT_THERE:
            then = [(_RETURN, 0, 0, _REFUSE | errno.ENOSYS)]
        else:
            then = _then(checked.get(name, ()))
        made += [(_IF_EQUAL, 0, len(then), int(number)), *then]
    return [*made, (_RETURN, 0, 0, _REFUSE | errno.EPERM)]


def _then(arguments: Sequence[Argument]) -> list[tuple[int, int, int, int]]:
    """Allow the call if each argument is right."""
    refuse = (_RETURN, 0, 0, _REFUSE | errno.EPERM)
    made: list[tuple[int, int, int, int]] = []
    for each in arguments:
        made += [(_LOAD, 0, 0, _ARGUMENTS_AT + 8 * each.position), (_AND, 0, 0, each.mask)]
        if each.wanted:
            left = range(len(each.values), 0, -1)
            made += [(_IF_EQUAL, n, 0, value) for n, value in zip(left, each.values, strict=True)]
            made.append(refuse)
        else:
            for value in each.values:
                made += [(_IF_EQUAL, 0, 1, value), refuse]
    return [*made, (_RETURN, 0, 0, _ALLOW)]


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("constant", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("first", ctypes.POINTER(_Instruction)))


def install(program: Sequence[tuple[int, int, int, int]]) -> None:
    """Put this process under a filter for good, and keep it from gaining privileges.

    Raises OSError where the kernel does not let it.
    """
    array = (_Instruction * len(program))(*(_Instruction(*each) for each in program))
    whole = _Program(len(program), ctypes.cast(array, ctypes.POINTER(_Instruction)))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (_SET_NO_NEW_PRIVILEGES, ctypes.c_ulong(1), 0, 0, 0),
        (_SET_SECCOMP, ctypes.c_ulong(_MODE_FILTER), ctypes.byref(whole), 0, 0),
    ):
        if libc.prctl(*arguments) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"seccomp: {os.strerror(code)}")
