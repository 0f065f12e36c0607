"""How processes were started: from the environment to a `Topology`. Standard library only; starts nothing itself."""
