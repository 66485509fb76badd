"""How weights leave: out of a run's ZeRO files, into a folder that loads with one line."""
