"""Nodes of a Ray cluster: which a job uses, which the autoscaler can start, and which join or leave."""
