"""The HTTP server of one head."""
