"""The conformance suite: what every backend must do, run by pytest on real ranks.

::

    torchrun --nproc-per-node 3 -m hvdtrain.testing --backend torch
    python -m hvdtrain.testing --backend local

A third-party backend passes when this does at 1, 2, 3 and 4 ranks.
"""
