"""Behind ``tools/profile_throughput.py``: a module for each subcommand, and what they share."""
