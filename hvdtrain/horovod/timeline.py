"""A trace of what this rank's operations waited for and did, for chrome://tracing or https://ui.perfetto.dev.

Each name has a lane. An event of the category "negotiate" lasts from the call until all ranks have asked for the same, one of
the category "operation" from there to the result.
"""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

from hvdtrain.errors import OutputError
from hvdtrain.horovod.state import job
