"""``--shard-modules``: a run that is cut over the ranks goes on whole, and the other way round, on other engines."""

from __future__ import annotations

import json

from launching import HOROVOD_MPIRUN, LOCAL, MPI, TORCH, Launch, missing, run
from safetensors.torch import load_file

RUN = ("--model", "mlp", "--precision", "fp64", "--global-batch-size", "64", "--epochs", "2", "--schedule", "constant", "--clip-norm", "1")  # fmt: skip
CUT = ("--shard-modules", "[135]")


def train(launch: Launch, ranks: int, folder, *flags: str, code: int = 0) -> str:
    argv = launch.argv(ranks, "-m", "hvdtrain", "--backend", launch.backend, "--run-dir", str(folder), *RUN, *flags)
    ended = run(argv)
    assert ended.code == code, ended.output
    return ended.output


def newest(folder):
    return load_file(max((folder / "checkpoints").glob("step-*")) / "model.safetensors")


def test_a_run_moves_between_engines_cut_and_whole(tmp_path):
    train(LOCAL, 1, tmp_path / "whole", "--max-steps", "30")
    moved = tmp_path / "moved"
    train(TORCH, 2, moved, *CUT, "--max-steps", "10")
    train(HOROVOD_MPIRUN if not missing("mpirun", "horovod") else LOCAL, 1, moved, "--max-steps", "20")
    train(MPI, 3, moved, *CUT, "--max-steps", "30")
    ends = [json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "whole", moved)]
    for name in ("train_loss", "eval_loss", "eval_accuracy", "parameters", "parameters_norm"):
        assert abs(ends[0][name] - ends[1][name]) < 1e-12
    whole, cut = newest(tmp_path / "whole"), newest(moved)
    assert whole.keys() == cut.keys()
    assert max(float((cut[name] - value).abs().max()) for name, value in whole.items()) < 1e-12


def test_what_does_not_go_with_it_leaves_no_folder(tmp_path):
    output = train(LOCAL, 1, tmp_path / "run", *CUT, "--reduce-dtype", "bf16", "--precision", "fp32", code=2)
    assert "--shard-modules) and reduce_dtype= (--reduce-dtype) exclude each other" in output
    assert not (tmp_path / "run").exists()


MODEL = """
from torch import nn

class Picky(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 10)

    def forward(self, x):
        return self.inner(x.view(len(x), -1))
"""


def test_a_rank_without_samples_whose_model_takes_no_empty_batch_says_what_to_do(tmp_path):
    (tmp_path / "picky.py").write_text(MODEL)
    flags = ["--model", "picky:Picky", "--shard-modules", "inner", "--global-batch-size", "2", "--max-steps", "800", "--epochs", "1"]  # fmt: skip
    argv = TORCH.argv(3, "-m", "hvdtrain", "--backend", "torch", "--run-dir", str(tmp_path / "run"), *flags)
    ended = run(argv, PYTHONPATH=f"{tmp_path}")
    assert ended.code != 0
    assert "this rank has no sample of a batch" in ended.output
    assert "--last-batch merge" in ended.output
