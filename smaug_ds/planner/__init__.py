"""What a run will cost before it is started: arithmetic only, from the run config and a description of the cluster."""
