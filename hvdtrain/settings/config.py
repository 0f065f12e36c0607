"""What can be configured: each field here is a flag (``--max-steps``) and a YAML key (``max_steps``) at once.

Checks that need only the values themselves happen when a configuration is made; those that need the world size, the
data or the devices are made by :mod:`hvdtrain.run`. Only the standard library is imported, so that a wrong flag is
answered before torch is loaded.
"""

# ruff: noqa: RUF009  (option() is dataclasses.field())
from __future__ import annotations

import re
from dataclasses import dataclass

from hvdtrain.errors import BackendUnavailable, ConfigError
from hvdtrain.settings.compression import FORMS, TYPES, parsed
from hvdtrain.settings.horovod_config import HOROVOD_GROUP, HorovodConfig
from hvdtrain.settings.options import MOST_SECONDS, Component, option, settle
from hvdtrain.settings.profiling import steps_of
from hvdtrain.settings.sync import FORMS as SYNC_FORMS
from hvdtrain.settings.sync import group_of, sync_of
from hvdtrain.settings.wording import did_you_mean, one_of, shown

__all__ = [
    "BACKENDS",
    "BACKEND_GROUP",
    "DATA_NAMES",
    "MODEL_NAMES",
    "SCHEDULES",
    "Component",
    "HorovodConfig",
    "TrainConfig",
]

BACKENDS = ("auto", "local", "torch", "mpi", "horovod")
TRACKERS = ("tensorboard", "wandb", "mlflow")
BACKEND_GROUP = "hvdtrain.backends"
"""Entry-point group under which other packages register backends."""
DATA_NAMES = ("digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "synthetic")
MODEL_NAMES = ("cnn", "mlp")
SCHEDULES = ("constant", "cosine", "step", "linear")
IMAGE_FOLDER = "imagefolder:"
DEFAULT_BATCH_SIZE = 32
DEFAULT_MODEL = Component("cnn")
DEFAULT_DATA = Component("digits")

_DATA, _MODEL, _OPTIM = "data", "model", "optimisation"
_DISTRIBUTED, _RUN = "distributed", "run"
_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,4})?")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything that ``hvdtrain train`` can be told; ``hvdtrain --help`` shows the same with units and defaults.

    Text is converted (``"1e-3"``, ``"5m"``, ``"AdamW"``), ``model`` and ``data`` are filled in unless a ``task`` is
    given, and ``batch_size`` unless a ``global_batch_size`` is.

    Raises:
        ConfigError: A value is wrong, or two exclude each other; the message names the flags.
        BackendUnavailable: No backend of that name is registered here.
    """

    data: Component | None = option(
        None,
        "data set: digits (inside the package), mnist, fashion-mnist, cifar10, cifar100, imagefolder:DIR (one folder a class "
        "under DIR/train and DIR/val), synthetic, or an import path",
        group=_DATA,
        metavar="NAME",
        names=DATA_NAMES,
        prefixes=(IMAGE_FOLDER,),
        excludes=("task",),
        implied=DEFAULT_DATA,
        default_text="digits",
    )
    data_dir: str = option("data", "folder of downloaded data sets", group=_DATA, metavar="DIR")
    download: bool = option(
        True, "download a missing data set (one rank of each node does, the others wait)", group=_DATA
    )
    batch_size: int | None = option(
        None,
        "samples per rank and micro-batch; the global batch is this times --accumulate times the world size",
        group=_DATA,
        metavar="N",
        at_least=1,
        excludes=("global_batch_size",),
        default_text=f"{DEFAULT_BATCH_SIZE}, unless --global-batch-size is given",
    )
    global_batch_size: int | None = option(
        None,
        "samples per optimizer step over all ranks and micro-batches, instead of --batch-size: the same training "
        "at every world size",
        group=_DATA,
        metavar="N",
        at_least=1,
        excludes=("batch_size",),
    )
    eval_batch_size: int | None = option(
        None,
        "samples per rank and batch in evaluation",
        group=_DATA,
        metavar="N",
        at_least=1,
        default_text="as in training",
    )
    last_batch: str = option(
        "keep",
        "the last global batch of an epoch, where it is smaller than the others: keep it, drop it, or merge it into "
        "the one before it",
        group=_DATA,
        choices=("keep", "drop", "merge"),
    )
    partition: str = option(
        "batch",
        "cut each global batch over the ranks, or cut the data once, so that each rank reads its own part: a contiguous one (sample), "
        "every so many-th sample (sample-strided), a part for each node (sample-node), or what each rank's data holds (sample-own)",
        group=_DATA,
        choices=("batch", "sample", "sample-strided", "sample-node", "sample-own"),
    )
    workers: int = option(
        0,
        "processes per rank that load data; 0 loads in the training process",
        group=_DATA,
        metavar="N",
        at_least=0,
        at_most=1024,
    )

    task: Component | None = option(
        None,
        "your own task, package.module:MyTask, which brings model, loss, metrics and data. "
        "Instead of --model and --data",
        group=_MODEL,
        metavar="PATH",
        excludes=("model", "data"),
        default_text="image classification with --model on --data",
    )
    model: Component | None = option(
        None,
        "model: cnn, mlp, a name in torchvision.models, or an import path, as in "
        "--model torchvision.models.resnet18 --model.num-classes 10",
        group=_MODEL,
        metavar="NAME",
        names=MODEL_NAMES,
        more_names=True,
        excludes=("task",),
        implied=DEFAULT_MODEL,
        default_text="cnn",
    )

    epochs: int = option(10, "passes over the training data; 0 only evaluates", group=_OPTIM, metavar="N", at_least=0)
    max_steps: int | None = option(
        None,
        "end after this many optimizer steps, if that is before --epochs",
        group=_OPTIM,
        metavar="N",
        at_least=1,
        default_text="no limit",
    )
    optimizer: Component = option(
        Component("AdamW"),
        "optimizer: a name in torch.optim or an import path, as in --optimizer SGD --optimizer.momentum 0.9",
        group=_OPTIM,
        metavar="NAME",
        more_names=True,
    )
    lr: float = option(
        2e-3, "learning rate, after warm-up and before the schedule", group=_OPTIM, metavar="X", above=0, at_most=1e6
    )
    scale_lr: bool = option(
        False,
        "multiply --lr by the world size (linear scaling, Goyal et al. 2017), best with --warmup-epochs",
        group=_OPTIM,
    )
    warmup_epochs: float = option(
        0.0,
        "epochs over which the learning rate rises linearly",
        group=_OPTIM,
        metavar="X",
        at_least=0,
        excludes=("warmup_steps",),
    )
    warmup_steps: int | None = option(
        None,
        "the same in optimizer steps, instead of --warmup-epochs",
        group=_OPTIM,
        metavar="N",
        at_least=0,
        excludes=("warmup_epochs",),
        default_text="as --warmup-epochs says",
    )
    schedule: Component = option(
        Component("cosine"),
        "learning rate after warm-up: constant, cosine, step, linear, or the import path of a torch scheduler",
        group=_OPTIM,
        metavar="NAME",
        names=SCHEDULES,
    )
    accumulate: int = option(1, "micro-batches per optimizer step", group=_OPTIM, metavar="N", at_least=1)
    clip_norm: float | None = option(
        None,
        "largest norm of the averaged gradient; larger ones are scaled down to it",
        group=_OPTIM,
        metavar="X",
        above=0,
        default_text="no clipping",
    )
    label_smoothing: float = option(
        0.0, "label smoothing of the cross-entropy", group=_OPTIM, metavar="X", at_least=0, below=1
    )
    precision: str = option(
        "fp32",
        "arithmetic: fp32, tf32 (fp32 with faster products on GPUs), fp64, autocast to bf16 or fp16 (fp16 with a gradient scaler), or "
        "bf16-pure (model and activations in bf16, float32 masters in the optimizer)",
        group=_OPTIM,
        choices=("fp32", "tf32", "fp64", "bf16", "bf16-pure", "fp16"),
    )

    channels_last: bool = option(
        False, "let weights and images lie channels last in memory, which convolutions may be faster with", group=_OPTIM
    )
    shard_optimizer: bool = option(
        False, "cut the optimizer's state over the ranks (ZeRO, stage 1), to need less memory", group=_OPTIM
    )
    shard_modules: str | None = option(
        None,
        "cut parameters, gradients and the optimizer's state over the ranks (FSDP2, backends torch and mpi), to need less memory, and "
        "gather modules one at a time: a regular expression for their whole names, such as 'layer[34]'",
        group=_OPTIM,
        metavar="REGEX",
        default_text="none",
    )
    compile: bool = option(
        False, "compile the model by torch.compile before the first step (needs a C++ compiler)", group=_OPTIM
    )
    checkpoint_modules: str | None = option(
        None,
        "compute the activations of modules again in the backward pass, to need less memory: a regular expression for their "
        "whole names, such as 'layer[34]'",
        group=_OPTIM,
        metavar="REGEX",
        default_text="none",
    )
    checkpoint_policy: str = option(
        "full",
        "what --checkpoint-modules computes again: full (everything), selective (all but matrix products, convolutions and "
        "attention)",
        group=_OPTIM,
        choices=("full", "selective"),
    )

    backend: str = option(
        "auto",
        "what moves the gradients: auto (what fits the launcher), auto:RUN (what hvdtrain bench engines --out RUN found the fastest), "
        "local, torch, mpi, horovod, or one that another package registers",
        group=_DISTRIBUTED,
        metavar="NAME",
    )
    device: str = option(
        "auto",
        "auto (a GPU per rank where there is one), cpu, cuda, or cuda:N",
        group=_DISTRIBUTED,
        metavar="DEVICE",
    )
    data_parallel: bool = option(
        False, "several GPUs in one process by nn.DataParallel (backend local)", group=_DISTRIBUTED
    )
    process_group: str = option(
        "auto",
        "torch's process group: auto (nccl on GPUs, gloo on CPUs), nccl, gloo (backend torch)",
        group=_DISTRIBUTED,
        choices=("auto", "nccl", "gloo"),
    )
    find_unused_parameters: bool = option(
        False, "the model does not use every parameter in every step", group=_DISTRIBUTED
    )
    static_graph: bool = option(
        False, "the model uses the same parameters in every step: less bookkeeping", group=_DISTRIBUTED
    )
    bucket_mb: float | None = option(
        None,
        "gradients are exchanged in buckets of this size, in MiB",
        group=_DISTRIBUTED,
        metavar="MIB",
        above=0,
        at_most=2**20,
        default_text="25, and 4 with backend horovod",
    )
    reduce_dtype: str = option(
        "auto",
        "type in which gradients travel: each its own (auto), fp32, or in half the bytes bf16 or fp16; they are the parameters' "
        "type again when they are clipped and used",
        group=_DISTRIBUTED,
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    compression: str = option(
        "none",
        f"for slow networks, send less of the gradients: {', '.join(FORMS)}, or one of your own by import path, with ,after=N once N were "
        "exchanged as they are; with --sync of what is exchanged then (docs/slow_networks.md)",
        group=_DISTRIBUTED,
        metavar="NAME[:NUMBER][,after=N]",
    )
    sync: str = option(
        "every-step",
        f"for slow networks, exchange weights every so many steps instead of gradients in each: {', '.join(SYNC_FORMS)}; "
        ",delay=STEPS and ,fragments=NUMBER may follow (docs/slow_networks.md)",
        group=_DISTRIBUTED,
        metavar="NAME[:STEPS[,...]]",
    )
    sync_group: str = option(
        "none",
        "with --sync or --compression: inside each node, or each so many ranks that follow one another, gradients are exchanged in every "
        "step and as they are; groups send less to each other",
        group=_DISTRIBUTED,
        metavar="none|node|RANKS",
    )
    all_reduce: str = option(
        "auto",
        "algorithm of all-reduces: ring, tree, rabenseifner, hierarchical (within each node first), where the engine has "
        "it (docs/performance.md)",
        group=_DISTRIBUTED,
        choices=("auto", "ring", "tree", "rabenseifner", "hierarchical"),
    )
    sync_batch_norm: bool = option(
        False, "batch normalisation over the whole global batch instead of each rank's share", group=_DISTRIBUTED
    )
    horovod: HorovodConfig = option(HorovodConfig(), "settings of Horovod", group=HOROVOD_GROUP)
    timeout: float = option(
        600.0,
        "longest wait for another rank, in seconds, or with a unit: 90s, 5m, 2h",
        group=_DISTRIBUTED,
        metavar="SECONDS",
        above=0,
        at_most=MOST_SECONDS,
        duration=True,
    )

    run_dir: str | None = option(
        None,
        "folder of config.yaml, metrics.jsonl, summary.json and checkpoints",
        group=_RUN,
        metavar="DIR",
        default_text="a new folder under runs/",
    )
    resume: str = option(
        "auto",
        "auto (go on from the newest checkpoint in --run-dir, if there is one), never, or the path of a checkpoint",
        group=_RUN,
        metavar="auto|never|PATH",
    )
    checkpoint_every: int = option(
        0,
        "steps between checkpoints, besides the one after each epoch; 0 for none besides",
        group=_RUN,
        metavar="STEPS",
        at_least=0,
    )
    checkpoint_minutes: float | None = option(
        None,
        "minutes of wall time after a checkpoint until the next, besides the others",
        group=_RUN,
        metavar="X",
        above=0,
        default_text="none by time",
    )
    checkpoint_async: bool = option(
        False,
        "write checkpoints while training goes on: only the copy to host memory is waited for, and twice that memory is needed",
        group=_RUN,
    )
    checkpoint_url: str | None = option(
        None,
        "copy each checkpoint to this folder too, and bring the newest back from there if --run-dir has lost it: s3://, gs://, "
        "file:// and what else fsspec knows, one run each",
        group=_RUN,
        metavar="URL",
        default_text="nowhere else",
    )
    keep: int = option(3, "newest checkpoints to keep", group=_RUN, metavar="N", at_least=1)
    eval_every: int = option(
        1, "epochs between evaluations; the last epoch always ends with one", group=_RUN, metavar="EPOCHS", at_least=1
    )
    logger: str = option(
        "auto",
        "experiment trackers besides the run's own files: none, or some of tensorboard, wandb, mlflow with commas between; auto is "
        "tensorboard where it is installed",
        group=_RUN,
        metavar="NAMES",
    )
    log_every: int = option(10, "steps between lines of metrics.jsonl", group=_RUN, metavar="STEPS", at_least=1)
    profile: str | None = option(
        None,
        "profile these optimizer steps on every rank, the first and the last one, as in 10:20; into profile/ of the run's folder "
        "(docs/observing.md)",
        group=_RUN,
        metavar="FIRST:LAST",
        default_text="none",
    )
    seed: int = option(
        0, "seed of weights, data order and augmentation", group=_RUN, metavar="N", at_least=0, at_most=2**32 - 1
    )
    deterministic: bool = option(
        False, "deterministic algorithms only: reruns agree bit for bit, some run slower", group=_RUN
    )
    on_nan: str = option(
        "stop",
        "when the loss is NaN or infinite: stop on all ranks, or skip the step on all ranks",
        group=_RUN,
        choices=("stop", "skip"),
    )

    def __post_init__(self) -> None:
        settle(self)
        self._check_pairs()
        if self.task is None:
            object.__setattr__(self, "model", self.model or DEFAULT_MODEL)
            object.__setattr__(self, "data", self.data or DEFAULT_DATA)
        if self.batch_size is None and self.global_batch_size is None:
            object.__setattr__(self, "batch_size", DEFAULT_BATCH_SIZE)
        _check_backend(self.backend)
        if self.logger not in ("auto", "none"):
            trackers_of(self.logger)
        if not _DEVICE.fullmatch(self.device):
            guess = did_you_mean(self.device, ("auto", "cpu", "cuda", "cuda:0"))
            raise ConfigError(f"--device must be auto, cpu, cuda or cuda:N, got {shown(self.device)}{guess}")

    def _check_pairs(self) -> None:
        if self.batch_size is not None and self.global_batch_size is not None:
            raise ConfigError(
                f"--batch-size {self.batch_size} (per rank) and --global-batch-size {self.global_batch_size} (all "
                "ranks) exclude each other; give one"
            )
        if self.scale_lr and self.global_batch_size is not None:
            raise ConfigError(
                "--scale-lr and --global-batch-size exclude each other: the learning rate is scaled because each "
                "rank adds samples to the batch, and with --global-batch-size none does; give --batch-size instead"
            )
        for name, value in (("model", self.model), ("data", self.data)):
            if self.task is not None and value is not None:
                raise ConfigError(
                    f"--task {self.task.name} brings its own {name}, so --{name} {value.name} would have no effect; "
                    f"leave one out (arguments for the task: --task.NAME VALUE)"
                )
        steps_of(self.profile)
        self._check_warmup()
        self._check_reduce_dtype()
        self._check_compression()
        self._check_sync()
        less = sync_of(self.sync) is not None or self.compression not in ("none", *TYPES)
        if group_of(self.sync_group, "--sync-group") is not None and not less:
            raise ConfigError(
                f"--sync-group {self.sync_group} says inside which groups of ranks nothing is sent less, and nothing is said to be: give "
                "--sync or --compression too, fp16 and bf16 excepted, or leave it out"
            )
        if self.checkpoint_url is not None and not re.fullmatch(r"\w[\w+.:-]*://.+", self.checkpoint_url):
            raise ConfigError(
                f"--checkpoint-url {self.checkpoint_url} is no URL, such as s3://bucket/run; a folder is file:///path, and "
                "--run-dir alone suffices for one that stays"
            )
        if self.checkpoint_url is not None and re.match(r"[^/]*//[^/@]*:[^/@]*@", self.checkpoint_url):
            shown = re.sub(r"//[^/@]*@", "//...@", self.checkpoint_url, count=1)
            raise ConfigError(
                f"--checkpoint-url {shown} holds a password, which everybody would read in the run folder's config.yaml and in "
                "the process list; give it as the file system's own variables or fsspec's configuration files do"
            )
        if self.data_parallel and self.backend not in ("auto", "local"):
            raise ConfigError(
                f"--data-parallel is one process with several GPUs, which --backend {self.backend} is not; "
                "use --backend local, or leave --data-parallel out"
            )
        if self.process_group == "nccl" and self.device == "cpu":
            raise ConfigError("--process-group nccl needs GPUs, got --device cpu; use --process-group gloo")
        if self.process_group != "auto" and self.backend in ("local", "mpi", "horovod"):
            raise ConfigError(
                f"--process-group {self.process_group} is for --backend torch, got --backend {self.backend}; "
                "leave --process-group out"
            )
        if self.horovod != HorovodConfig() and self.backend in ("local", "torch", "mpi"):
            raise ConfigError(
                f"--horovod.* settings are for --backend horovod, got --backend {self.backend}; leave them out"
            )

    def _check_reduce_dtype(self) -> None:
        if self.reduce_dtype == "auto":
            return
        if self.precision == "fp64":
            raise ConfigError(
                f"--reduce-dtype {self.reduce_dtype} and --precision fp64 exclude each other: gradients would lose what fp64 is for; "
                "leave one out"
            )
        self.horovod.check_reduce_dtype(f"--reduce-dtype {self.reduce_dtype}", bf16=self.reduce_dtype == "bf16")

    def _check_sync(self) -> None:
        if sync_of(self.sync, "--sync") is None:
            return
        asked = f"--sync {self.sync}"
        others = {
            f"--compression {self.compression}": self.compression in TYPES,
            f"--reduce-dtype {self.reduce_dtype}": self.reduce_dtype != "auto",
            "--shard-optimizer": self.shard_optimizer,
            "--on-nan skip": self.on_nan == "skip",
            f"--precision {self.precision}": self.precision in ("fp16", "bf16-pure"),
            "--data-parallel": self.data_parallel,
        }
        named = [flag for flag, given in others.items() if given]
        if named:
            raise ConfigError(
                f"{asked} does not go with {', '.join(named)} (docs/slow_networks.md); leave one of them out"
            )
        self.horovod.check_exchange(asked)

    def _check_compression(self) -> None:
        if self.compression == "none":
            return
        asked = f"--compression {self.compression}"
        name, _, _ = parsed(self.compression, "--compression")
        if self.reduce_dtype != "auto":
            raise ConfigError(
                f"{asked} and --reduce-dtype {self.reduce_dtype} both say as what gradients travel; give one of them"
            )
        if name in TYPES and self.precision == "fp64":
            raise ConfigError(
                f"{asked} and --precision fp64 exclude each other: gradients would lose what fp64 is for; leave one out"
            )
        self.horovod.check_exchange(asked)

    def _check_warmup(self) -> None:
        if self.warmup_epochs and self.warmup_steps is not None:
            raise ConfigError(
                f"--warmup-epochs {self.warmup_epochs:g} and --warmup-steps {self.warmup_steps} exclude each other; "
                "give one"
            )
        if self.epochs and self.warmup_epochs > self.epochs:
            raise ConfigError(
                f"--warmup-epochs {self.warmup_epochs:g} is more than --epochs {self.epochs}; the learning rate "
                "would never be reached"
            )
        if self.max_steps is not None and (self.warmup_steps or 0) > self.max_steps:
            raise ConfigError(
                f"--warmup-steps {self.warmup_steps} is more than --max-steps {self.max_steps}; the learning rate "
                "would never be reached"
            )


def trackers_of(text: str) -> list[str]:
    """The experiment trackers that ``--logger`` names.

    Raises:
        ConfigError: There is no such tracker, or one is named twice.
    """
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(
                f"--logger {shown(text)}: {shown(name)} is none of auto, none, {', '.join(TRACKERS)}{did_you_mean(name, TRACKERS)}"
            )
        if names.count(name) > 1:
            raise ConfigError(f"--logger {shown(text)} names {name} twice")
    return names


def _check_backend(name: str) -> None:
    """Refuses a name that nobody registered; no :class:`ConfigError`, since what is installed may differ by host."""
    if name == "auto:":
        raise ConfigError(
            "--backend auto: names no RUN; give what hvdtrain bench engines --out RUN has written, or auto"
        )
    if name in BACKENDS or name.startswith("auto:"):
        return
    from importlib import metadata  # noqa: PLC0415  (20 ms that only other packages' backends need)

    known = (*BACKENDS, *sorted(entry.name for entry in metadata.entry_points(group=BACKEND_GROUP)))
    if name not in known:
        raise BackendUnavailable(f"--backend must be {one_of(known)}, got {shown(name)}{did_you_mean(name, known)}")
