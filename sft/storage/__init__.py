"""Files that are whole or absent: atomic writes, JSON lines, the cache folder."""
