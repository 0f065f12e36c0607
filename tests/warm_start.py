"""Started by launchers in place of Python: asks the warm one for a copy (see warm.py), hands it its files, and ends as it does."""

import array
import json
import os
import re
import signal
import socket
import sys
import time

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
# Read while Python, PyTorch and its libraries are loaded.
READ_EARLY = re.compile(
    r"(TORCH|PYTORCH|PYTHON|OMP_|MKL_|KMP_|GOMP|OPENBLAS|LD_PRELOAD|MALLOC|GLIBC|CUDA|NCCL|ATEN|LC_|LANG)"
)
NOT_EARLY = re.compile(
    r"(TORCHELASTIC_|TORCH_NCCL_|PYTHON_EXEC$|PYTHONPATH$|PYTHONUNBUFFERED$|PYTHONDONTWRITEBYTECODE$|PYTHONSAFEPATH$)"
)


def early(environment: dict) -> dict:
    """What a copy of the warm Python would not see."""
    return {key: value for key, value in environment.items() if READ_EARLY.match(key) and not NOT_EARLY.match(key)}


def main() -> None:
    program, python, address, *words = sys.argv[1:]
    unbuffered = words[:1] == ["-u"]
    words = words[unbuffered:]
    unusual = not words or (words[0].startswith("-") and words[0] not in ("-m", "-c")) or not os.path.isdir(os.getcwd())
    if unusual:
        os.execv(python, [python, *sys.argv[4:]])
    connection = socket.socket(socket.AF_UNIX)
    end = time.monotonic() + 60
    while True:
        try:
            connection.connect(address)
            break
        except FileNotFoundError:  # it is loading PyTorch still
            if time.monotonic() > end:
                sys.exit("the warm Python has not begun within 60 s")
            time.sleep(0.02)
    asked = json.dumps(
        {"words": words, "folder": os.getcwd(), "environment": surroundings(program, unbuffered), "umask": mask()}
    ).encode()
    files = array.array("i", [0, 1, 2])
    connection.sendmsg([len(asked).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
    connection.sendall(asked)
    pid = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "big")
    if not pid:  # the environment differs
        os.execv(python, [python, *sys.argv[4:]])
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: os.kill(pid, number))
    for fd in (0, 1, 2):
        os.close(fd)  # pipes end when the copy closes them
    code = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "big", signed=True)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def surroundings(program: str, unbuffered: bool) -> dict:
    # PYTHON_EXEC: what torchrun starts its ranks by.
    return {**os.environ, "PYTHON_EXEC": program, **({"PYTHONUNBUFFERED": "1"} if unbuffered else {})}


def mask() -> int:
    now = os.umask(0o077)
    os.umask(now)
    return now


if __name__ == "__main__":
    main()
