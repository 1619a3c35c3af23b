"""Ours beside a peer: whole processes on the same machine and files. See `harness`, `peers`, `shapes`."""
