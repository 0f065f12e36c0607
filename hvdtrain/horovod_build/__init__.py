"""Builds Horovod for the torch that is installed: `hvdtrain install-horovod`.

`probe` looks at the machine, `plan` decides, `source` fetches Horovod, `edits` changes the few lines that no longer fit,
`compiling` runs the build, `wheels` keeps what it made, `installing` puts it into this environment and tries it on two
ranks. Nothing here is used while training, and nothing here imports torch or horovod, except `trial`, which the two
ranks run.
"""
