"""``hvdtrain verify``: a few steps of a task in one process and on several ranks of each engine, compared.

`watching` notes what a run does (data, losses, gradients, buffers, parameters) while the ordinary loop runs it; `rank` is what
each process runs; `comparing` reads the notes and names the first difference and its likely cause.
"""
