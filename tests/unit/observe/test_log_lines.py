"""Log lines name the rank and the host that they come from."""

from __future__ import annotations

import logging
import subprocess
import sys

from hvdtrain.observe.log_lines import line_format
from hvdtrain.topology import Topology


def said(topology: Topology | None, host: str = "node-a") -> str:
    record = logging.LogRecord("hvdtrain.run", logging.WARNING, __file__, 1, "the disk is %s", ("full",), None)
    return logging.Formatter(line_format(topology, host)).format(record)


def test_a_line_names_rank_and_host_where_there_are_several():
    several = Topology(rank=3, world_size=4, local_rank=1, local_world_size=2, node_rank=1, num_nodes=2)
    assert said(several) == "WARNING rank 3 on node-a hvdtrain.run: the disk is full"
    assert said(several, "100%s") == "WARNING rank 3 on 100%s hvdtrain.run: the disk is full"


def test_one_process_and_one_that_is_not_known_name_none():
    alone = Topology(rank=0, world_size=1, local_rank=0, local_world_size=1, node_rank=0, num_nodes=1)
    assert said(alone) == said(None) == "WARNING hvdtrain.run: the disk is full"


def test_a_logging_that_somebody_has_set_up_stays():
    code = (
        "import logging; logging.basicConfig(format='mine %(message)s')\n"
        "from hvdtrain.observe.log_lines import configure\n"
        "configure(None, 'h'); logging.getLogger('x').warning('text')"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stderr == "mine text\n"
