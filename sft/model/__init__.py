"""The model: loading, adapters, padding-free attention, CUDA graphs, compiled and quantised layers."""
