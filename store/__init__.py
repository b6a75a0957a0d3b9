"""The ground floor: what flows between roles, and the file that keeps it."""
