"""One rank of the conformance suite; see `hvdtrain.testing`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from hvdtrain.launch.detect import detect

try:
    import pytest
except ImportError as missing:
    raise SystemExit(f"hvdtrain.testing needs pytest ({missing}); pip install 'hvdtrain[testing]'") from missing


def main() -> int:
    """Run the suite on this rank; other arguments are pytest's."""
    parser = argparse.ArgumentParser(prog="hvdtrain.testing")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--log-dir", type=Path, help="folder for each rank's output; the terminal otherwise")
    parser.add_argument("--record", type=Path, help="file for what passed (see hvdtrain.testing.features)")
    parser.add_argument("--sample", type=int, help="of each test with parameters run this many of them at most")
    parser.add_argument("--brief", action="store_true", help="of each test that takes long run some of its parameters")
    known, others = parser.parse_known_args()
    if known.sample is not None and known.sample < 1:
        parser.error("--sample needs a number of at least 1")
    if known.log_dir is not None:
        known.log_dir.mkdir(parents=True, exist_ok=True)
        log = os.open(known.log_dir / f"rank{detect().topology.rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
    suite = Path(__file__).with_name("conformance")
    # -x: a rank whose test failed ends, and its end ends the others, who may be waiting for it.
    options = ["-x", "-p", "hvdtrain.testing.plugin", "-p", "no:cacheprovider", "-W", "error", "--rootdir", str(suite)]
    options += ["-W", "ignore:`torch.cpu.amp.autocast:FutureWarning"]  # torch 2.4's checkpointing calls it itself
    options += [
        "-W",
        "ignore:unclosed scandir iterator:ResourceWarning",
    ]  # pytest's, of temporary folders that ranks share
    options += ["-p", "no:hypothesispytest"]  # its summary would load all of hypothesis on every rank
    options += ["-p", "no:logging"]  # it would add itself to each of torch's loggers six times a test; see `logged`
    chosen = [f"--hvdtrain-backend={known.backend}", f"--hvdtrain-device={known.device}"]
    if known.record is not None:
        chosen.append(f"--hvdtrain-record={known.record.absolute()}")
    if known.sample is not None:
        chosen.append(f"--hvdtrain-sample={known.sample}")
    if known.brief:
        chosen.append("--hvdtrain-brief")
    return int(pytest.main([str(suite), *options, *chosen, *others]))


if __name__ == "__main__":
    sys.exit(main())
