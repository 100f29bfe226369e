"""Running a workload through a pipeline on paper.

Knows seconds and servers; where the seconds come from is a plan's business.
"""
