"""How a run is seen: a progress line, JSON lines, and a summary."""
