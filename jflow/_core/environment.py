"""What processes that `jflow launch` starts find in their environment; without JAX, for the command
line."""

COORDINATOR, COUNT, INDEX = "JFLOW_COORDINATOR", "JFLOW_PROCESSES", "JFLOW_PROCESS"
