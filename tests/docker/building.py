"""Bases for images, made by debootstrap, and this machine's own way to its package registries."""

from __future__ import annotations

import os
import re
import shutil
import ssl
import subprocess
from pathlib import Path


def apt_sources() -> list[Path]:
    """Where apt is told of its mirrors."""
    return [
        file
        for file in (Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*.sources"))
        if file.exists()
    ]


def mirror() -> str:
    """The Debian mirror that this machine uses; "" if there is none."""
    text = "\n".join(file.read_text() for file in apt_sources())
    found = re.search(r"^URIs: (\S+/debian/?)$|^deb (?:\[.*?\] )?(\S+/debian/?) ", text, re.M)
    return (found[1] or found[2]) if found else ""


def why_no_base() -> str:
    """Why no base image can be made here; "" if one can."""
    if os.geteuid() != 0:
        return "a base image by debootstrap needs root"
    if shutil.which("debootstrap") is None:
        return "there is no debootstrap (apt install debootstrap)"
    if shutil.disk_usage("/var/tmp").free < 12 * 2**30:
        return "less than 12 GB are free"
    return "" if mirror() else "no Debian mirror is configured"


def host_settings(folder: Path) -> list[str]:
    """This machine's own way to its package registries, as volumes: nothing of it stays in the image."""
    volumes = {}
    bundle = ssl.get_default_verify_paths().cafile or "/etc/ssl/certs/ca-certificates.crt"
    if Path(bundle).exists():
        volumes[bundle] = "/opt/host-certificates.crt"
    lines = ["[global]", *(["cert = /opt/host-certificates.crt"] if volumes else [])]
    said = subprocess.run(["pip", "config", "list"], capture_output=True, text=True, check=False).stdout
    for key, value in re.findall(r"\.([\w-]+)='(.*)'$", said, re.M):
        if key in ("index-url", "extra-index-url", "find-links") and f"{key} = {value}" not in lines:
            lines.append(f"{key} = {value}")
            for local in re.findall(r"(?:file://)?(/[^\s:]+)", value):
                if value.startswith(("file:", "/")) and Path(local).is_dir():
                    volumes[f"/{Path(local).parts[1]}/{Path(local).parts[2]}"] = "/".join(Path(local).parts[:3])[1:]
    (folder / "pip.conf").write_text("\n".join(lines) + "\n")
    volumes[str(folder / "pip.conf")] = "/etc/pip.conf"
    (folder / "empty").write_text("")
    volumes[str(folder / "empty")] = "/etc/apt/sources.list"
    for file in apt_sources():
        volumes[str(file)] = str(file)
    return [word for source, target in volumes.items() for word in ("--volume", f"{source}:{target}:ro")]


def debian(root: Path) -> None:
    """A Debian 12 with nothing in it."""
    subprocess.run(["debootstrap", "--variant=minbase", "bookworm", root, mirror()], check=True, capture_output=True)
    (root / "etc" / "apt" / "sources.list").write_text("deb http://deb.debian.org/debian bookworm main\n")


def cpu_wheels() -> list[str]:
    """Words for docker/build.sh: where torch's CPU wheel comes from, if this machine has one."""
    folders = os.environ.get("PIP_FIND_LINKS", "").split()
    found = [folder for folder in folders if list(Path(folder).glob("torch-*+cpu*.whl"))]
    if not found:
        return []  # torchvision has no such file
    return ["--build-arg", f"TORCH_SOURCE=--find-links {found[0]}", "--build-arg", "EXTRAS=mpi"]
