"""Ops on every backend: a file each, or a folder with dispatch, reference, backends and cases."""
