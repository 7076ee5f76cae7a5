"""The demo without what Windows lacks: modules, functions, signals, forks, file names, and replacing an open file.

sys.platform stays what it is, since the libraries ask it, and so do os.uname, os.statvfs and os.register_at_fork. What
this cannot show: backslashes, the libraries' own code for Windows, and files that another process holds open. filelock
imports fcntl before that goes: on Windows it has msvcrt.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, evidence, smaller

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to see which files are open")

PREAMBLE = r'''
# sitecustomize.py: Python imports it before anything else
import asyncio, contextlib, filelock._unix, os, re, signal, sys  # asyncio, too, imports fcntl
import multiprocessing.context, multiprocessing.popen_fork

for module in ("fcntl", "grp", "pwd", "resource", "syslog", "termios", "tty"):
    sys.modules[module] = None  # import raises ImportError
GONE = {
    os: "fork forkpty sched_getaffinity sched_setaffinity getuid geteuid getgid getegid setsid "
        "setpgid getpgid killpg getloadavg nice sysconf mkfifo chown fchmod pread pwrite posix_fadvise",
    signal: "SIGKILL SIGALRM SIGHUP SIGUSR1 SIGUSR2 SIGCHLD SIGQUIT SIGSTOP SIGPIPE alarm setitimer pause sigwait "
            "pthread_kill pthread_sigmask SIG_BLOCK SIG_UNBLOCK SIG_SETMASK",
}
os.process_cpu_count = os.cpu_count  # as on Windows; Python 3.13 has one that asks sched_getaffinity
for owner, names in GONE.items():
    for name in names.split():
        vars(owner).pop(name, None)
context = multiprocessing.context
context._concrete_contexts = {"spawn": context._concrete_contexts["spawn"]}  # get_context("fork") raises ValueError
context._default_context._default_context = context._concrete_contexts["spawn"]
multiprocessing.popen_fork.Popen.kill = multiprocessing.popen_fork.Popen.terminate


def held(path):
    """Whether this process has the file open or mapped into memory."""
    inodes = {int(line.split()[4]) for line in open("/proc/self/maps", encoding="utf-8", errors="replace")}
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the one that lists the folder is closed
            inodes.add(os.stat(int(fd)).st_ino)
    return os.path.exists(path) and os.stat(path).st_ino in inodes


def filesystem(event, arguments):
    if event in ("os.rename", "os.remove"):  # replacing is renaming
        frame = sys._getframe()
        while frame and not frame.f_globals.get("__name__", "").startswith("filelock"):  # has code for Windows
            frame = frame.f_back
        for path in arguments[: 2 if event == "os.rename" else 1]:
            if not frame and held(path):
                raise PermissionError(13, "Windows: the file is open or mapped", os.fspath(path))
    if event in ("os.mkdir", "os.rename") or (event == "open" and (arguments[2] or 0) & os.O_CREAT):
        path = arguments[event == "os.rename"]
        name = "" if isinstance(path, int) else os.path.basename(os.fsdecode(path))
        if re.search(r'[<>:"|?*\\\x00-\x1f]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', name, re.I):
            raise OSError(22, "Windows: no such file name", path)


sys.addaudithook(filesystem)
'''


def windows(folder: Path, *command: str, **more: str) -> subprocess.CompletedProcess:
    """Run Python beside both files. A text file without a named encoding is ASCII, stdout cp1252."""
    shutil.copy(ROOT / "prepare.py", folder)
    (folder / "train.py").write_text(smaller((ROOT / "train.py").read_text()))
    (folder / "preamble").mkdir(exist_ok=True)
    (folder / "preamble" / "sitecustomize.py").write_text(PREAMBLE)
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "USERNAME": "u", "PYTHONPATH": str(folder / "preamble"),
           "PYTHONIOENCODING": "cp1252:strict", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C",
           "PYTHONDONTWRITEBYTECODE": "1", "OMP_WAIT_POLICY": "PASSIVE",
           "CUDA_VISIBLE_DEVICES": "", "AUTORESEARCH_CACHE": str(folder / "cache")}
    return subprocess.run([sys.executable, *command], cwd=folder, env=env | more, capture_output=True, timeout=300)


REFUSED = [
    ("import resource", "ImportError|ModuleNotFoundError"),
    ("import os; os.fork()", "AttributeError"),
    ("import multiprocessing as m; m.get_context('fork')", "ValueError"),
    ("import os; f = open('a', 'w'); open('b', 'w').close(); os.replace('b', 'a')", "PermissionError"),
    ("import numpy as n, os; n.save('a', n.ones(9)); m = n.load('a.npy', 'r'); os.unlink('a.npy')", "PermissionError"),
    ("from pathlib import Path; Path('12:30').write_text('')", "OSError"),
    ("print('\\u2192')", "UnicodeEncodeError"),
]


def test_what_windows_refuses_is_refused_here(tmp_path):
    code = f"""
for code, error in {REFUSED!r}:
    try: exec(code)
    except Exception as raised: assert type(raised).__name__ in error, (code, raised)
    else: raise SystemExit(code + " was not refused")
"""
    done = windows(tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr.decode()


def test_the_demo_goes_from_a_damaged_cache_to_a_score(tmp_path):
    made = tmp_path / "cache" / "demo"
    (made / "token_ids").mkdir(parents=True)
    names = "tokenizer.tiktoken", "val.bin", "test.bin"
    (made / "SHA256SUMS").write_text("".join(f"{'0' * 64}  {name}\n" for name in names))
    for name in (*names, "token_ids/train.parquet.bin"):  # files to replace
        (made / name).write_bytes(b"damaged")
    done = windows(tmp_path, "train.py", AUTORESEARCH_CONTRACT="demo", AUTORESEARCH_TIME_BUDGET="1")
    output = done.stdout.decode("cp1252")
    assert done.returncode == 0, output + done.stderr.decode("cp1252")
    assert re.search(r"^---\r?\nval_bpb: +\d\.\d{6}\r?$", output, re.MULTILINE)
    assert len(evidence(tmp_path)) == 1 and output.count("making it again") == 3
