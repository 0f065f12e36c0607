"""A /dev/shm that is too small for loader processes is refused with what to do, and only then."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
from torch.utils.data import TensorDataset

from hvdtrain.data.shared_memory import check_shared_memory
from hvdtrain.errors import ConfigError


class Drawing(torch.utils.data.Dataset):
    def __len__(self):
        return 10**6

    def __getitem__(self, index):
        return {"image": torch.rand(3, 2**10, 2**10), "label": index, "jitter": random.random()}


def test_batches_that_fit_pass_and_no_random_number_is_drawn():
    torch.manual_seed(3)
    random.seed(3)
    check_shared_memory(Drawing(), batch_size=1, workers=1, ranks=1)
    drawn = torch.rand(1), random.random()
    torch.manual_seed(3)
    random.seed(3)
    assert drawn == (torch.rand(1), random.random())


def test_batches_that_do_not_fit_are_refused_with_the_sizes_and_the_remedies():
    with pytest.raises(
        ConfigError, match=r"--workers 4: .*4 ranks .* x 4 processes x 2 batches of 4096 samples.*--shm-size 1537g"
    ):
        check_shared_memory(Drawing(), batch_size=4096, workers=4, ranks=4)


def test_batches_ahead_are_counted():
    with pytest.raises(ConfigError, match=r"x 7 batches of 4096 samples"):
        check_shared_memory(Drawing(), batch_size=4096, workers=4, ranks=4, prefetch_factor=7)


def test_no_processes_no_folder_and_no_samples_need_nothing():
    check_shared_memory(Drawing(), batch_size=10**9, workers=0, ranks=1)
    check_shared_memory(Drawing(), batch_size=10**9, workers=1, ranks=1, folder="/nowhere")
    check_shared_memory(TensorDataset(torch.zeros(0, 2)), batch_size=10**9, workers=1, ranks=1)


def test_the_main_job_refuses_before_training(tmp_path):
    flags = ["--data", "synthetic", "--data.shape", "[3, 512, 512]", "--data.samples", "32", "--workers", "1000"]
    ended = subprocess.run(
        [sys.executable, "-m", "hvdtrain", "--backend", "local", "--run-dir", str(tmp_path), *flags],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert "--shm-size" in ended.stderr
    assert "step" not in ended.stdout
