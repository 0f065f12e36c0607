"""``hvdtrain train``: the flags of :class:`hvdtrain.settings.config.TrainConfig`, then the training."""

from __future__ import annotations

import gc
import os
import platform
import shutil
import socket
import sys
from collections.abc import Sequence

from hvdtrain.cli.voice import say
from hvdtrain.errors import ConfigError
from hvdtrain.launch.detect import detect
from hvdtrain.observe import log_lines
from hvdtrain.settings.config import TrainConfig
from hvdtrain.settings.flags import build, config_text, help_text, read_flags
from hvdtrain.version import __version__

_USAGE = "hvdtrain [train] [FLAG VALUE ...]"
_INTRO = """\
Train a model on one process or on many:
  python -m hvdtrain --epochs 3
  torchrun --nproc-per-node 2 -m hvdtrain --model torchvision.models.resnet18

Flags are also YAML keys (--max-steps 100 is max_steps: 100), and dashes may be
underscores. What --model, --optimizer, --schedule, --data or --task names gets
arguments by --model.ARG VALUE, in YAML by model: {name: NAME, ARG: VALUE};
naming it anew drops the arguments that a file gave it. --[no-]X stands for --X
and --no-X. The value none unsets a setting that has no default."""
_EPILOG = """\
exit codes:
  0    done
  1    failed; the message says at what
  2    wrong flag, configuration, launch or backend; nothing was trained
  75   asked to end (SIGTERM, Ctrl-C), state saved; the same command goes on
  130  interrupted (Ctrl-C twice, or before training)"""


def run(argv: Sequence[str]) -> int:
    """Reads the flags and trains.

    Returns:
        0; every other exit code comes from an exception.

    Raises:
        HvdtrainError: Something was wrong or failed; its ``exit_code`` is the command's.
    """
    flags = read_flags(TrainConfig, argv)
    if "help" in flags.switches:
        say(_help())
        return 0
    if "version" in flags.switches:
        say(_versions())
        return 0
    config: TrainConfig = build(TrainConfig, flags)
    if "print_config" in flags.switches:
        say(config_text(config).rstrip())
        return 0
    detection = detect()
    log_lines.configure(detection.topology, socket.gethostname())  # the library only logs
    try:
        here = os.getcwd()
    except FileNotFoundError as error:  # MKL would end the process without a word of where
        raise ConfigError("the working directory was deleted; cd to one that is there") from error
    if here not in sys.path:  # the console script lacks it, `python -m` has it: --task my_module:MyTask
        sys.path.append(here)
    gc.disable()  # collections while torch is loaded find nothing, and take a seventh of that time
    try:
        from hvdtrain.run import run_training  # noqa: PLC0415  (torch: seconds that a wrong flag should not cost)
    finally:
        gc.enable()

    # The last collection of a process would walk all of torch, for a second or more. Not what is loaded from here on: Triton
    # 3.9 complains of all that is not collected.
    gc.freeze()
    run_training(config, detection)
    return 0


def _help() -> str:
    columns = min(max(shutil.get_terminal_size().columns, 80), 100)
    return help_text(TrainConfig, usage=_USAGE, intro=_INTRO, epilog=_EPILOG, width=columns).rstrip()


def _versions() -> str:
    from importlib import metadata  # noqa: PLC0415  (20 ms)

    try:
        torch = metadata.version("torch")
    except metadata.PackageNotFoundError:
        torch = "missing"
    return f"hvdtrain {__version__}, torch {torch}, Python {platform.python_version()}"
