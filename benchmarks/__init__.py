"""Throughput and memory benchmarks, as pytest."""
