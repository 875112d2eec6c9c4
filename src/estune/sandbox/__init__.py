"""Python code that a model wrote, run in a process without rights."""
