"""The plan in force, and the way to another one."""
