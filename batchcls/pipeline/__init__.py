"""The Ray Data graph: load tasks -> predict actors -> write tasks. The one room that knows ray.data.

Each stage has a module of its own, and this one imports none of them: a worker process imports the
module of its stage and no more, which is most of a job's start-up on a small machine.
"""
