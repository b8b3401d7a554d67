"""Many images: decoded in parallel processes, classified in batches, written so that a killed run can resume."""
