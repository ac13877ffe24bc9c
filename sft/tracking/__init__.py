"""Where curves and samples are sent."""
