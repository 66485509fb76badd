"""From corpus files to device batches: index, order, decode, augment."""
