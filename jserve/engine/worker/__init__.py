"""The engine process: its job, its loop's thread, its session server."""
