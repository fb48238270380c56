"""Time and memory of the package beside other implementations, measured in interleaved runs; CSVs in results/bench/."""
