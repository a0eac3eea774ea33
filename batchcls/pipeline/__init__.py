"""A manifest's rows through the cluster, in one of two shapes. Nothing else knows Ray's tasks and actors.

fused   one pool of actors, each of which does all of a fragment's way: nodes without a GPU
staged  Ray Data: load tasks -> predict actors -> write tasks, for GPUs fed by the CPUs of many nodes

Both run the same loader, predictor and writer. Each stage has a module of its own, and this one
imports none of them: a worker process imports what it runs and no more, which is most of a job's
start-up on a small machine.
"""
