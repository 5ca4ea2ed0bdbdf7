"""The systems that are measured beside this one."""
