"""Settings: their schema, rules, provenance and what they come to. Imports neither torch nor transformers."""
