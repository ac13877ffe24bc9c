"""Completions: decoding and samples."""
