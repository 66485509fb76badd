"""Behind ``tools/plan_run.py``: what a plan reads, tells and writes."""
