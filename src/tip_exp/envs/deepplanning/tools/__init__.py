"""The benchmark's tools, offline: JSON calls in, the official answers out, byte for byte."""
