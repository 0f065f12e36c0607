"""The `horovod` backend: real Horovod, driven through its collectives.

Of Horovod this uses the engine (negotiation by name, fusion, MPI, Gloo and NCCL inside) and not
`horovod.torch.DistributedOptimizer`, whose wrapper replaces the user's optimizer, fills unused gradients with zeros,
knows no micro-batches of varying number, and exchanges before a closure runs. The gradients leave from hooks of our own
(`HookedReplica`), so that everything promised in `Replica` holds here as on every engine.

`backend` puts the parts together. This module itself imports nothing: `stamp` must be readable where there is no Horovod.
"""
