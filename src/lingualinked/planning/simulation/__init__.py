"""Run a workload through a pipeline in simulation.

Knows seconds and servers; where the seconds come from is a plan's business.
"""
