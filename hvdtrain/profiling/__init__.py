"""``--profile``: what some steps of a run are made of.

`recording` is what each rank records, `trace` puts the ranks' events on one clock, `verdict` says what binds the step, and
`profiler` is the callback that does all this.
"""
