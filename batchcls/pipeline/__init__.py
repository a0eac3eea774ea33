"""Distributed execution of a run on Ray, as one of two graphs.

fragment  (`--shape fused`) one pool of actors, each of which loads, predicts and writes whole fragments;
          for nodes without a GPU
ray_data  (`--shape staged`) Ray Data: load tasks -> predict actors -> write tasks; for GPUs that are fed
          by the CPUs of many nodes

Both graphs run the same loader, predictor and writer. This package imports none of its modules: a worker
process imports only what it runs, because imports dominate the start-up time of a small job.
"""
